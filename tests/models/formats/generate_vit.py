"""Make the ViT family's cases with the original projects' own modules.

DINO, iBOT, MAE, DeiT, BEiT, Feature Distillation, DINOv2 and DINOv3.

    python tests/models/formats/generate_vit.py CHECKOUTS [--only NAME ...] [--check]

CHECKOUTS holds one folder for each project of `PROJECTS` (a git checkout, or its files and a file
`COMMIT`), and in `timm` the version that most of them were written for:
`pip install --no-deps --target CHECKOUTS/timm timm==0.3.2`. Nothing of theirs is copied here; what
today's PyTorch and NumPy no longer have is put in their place while they run (`shims`).

The other sizes of a case are the same checkpoint in the original module built for that size. Its
position embeddings and tables of relative positions are resampled by Pillow's antialiased bicubic
filter, the prefix's rows kept, and its index buffers are the new module's own. The projects' own
interpolation is not used: each does it differently (DINO and DINOv2 without antialiasing and by a
scale factor that is slightly off, BEiT by a spline over geometric distances), and here only one
rule is to be held to, by an implementation that is neither ours nor PyTorch's.

`--check` writes nothing: every stored case is saved as a file, loaded into the original module
again, and its answers compared.
"""

from __future__ import annotations

import argparse
import collections.abc
import importlib
import json
import subprocess
import sys
import tempfile
import types
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity import CASES, Answer, Case, images
from PIL import Image
from torch import Tensor, nn

Tree = dict[str, Any]
State = dict[str, Tensor]

PROJECTS = {
    "dino": "facebookresearch/dino",
    "ibot": "bytedance/ibot",
    "mae": "facebookresearch/mae",
    "deit": "facebookresearch/deit",
    "unilm": "microsoft/unilm",
    "feature-distillation": "SwinTransformer/Feature-Distillation",
    "dinov2": "facebookresearch/dinov2",
    "dinov3": "facebookresearch/dinov3",
}
WITHOUT_TIMM = ("dino", "dinov2", "dinov3")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
WIDE = {"embed_dim": 128, "num_heads": 2}
NARROW = {"embed_dim": 64, "num_heads": 1}


@dataclass(frozen=True)
class Recipe:
    """How a case is made.

    Attributes:
        name, format, title, file, prefix: facts of the case.
        project: the folder of the checkout.
        files: what is used of it.
        build: the original module for an image size.
        wrap: its state dict as the project saves it; other values may stand beside tensors.
        pick: the module's state dict, of a checkpoint.
        run: the module's answer to normalised images.
        sizes: image sizes, the checkpoint's own first.
        patch: pixels of a patch.
        exact: ends of the names of tensors that are stored, not filled; integers always are.
        normalisation: mean and standard deviation.
    """

    name: str
    format: str
    title: str
    file: str
    prefix: tuple[str, ...]
    project: str
    files: tuple[str, ...]
    build: Callable[[int], nn.Module]
    run: Callable[[nn.Module, Tensor], Answer]
    wrap: Callable[[State], Tree] = dict
    pick: Callable[[Tree], State] = dict
    sizes: tuple[int, ...] = (64, 96)
    patch: int = 16
    exact: tuple[str, ...] = ()
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


# --- the originals ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkouts:
    folder: Path

    def module(self, project: str, name: str) -> types.ModuleType:
        """A module of a project, `name` as the project itself imports it."""
        return _imported(self.folder, project, name)

    def commit(self, project: str) -> str:
        folder = self.folder / project
        if (folder / ".git").exists():
            command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
            return subprocess.run(
                command, check=True, capture_output=True, text=True
            ).stdout.strip()
        return (folder / "COMMIT").read_text().strip()


@cache
def _imported(folder: Path, project: str, name: str) -> types.ModuleType:
    roots = [folder / project]
    if project == "unilm":
        roots = [folder / project / "beit"]
    if project not in WITHOUT_TIMM:
        roots.append(folder / "timm")
    with _alone(roots):
        return importlib.import_module(name)


@contextmanager
def _alone(roots: list[Path]) -> Iterator[None]:
    """Import from these folders first, and forget the modules after: many are called `utils`."""
    path = list(sys.path)
    sys.path[:0] = [str(root) for root in roots]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and any(Path(file).is_relative_to(root) for root in roots):
                del sys.modules[name]


def shims() -> None:
    """What the projects expect of their time's PyTorch and NumPy."""
    six = types.ModuleType("torch._six")
    six.container_abcs = collections.abc  # type: ignore[attr-defined]
    sys.modules["torch._six"] = six
    vars(np).setdefault("float", float)
    warnings.simplefilter("ignore")


# --- answers ------------------------------------------------------------------------------------


def answer(tokens: Tensor, prefix: int, pooled: Tensor | None, logits: Tensor | None) -> Answer:
    """Tokens (B, P + h * w, C) of a square map as an answer."""
    batch, count, width = tokens.shape
    side = round((count - prefix) ** 0.5)
    map_ = tokens[:, prefix:].transpose(1, 2).reshape(batch, width, side, side)
    parts = (map_, tokens[:, :prefix], pooled, logits)
    return Answer(*(None if part is None else part.contiguous().numpy() for part in parts))


@contextmanager
def output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the layer puts out while the context lasts."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def cls_model(model: nn.Module, x: Tensor) -> Answer:
    """A model whose output is the CLS token after its norm."""
    with output_of(model.norm) as seen:
        pooled = model(x)
    return answer(seen[0], 1, pooled, None)


def cls_classifier(model: nn.Module, x: Tensor) -> Answer:
    """A classifier of the CLS token after its norm."""
    with output_of(model.norm) as seen:
        logits = model(x)
    return answer(seen[0], 1, seen[0][:, 0], logits)


def mean_classifier(model: nn.Module, x: Tensor) -> Answer:
    """A classifier of the patch tokens' mean, normed after; here the tokens are normed, too."""
    with output_of(model.blocks[-1]) as seen, output_of(model.fc_norm) as pooled:
        logits = model(x)
    return answer(model.fc_norm(seen[0]), 1, pooled[0], logits)


def distilled_classifier(model: nn.Module, x: Tensor) -> Answer:
    with output_of(model.norm) as seen:
        logits = model(x)
    return answer(seen[0], 2, None, logits)


def mae_encoder(model: nn.Module, x: Tensor) -> Answer:
    """The encoder of a masked autoencoder on all patches, none masked and none moved."""
    model.random_masking = lambda tokens, _ratio: (tokens, None, None)
    tokens, _, _ = model.forward_encoder(x, 0.0)
    return answer(tokens, 1, tokens[:, 0], None)


def beit_encoder(model: nn.Module, x: Tensor) -> Answer:
    """A BeiT of masked image modelling, with no patch masked."""
    masked = torch.zeros(len(x), model.patch_embed.num_patches, dtype=torch.bool)
    return answer(model.forward_features(x, masked), 1, None, None)


def token_encoder(model: nn.Module, x: Tensor) -> Answer:
    """A model that puts out all its tokens."""
    return answer(model(x), 1, None, None)


def dino_features(registers: str, model: nn.Module, x: Tensor) -> Answer:
    """DINOv2 and DINOv3, which name their parts; the registers' name differs."""
    parts = model.forward_features(x)
    cls = parts["x_norm_clstoken"]
    tokens = torch.cat([cls[:, None], parts[registers], parts["x_norm_patchtokens"]], 1)
    return answer(tokens, 1 + parts[registers].shape[1], cls, None)


# --- other sizes --------------------------------------------------------------------------------


def carried(state: State, model: nn.Module, grid: int) -> State:
    """A checkpoint's state dict for a model of another image size; `grid` is the checkpoint's."""
    out = {}
    for key, new in model.state_dict().items():
        old = state[key]
        if old.shape == new.shape:
            out[key] = old
        elif key.endswith("relative_position_index"):
            out[key] = new
        elif key.endswith("relative_position_bias_table"):
            kept = len(old) - (2 * grid - 1) ** 2
            side = round((len(new) - kept) ** 0.5)
            out[key] = torch.cat([resampled(old[: len(old) - kept], side), old[len(old) - kept :]])
        elif key.endswith("pos_embed"):
            kept = old.shape[1] - grid**2
            side = round((new.shape[1] - kept) ** 0.5)
            out[key] = torch.cat([old[:, :kept], resampled(old[0, kept:], side)[None]], 1)
        else:
            raise ValueError(f"{key}: {tuple(old.shape)} does not fit {tuple(new.shape)}")
    if extra := state.keys() - out.keys():
        raise ValueError(f"the module lacks {sorted(extra)}")
    return out


def resampled(rows: Tensor, side: int) -> Tensor:
    """(h * h, C) rows of a square grid as (side * side, C), by Pillow's bicubic filter."""
    old = round(len(rows) ** 0.5)
    planes = rows.T.reshape(-1, old, old).numpy()
    new = [Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC) for p in planes]
    return torch.from_numpy(np.stack([np.asarray(p) for p in new])).reshape(-1, side * side).T


# --- cases --------------------------------------------------------------------------------------


def recipes(originals: Checkouts) -> Iterator[Recipe]:
    makers = {
        "dino": _dino,
        "ibot": _ibot,
        "mae": _mae,
        "deit": _deit,
        "unilm": _beit,
        "feature-distillation": _feature_distillation,
        "dinov2": _dinov2,
        "dinov3": _dinov3,
    }
    for project, cases in makers.items():
        if (originals.folder / project).is_dir():
            yield from cases(originals)
        else:
            print(f"left out, because there is no checkout of it: {project}")


def _dino(originals: Checkouts) -> Iterator[Recipe]:
    vits = originals.module("dino", "vision_transformer")
    wrapper = originals.module("dino", "utils").MultiCropWrapper

    def build(size: int, patch: int = 16, **shape: int) -> nn.Module:
        return vits.VisionTransformer(
            img_size=[size],
            patch_size=patch,
            depth=2,
            qkv_bias=True,
            norm_layer=LAYER_NORM,
            **shape,
        )

    def training(_state: State) -> Tree:
        head = vits.DINOHead(128, 48, hidden_dim=64, bottleneck_dim=32)
        teacher = wrapper(build(64, **WIDE), head).state_dict()
        return {
            "student": {f"module.{key}": value for key, value in teacher.items()},
            "teacher": dict(teacher),
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 400,
            "args": Namespace(
                arch="vit_base",
                patch_size=16,
                out_dim=48,
                norm_last_layer=True,
                use_bn_in_head=False,
                use_fp16=False,
                epochs=400,
                lr=0.00075,
                optimizer="adamw",
                drop_path_rate=0.1,
                global_crops_scale=[0.25, 1.0],
                local_crops_number=10,
                data_path="/path/to/imagenet/train/",
                dist_url="env://",
            ),
            "dino_loss": {"center": torch.zeros(1, 48)},
        }

    facts = {"format": "dino", "prefix": ("cls",), "project": "dino", "run": cls_model}
    yield Recipe(
        name="dino-backbone",
        title="DINO: the backbone alone",
        file="dino_vitbase16_pretrain.pth",
        files=("vision_transformer.py",),
        build=partial(build, **WIDE),
        **facts,
    )
    yield Recipe(
        name="dino-patch8",
        title="DINO: the backbone alone, patches of 8 pixels",
        file="dino_vitbase8_pretrain.pth",
        files=("vision_transformer.py",),
        build=partial(build, patch=8, **NARROW),
        sizes=(32, 48),
        patch=8,
        **facts,
    )
    yield Recipe(
        name="dino-full",
        title="DINO: a training checkpoint, of which the teacher counts",
        file="dino_vitbase16_pretrain_full_checkpoint.pth",
        files=("main_dino.py", "utils.py", "vision_transformer.py"),
        build=partial(build, **WIDE),
        wrap=training,
        pick=lambda tree: _below(tree["teacher"], "backbone."),
        **facts,
    )


def _ibot(originals: Checkouts) -> Iterator[Recipe]:
    vits = originals.module("ibot", "models.vision_transformer")
    wrapper = originals.module("ibot", "utils").MultiCropWrapper
    heads = originals.module("ibot", "models.head")

    def build(size: int, masked: bool = False, **shape: int) -> nn.Module:
        return vits.VisionTransformer(
            img_size=[size], depth=2, qkv_bias=True, masked_im_modeling=masked, **shape
        )

    def training(_state: State) -> Tree:
        def whole(student: bool) -> State:
            head = heads.iBOTHead(
                64, 48, patch_out_dim=48, hidden_dim=64, bottleneck_dim=32, shared_head=not student
            )
            return wrapper(build(64, student, **NARROW), head).state_dict()

        return {
            "student": {f"module.{key}": value for key, value in whole(True).items()},
            "teacher": dict(whole(False)),
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 400,
            "args": Namespace(
                arch="vit_base",
                patch_size=16,
                window_size=7,
                out_dim=48,
                patch_out_dim=48,
                shared_head=False,
                shared_head_teacher=True,
                norm_in_head=None,
                act_in_head="gelu",
                use_masked_im_modeling=True,
                pred_ratio=[0.0, 0.3],
                pred_shape="block",
                use_fp16=True,
                epochs=400,
                lr=0.00075,
                optimizer="adamw",
            ),
            "ibot_loss": {"center": torch.zeros(1, 48), "center2": torch.zeros(1, 1, 48)},
            "fp16_scaler": _scaler(),
        }

    facts = {"format": "ibot", "prefix": ("cls",), "project": "ibot", "run": cls_model}
    yield Recipe(
        name="ibot",
        title="iBOT: a training checkpoint, of which the teacher counts",
        file="checkpoint.pth",
        files=("main_ibot.py", "utils.py", "models/head.py", "models/vision_transformer.py"),
        build=partial(build, **NARROW),
        wrap=training,
        pick=lambda tree: _below(tree["teacher"], "backbone."),
        **facts,
    )
    yield Recipe(
        name="ibot-backbone",
        title="iBOT: the teacher's backbone, extracted",
        file="checkpoint_teacher.pth",
        files=("extract_backbone_weights.py", "models/vision_transformer.py"),
        build=partial(build, **WIDE),
        wrap=lambda state: {"state_dict": state},
        pick=lambda tree: tree["state_dict"],
        **facts,
    )


def _mae(originals: Checkouts) -> Iterator[Recipe]:
    autoencoders = originals.module("mae", "models_mae")
    vits = originals.module("mae", "models_vit")

    def autoencoder(size: int, **shape: int) -> nn.Module:
        return autoencoders.MaskedAutoencoderViT(
            img_size=size,
            depth=2,
            decoder_embed_dim=64,
            decoder_depth=1,
            decoder_num_heads=2,
            norm_layer=LAYER_NORM,
            **shape,
        )

    def vit(size: int, classes: int, pool: bool, **shape: int) -> nn.Module:
        return vits.VisionTransformer(
            global_pool=pool,
            img_size=size,
            patch_size=16,
            num_classes=classes,
            depth=2,
            qkv_bias=True,
            norm_layer=LAYER_NORM,
            **shape,
        )

    def training(state: State) -> Tree:
        return {
            "model": state,
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 799,
            "scaler": _scaler(),
            "args": Namespace(
                batch_size=64,
                epochs=800,
                accum_iter=1,
                model="mae_vit_base_patch16",
                input_size=224,
                mask_ratio=0.75,
                norm_pix_loss=True,
                output_dir="./output_dir",
                lr=0.0024,
            ),
        }

    def encoder(_state: State) -> Tree:
        state = autoencoder(64, **NARROW).state_dict()
        drop = ("mask_token", "decoder_")
        return {"model": {k: v for k, v in state.items() if not k.startswith(drop)}}

    facts = {"format": "mae", "prefix": ("cls",), "project": "mae", "pick": _model}
    yield Recipe(
        name="mae-pretrain",
        title="MAE: a training checkpoint, encoder and decoder",
        file="checkpoint-799.pth",
        files=("models_mae.py", "util/misc.py", "util/pos_embed.py"),
        build=partial(autoencoder, **WIDE),
        wrap=training,
        run=mae_encoder,
        exact=("pos_embed",),
        **facts,
    )
    yield Recipe(
        name="mae-encoder",
        title="MAE: the encoder alone",
        file="mae_pretrain_vit_base.pth",
        files=("models_mae.py", "models_vit.py", "util/pos_embed.py"),
        build=partial(vit, classes=0, pool=False, **NARROW),
        wrap=encoder,
        run=cls_model,
        exact=("pos_embed",),
        **facts,
    )
    yield Recipe(
        name="mae-finetuned",
        title="MAE: fine-tuned, a classifier of the patches' mean",
        file="mae_finetuned_vit_base.pth",
        files=("models_vit.py",),
        build=partial(vit, classes=5, pool=True, **NARROW),
        wrap=_as_model,
        run=mean_classifier,
        **facts,
    )


def _deit(originals: Checkouts) -> Iterator[Recipe]:
    models = originals.module("deit", "models")

    def build(size: int, kind: str, **shape: int) -> nn.Module:
        return getattr(models, kind)(
            img_size=size,
            patch_size=16,
            num_classes=5,
            depth=2,
            qkv_bias=True,
            norm_layer=LAYER_NORM,
            **shape,
        )

    facts = {
        "format": "deit",
        "project": "deit",
        "files": ("models.py",),
        "wrap": _as_model,
        "pick": _model,
    }
    yield Recipe(
        name="deit",
        title="DeiT: a classifier",
        file="deit_base_patch16_224-b5f2ef4d.pth",
        prefix=("cls",),
        build=partial(build, kind="VisionTransformer", **NARROW),
        run=cls_classifier,
        **facts,
    )
    yield Recipe(
        name="deit-distilled",
        title="DeiT: a classifier with a distillation token and two heads",
        file="deit_base_distilled_patch16_224-df68dfff.pth",
        prefix=("cls", "dist"),
        build=partial(build, kind="DistilledVisionTransformer", **WIDE),
        run=distilled_classifier,
        **facts,
    )


def _beit(originals: Checkouts) -> Iterator[Recipe]:
    pretraining = originals.module("unilm", "modeling_pretrain")
    finetuning = originals.module("unilm", "modeling_finetune")
    shared = {"qkv_bias": True, "norm_layer": LAYER_NORM, "init_values": 0.1}

    def pretrained(size: int) -> nn.Module:
        return pretraining.VisionTransformerForMaskedImageModeling(
            img_size=size,
            vocab_size=32,
            depth=2,
            use_abs_pos_emb=False,
            use_shared_rel_pos_bias=True,
            **shared,
            **WIDE,
        )

    def finetuned(size: int, pool: bool, **shape: int) -> nn.Module:
        return finetuning.VisionTransformer(
            img_size=size,
            num_classes=5,
            use_abs_pos_emb=False,
            use_rel_pos_bias=True,
            use_mean_pooling=pool,
            **shared,
            **shape,
        )

    facts = {
        "format": "beit",
        "prefix": ("cls",),
        "project": "unilm",
        "wrap": _as_model,
        "pick": _model,
        "normalisation": HALF,
    }
    yield Recipe(
        name="beit-pretrain",
        title="BEiT: masked image modelling, one table of relative positions for all layers",
        file="beit_base_patch16_224_pt22k.pth",
        files=("beit/modeling_pretrain.py", "beit/modeling_finetune.py"),
        build=pretrained,
        run=beit_encoder,
        sizes=(64, 96, 48),
        **facts,
    )
    yield Recipe(
        name="beit-finetuned",
        title="BEiT: fine-tuned, a classifier of the patches' mean",
        file="beit_base_patch16_224_pt22k_ft22kto1k.pth",
        files=("beit/modeling_finetune.py",),
        build=partial(finetuned, pool=True, depth=3, **WIDE),
        run=mean_classifier,
        **facts,
    )
    yield Recipe(
        name="beit-finetuned-cls",
        title="BEiT: fine-tuned, a classifier of the CLS token",
        file="checkpoint-best.pth",
        files=("beit/modeling_finetune.py",),
        build=partial(finetuned, pool=False, depth=2, **NARROW),
        run=cls_classifier,
        **facts,
    )


def _feature_distillation(originals: Checkouts) -> Iterator[Recipe]:
    models = originals.module("feature-distillation", "models.build")
    names = models.build_fd.__globals__
    teacher = names["load_dino"].__globals__["WarpperVisionTransformer"]
    # in place of one that is downloaded
    names["load_dino"] = lambda _name: teacher(img_size=64, num_classes=0, depth=1, **NARROW)

    def config(size: int, depth: int, shared: bool, classes: int, **shape: int) -> Namespace:
        vit = Namespace(
            PATCH_SIZE=16,
            IN_CHANS=3,
            EMBED_DIM=shape["embed_dim"],
            DEPTH=depth,
            NUM_HEADS=shape["num_heads"],
            MLP_RATIO=4,
            QKV_BIAS=True,
            INIT_VALUES=0.1,
            USE_APE=False,
            USE_RPB=not shared,
            USE_SHARED_RPB=shared,
            USE_MEAN_POOLING=not shared,
            WITH_CLS_TOKEN=True,
        )
        return Namespace(
            DATA=Namespace(IMG_SIZE=size),
            MODEL=Namespace(
                TYPE="vit", VIT=vit, NUM_CLASSES=classes, DROP_RATE=0.0, DROP_PATH_RATE=0.0
            ),
            DEV=Namespace(
                PRED_FEAT="DINO",
                PRED_FEAT_AFTERNORM=True,
                PRED_FEAT_S3=False,
                VIT_WITHKBIAS=False,
            ),
            TRAIN=Namespace(USE_CHECKPOINT=False),
        )

    def distilled(size: int) -> nn.Module:
        return models.build_fd(config(size, 3, True, 0, **WIDE))

    def encoder(size: int) -> nn.Module:
        return distilled(size).encoder

    def finetuned(size: int) -> nn.Module:
        return models.build_vit(config(size, 2, False, 5, **NARROW))

    def saved(epoch: int, accuracy: float, state: State) -> Tree:
        return {
            "model": state,
            "optimizer": {"state": {}, "param_groups": []},
            "lr_scheduler": {"t_initial": 375300, "lr_min": 5e-6, "warmup_t": 12510},
            "scaler": _scaler(),
            "max_accuracy": accuracy,
            "epoch": epoch,
            "config": None,  # a yacs.config.CfgNode in real files
        }

    facts = {"prefix": ("cls",), "project": "feature-distillation", "format": "fd"}
    yield Recipe(
        name="fd-vit-pretrain",
        title="Feature Distillation: a ViT student with its decoder and its teacher",
        file="ckpt_epoch_299.pth",
        files=("models/feature_distillation.py", "models/vision_transformer.py", "utils.py"),
        build=encoder,
        wrap=lambda _state: saved(299, 0.0, distilled(64).state_dict()),
        pick=lambda tree: _below(tree["model"], "encoder."),
        run=token_encoder,
        **facts,
    )
    yield Recipe(
        name="fd-vit-finetuned",
        title="Feature Distillation: the student fine-tuned, a classifier of the patches' mean",
        file="ckpt_epoch_99.pth",
        files=("models/vision_transformer.py", "utils.py"),
        build=finetuned,
        wrap=partial(saved, 99, 83.8),
        pick=_model,
        run=mean_classifier,
        **facts,
    )


def _dinov2(originals: Checkouts) -> Iterator[Recipe]:
    vits = originals.module("dinov2", "dinov2.models.vision_transformer")

    def build(size: int, registers: int = 0, ffn: str = "mlp", **shape: int) -> nn.Module:
        return vits.DinoVisionTransformer(
            img_size=size,
            patch_size=14,
            depth=2,
            init_values=1.0,
            ffn_layer=ffn,
            block_chunks=0,
            num_register_tokens=registers,
            **shape,
        )

    facts = {
        "format": "dinov2",
        "project": "dinov2",
        "files": ("dinov2/hub/backbones.py", "dinov2/models/vision_transformer.py"),
        "run": partial(dino_features, "x_norm_regtokens"),
        "patch": 14,
    }
    yield Recipe(
        name="dinov2",
        title="DINOv2",
        file="dinov2_vitb14_pretrain.pth",
        prefix=("cls",),
        build=partial(build, **WIDE),
        sizes=(56, 84, 42),
        **facts,
    )
    yield Recipe(
        name="dinov2-registers",
        title="DINOv2 with registers",
        file="dinov2_vitb14_reg4_pretrain.pth",
        prefix=("cls", *_registers(4)),
        build=partial(build, registers=4, **NARROW),
        sizes=(56, 84),
        **facts,
    )
    yield Recipe(
        name="dinov2-swiglu",
        title="DINOv2 with SwiGLU, as its giant",
        file="dinov2_vitg14_pretrain.pth",
        prefix=("cls",),
        build=partial(build, ffn="swiglufused", **NARROW),
        sizes=(56, 84),
        **facts,
    )


def _dinov3(originals: Checkouts) -> Iterator[Recipe]:
    vits = originals.module("dinov3", "dinov3.models.vision_transformer")

    def build(size: int, rounded: bool, **options: Any) -> nn.Module:
        model = vits.DinoVisionTransformer(
            img_size=size,
            patch_size=16,
            pos_embed_rope_base=100,
            pos_embed_rope_normalize_coords="separate",
            pos_embed_rope_rescale_coords=2,
            pos_embed_rope_dtype="fp32",
            embed_dim=128,
            depth=2,
            layerscale_init=1e-5,
            norm_layer="layernormbf16",
            n_storage_tokens=4,
            mask_k_bias=True,
            **options,
        )
        model.init_weights()
        if rounded:  # trained in bfloat16, and so released
            periods = model.rope_embed.periods
            periods.copy_(periods.bfloat16().float())
        return model

    facts = {
        "format": "dinov3",
        "prefix": ("cls", *_registers(4)),
        "project": "dinov3",
        "files": ("dinov3/hub/backbones.py", "dinov3/models/vision_transformer.py"),
        "run": partial(dino_features, "x_storage_tokens"),
        "exact": ("rope_embed.periods", "bias_mask"),
    }
    yield Recipe(
        name="dinov3",
        title="DINOv3, its rotary periods rounded to bfloat16 as in the released files",
        file="dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
        build=partial(build, rounded=True, num_heads=2),
        **facts,
    )
    yield Recipe(
        name="dinov3-7b",
        title="DINOv3 as its 7B: SwiGLU, wide heads, no qkv bias, a norm for local crops",
        file="dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth",
        build=partial(
            build,
            rounded=False,
            num_heads=1,
            ffn_ratio=3,
            qkv_bias=False,
            ffn_layer="swiglu64",
            untie_global_and_local_cls_norm=True,
        ),
        **facts,
    )


def _registers(count: int) -> tuple[str, ...]:
    return tuple(f"reg{i + 1}" for i in range(count))


def _as_model(state: State) -> Tree:
    return {"model": state}


def _model(tree: Tree) -> State:
    return tree["model"]


def _below(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _scaler() -> Tree:
    return {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }


# --- writing ------------------------------------------------------------------------------------


def described(value: Any, exact: tuple[str, ...], arrays: dict[str, np.ndarray], *path: str) -> Any:
    """A checkpoint as `parity` reads it; tensors that are not random go to `arrays`."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or (exact and path[-1].endswith(exact)):
            arrays["tensor/" + "/".join(path)] = value.numpy()
            return "exact"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, Namespace):
        return {"!namespace": vars(value)}
    if isinstance(value, Mapping) and _has_tensors(value):
        return {k: described(v, exact, arrays, *path, k) for k, v in value.items()}
    return {"!value": value}


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(v) for v in value.values())
    return isinstance(value, Tensor)


def answers(recipe: Recipe, tree: Tree) -> dict[str, np.ndarray]:
    """The original module's answers, with a checkpoint's weights, by their names in the npz."""
    state = recipe.pick(tree)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in recipe.normalisation)
    out = {}
    for size in recipe.sizes:
        model = recipe.build(size).eval()
        if size == recipe.sizes[0]:
            model.load_state_dict(state)
        else:
            model.load_state_dict(carried(state, model, recipe.sizes[0] // recipe.patch))
        found = recipe.run(model, (images(size) - mean) / std)
        out |= {f"{size}/{k}": v for k, v in vars(found).items() if v is not None}
    return out


def generate(recipe: Recipe, originals: Checkouts) -> None:
    arrays: dict[str, np.ndarray] = {}
    torch.manual_seed(0)
    tree = recipe.wrap(recipe.build(recipe.sizes[0]).state_dict())
    source = {
        "repository": PROJECTS[recipe.project],
        "commit": originals.commit(recipe.project),
        "files": list(recipe.files),
    }
    if recipe.project not in WITHOUT_TIMM:
        source["timm"] = originals.module("deit", "timm").__version__
    facts = {
        "format": recipe.format,
        "title": recipe.title,
        "source": source,
        "file": recipe.file,
        "mean": list(recipe.normalisation[0]),
        "std": list(recipe.normalisation[1]),
        "prefix": list(recipe.prefix),
        "sizes": list(recipe.sizes),
        "checkpoint": described(tree, recipe.exact, arrays),
    }
    arrays |= answers(recipe, Case(recipe.name, facts, arrays).tree())
    CASES.mkdir(exist_ok=True)
    (CASES / f"{recipe.name}.json").write_text(_compact(facts) + "\n")
    np.savez_compressed(CASES / f"{recipe.name}.npz", **arrays)


def _compact(facts: dict[str, Any]) -> str:
    """JSON with a line for every key, and lists in one line."""
    lists: list[str] = []

    def hide(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: hide(v) for k, v in value.items()}
        if isinstance(value, list):
            lists.append(json.dumps(value))
            return f"!list {len(lists) - 1}!"
        return value

    text = json.dumps(hide(facts), indent=1)
    for index, item in enumerate(lists):
        text = text.replace(f'"!list {index}!"', item)
    return text


def check(recipe: Recipe) -> None:
    case = Case.read(recipe.name)
    with tempfile.TemporaryDirectory() as folder:
        tree = torch.load(case.write(Path(folder)), weights_only=False)
    found = answers(recipe, tree)
    stored = {k: v for k, v in case.arrays.items() if not k.startswith("tensor/")}
    if found.keys() != stored.keys():
        raise SystemExit(f"{recipe.name}: {sorted(found.keys() ^ stored.keys())}")
    for key, value in found.items():
        np.testing.assert_allclose(value, stored[key], rtol=1e-4, atol=1e-4, err_msg=recipe.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the ViT family's cases.")
    parser.add_argument("checkouts", type=Path, help="folder of the original projects")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases alone")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    args = parser.parse_args()
    shims()
    originals = Checkouts(args.checkouts.resolve())
    with torch.no_grad():
        for recipe in recipes(originals):
            if args.only and recipe.name not in args.only:
                continue
            if args.check:
                check(recipe)
            else:
                generate(recipe, originals)
            sizes = sum(f.stat().st_size for f in CASES.glob(f"{recipe.name}.*"))
            print(f"{recipe.name}: {sizes / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

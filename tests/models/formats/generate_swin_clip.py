"""Make the cases of Swin and CLIP checkpoints with the original projects' own modules.

    python tests/models/formats/generate_swin_clip.py CHECKOUTS [NAME ...]
    python tests/models/formats/generate_swin_clip.py CHECKOUTS --check

CHECKOUTS is a folder with checkouts of the projects:

    esvit                   github.com/microsoft/esvit
    swin                    github.com/microsoft/Swin-Transformer
    feature-distillation    github.com/SwinTransformer/Feature-Distillation
    clip                    github.com/openai/CLIP
    open_clip               github.com/mlfoundations/open_clip

A checkout without `.git` has its commit in a file `COMMIT`. The projects need `yacs`, `einops`,
`ftfy` and `regex`, which this package does not.

Every model is built by the project's own builder, from its own configuration with small sizes put
in, and takes the weights that `parity.fill` makes for its checkpoint. Images are normalised with
the project's mean and standard deviation, or those of its published weights.

A second image size tests what a reader does with positions. None of the projects' (or torch's)
interpolation is used for the answers: absolute positions and relative bias tables are resized as
images, by Pillow's bicubic filter, and set into the original module built at that size. Where a
stage keeps its window, nothing is resized and only the masks differ. EsViT at 256 pixels has maps
that its windows do not fill, and with a window of 14 a last stage whose window grows.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from parity import CASES, Answer, Case, images, shapes_hash

State = dict[str, Tensor]
Pair = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET: Pair = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CLASSES = 5
# tensors that follow from the model's sizes and must not be random
EXACT = {
    "relative_position_index",
    "relative_coords_table",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
}

COMPUTED = ("attn_mask", "relative_position_index", "relative_coords_table")

# --- the projects -------------------------------------------------------------------------------


class Checkouts:
    """The original projects' modules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def commit(self, project: str) -> str:
        folder = self.folder / project
        if (folder / ".git").exists():
            command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
            return subprocess.run(
                command, check=True, capture_output=True, text=True
            ).stdout.strip()
        return (folder / "COMMIT").read_text().strip()

    @cache  # noqa: B019
    def load(self, project: str, name: str, root: str = "") -> ModuleType:
        """Import a project's module.

        Projects share names (`models`, `config`), so a project's modules are forgotten once
        imported. Its outermost package is not run, only found: it may import what is not needed.
        """
        folder = self.folder / project / root
        before = dict(sys.modules)
        outermost, _, rest = name.partition(".")
        sys.path.insert(0, str(folder))
        try:
            if rest:
                package = ModuleType(outermost)
                package.__path__ = [str(folder / outermost)]
                sys.modules[outermost] = package
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module(name)
        finally:
            sys.path.remove(str(folder))
            for key, module in list(sys.modules.items()):
                if (
                    str(getattr(module, "__file__", None)).startswith(str(folder))
                    or key == outermost
                ):
                    sys.modules.pop(key)
            sys.modules.update({key: before[key] for key in (outermost,) if key in before})


@dataclass(frozen=True)
class Recipe:
    """How a case is made.

    Attributes:
        checkpoint: What the project saves, from modules with any weights.
        weights: The module's state dict, out of what was saved.
        build: The module at an image size.
        answer: What a module says of normalised images.
        positions: The weight that holds absolute positions, and how many come before the grid's.
        alternatives: Other state dicts in the file, of which only the pooled answer is kept, as
            `NAME/SIZE/pooled`.
        archive: The file's bytes, if it is not the checkpoint saved by `torch.save`.
    """

    name: str
    format: str
    title: str
    project: str
    files: tuple[str, ...]
    file: str
    pixels: Pair
    prefix: tuple[str, ...]
    sizes: tuple[int, ...]
    checkpoint: Callable[[], dict[str, Any]]
    weights: Callable[[dict[str, Any]], State]
    build: Callable[[int], nn.Module]
    answer: Callable[[nn.Module, Tensor], Answer]
    positions: tuple[str, int] | None = None
    alternatives: dict[str, Callable[[dict[str, Any]], State]] = field(default_factory=dict)
    archive: Callable[[State], bytes] | None = None

    @torch.no_grad()
    def ask(self, weights: State, size: int) -> Answer:
        """The original module's answer with these weights."""
        model = self.build(size).eval()
        own = model.state_dict()
        weights = {
            key: value.float() if value.is_floating_point() else value
            for key, value in weights.items()
        }
        if size != self.sizes[0]:
            # these belong to an image size; the module has made its own
            weights = {key: value for key, value in weights.items() if not key.endswith(COMPUTED)}
            if self.positions:
                key, prefix = self.positions
                weights[key] = resize(weights[key], own[key].shape, prefix)
            for key, value in weights.items():
                if key.endswith("relative_position_bias_table"):
                    weights[key] = resize(value, own[key].shape, 0)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or any(not key.endswith(COMPUTED) for key in missing):
            raise ValueError(f"{self.name}: missing {missing}, unexpected {unexpected}")
        mean, std = (torch.tensor(values)[:, None, None] for values in self.pixels)
        return self.answer(model, (images(size) - mean) / std)


def resize(positions: Tensor, shape: torch.Size, prefix: int) -> Tensor:
    """Positions of another grid, each channel resized as an image."""
    flat, channels = positions.reshape(-1, shape[-1]), shape[-1]
    old, new = (math.isqrt(n - prefix) for n in (len(flat), math.prod(shape) // channels))
    grid = flat[prefix:].reshape(old, old, channels).permute(2, 0, 1).numpy()
    resized = [
        Image.fromarray(plane, "F").resize((new, new), Image.Resampling.BICUBIC) for plane in grid
    ]
    tokens = torch.from_numpy(np.stack([np.asarray(plane) for plane in resized])).flatten(1).T
    return torch.cat([flat[:prefix], tokens]).reshape(shape)


@contextmanager
def observing(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a part of a model while it runs."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda *args: seen.append(args[-1]))
    try:
        yield seen
    finally:
        hook.remove()


def answers(tokens: Tensor, prefix: int, pooled: Tensor, logits: Tensor | None = None) -> Answer:
    side = math.isqrt(tokens.shape[1] - prefix)
    grid = tokens[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    return Answer(
        grid.contiguous().numpy(),
        tokens[:, :prefix].contiguous().numpy(),
        pooled.numpy(),
        None if logits is None else logits.numpy(),
    )


def swin_answer(model: nn.Module, pixels: Tensor) -> Answer:
    with observing(model.norm) as seen:
        out = model(pixels)
    return answers(seen[0], 0, seen[0].mean(1), out if out.shape[1:] == (CLASSES,) else None)


def clip_answer(model: nn.Module, pixels: Tensor) -> Answer:
    with observing(model.visual.transformer) as seen:
        pooled = model.encode_image(pixels)
    tokens = seen[0] if seen[0].shape[0] == len(pixels) else seen[0].transpose(0, 1)
    return answers(model.visual.ln_post(tokens), 1, pooled)


def timm_answer(model: nn.Module, pixels: Tensor) -> Answer:
    with observing(model.visual.trunk.norm) as seen:
        pooled = model.encode_image(pixels)
    return answers(seen[0], model.visual.trunk.num_prefix_tokens, pooled)


def without(prefix: str, state: State) -> State:
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


# --- Swin ---------------------------------------------------------------------------------------


def small(window: int, depths: tuple[int, ...] = (2, 2, 2, 1)) -> dict[str, Any]:
    """A Swin of four stages with heads of 32 channels, as the published ones."""
    return {
        "EMBED_DIM": 32,
        "DEPTHS": list(depths),
        "NUM_HEADS": [1, 2, 4, 8],
        "WINDOW_SIZE": window,
    }


def esvit(made: Checkouts) -> Iterator[Recipe]:
    swin = made.load("esvit", "models.swin_transformer")
    head = made.load("esvit", "models.vision_transformer").DINOHead

    def build(window: int, size: int) -> nn.Module:
        config = made.load("esvit", "config.default")._C.clone()
        recipe = made.folder / "esvit/experiments/imagenet/swin/swin_base_patch4_window14_224.yaml"
        config.merge_from_file(str(recipe))
        config.MODEL.INIT_WEIGHTS = False
        config.MODEL.NUM_CLASSES = 0
        config.TRAIN.IMAGE_SIZE = [size, size]
        sizes = small(window, (1, 2, 2, 1))
        config.MODEL.SPEC.DIM_EMBED = sizes.pop("EMBED_DIM")
        config.MODEL.SPEC.update(sizes)
        return swin.get_cls_model(config)

    def checkpoint(window: int, size: int) -> dict[str, Any]:
        def trained() -> State:
            model = build(window, size)
            model.head = head(model.num_features, 16, hidden_dim=24, bottleneck_dim=8)
            model.head_dense = head(model.num_features, 16, hidden_dim=24, bottleneck_dim=8)
            return model.state_dict()

        return {
            "student": prefixed("module.", trained()),
            "teacher": trained(),
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 300,
            "args": argparse.Namespace(arch="swin_base", out_dim=16, use_dense_prediction=True),
            "dino_loss": {"center": torch.zeros(1, 16), "center_grid": torch.zeros(1, 16)},
            "fp16_scaler": {"scale": 65536.0},
        }

    def backbone(state: State) -> State:
        return {
            key: value
            for key, value in state.items()
            if not key.startswith(("head.", "head_dense."))
        }

    for window, sizes in ((7, (224, 256)), (14, (224, 256)), (3, (96, 192))):
        yield Recipe(
            name=f"esvit-w{window}",
            format="esvit",
            title=f"EsViT's full checkpoint of a Swin with window {window}",
            project="esvit",
            files=(
                "models/swin_transformer.py",
                "models/vision_transformer.py",
                "main_esvit.py",
                "experiments/imagenet/swin/swin_base_patch4_window14_224.yaml",
            ),
            file="checkpoint_best.pth",
            pixels=IMAGENET,
            prefix=(),
            sizes=sizes,
            checkpoint=lambda window=window, size=sizes[0]: checkpoint(window, size),
            weights=lambda tree: backbone(tree["teacher"]),
            alternatives={"student": lambda tree: backbone(without("module.", tree["student"]))},
            build=lambda size, window=window: build(window, size),
            answer=swin_answer,
        )


def microsoft(made: Checkouts) -> Iterator[Recipe]:
    def build(recipe: str, size: int, **sizes: Any) -> nn.Module:
        config = made.load("swin", "config")._C.clone()
        config.merge_from_file(str(made.folder / "swin" / recipe))
        config.DATA.IMG_SIZE = size
        config.MODEL.NUM_CLASSES = CLASSES
        config.MODEL[config.MODEL.TYPE.upper()].update(sizes)
        return made.load("swin", "models.build").build_model(config)

    def recipe(
        name: str, title: str, config: str, sizes: tuple[int, ...], window: int, **args: Any
    ) -> Recipe:
        kind = name.partition("-")[0]
        source = {"swin": "swin_transformer.py", "swinv2": "swin_transformer_v2.py"}[kind]
        config = f"configs/{kind}/{config}"

        def make(size: int) -> nn.Module:
            return build(config, size, **small(window), **args)

        return Recipe(
            name=name,
            format=kind,
            title=title,
            project="swin",
            files=(f"models/{source}", "models/build.py", config),
            file=Path(config).with_suffix(".pth").name,
            pixels=IMAGENET,
            prefix=(),
            sizes=sizes,
            checkpoint=lambda: {"model": make(sizes[0]).state_dict()},
            weights=lambda tree: tree["model"],
            build=make,
            answer=swin_answer,
        )

    yield recipe("swin", "Swin classifier", "swin_tiny_patch4_window7_224.yaml", (96, 192), 3)
    yield recipe(
        "swinv2", "Swin V2 classifier", "swinv2_tiny_patch4_window8_256.yaml", (96, 192), 3
    )
    yield recipe(
        "swinv2-pretrained-window",
        "Swin V2 classifier, fine-tuned with a larger window than it was pre-trained with",
        "swinv2_base_patch4_window12to16_192to256_22kto1k_ft.yaml",
        (128, 256),
        8,
        PRETRAINED_WINDOW_SIZES=[6, 6, 6, 3],
    )


def feature_distillation(made: Checkouts) -> Iterator[Recipe]:
    project = "feature-distillation"
    pretrain = "configs/pretrain/fd_pretrain__esvit_swin_base__img224__300ep.yaml"
    finetune = "configs/finetune/fd_finetune__esvit_swin_base__img224__300ep.yaml"
    fd = made.load(project, "models.feature_distillation")
    v2 = made.load(project, "models.swin_transformer_v2")
    teacher = made.load(project, "models.esvit").WarpperSwinTransformer

    def settings(recipe: str, size: int, **sizes: Any) -> Any:
        config = made.load(project, "config")._C.clone()
        config.merge_from_file(str(made.folder / project / recipe))
        config.DATA.IMG_SIZE = size
        config.MODEL.NUM_CLASSES = CLASSES
        config.MODEL.SWIN.update(sizes)
        return config

    def distilled(size: int, **sizes: Any) -> nn.Module:
        # a small teacher in the place of the downloaded one
        shape = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
        fd.load_esvit = lambda *_, **__: teacher(img_size=96, window_size=3, num_classes=0, **shape)
        return fd.build_fd(settings(pretrain, size, **sizes))

    def saved(model: nn.Module) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": {},
            "lr_scheduler": {},
            "scaler": {},
            "max_accuracy": 0.0,
            "epoch": 1,
            "config": None,
        }

    def recipe(
        name: str, title: str, sizes: tuple[int, ...], make: Callable[[int], nn.Module], **rest: Any
    ) -> Recipe:
        common = {
            "format": "fd-swin",
            "project": project,
            "file": "ckpt_epoch_1.pth",
            "pixels": IMAGENET,
            "prefix": (),
            "checkpoint": lambda: saved(make(sizes[0])),
            "build": make,
            "answer": swin_answer,
        }
        return Recipe(name=name, title=title, sizes=sizes, **(common | rest))

    yield recipe(
        "fd-swin-pretrain",
        "Feature distillation's pre-training checkpoint: student, frozen EsViT teacher, decoder",
        (96, 192),
        lambda size: distilled(size, **small(6)).encoder,
        checkpoint=lambda: saved(distilled(96, **small(6))),
        weights=lambda tree: without("encoder.", tree["model"]),
        files=(
            "models/feature_distillation.py",
            "models/swin_transformer_v2.py",
            "models/esvit.py",
            pretrain,
        ),
    )
    yield recipe(
        "fd-swin-finetuned",
        "A distilled Swin V2, fine-tuned",
        (96, 192),
        lambda size: v2.build_swin_v2(settings(finetune, size, **small(3))),
        weights=lambda tree: tree["model"],
        files=("models/swin_transformer_v2.py", finetune),
    )
    yield recipe(
        "fd-swin-shared-bias",
        "Feature distillation's pre-training checkpoint, position bias shared by a stage's blocks",
        (96, 192),
        lambda size: distilled(size, **small(3), USE_SHARED_RPB=True).encoder,
        checkpoint=lambda: saved(distilled(96, **small(3), USE_SHARED_RPB=True)),
        weights=lambda tree: without("encoder.", tree["model"]),
        files=("models/feature_distillation.py", "models/swin_transformer_v2.py", pretrain),
    )

    def extra_norm(size: int) -> nn.Module:
        return v2.SwinTransformerV2(
            img_size=size,
            num_classes=CLASSES,
            embed_dim=32,
            depths=[2, 2, 2, 1],
            num_heads=[1, 2, 4, 8],
            window_size=3,
            endnorm_interval=2,
        )

    yield recipe(
        "fd-swin-extra-norm",
        "Swin V2 with a further norm after every second block",
        (96, 192),
        extra_norm,
        weights=lambda tree: tree["model"],
        files=("models/swin_transformer_v2.py",),
    )


# --- CLIP ---------------------------------------------------------------------------------------


def clip(made: Checkouts) -> Iterator[Recipe]:
    module = made.load("clip", "clip.model")
    normalize = made.load("clip", "clip.clip")._transform(32).transforms[-1]

    def build(size: int, width: int) -> nn.Module:
        return module.CLIP(
            embed_dim=32,
            image_resolution=size,
            vision_layers=2,
            vision_width=width,
            vision_patch_size=8,
            context_length=8,
            vocab_size=32,
            transformer_width=16,
            transformer_heads=1,
            transformer_layers=1,
        )

    def halved(width: int) -> State:
        model = build(32, width)
        module.convert_weights(model)
        return model.state_dict()

    def recipe(name: str, title: str, width: int, **rest: Any) -> Recipe:
        common = {
            "format": "clip",
            "project": "clip",
            "files": ("clip/model.py", "clip/clip.py"),
            "file": "ViT-B-32.pt",
            "pixels": (tuple(normalize.mean), tuple(normalize.std)),
            "prefix": ("cls",),
            "sizes": (32, 48),
            "checkpoint": lambda: halved(width),
            "weights": lambda tree: tree,
            "build": lambda size: build(size, width),
            "answer": clip_answer,
            "positions": ("visual.positional_embedding", 1),
        }
        return Recipe(name=name, title=title, **(common | rest))

    scalars = {"input_resolution": 32, "context_length": 8, "vocab_size": 32}

    def archive(state: State) -> bytes:
        """The model traced, with whole numbers as buffers, as in the downloads."""
        model = build(32, 64).eval()
        module.convert_weights(model)
        for key in scalars:
            if hasattr(model, key):
                delattr(model, key)
            model.register_buffer(key, torch.tensor(0))
        model.load_state_dict(state)
        inputs = {"encode_image": images(32), "encode_text": torch.zeros(2, 8, dtype=torch.long)}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace_module(model, inputs)
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
        return without_sources(buffer.getvalue())

    yield recipe("clip-state", "CLIP's state dict, in half precision where CLIP is", 128)
    yield recipe(
        "clip-jit",
        "CLIP as downloaded: a traced archive",
        64,
        checkpoint=lambda: (
            halved(64) | {key: torch.tensor(value) for key, value in scalars.items()}
        ),
        weights=lambda tree: {key: value for key, value in tree.items() if key not in scalars},
        archive=archive,
    )


def without_sources(archive: bytes) -> bytes:
    """A traced archive without dates, example inputs, and the map from instructions to sources."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            if not name.endswith(".debug_pkl") and "/traced_inputs" not in name:
                new.writestr(zipfile.ZipInfo(name), old.read(name))
    return out.getvalue()


def open_clip(made: Checkouts) -> Iterator[Recipe]:
    model = made.load("open_clip", "open_clip.model", "src")
    published = made.load("open_clip", "open_clip.pretrained", "src").get_pretrained_cfg
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}

    def pixels(name: str, tag: str) -> Pair:
        config = published(name, tag)
        return tuple(config["mean"]), tuple(config["std"])

    def plain(size: int) -> nn.Module:
        vision = {"image_size": size, "layers": 2, "width": 128, "patch_size": 8}
        return model.CLIP(32, vision, text)

    def timm(size: int, name: str, pool: str, proj: str, custom: bool) -> nn.Module:
        shape = {"img_size": size, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
        vision = {
            "image_size": size,
            "timm_model_name": name,
            "timm_pool": pool,
            "timm_proj": proj,
            "timm_model_kwargs": shape,
        }
        if custom:
            return model.CustomTextCLIP(
                128, vision, text | {"proj_bias": True}, init_logit_bias=-10
            )
        return model.CLIP(32, vision, text)

    def recipe(name: str, title: str, build: Callable[[int], nn.Module], **rest: Any) -> Recipe:
        common = {
            "format": "open-clip",
            "project": "open_clip",
            "files": ("src/open_clip/model.py", "src/open_clip/transformer.py"),
            "file": "open_clip_pytorch_model.bin",
            "pixels": pixels("ViT-B-16", "laion2b_s34b_b88k"),
            "prefix": ("cls",),
            "sizes": (32, 48),
            "checkpoint": lambda: build(32).state_dict(),
            "weights": lambda tree: tree,
            "build": build,
            "answer": clip_answer,
            "positions": ("visual.positional_embedding", 1),
        }
        return Recipe(name=name, title=title, **(common | rest))

    yield recipe("open-clip-gelu", "OpenCLIP's published weights, with plain GELU", plain)
    yield recipe(
        "open-clip-training",
        "OpenCLIP's training checkpoint",
        plain,
        file="epoch_32.pt",
        checkpoint=lambda: {
            "epoch": 32,
            "name": "run",
            "state_dict": prefixed("module.", plain(32).state_dict()),
            "optimizer": {"state": {}, "param_groups": []},
        },
        weights=lambda tree: without("module.", tree["state_dict"]),
    )
    trunk = {
        "files": ("src/open_clip/model.py", "src/open_clip/timm_model.py"),
        "prefix": (),
        "answer": timm_answer,
        "positions": ("visual.trunk.pos_embed", 0),
    }
    yield recipe(
        "open-clip-timm",
        "OpenCLIP's SigLIP: timm's image tower with attention pooling",
        lambda size: timm(size, "vit_base_patch16_siglip_224", "map", "none", True),
        pixels=pixels("ViT-B-16-SigLIP", "webli"),
        **trunk,
    )
    yield recipe(
        "open-clip-timm-linear",
        "OpenCLIP with timm's image tower and a linear head of its own",
        lambda size: timm(size, "vit_medium_patch16_gap_256", "", "linear", False),
        **trunk,
    )


# --- the giant ----------------------------------------------------------------------------------

GIANT = CASES.parent / "swin-v2-g.json"


def giant(made: Checkouts) -> dict[str, Any]:
    """SwinV2-G's weights by the project's own module, without memory for them.

    The sizes are the paper's (Liu et al. 2022): the project has no configuration of it.
    """
    project, file = "feature-distillation", "models/swin_transformer_v2.py"
    v2 = made.load(project, "models.swin_transformer_v2")
    linspace = torch.linspace
    torch.linspace = lambda *args: linspace(*args, device="cpu")  # its `item()` needs numbers
    try:
        with torch.device("meta"):
            model = v2.SwinTransformerV2(
                img_size=256,
                num_classes=0,
                embed_dim=512,
                depths=[2, 2, 42, 4],
                num_heads=[16, 32, 64, 128],
                window_size=8,
                endnorm_interval=6,
            )
    finally:
        torch.linspace = linspace
    weights = dict(model.named_parameters())
    return {
        "source": {
            "repository": REPOSITORIES[project],
            "commit": made.commit(project),
            "files": [file],
        },
        "parameters": sum(p.numel() for p in weights.values()),
        "tensors": len(weights),
        "sha256": shapes_hash(weights),
    }


# --- cases --------------------------------------------------------------------------------------

REPOSITORIES = {
    "esvit": "https://github.com/microsoft/esvit",
    "swin": "https://github.com/microsoft/Swin-Transformer",
    "feature-distillation": "https://github.com/SwinTransformer/Feature-Distillation",
    "clip": "https://github.com/openai/CLIP",
    "open_clip": "https://github.com/mlfoundations/open_clip",
}


def describe(node: Any, arrays: dict[str, np.ndarray], path: tuple[str, ...] = ()) -> Any:
    """A checkpoint as JSON; tensors that cannot be filled go to `arrays`."""
    if isinstance(node, Tensor):
        if path[-1].rpartition(".")[2] in EXACT:
            arrays["tensor/" + "/".join(path)] = node.numpy()
            return "exact"
        return f"{str(node.dtype).removeprefix('torch.')}[{','.join(map(str, node.shape))}]"
    if isinstance(node, argparse.Namespace):
        return {"!namespace": vars(node)}
    if isinstance(node, dict) and any(isinstance(value, Tensor | dict) for value in node.values()):
        return {key: describe(value, arrays, (*path, key)) for key, value in node.items()}
    return {"!value": node}


def make(recipe: Recipe, made: Checkouts) -> Case:
    arrays: dict[str, np.ndarray] = {}
    facts = {
        "format": recipe.format,
        "title": recipe.title,
        "source": {
            "repository": REPOSITORIES[recipe.project],
            "commit": made.commit(recipe.project),
            "files": list(recipe.files),
        },
        "file": recipe.file,
        "mean": list(recipe.pixels[0]),
        "std": list(recipe.pixels[1]),
        "prefix": list(recipe.prefix),
        "sizes": list(recipe.sizes),
        "checkpoint": describe(recipe.checkpoint(), arrays),
    }
    case = Case(recipe.name, facts, arrays)
    tree = case.tree()
    for size in recipe.sizes:
        answer = recipe.ask(recipe.weights(tree), size)
        for key, value in vars(answer).items():
            if value is not None:
                arrays[f"{size}/{key}"] = value
        for name, weights in recipe.alternatives.items():
            arrays[f"{name}/{size}/pooled"] = recipe.ask(weights(tree), size).pooled
    return case


def write(case: Case, archive: bytes | None) -> None:
    CASES.mkdir(exist_ok=True)
    (CASES / f"{case.name}.json").write_text(json.dumps(case.facts, indent=1) + "\n")
    np.savez_compressed(CASES / f"{case.name}.npz", **case.arrays)
    if archive is not None:
        (CASES / f"{case.name}{Path(case.facts['file']).suffix}").write_bytes(archive)


def check(recipe: Recipe) -> float:
    """The written checkpoint in the original module: the largest difference of its answers."""
    case, worst = Case.read(recipe.name), 0.0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = case.write(Path(folder))
        if recipe.archive:
            tree = dict(torch.jit.load(path).state_dict())
        else:
            tree = torch.load(path, weights_only=False)
    for size in case.sizes:
        expected, got = vars(case.answer(size)), vars(recipe.ask(recipe.weights(tree), size))
        for key, value in expected.items():
            if (value is None) != (got[key] is None):
                raise ValueError(f"{recipe.name}: {key} at {size}")
            if value is not None and value.size:
                worst = max(worst, float(np.abs(value - got[key]).max()))
    return worst


PROJECTS = {
    "clip": clip,
    "swin": microsoft,
    "feature-distillation": feature_distillation,
    "esvit": esvit,
    "open_clip": open_clip,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkouts", type=Path)
    parser.add_argument("names", nargs="*", help="cases to make; all, if none is named")
    parser.add_argument("--check", action="store_true", help="compare written cases, write nothing")
    options = parser.parse_args()
    made = Checkouts(options.checkouts)
    giants = (made.folder / "feature-distillation").is_dir()
    if giants and (not options.names or GIANT.stem in options.names):
        if options.check:
            print(f"{GIANT.stem}: {json.loads(GIANT.read_text()) == giant(made)}")
        else:
            GIANT.write_text(json.dumps(giant(made), indent=1) + "\n")
    for folder, recipes in PROJECTS.items():
        if not (made.folder / folder).is_dir():
            print(f"left out, because there is no checkout of it: {folder}")
            continue
        for recipe in recipes(made):
            if options.names and recipe.name not in options.names:
                continue
            if options.check:
                print(f"{recipe.name}: {check(recipe):.1e}")
                continue
            case = make(recipe, made)
            write(case, recipe.archive(case.tree()) if recipe.archive else None)
            size = sum(path.stat().st_size for path in CASES.glob(f"{recipe.name}.*"))
            print(f"{recipe.name}: {size / 1024:.0f} KB")


if __name__ == "__main__":
    main()

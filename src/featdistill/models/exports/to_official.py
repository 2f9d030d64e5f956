"""A checkpoint as feature distillation's own code saves and reads it.

Source: SwinTransformer/Feature-Distillation, utils.py (`save_checkpoint`, `load_pretrained`) and
models/. A student stands under `encoder.`, a fine-tuned classifier by itself.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from featdistill.models.checkpoints.files import read_tree
from featdistill.models.checkpoints.formats import recognise
from featdistill.models.checkpoints.sizes import heads_of
from featdistill.models.checkpoints.spec import Format
from featdistill.models.checkpoints.swins import SWIN_V2
from featdistill.models.checkpoints.tables import Rule, any_matches, convert, revert
from featdistill.models.checkpoints.unwrap import unwrap
from featdistill.models.checkpoints.vits import BEIT
from featdistill.models.exports.common import Outputs, Target, cannot, outputs_of
from featdistill.models.load import load_backbone
from featdistill.models.timm_models import create
from featdistill.models.weights import load_exactly

FILE = "ckpt_featdistill.pth"
_PREFIX = "encoder."
_INSTEAD = "use --to timm, --to plain or --to onnx"


def write(backbone: Backbone, folder: Path) -> list[str]:
    """`{'model': ...}` under the official names, with the buffers that official files have."""
    format_ = _format_of(backbone)
    tensors = _official(backbone, format_)
    prefix = "" if backbone.num_classes else _PREFIX
    tree = {
        "model": {f"{prefix}{name}": value for name, value in tensors.items()},
        "max_accuracy": 0.0,  # beside every official model; by it and `config` the file is known
        "config": None,
    }
    packed = io.BytesIO()  # torch's own writer hides why it cannot write a file
    torch.save(tree, packed)
    (folder / FILE).write_bytes(packed.getbuffer())
    notes = [
        "Read by the official `main_finetune.py --cfg CFG --pretrained FILE`, with this in CFG: "
        f"`{_settings(backbone)}`.",
        "The file has no optimiser: `--resume` has nothing to resume from.",
    ]
    if why := _untold(backbone):
        notes.append(
            f"`featdistill.load_backbone` cannot read it rightly: {why}. For that use --to plain."
        )
    return notes


def _untold(backbone: Backbone) -> str | None:
    """What the file's tensors do not tell of the model, if anything."""
    model: Any = backbone.model
    if not isinstance(model, Beit):
        return None
    tables = sum("bias_table" in name for name in model.state_dict())
    if model.pos_embed is None and not tables:
        return "without positions its tensors do not show the image size"
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    if tables < 2 and heads != heads_of(width):  # several tables that agree show them
        return (
            f"without a bias table in each layer its tensors do not show its {heads} heads, "
            f"which would be {heads_of(width)} by its width"
        )
    return None


def _format_of(backbone: Backbone) -> Format:
    """The official family of a model; everything that it cannot hold is refused here."""
    model = backbone.model
    what = "the official feature-distillation layout"
    if backbone.build is None or not isinstance(model, Beit | SwinTransformerV2):
        raise cannot(
            backbone,
            what,
            f"a {type(model).__name__} is neither a BEiT-style ViT nor a Swin V2",
            _INSTEAD,
        )
    for mine, theirs in zip(backbone.rgb, (IMAGENET_MEAN, IMAGENET_STD), strict=True):
        if any(abs(a - b) > 1e-4 for a, b in zip(mine, theirs, strict=True)):
            raise cannot(
                backbone,
                what,
                f"that code normalises with ImageNet's mean and std, this model with {mine}",
                _INSTEAD,
            )
    if isinstance(model, Beit):
        if backbone.num_classes and model.global_pool != "avg":
            raise cannot(backbone, what, "its classifier pools by the mean of the map", _INSTEAD)
        if not backbone.num_classes and not isinstance(model.norm, torch.nn.LayerNorm):
            raise cannot(backbone, what, "its students end in a norm of every token", _INSTEAD)
        return BEIT
    return SWIN_V2


def _official(backbone: Backbone, format_: Format) -> dict[str, Tensor]:
    """The model's tensors and official buffers under the official names, in the model's order."""
    state = {k: v.detach().clone() for k, v in backbone.model.state_dict().items()}
    reverted = revert(state, format_.rules)
    if reverted.strangers:
        raise cannot(
            backbone,
            "the official feature-distillation layout",
            f"it has no place for {', '.join(reverted.strangers[:4])}",
            _INSTEAD,
        )
    kept = [rule for rule in format_.rules if rule.buffer and rule.source == rule.target]
    return reverted.tensors | {
        name: value.detach().clone()
        for name, value in backbone.model.named_buffers()
        if name not in state and _is_one_of(kept, name)
    }


def _is_one_of(rules: list[Rule], name: str) -> bool:
    return any(any_matches(str(rule.target), [name]) for rule in rules)


def _settings(backbone: Backbone) -> str:
    """The official configuration's words for the model."""
    model: Any = backbone.model
    if isinstance(model, Beit):
        block: Any = model.blocks[0]
        values = {
            "EMBED_DIM": model.embed_dim,
            "DEPTH": len(model.blocks),
            "NUM_HEADS": block.attn.num_heads,
            "MLP_RATIO": block.mlp.fc1.out_features / model.embed_dim,
            # whether there are layer scales; their values are in the file
            "INIT_VALUES": 0.1 if block.gamma_1 is not None else 0.0,
            "PATCH_SIZE": model.patch_embed.patch_size[0],
            "USE_APE": model.pos_embed is not None,
            # its fine-tuning copies a shared bias into each layer
            "USE_RPB": any("bias_table" in name for name in model.state_dict()),
            "USE_SHARED_RPB": False,
            "USE_MEAN_POOLING": True,
        }
        kind, section = "vit", "VIT"
    else:
        mlp: Any = model.layers[0].blocks[0].mlp
        values = {
            "EMBED_DIM": model.embed_dim,
            "MLP_RATIO": mlp.fc1.out_features / mlp.fc1.in_features,
            "DEPTHS": [len(stage.blocks) for stage in model.layers],
            "NUM_HEADS": [stage.blocks[0].attn.num_heads for stage in model.layers],
            "PATCH_SIZE": model.patch_embed.patch_size[0],
            "WINDOW_SIZE": model.layers[0].blocks[0].window_size[0],
        }
        kind, section = "swin_v2", "SWIN"
    inner = ", ".join(f"{key}: {value}" for key, value in values.items())
    size = backbone.image_size[0]
    return f"{{MODEL: {{TYPE: {kind}, {section}: {{{inner}}}}}, DATA: {{IMG_SIZE: {size}}}}}"


def read(backbone: Backbone, folder: Path, images: Tensor) -> tuple[Outputs, Outputs]:
    """What our readers of official files make of it.

    Once with the model's own architecture, which the official configuration tells and the file may
    not; and once as users load the file, if that is said to work.
    """
    unwrapped = unwrap(read_tree(folder / FILE), None, folder / FILE)
    format_ = recognise(unwrapped)
    assert backbone.build is not None
    if format_ is None:
        raise ModelError("the export is not exact: its keys are of no known format")
    converted = convert(unwrapped.tensors, format_.rules)
    model = create(backbone.build.architecture, **backbone.build.arguments)
    load_exactly(
        model,
        format_.finish(converted.tensors),
        what=FILE,
        missing=converted.incomplete,
        strangers=converted.strangers,
    )
    mean, std = backbone.rgb
    again = Backbone(
        model,
        mean=mean,
        std=std,
        image_size=backbone.image_size,
        origin=backbone.origin,
        build=backbone.build,
        class_names=backbone.class_names,
        fixed_size=backbone.fixed_size,
    ).eval()
    theirs, ours = outputs_of(again, images), outputs_of(backbone, images)
    if _untold(backbone) is None:
        loaded = _loaded(backbone, folder / FILE)
        theirs |= {f"{k} (load_backbone)": v for k, v in outputs_of(loaded, images).items()}
        ours |= {f"{k} (load_backbone)": v for k, v in ours.items()}
    return theirs, ours


def _loaded(backbone: Backbone, path: Path) -> Backbone:
    """The file as the snippet loads it."""
    try:
        loaded = load_backbone(str(path), image_size=backbone.image_size[0])
    except ModelError as error:
        raise ModelError(
            f"the export is not exact: featdistill.load_backbone does not read it ({error})",
            fix=_INSTEAD,
        ) from None
    if loaded.image_size != backbone.image_size:
        raise ModelError(
            "the export is not exact: featdistill.load_backbone takes its images for "
            f"{loaded.image_size}",
            expected=str(backbone.image_size),
            fix=_INSTEAD,
        )
    for mine, theirs in zip(backbone.rgb, loaded.rgb, strict=True):
        if any(abs(a - b) > 1e-4 for a, b in zip(mine, theirs, strict=True)):
            raise ModelError(
                f"the export is not exact: featdistill.load_backbone normalises with {theirs}",
                expected=str(mine),
                fix=_INSTEAD,
            )
    return loaded


def snippet(backbone: Backbone, folder: str) -> str:
    """How to read the file."""
    path = f"{folder}/{FILE}"
    tensors = f'tensors = torch.load("{path}", weights_only=True)["model"]'
    if _untold(backbone) is not None:
        return f"import torch\n{tensors}"
    size = backbone.image_size[0]
    return (
        f"import torch, featdistill\n{tensors}\n"
        f'model = featdistill.load_backbone("{path}", image_size={size})'
    )


OFFICIAL = Target(
    name="official",
    title="a checkpoint in the layout of SwinTransformer/Feature-Distillation",
    checked_with="featdistill's reader of official files",
    front=("library_name: pytorch", "tags: [image-feature-extraction, featdistill]"),
    tolerance=1e-5,
    write=write,
    read=read,
    snippet=snippet,
)

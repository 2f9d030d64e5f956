"""A folder that plain timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.core.records import write_json
from featdistill.models.backbone import Backbone
from featdistill.models.checkpoints.settings import EXTENSIONS_KEY, HEAD_KEY, PROJECTION
from featdistill.models.exports.common import Outputs, Target, cannot, state_of
from featdistill.models.extensions import split_arguments


def write(backbone: Backbone, folder: Path) -> list[str]:
    """`config.json` and `model.safetensors`."""
    if backbone.build is None:
        raise cannot(
            backbone,
            "timm",
            "it is not an architecture of timm's",
            "use --to plain or --to onnx, which hold any model",
        )
    _, extensions = split_arguments(backbone.build.arguments)
    if "end_norm_period" in extensions:
        raise cannot(
            backbone,
            "plain timm",
            f"it has a layer norm after every {extensions['end_norm_period']} blocks (SwinV2-G), "
            "and timm's Swin V2 has none",
            "use --to plain, --to onnx or --to official",
        )
    save_file(state_of(backbone.model), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", timm_config(backbone))
    return adaptation_notes(backbone)


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """timm's `config.json`: with every constructor argument, or timm would take its defaults.

    What timm has no word for stands under names of our own, which timm leaves alone.
    """
    assert backbone.build is not None
    mean, std = backbone.rgb
    model = backbone.model
    own, extensions = split_arguments(backbone.build.arguments)
    # timm has it from `pretrained_cfg`, and transformers' wrapper would give it twice
    own.pop("num_classes", None)
    inherited: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    pretrained = {
        "architecture": backbone.build.architecture,
        "tag": "featdistill",
        "custom_load": False,
        "input_size": [3, *backbone.image_size],
        "fixed_input_size": backbone.fixed_size,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": mean,
        "std": std,
        "num_classes": int(getattr(model, "num_classes", 0) or 0),
        "first_conv": inherited.get("first_conv"),
        "classifier": inherited.get("classifier"),
        "license": backbone.origin.licence,
    }
    config = {
        "architecture": backbone.build.architecture,
        "num_classes": pretrained["num_classes"],
        "num_features": int(model.num_features),
        "model_args": {**_pooling(model), **own},
        "pretrained_cfg": pretrained,
    }
    if backbone.class_names:
        config["label_names"] = pretrained["label_names"] = list(backbone.class_names)
    if backbone.projection:
        config[HEAD_KEY] = PROJECTION
    if extensions:
        config[EXTENSIONS_KEY] = extensions
    return config


def _pooling(model: Any) -> dict[str, str]:
    """A timm model's `global_pool`, wherever its family keeps it."""
    for holder in (model, getattr(model, "head", None)):
        pool = getattr(holder, "global_pool", None)
        kind = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if isinstance(kind, str):
            return {"global_pool": kind}
    return {}


@torch.no_grad()
def read(backbone: Backbone, folder: Path, images: Tensor) -> tuple[Outputs, Outputs]:
    """What timm makes of the folder, and the model itself: their features and outputs."""
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    said = loaded.pretrained_cfg
    if tuple(said.get("label_names") or ()) != tuple(backbone.class_names or ()):
        raise ModelError("the export is not exact: its classes have other names")
    mean, std = (images.new_tensor(said[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    ours = backbone.model.forward_features((images - backbone.mean) / backbone.std)
    theirs = loaded.forward_features((images - mean) / std)
    return (
        {"features": theirs, "output": loaded.forward_head(theirs)},
        {"features": ours, "output": backbone.model.forward_head(ours)},
    )


def adaptation_notes(backbone: Backbone) -> list[str]:
    """What plain timm drops or leaves fresh when the export is loaded in another way."""
    assert backbone.build is not None
    notes = ["Without `pretrained=True` timm returns random weights, in silence."]
    if why := reason(backbone):
        notes.append(
            f"{why[0].upper()}{why[1:]}, which the difference above includes; "
            "`featdistill.load_backbone` keeps it."
        )
    if isinstance(backbone.model, Beit):
        if backbone.num_classes == 0:
            notes += [
                "`num_classes=N` adds a fresh head over the CLS token. For mean pooling give "
                "`global_pool='avg'` as well: timm then leaves the final norm out and puts a fresh "
                "one after the pooling.",
            ]
        else:
            notes.append("`num_classes=N` replaces the head by a fresh one.")
        notes += [
            "`img_size=S` is carried over: timm resamples the relative position bias, in BEiT's "
            "geometric way and linearly; featdistill's `image_size` stretches it bicubically.",
            "`features_only=True` gives the maps of the blocks, before the final norm.",
        ]
    elif backbone.projection:
        notes.append("timm's `model(x)` gives the projection's output, without a classifier.")
    elif backbone.num_classes == 0:
        notes.append("`num_classes=N` adds a fresh head.")
    return notes


def reason(backbone: Backbone) -> str | None:
    """What timm's constructors cannot be told, if anything."""
    assert backbone.build is not None
    _, extensions = split_arguments(backbone.build.arguments)
    if not extensions:
        return None
    return f"timm has no argument for {', '.join(extensions)} and takes its own value instead"


def snippet(_: Backbone, folder: str) -> str:
    """Python that loads the folder."""
    return f'import timm\nmodel = timm.create_model("local-dir:{folder}", pretrained=True)'


TIMM = Target(
    name="timm",
    title="a folder that plain timm loads",
    checked_with="timm",
    front=("library_name: timm", "tags: [image-feature-extraction, timm, featdistill]"),
    tolerance=1e-5,
    write=write,
    read=read,
    snippet=snippet,
    reason=reason,
)

"""Write a model as a folder that plain timm loads, and check that it does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from featdistill.core.errors import ModelError, RunError
from featdistill.core.records import write_json
from featdistill.models.backbone import Backbone
from featdistill.models.weights import tensors_hash

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Exported:
    """An export, checked.

    Attributes:
        folder: where it is.
        difference: largest difference of the re-loaded model's output from the model's own, over
            the largest output.
        notes: what plain timm would drop or leave fresh, one line each.
    """

    folder: Path
    difference: float
    notes: tuple[str, ...]

    @property
    def snippet(self) -> str:
        """Python to paste."""
        return (
            "import timm\n"
            f'model = timm.create_model("local-dir:{self.folder.resolve()}", pretrained=True)'
        )


def export_timm(
    backbone: Backbone, folder: Path, *, card: Mapping[str, Any] | None = None
) -> Exported:
    """Write `config.json`, `model.safetensors` and a model card; load them back and compare.

    Args:
        folder: new, empty, or an earlier export to replace.
        card: facts for the model card, by heading.

    Raises:
        ModelError: the model is not one of timm's, or timm gives another output back.
        RunError: the folder cannot be written.
    """
    if backbone.build is None:
        raise ModelError(
            f"'{backbone.origin.spec}' is not an architecture of timm's",
            fix="its weights are in the run's checkpoint, as safetensors",
        )
    temporary = folder.with_name(f".{folder.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {k: v.detach().cpu().clone() for k, v in backbone.model.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", timm_config(backbone))
        difference = _compare(backbone, temporary)
        notes = tuple(adaptation_notes(backbone))
        text = _card(backbone, Exported(folder, difference, notes), card or {})
        (temporary / "README.md").write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    except OSError as error:
        raise RunError(f"cannot write the export '{folder}' ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder, difference, notes)


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """timm's `config.json`: with every constructor argument, or timm would take its defaults."""
    assert backbone.build is not None
    mean, std = backbone.rgb
    model = backbone.model
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
        "num_classes": backbone.num_classes,
        "first_conv": inherited.get("first_conv"),
        "classifier": inherited.get("classifier"),
        "license": backbone.origin.licence,
    }
    config = {
        "architecture": backbone.build.architecture,
        "num_classes": backbone.num_classes,
        "num_features": int(model.num_features),
        "model_args": {**_pooling(model), **backbone.build.arguments},
        "pretrained_cfg": pretrained,
    }
    if backbone.class_names:
        config["label_names"] = pretrained["label_names"] = list(backbone.class_names)
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
def _compare(backbone: Backbone, folder: Path) -> float:
    """Largest output difference of what timm loads from the folder, over the largest output."""
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    was_training = backbone.training
    device = backbone.mean.device
    backbone.eval().to("cpu")
    images = torch.rand(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    x = (images - backbone.mean) / backbone.std
    ours, theirs = backbone.model.forward_features(x), loaded.forward_features(x)
    difference = _relative(ours, theirs)
    if backbone.num_classes:
        ours, theirs = backbone.model.forward_head(ours), loaded.forward_head(theirs)
        difference = max(difference, _relative(ours, theirs))
    backbone.train(was_training).to(device)
    if not difference <= _TOLERANCE:
        raise ModelError(
            f"the export is not exact: timm's output differs by {difference:.2g} of the largest",
            expected=f"at most {_TOLERANCE}",
        )
    return difference


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))


def adaptation_notes(backbone: Backbone) -> list[str]:
    """What plain timm drops or leaves fresh when the export is loaded in another way."""
    from timm.models.beit import Beit

    notes = ["Without `pretrained=True` timm returns random weights, in silence."]
    model = backbone.model
    if isinstance(model, Beit):
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
    elif backbone.num_classes == 0:
        notes.append("`num_classes=N` adds a fresh head.")
    return notes


def _card(backbone: Backbone, exported: Exported, facts: Mapping[str, Any]) -> str:
    grid = f"{backbone.grid[0]}x{backbone.grid[1]}"
    mean, std = (", ".join(f"{v:.3f}" for v in values) for values in backbone.rgb)
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, timm, featdistill]",
        *([f"license: {backbone.origin.licence}"] if backbone.origin.licence else []),
        "---",
        f"# {exported.folder.resolve().parent.name or 'model'}",
        "",
        "```python",
        "import timm",
        'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)',
        "```",
        "",
        "| | |",
        "| --- | --- |",
        f"| architecture | {backbone.build.architecture if backbone.build else '-'} |",
        f"| parameters | {backbone.parameters_count / 1e6:.2f} M |",
        f"| image | {backbone.image_size[0]}x{backbone.image_size[1]}, RGB |",
        f"| normalisation | mean {mean}; std {std} |",
        f"| tokens | {grid} map of {backbone.width} channels, "
        f"prefix: {', '.join(backbone.prefix_names) or 'none'} |",
        f"| classes | {backbone.num_classes or 'none'} |",
        f"| weights | sha256 {tensors_hash(backbone.model)} |",
        f"| checked | timm's output differs by {exported.difference:.1g} at most |",
        "",
        "Made with featdistill.",
        *(["", "## How it was made", ""] if facts else []),
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "## In plain timm",
        "",
        *(f"- {note}" for note in exported.notes),
        "",
    ]
    return "\n".join(lines)

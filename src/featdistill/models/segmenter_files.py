"""A trained segmenter on disk: `segmenter.json` and `model.safetensors`, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

from featdistill.core.errors import ModelError, RunError
from featdistill.core.records import write_json
from featdistill.models.backbone import Backbone, Origin, TimmBuild
from featdistill.models.segmenter import HeadShape, Segmenter
from featdistill.models.timm_models import create
from featdistill.models.weights import file_hash, load_exactly, read_json

FOLDER = "segmenter"
_DESCRIBED, _WEIGHTS = "segmenter.json", "model.safetensors"


@dataclass(frozen=True)
class Trained:
    """A segmenter, and what its predictions mean.

    Attributes:
        values: of a mask, for each class.
        unlabelled: values that mean no class.
        short: the images' short side at scale 1, pixels.
        weights: where they come from, with a hash.
    """

    segmenter: Segmenter
    values: tuple[int, ...]
    unlabelled: tuple[int, ...]
    short: int
    weights: str


def save_segmenter(
    segmenter: Segmenter,
    folder: Path,
    *,
    values: tuple[int, ...],
    unlabelled: tuple[int, ...],
    short: int,
    about: Mapping[str, Any],
) -> Path | None:
    """Write a segmenter; None (and nothing written) where timm cannot build its backbone again.

    Args:
        about: what else the description shall say.

    Raises:
        RunError: the folder cannot be written.
    """
    backbone = segmenter.backbone
    if backbone.build is None:
        return None
    mean, std = backbone.rgb
    described = {
        "format": 1,
        "backbone": {
            "architecture": backbone.build.architecture,
            "arguments": dict(backbone.build.arguments),
            "mean": mean,
            "std": std,
            "image_size": backbone.image_size,
            "fixed_size": backbone.fixed_size,
            "projection": backbone.projection,
        },
        "size": segmenter.size,
        "head": asdict(segmenter.shape),
        "classes": segmenter.class_names,
        "values": values,
        "unlabelled": unlabelled,
        "short": short,
        "timm": timm.__version__,
        **about,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in segmenter.state_dict().items()}
        temporary = folder / f".{_WEIGHTS}.part"
        save_file(tensors, temporary)
        temporary.replace(folder / _WEIGHTS)
        write_json(folder / _DESCRIBED, described)
    except OSError as error:
        raise RunError(f"cannot write '{folder}' ({error.strerror or error})") from None
    return folder


def load_segmenter(spec: str) -> Trained:
    """A segmenter from the folder of its run, or from `segmenter/` in it.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    root = Path(spec).expanduser()
    folder = next((f for f in (root / FOLDER, root) if (f / _DESCRIBED).is_file()), None)
    if folder is None:
        begun = (root / "config.yaml").is_file()
        raise ModelError(
            f"'{spec}' is no trained segmenter",
            expected="the --out of a finished `featdistill segment`",
            fix="finish that run first (--resume)"
            if begun and (root / "checkpoints").is_dir()
            else "train one: featdistill segment --model BACKBONE --data DATA --out RUN",
        )
    described = read_json(folder / _DESCRIBED)
    try:
        segmenter = _built(described, spec)
        values, unlabelled = tuple(described["values"]), tuple(described["unlabelled"])
        short = int(described["short"])
        tensors = load_file(folder / _WEIGHTS)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"'{folder / _DESCRIBED}' is not complete ({type(error).__name__}: {error})"
        ) from None
    except Exception as error:  # safetensors raises a class of its own, and OSError
        raise ModelError(
            f"cannot read '{folder / _WEIGHTS}' ({' '.join(str(error).split())[:200]})"
        ) from None
    load_exactly(segmenter, tensors, what=str(folder / _WEIGHTS))
    weights = f"{_WEIGHTS} (sha256 {file_hash(folder / _WEIGHTS)})"
    return Trained(segmenter.eval(), values, unlabelled, short, weights)


def _built(described: Mapping[str, Any], spec: str) -> Segmenter:
    known = described["backbone"]
    arguments = dict(known["arguments"])
    build = TimmBuild(known["architecture"], arguments)
    backbone = Backbone(
        create(build.architecture, **arguments),
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
        image_size=tuple(known["image_size"]),
        origin=Origin(spec, "its own"),
        build=build,
        fixed_size=known["fixed_size"],
        projection=known["projection"],
    )
    head = described["head"]
    layers = None if head["layers"] is None else tuple(head["layers"])
    return Segmenter(
        backbone,
        size=tuple(described["size"]),
        class_names=tuple(described["classes"]),
        shape=HeadShape(**{**head, "layers": layers}),
    )


def moved(trained: Trained, device: torch.device) -> Segmenter:
    """The segmenter on a device, in evaluation mode."""
    return trained.segmenter.to(device).eval()

"""What lies beside a checkpoint and says what its tensors cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from featdistill.core.errors import ModelError
from featdistill.core.parsing import parse_json
from featdistill.models.backbone import Rgb
from featdistill.models.weights import read_json

# What timm's config.json has no word for, and ours holds besides
HEAD_KEY, PROJECTION = "featdistill_head", "projection"
EXTENSIONS_KEY = "featdistill_args"


def settings_beside(path: Path) -> dict[str, Any]:
    """Facts from the settings files in a checkpoint's folder; unreadable ones say nothing.

    `open_clip_config.json` gives `quick_gelu`, `mean`, `std` and `timm_model_name`; a `config.json`
    of the transformers library `transformers` (its contents); its `preprocessor_config.json` the
    `mean` and `std`.

    Raises:
        ModelError: a file says something that cannot be.
    """
    folder = path.parent
    facts = _open_clip(folder / "open_clip_config.json")
    config = _read(folder / "config.json")
    if "model_type" in config and "architecture" not in config:  # the latter would be timm's
        facts["transformers"] = config
        facts |= _processor(folder)
    return facts


def _read(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = config.get(name)
    return inner if isinstance(inner, dict) else {}


def _three(path: Path, name: str, value: Any) -> Rgb:
    """Three numbers of a settings file."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        value = (None,)
    if not all(isinstance(v, int | float) for v in value):
        raise ModelError(f"'{path}' has no three numbers as its {name}")
    red, green, blue = map(float, value)
    return red, green, blue


def _open_clip(path: Path) -> dict[str, Any]:
    config = _read(path)
    if not config:
        return {}
    model, pixels = _section(config, "model_cfg"), _section(config, "preprocess_cfg")
    facts: dict[str, Any] = {"quick_gelu": bool(model.get("quick_gelu", False))}
    if name := _section(model, "vision_cfg").get("timm_model_name"):
        if not timm.is_model(str(name)):
            raise ModelError(f"'{path}' names '{name}', which this timm does not know")
        facts["timm_model_name"] = str(name)
    if "mean" in pixels and "std" in pixels:
        facts |= {n: _three(path, n, pixels[n]) for n in ("mean", "std")}
    return facts


def _processor(folder: Path) -> dict[str, Any]:
    """The mean and standard deviation of transformers' image processor."""
    path = folder / "preprocessor_config.json"
    pixels: Mapping[str, Any] = _read(path)
    if not pixels:  # written with a tokenizer
        path = folder / "processor_config.json"
        pixels = _section(_read(path), "image_processor")
    if pixels.get("do_normalize") is False:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if "image_mean" not in pixels or "image_std" not in pixels:
        return {}
    return {n: _three(path, f"image_{n}", pixels[f"image_{n}"]) for n in ("mean", "std")}


@dataclass(frozen=True)
class TimmLayout:
    """A `config.json` as timm writes it.

    Attributes:
        architecture: timm's name.
        arguments: of the constructor, with our extensions.
        pretrained: `input_size`, `mean`, `std`, `license`, ...
        class_names: of the classifier, if it has any.
        projection: the head is a projection; None if that shows in the model itself.
    """

    architecture: str
    arguments: dict[str, Any]
    pretrained: dict[str, Any]
    class_names: tuple[str, ...] | None
    projection: bool | None


def timm_layout(path: Path) -> TimmLayout:
    """Read a `config.json` in timm's layout.

    Raises:
        ModelError: unreadable, or what timm would not write.
    """
    config = read_json(path)
    pretrained = dict(_section(config, "pretrained_cfg") or config)
    size = pretrained.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(isinstance(n, int) for n in size):
        raise ModelError(f"'{path}' says no input_size", expected="timm's layout: [3, 224, 224]")
    for name in ("mean", "std"):
        if pretrained.get(name) is not None:
            pretrained[name] = _three(path, name, pretrained[name])
    arguments = {**_section(config, "model_args"), **_section(config, EXTENSIONS_KEY)}
    eps = arguments.get("norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise ModelError(f"'{path}' says norm_eps {eps!r}", expected="a number")
    arguments.setdefault("num_classes", config.get("num_classes") or 0)
    names = pretrained.get("label_names") or config.get("label_names")
    return TimmLayout(
        str(config["architecture"]),
        arguments,
        pretrained,
        tuple(map(str, names)) if isinstance(names, list) and names else None,
        True if config.get(HEAD_KEY) == PROJECTION else None,
    )

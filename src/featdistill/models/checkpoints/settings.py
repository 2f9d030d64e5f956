"""What lies beside a checkpoint and says what its tensors cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def settings_beside(path: Path) -> dict[str, Any]:
    """Facts from the settings files in a checkpoint's folder; unreadable ones say nothing.

    `open_clip_config.json` gives `quick_gelu`, `mean`, `std` and `timm_model_name`; a `config.json`
    of the transformers library `transformers` (its contents); its `preprocessor_config.json` the
    `mean` and `std`.
    """
    folder = path.parent
    facts = _open_clip(_read(folder / "open_clip_config.json"))
    config = _read(folder / "config.json")
    if "model_type" in config and "architecture" not in config:  # the latter would be timm's
        facts["transformers"] = config
        facts |= _processor(folder)
    return facts


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config:
        return {}
    model, pixels = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    facts: dict[str, Any] = {"quick_gelu": bool(model.get("quick_gelu", False))}
    if name := model.get("vision_cfg", {}).get("timm_model_name"):
        facts["timm_model_name"] = str(name)
    if "mean" in pixels and "std" in pixels:
        facts |= {"mean": tuple(pixels["mean"]), "std": tuple(pixels["std"])}
    return facts


def _processor(folder: Path) -> dict[str, Any]:
    """The mean and standard deviation of transformers' image processor."""
    pixels = _read(folder / "preprocessor_config.json")
    if not pixels:  # written with a tokenizer
        inner = _read(folder / "processor_config.json").get("image_processor")
        pixels = inner if isinstance(inner, dict) else {}
    if pixels.get("do_normalize") is False:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    mean, std = pixels.get("image_mean"), pixels.get("image_std")
    if not all(isinstance(v, list) and len(v) == 3 for v in (mean, std)):
        return {}
    assert mean is not None
    assert std is not None
    return {"mean": tuple(mean), "std": tuple(std)}

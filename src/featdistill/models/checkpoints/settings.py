"""What lies beside a checkpoint and says what its tensors cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def settings_beside(path: Path) -> dict[str, Any]:
    """Facts from an `open_clip_config.json` in the file's folder: `quick_gelu`, `mean`, `std`,
    `timm_model_name`.

    An unreadable file says nothing.
    """
    try:
        config = json.loads((path.parent / "open_clip_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    model, pixels = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    facts: dict[str, Any] = {"quick_gelu": bool(model.get("quick_gelu", False))}
    if name := model.get("vision_cfg", {}).get("timm_model_name"):
        facts["timm_model_name"] = str(name)
    if "mean" in pixels and "std" in pixels:
        facts |= {"mean": tuple(pixels["mean"]), "std": tuple(pixels["std"])}
    return facts

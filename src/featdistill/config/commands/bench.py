"""The schema of `bench`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from featdistill.config.commands.base import Command
from featdistill.config.sections import Positive


class BenchConfig(Command):
    """Time a part of the project beside doing it plainly."""

    summary = "time a part of the project beside the same done plainly"
    example = "featdistill bench diagnose --batch-size 8"
    flat = {
        "what": "what",
        "model": "model",
        "image-size": "image_size",
        "batch-size": "batch_size",
        "rounds": "rounds",
        "device": "device",
        "threads": "threads",
        "json": "as_json",
    }
    positional = "what"

    what: Literal["diagnose", "landscape"] = Field(
        description="what to time: diagnose (attention beside a plain forward pass) or landscape "
        "(its points beside plain evaluations)"
    )
    model: str = Field("timm/vit_base_patch16_224", description="model, with random weights")
    image_size: Positive | None = Field(None, description="side in pixels; the model's own")
    batch_size: Positive = Field(8, description="images of a pass, or of an evaluation")
    rounds: Positive = Field(5, description="rounds in which each takes its turn")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    threads: Positive | None = Field(None, description="CPU threads; all cores by default")
    as_json: bool = Field(False, description="print one JSON object")

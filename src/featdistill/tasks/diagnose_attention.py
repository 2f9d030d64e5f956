"""`featdistill diagnose attention`: what each head of each layer attends to."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featdistill.config.commands import DiagnoseConfig
from featdistill.core.errors import ModelError
from featdistill.data.loader import ordered_batches, plainly
from featdistill.data.views import EvalView
from featdistill.diagnostics.attention_model import (
    ModelAttention,
    Tokens,
    bias_alone,
    layer_results,
)
from featdistill.diagnostics.capture import capture_attention
from featdistill.engine.tracking import Countdown, duration, say
from featdistill.evaluation.features import features_of
from featdistill.models.backbone import Backbone
from featdistill.tasks.diagnose import Subjects, about, check_images, keep, number

_FEWEST = 2  # images: what a standard error needs
_PAIRS = ("similarity", "similarity_flat", "similarity_centred", "similarity_flat_centred")


@dataclass(frozen=True)
class AttentionDiagnosis:
    """What was found.

    Attributes:
        models: by name, the measures of each layer.
        record: diagnose-attention.json; mean maps lie in an npz beside it.
    """

    models: dict[str, ModelAttention]
    record: Path


def run(config: DiagnoseConfig, subjects: Subjects) -> AttentionDiagnosis:
    """Measure model after model, and write the record."""
    count = len(subjects.images)
    check_images(subjects, _FEWEST, ", for errors over images")
    start = time.monotonic()
    biases = {name: _bias(name, backbone) for name, backbone in subjects.models.items()}
    say(f"{count:,} images of {subjects.images.name}, seen by {', '.join(subjects.models)}")
    found = {
        name: _measure(config, subjects, name, backbone)
        for name, backbone in subjects.models.items()
    }
    arrays: dict[str, np.ndarray] = {}
    models = []
    for place, (name, backbone) in enumerate(subjects.models.items()):
        layers = []
        for j, (layer, measures) in enumerate(found[name].layers.items()):
            maps = measures.maps.compute()
            arrays[f"{place}.map.{j}"] = maps.mean(0).astype(np.float32)
            arrays[f"{place}.heads.{j}"] = maps.astype(np.float32)
            layers.append(_layer(config, layer, found[name], biases[name]))
        models.append({**about(name, backbone), "layers": layers})
    results = {
        "data": {"name": subjects.images.name, "images": count},
        "unit": config.attention.unit,
        "rows": "patch tokens alone, renormalised; errors are standard errors over images",
        "models": models,
        "seconds": time.monotonic() - start,
    }
    record = keep(config, subjects.runtime, results, arrays)
    _say_end(config, models)
    say(f"done in {duration(time.monotonic() - start)}: {record}")
    return AttentionDiagnosis(found, record)


def _tokens(backbone: Backbone) -> Tokens:
    return Tokens(backbone.grid, backbone.num_prefix, backbone.image_size)


def _bias(name: str, backbone: Backbone) -> ModelAttention:
    """The bias alone; also finds out, before the long work, that there is attention to measure."""
    height, width = backbone.image_size
    if height != width:
        raise ModelError(
            f"'{name}' sees {height}x{width} pixels",
            expected="a model of square images",
            fix="give --image-size",
        )
    blank = torch.zeros(1, 3, height, width, device=backbone.mean.device)
    try:
        return bias_alone(backbone, blank, _tokens(backbone))
    except ModelError as error:
        raise ModelError(f"'{name}': {error}") from None


def _measure(
    config: DiagnoseConfig, subjects: Subjects, name: str, backbone: Backbone
) -> ModelAttention:
    runtime = subjects.runtime
    loader = ordered_batches(
        subjects.images,
        EvalView(backbone.image_size[0], config.view.eval_crop),
        batch_size=config.data.batch_size,
        workers=config.data.workers,
        share=runtime.share,
    )
    attention, seen = ModelAttention(_tokens(backbone)), 0
    total = len(subjects.images)
    bar = Countdown(f"attention of {name}", total, "images", quiet=not runtime.first)
    try:
        with capture_attention(backbone, attention):
            for batch, _ in features_of(backbone, plainly(loader)):
                seen += len(batch)
                bar.update(min(total, seen * runtime.share.world))
    finally:
        bar.stop()
    merged, *others = runtime.collect(attention)
    for other in others:
        merged.merge(other)
    return merged


def _layer(
    config: DiagnoseConfig, layer: str, found: ModelAttention, bias: ModelAttention
) -> dict[str, Any]:
    measures, unit = found.layers[layer], config.attention.unit
    layout = measures.layout
    row = {
        "name": layer,
        "heads": measures.heads,
        "grid": layout.grid,
        "prefix": layout.prefix,
        "window": None if layout.window is None else vars(layout.window),
        **{k: _plain(v) for k, v in layer_results(measures, unit).items()},
        "bias": None,
    }
    if measures.similarity is None:
        row |= {f"{name}{e}": None for name in (*_PAIRS, "divergence") for e in ("", "_error")}
    if layer in bias.layers:
        alone = layer_results(bias.layers[layer], unit)
        kept = ("distance", "distance_relative", "entropy", "column_r2", "relative_r2")
        row["bias"] = {k: _plain(alone[k]) for k in kept}
    return row


def _plain(value: Any) -> Any:
    array = np.asarray(value)
    return number(float(array)) if array.ndim == 0 else [number(float(v)) for v in array]


def _say_end(config: DiagnoseConfig, models: list[dict[str, Any]]) -> None:
    """A line for each layer: means over heads."""
    unit = config.attention.unit
    for model in models:
        say(f"\n{model['name']}: means over heads")
        say(
            f"  {'layer':<32} {unit:>9}  of uniform  entropy    nmi  similarity  column R2  "
            "relative R2"
        )
        for layer in model["layers"]:
            cells = (
                f"{np.mean(layer['distance']):9.2f}",
                f"{np.mean(layer['distance_relative']):10.3f}",
                f"{np.mean(layer['entropy']):7.2f}",
                f"{np.mean(layer['nmi']):5.3f}",
                _cell(layer["similarity"], 10),
                _cell(layer["column_r2"], 9),
                _cell(layer["relative_r2"], 11),
            )
            say(f"  {layer['name']:<32} {'  '.join(cells)}")
        if any(layer["heads"] == 1 for layer in model["layers"]):
            say("  a layer with a single head has no similarity between heads")


def _cell(value: float | None, width: int) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.3f}"

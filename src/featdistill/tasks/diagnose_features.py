"""`featdistill diagnose features`: CKA, spectra, norms, variance, rank and pictures of features."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featdistill.config.commands import DiagnoseConfig
from featdistill.core.types import Batch, Features
from featdistill.data.loader import Share, ordered_batches, plainly
from featdistill.data.sources import Subset
from featdistill.data.views import EvalView
from featdistill.diagnostics.cka import LinearCKA
from featdistill.diagnostics.features import NORM_EDGES, OUTLIER_RATIO, LayerMeasures, LayerResult
from featdistill.diagnostics.pca import pca_pictures
from featdistill.engine.tracking import Countdown, duration, say
from featdistill.evaluation.features import features_of
from featdistill.models.backbone import Backbone
from featdistill.tasks.diagnose import Subjects, about, check_images, keep, number

_FEWEST = 4  # images: what unbiased CKA needs


@dataclass(frozen=True)
class FeaturesDiagnosis:
    """What was found.

    Attributes:
        cka: (M, M) over `points`; NaN where a layer does not vary.
        points: (model's name, layer) of each row of `cka`.
        layers: by model, first layer to last.
        record: diagnose-features.json; arrays lie in an npz beside it.
    """

    cka: Tensor
    points: tuple[tuple[str, int], ...]
    layers: dict[str, tuple[LayerResult, ...]]
    record: Path


class _Model:
    """One model's share: which layers it has, and their measures."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        # a module of a user's own shows its output only
        self.indices = tuple(range(len(backbone.layer_grids)))
        self.measures: list[LayerMeasures] = []

    def maps(self, features: Features) -> list[Tensor]:
        """Each layer's (B, C, h, w)."""
        return [features.layers[i].map for i in self.indices] or [features.map]

    def update(self, features: Features) -> list[Tensor]:
        """Measure; returns each layer's mean tokens (B, C)."""
        maps = self.maps(features)
        if not self.measures:
            self.measures = [LayerMeasures(m.shape[1], (m.shape[2], m.shape[3])) for m in maps]
        for measure, map_ in zip(self.measures, maps, strict=True):
            measure.update(map_)
        return [m.double().mean((2, 3)) for m in maps]


def run(config: DiagnoseConfig, subjects: Subjects) -> FeaturesDiagnosis:
    """Measure, draw the pictures' colours, and write the record."""
    count = len(subjects.images)
    check_images(subjects, _FEWEST, ": CKA compares models by how images differ")
    start = time.monotonic()
    models = {name: _Model(backbone) for name, backbone in subjects.models.items()}
    say(f"{count:,} images of {subjects.images.name}, seen by {', '.join(models)}")
    cka = _measure(config, subjects, models)
    layers = {n: tuple(m.compute() for m in one.measures) for n, one in models.items()}
    points = tuple((name, i) for name, found in layers.items() for i in range(len(found)))
    arrays = {"cka": cka.compute().numpy(), "norm_edges": NORM_EDGES.numpy()}
    for place, found in enumerate(layers.values()):
        arrays[f"{place}.norms"] = np.stack([r.norms.histogram.numpy() for r in found])
    explained = _pictures(config, subjects, arrays)
    results: dict[str, Any] = {
        "data": {"name": subjects.images.name, "images": count},
        "pooling": "mean of the layer's patch tokens, before any norm",
        "cka": {"block": config.features.block, "images": cka.count, "points": points},
        "norms": {"outlier": f"norm above {OUTLIER_RATIO:g} times the median of its image"},
        "models": [
            {
                **about(name, one.backbone),
                "layers": [
                    _layer(r, m, count) for r, m in zip(layers[name], one.measures, strict=True)
                ],
                "explained": explained.get(name),
            }
            for name, one in models.items()
        ],
        "seconds": time.monotonic() - start,
    }
    record = keep(config, subjects.runtime, results, arrays)
    _say_end(layers, record, results["seconds"])
    return FeaturesDiagnosis(cka.compute(), points, layers, record)


def _measure(config: DiagnoseConfig, subjects: Subjects, models: dict[str, _Model]) -> LinearCKA:
    """One pass over the images, all models side by side, so that nothing need be kept."""
    cka: LinearCKA | None = None
    streams = [_stream(config, subjects, one.backbone, one.indices) for one in models.values()]
    runtime, total = subjects.runtime, len(subjects.images)
    bar = Countdown("diagnose features", total, "images", quiet=not runtime.first)
    seen = 0
    try:
        for together in zip(*streams, strict=True):
            rows = [
                row
                for one, (_, features) in zip(models.values(), together, strict=True)
                for row in one.update(features)
            ]
            cka = cka or LinearCKA(len(rows), block=config.features.block)
            cka.update(rows, together[0][0].indices)
            seen += len(rows[0])
            bar.update(min(total, seen * runtime.share.world))
    finally:
        bar.stop()
    assert cka is not None
    return _merged(models, cka, subjects)


def _merged(models: dict[str, _Model], cka: LinearCKA, subjects: Subjects) -> LinearCKA:
    """Put together what all processes measured, in `models` and in what is returned."""
    mine = [one.measures for one in models.values()]
    parts = subjects.runtime.collect((mine, cka))
    (measures, whole), *others = parts
    for theirs, other in others:
        for layer, its in zip(chain(*measures), chain(*theirs), strict=True):
            layer.merge(its)
        whole.merge(other)
    for one, merged in zip(models.values(), measures, strict=True):
        one.measures = merged
    return whole


def _stream(
    config: DiagnoseConfig,
    subjects: Subjects,
    backbone: Backbone,
    layers: Sequence[int],
    chosen: np.ndarray | None = None,
) -> Iterator[tuple[Batch, Features]]:
    """The images as one model wants them, and what it makes of them."""
    source = subjects.images if chosen is None else Subset(subjects.images, chosen)
    loader = ordered_batches(
        source,
        EvalView(backbone.image_size[0], config.view.eval_crop),
        batch_size=config.data.batch_size,
        workers=config.data.workers,
        share=Share() if chosen is not None else subjects.runtime.share,
    )
    return features_of(backbone, plainly(loader), layers)


def _pictures(
    config: DiagnoseConfig, subjects: Subjects, arrays: dict[str, np.ndarray]
) -> dict[str, list[float]]:
    """Add the pictures to the arrays; returns the shares of variance that they show."""
    total = len(subjects.images)
    count = min(config.features.pictures, total)
    if not count or not subjects.runtime.first:
        return {}
    chosen = np.arange(count) * total // count
    explained = {}
    for place, (name, backbone) in enumerate(subjects.models.items()):
        seen = [
            (batch.images, features.map)
            for batch, features in _stream(config, subjects, backbone, (), chosen)
        ]
        found = pca_pictures(torch.cat([m for _, m in seen]), foreground=config.features.foreground)
        arrays[f"{place}.pictures"] = (found.colours * 255).round().byte().numpy()
        arrays[f"{place}.photographs"] = torch.cat([i for i, _ in seen]).permute(0, 2, 3, 1).numpy()
        explained[name] = found.explained.tolist()
    return explained


def _layer(result: LayerResult, measure: LayerMeasures, images: int) -> dict[str, Any]:
    fourier, norms, variance = result.fourier, result.norms, result.variance
    return {
        "grid": measure.fourier.grid,
        "channels": measure.rank.channels,
        "rank": number(result.rank),
        "rank_limit": min(images, measure.rank.channels),
        "frequency": fourier.frequency.tolist(),
        "relative_log_amplitude": [number(v) for v in fourier.relative.tolist()],
        "relative_log_amplitude_error": [number(v) for v in fourier.error.tolist()],
        "norm_mean": number(norms.mean),
        "norm_median": number(norms.median),
        "norm_largest_over_median": number(norms.largest),
        "outliers": number(norms.outliers),
        "outliers_error": number(norms.outliers_error),
        "variance_spatial": number(variance.spatial),
        "variance_spatial_error": number(variance.spatial_error),
        "variance_between": number(variance.between),
    }


def _say_end(layers: dict[str, tuple[LayerResult, ...]], record: Path, seconds: float) -> None:
    for name, found in layers.items():
        last = found[-1]
        say(
            f"{name}: last of {len(found)} layers: effective rank {last.rank:.1f}, relative log "
            f"amplitude at the highest frequency {last.fourier.high:+.2f}, outlier tokens "
            f"{last.norms.outliers:.2%}"
        )
    say(f"done in {duration(seconds)}: {record}")

"""`featdistill diagnose`: models, side by side, on the same images; one file a kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.config.commands import DiagnoseConfig
from featdistill.config.commands.diagnostics import LossConfig
from featdistill.config.sections import ModelConfig
from featdistill.core.errors import ConfigError, DataError
from featdistill.core.records import write_record
from featdistill.data.sources import Source, Subset
from featdistill.engine.rundir import check_out
from featdistill.engine.runtime import Runtime, limit_threads
from featdistill.models.backbone import Backbone
from featdistill.models.weights import tensors_hash
from featdistill.tasks.common import images_of, model_of, naming_problems, plain, refuse_labels

_HOMES = {"attention": "diagnose_attention", "features": "diagnose_features"}


@dataclass(frozen=True)
class Subjects:
    """What is looked at.

    Attributes:
        models: by name, in the order given, in evaluation mode on one device.
        images: the same for all of them.
        runtime: of several processes, each sees its share of the images.
    """

    models: dict[str, Backbone]
    images: Source
    runtime: Runtime


def run(config: DiagnoseConfig) -> Any:
    """Diagnose; what it returns is the kind's own result."""
    check_out(config.run.out, resume=False)
    refuse_labels(config.data)
    names = names_of(config)
    limit_threads()
    runtime = Runtime(device=config.run.device, devices=config.run.devices, precision="float32")
    source = _spread(images_of(config.data, part=config.part, seed=config.run.seed), config.images)
    home = import_module(f"featdistill.tasks.{_HOMES[config.kind]}")
    return home.run(config, Subjects(_models(config, names, runtime), source, runtime))


def check_images(subjects: Subjects, fewest: int, why: str) -> None:
    """Raise DataError for too few images to measure, or to give each process one."""
    count, processes = len(subjects.images), subjects.runtime.share.world
    if count < fewest:
        raise DataError(
            f"{count} image{'' if count == 1 else 's'} to look at",
            expected=f"at least {fewest}{why}",
            fix="give more --images or other --data",
        )
    if count < processes:
        raise DataError(
            f"{count} images for {processes} processes", fix="give a smaller --run.devices"
        )


def names_of(config: DiagnoseConfig | LossConfig) -> list[str]:
    """What the models are called.

    Raises:
        ConfigError: names or weights that are too few, too many or the same.
    """
    problems = naming_problems(config.models, names=config.names, weights=config.weights)
    if problems:
        raise ConfigError(problems)
    return list(config.names or config.models)


def _models(config: DiagnoseConfig, names: list[str], runtime: Runtime) -> dict[str, Backbone]:
    weights = config.weights * (len(names) if len(config.weights) == 1 else 1)
    return {
        name: model_of(
            ModelConfig(spec=spec, weights=w),
            image_size=config.view.image_size,
            seed=config.run.seed,
            quiet=not runtime.first,
        )
        .to(runtime.device)
        .eval()
        for name, spec, w in zip(names, config.models, weights, strict=True)
    }


def _spread(source: Source, count: int) -> Source:
    """`count` images at even distances, so that classes stored one after the other all occur."""
    if len(source) <= count:
        return source
    return Subset(source, np.arange(count) * len(source) // count)


def about(name: str, backbone: Backbone) -> dict[str, Any]:
    """A model as the records have it."""
    origin = backbone.origin
    return {
        "name": name,
        "spec": origin.spec,
        "weights": origin.weights,
        "licence": origin.licence,
        "tensors_sha256": tensors_hash(backbone),
        "image_size": backbone.image_size,
        "grid": backbone.grid,
        "width": backbone.width,
        "parameters": backbone.parameters_count,
    }


def number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


def keep(
    config: DiagnoseConfig,
    runtime: Runtime,
    results: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> Path:
    """Write `diagnose-KIND.json` in the output folder; of several processes, the first does."""
    record = Path(config.run.out).expanduser() / f"diagnose-{config.kind}.json"
    if runtime.first:
        kind = f"diagnose-{config.kind}"
        write_record(record, kind, config=plain(config), results=results, arrays=arrays)
    runtime.barrier()
    return record

"""What several commands do alike: open data, make a runtime, plan a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from torch import nn

from featdistill.config.sections import CachedDataConfig, DataConfig, ModelConfig
from featdistill.config.training import (
    OptimizerConfig,
    PolynomialScheduleConfig,
    RunConfig,
    ScheduleConfig,
)
from featdistill.core.errors import ConfigError, DataError
from featdistill.data.index import EXTENSIONS
from featdistill.data.joint_views import JointView
from featdistill.data.loader import steps_per_epoch
from featdistill.data.open import open_data
from featdistill.data.parts import Data
from featdistill.data.sources import FileSource, Source, scaled
from featdistill.data.views import View
from featdistill.engine.plan import Plan
from featdistill.engine.runtime import Runtime, limit_threads
from featdistill.engine.schedule import Schedule, build_schedule, scaled_rate
from featdistill.engine.tracking import say
from featdistill.models.backbone import Backbone
from featdistill.models.blocks import compile_blocks, recompute_blocks
from featdistill.models.load import load_backbone
from featdistill.tasks.caches import check_cache

PartName = Literal["train", "val", "test"]


def model_of(
    config: ModelConfig,
    *,
    image_size: int | None = None,
    seed: int = 0,
    drop_path: float = 0.0,
    always_drop_path: bool = False,
    quiet: bool = False,
) -> Backbone:
    """The model that a configuration names; what became of a checkpoint's tensors is said."""
    backbone = load_backbone(
        config.spec,
        weights=config.weights,
        arch=config.arch,
        branch=config.branch,
        normalisation=config.normalisation,
        image_size=image_size,
        bias_resampling=config.bias_resampling,
        drop_path=drop_path,
        always_drop_path=always_drop_path,
        seed=seed,
    )
    if not quiet and backbone.origin.loading:
        say(f"'{backbone.origin.spec}', {backbone.origin.weights}")
        for line in backbone.origin.loading:
            say(f"  {line}")
    return backbone


def data_of(config: DataConfig, seed: int) -> Data:
    """The data that a configuration names, without its label budget."""
    if isinstance(config, CachedDataConfig):
        check_cache(config)
    return open_data(
        config.path,
        val=config.val,
        val_fraction=config.val_fraction,
        seed=seed,
        decode=config.decode,
    )


def part_of(data: Data, part: PartName | None = None) -> Source:
    """A part of the data; the held-out one where none is named, or everything without parts.

    Raises:
        DataError: there is no such part.
    """
    if part is None:
        return data.train if data.held_out is None else data.held_out
    parts = {"train": data.train, "val": data.val, "test": data.test}
    found = parts[part]
    if found is None:
        raise DataError(
            f"the data have no {part} part",
            fix=f"give --part {' or '.join(name for name, p in parts.items() if p is not None)}",
        )
    return found


def images_of(config: DataConfig, *, part: PartName | None = None, seed: int = 0) -> Source:
    """The images that a command looks at: a part of the data, or a single image file."""
    where = Path(config.path)
    if where.is_file() and where.suffix.lower() in EXTENSIONS:
        image = FileSource(config.path, where.parent, (where.name,))
        return scaled(image) if config.decode == "fast" else image
    return part_of(data_of(config, seed), part)


def naming_problems(
    models: Sequence[str], *, names: Sequence[str], weights: Sequence[str]
) -> list[str]:
    """What is wrong with the names and weights that several models are given, a line each."""
    count, problems = len(models), weights_problems(models, weights)
    if names and len(names) != count:
        problems.append(
            f"--name given {len(names)} times for {count} models; expected once for each"
        )
    called = names or models
    if len(set(called)) < len(called):
        problems.append("two models have the same name; give each its own with --name")
    return problems


def weights_problems(models: Sequence[str], weights: Sequence[str]) -> list[str]:
    """What is wrong with the number of weights that several models are given."""
    if len(weights) in (1, len(models)):
        return []
    return [
        f"--weights given {len(weights)} times for {len(models)} models; expected once, or once "
        "for each"
    ]


def refuse_labels(config: DataConfig) -> None:
    """Raise ConfigError for a label budget where no label is used."""
    if config.labels is not None:
        raise ConfigError(["--data.labels is of no use here: no label is used"])


def runtime_of(run: RunConfig) -> Runtime:
    """The runtime that a configuration names."""
    limit_threads(run.threads)
    return Runtime(
        device=run.device,
        devices=run.devices,
        nodes=run.nodes,
        precision=run.precision.value,
        attention=run.attention,
    )


def settle(runtime: Runtime, model: nn.Module, run: RunConfig) -> None:
    """Suit a model that is to be trained to the device, and to what the run asks for.

    Raises:
        ModelError: it cannot be compiled, or cannot recompute its blocks.
    """
    runtime.settle(model)
    if run.recompute:
        recompute_blocks(model)
    if run.compile == "on":
        compile_blocks(model)


def schedule_of(
    schedule: ScheduleConfig, optimizer: OptimizerConfig, *, images: int, batch_size: int
) -> Schedule:
    """The schedule in steps.

    Raises:
        ConfigError: neither epochs nor steps.
        DataError: the batch is larger than the data.
    """
    if schedule.epochs is None and schedule.steps is None:
        raise ConfigError(["--epochs or --steps is required: how long to train"])
    return build_schedule(
        per_epoch=steps_per_epoch(images, batch_size),
        epochs=schedule.epochs,
        steps=schedule.steps,
        peak=scaled_rate(optimizer.lr, optimizer.lr_per_512, batch_size),
        warmup=schedule.warmup,
        start_ratio=schedule.start_ratio,
        final_ratio=schedule.final_ratio,
        power=schedule.power if isinstance(schedule, PolynomialScheduleConfig) else None,
    )


def plan_of(
    config: Any, source: Source, view: View | JointView, schedule: Schedule, *, title: str
) -> Plan:
    """The loop's plan from a command's `data`, `optimizer`, `schedule` and `run` sections."""
    return replace(
        plain_plan_of(config, source, view, schedule, title=title),
        clip=config.optimizer.clip,
        micro_batches=config.run.micro_batches,
        stop_at=config.schedule.stop_at,
    )


def plain_plan_of(
    config: Any, source: Source, view: View | JointView, schedule: Schedule, *, title: str
) -> Plan:
    """The same without clipping, micro-batches or an early end, from `data` and `run` alone."""
    run: RunConfig = config.run
    return Plan(
        source=source,
        view=view,
        batch_size=config.data.batch_size,
        schedule=schedule,
        seed=run.seed,
        workers=config.data.workers,
        log_every=run.log_every,
        checkpoint_every=run.checkpoint_every,
        checkpoint_keep=run.checkpoint_keep,
        eval_every=run.eval_every,
        bad_image_limit=config.data.tolerated,
        nonfinite=run.nonfinite,
        nonfinite_limit=run.nonfinite_limit,
        tensorboard=run.tensorboard,
        title=title,
    )


def plain(config: BaseModel) -> dict[str, Any]:
    """A configuration as JSON-ready values."""
    return config.model_dump(mode="json")

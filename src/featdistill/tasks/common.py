"""What several commands do alike: open data, make a runtime, plan a run."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from featdistill.config.sections import DataConfig, OptimizerConfig, RunConfig, ScheduleConfig
from featdistill.core.errors import ConfigError
from featdistill.data.loader import steps_per_epoch
from featdistill.data.open import open_data
from featdistill.data.parts import Data
from featdistill.data.sources import Source
from featdistill.data.views import View
from featdistill.engine.loop import Plan
from featdistill.engine.runtime import Runtime, limit_threads
from featdistill.engine.schedule import Schedule, build_schedule, scaled_rate


def data_of(config: DataConfig, seed: int) -> Data:
    """The data that a configuration names, without its label budget."""
    return open_data(config.path, val=config.val, val_fraction=config.val_fraction, seed=seed)


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
    )


def plan_of(config: Any, source: Source, view: View, schedule: Schedule, *, title: str) -> Plan:
    """The loop's plan from a command's `data`, `optimizer`, `schedule` and `run` sections."""
    run: RunConfig = config.run
    return Plan(
        source=source,
        view=view,
        batch_size=config.data.batch_size,
        schedule=schedule,
        seed=run.seed,
        clip=config.optimizer.clip,
        micro_batches=run.micro_batches,
        workers=config.data.workers,
        log_every=run.log_every,
        checkpoint_every=run.checkpoint_every,
        checkpoint_keep=run.checkpoint_keep,
        eval_every=run.eval_every,
        stop_at=config.schedule.stop_at,
        bad_image_limit=config.data.bad_image_limit,
        tensorboard=run.tensorboard,
        title=title,
    )


def plain(config: BaseModel) -> dict[str, Any]:
    """A configuration as JSON-ready values."""
    return config.model_dump(mode="json")

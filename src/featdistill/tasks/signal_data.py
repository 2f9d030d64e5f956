"""What a distillation is measured on while it runs, and by which score its best state is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from featdistill.config.commands import DistillConfig
from featdistill.core.errors import ConfigError, did_you_mean
from featdistill.data.holdout import HeldOut, hold_out
from featdistill.data.open import open_data
from featdistill.data.parts import Data
from featdistill.data.sources import Source
from featdistill.engine.best import Choice, Mode
from featdistill.tasks.common import schedule_of
from featdistill.tasks.finetune import check_labels

# a large enough slice for the rank of a wide model; never more than a hundredth of the views, so
# that measuring (eleven times, without gradients) costs a few percent of a run at most
_MOST, _LEAST, _VIEWS = 1024, 64, 100

METRICS: dict[str, Mode] = {
    "holdout_loss": "min",
    "holdout_cosine": "max",
    "holdout_explained_variance": "max",
    "student_rank": "max",
    "knn_top1": "max",
}


@dataclass(frozen=True)
class Voters:
    """Labelled images: those that vote, and those that are voted on."""

    train: Source
    held: Source


def held_out_of(config: DistillConfig, data: Data) -> HeldOut:
    """The slice that a configuration wants."""
    batch_size = config.data.batch_size
    steps = schedule_of(
        config.schedule, config.optimizer, images=len(data.train), batch_size=batch_size
    ).steps
    most = min(_MOST, max(_LEAST, steps * batch_size // _VIEWS))
    return hold_out(data, config.signal.holdout, seed=config.run.seed, most=most)


def voters_of(config: DistillConfig) -> Voters | None:
    """The labelled data for kNN, if any."""
    signal = config.signal
    if signal.knn_data is None:
        if signal.knn_labels is not None:
            raise ConfigError(["--signal.knn_labels is of no use without --knn-data"])
        return None
    data = open_data(signal.knn_data)
    train, held, _ = check_labels(data, budget=signal.knn_labels, seed=config.run.seed)
    return Voters(train, held)


def choice_of(config: DistillConfig, held: HeldOut) -> Choice | None:
    """The score that chooses the best state.

    Raises:
        ConfigError: there is no such score, it is not measured, or it is measured on a test part.
    """
    metric = config.run.best
    if metric is None:
        return None
    if metric not in METRICS:
        hint = did_you_mean(metric, METRICS)
        known = ", ".join(METRICS)
        raise ConfigError(
            [f"--best '{metric}'; expected one of {known}" + (f"; {hint}" if hint else "")]
        )
    if metric == "knn_top1":
        if config.signal.knn_data is None:
            raise ConfigError(["--best knn_top1 needs --knn-data, labelled data to score on"])
    elif held.images is None:
        raise ConfigError([f"--best {metric} needs a held-out slice; give --holdout 0.02"])
    elif held.taken_from == "test":
        raise ConfigError(
            [
                f"--best {metric} would choose the student by test images; give --holdout 0.02, "
                "which takes training images"
            ]
        )
    return Choice(metric, METRICS[metric])

"""The fine-tunings of a comparison: each once, kept when done, and counted."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.config.commands import CompareConfig
from featdistill.core.errors import DataError, Interrupted, NonFiniteError, RunError
from featdistill.core.parsing import read_arrays
from featdistill.core.records import read_record, write_record
from featdistill.data.sources import Source, labelled
from featdistill.data.splits import label_budget, split
from featdistill.engine.cost import Spent
from featdistill.engine.runtime import Runtime
from featdistill.engine.schedule import scaled_rate
from featdistill.engine.tracking import duration, say
from featdistill.evaluation.paired import Hits
from featdistill.tasks.compare_rows import Row
from featdistill.tasks.finetune import classification, tune
from featdistill.tasks.finetune_record import score_arrays


@dataclass
class Progress:
    """How far a comparison is.

    Attributes:
        fits: fine-tunings to do; more, if a sweep goes on beyond its grid.
        done: of them.
        anew: of those, in this session.
    """

    fits: int
    done: int = 0
    anew: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def label(self) -> str:
        """`3/18`, of the one that comes next."""
        return f"{self.done + 1}/{self.fits}"

    def left(self) -> str:
        """How long it may still take; empty where there is nothing to tell from, or to do."""
        if not self.anew or self.done >= self.fits:
            return ""
        each = (time.monotonic() - self.began) / self.anew
        return f"; about {duration(each * (self.fits - self.done))} left"

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Say of a stop how far the whole comparison was, and how it goes on."""
        fix = "go on with the same command and --resume"
        try:
            yield
        except Interrupted as stopped:
            raise Interrupted(
                f"{stopped.given}; {self.done} of {self.fits} fine-tunings are done",
                signal_number=stopped.exit_code - 128,
                fix=fix,
            ) from None
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped with {self.done} of {self.fits} fine-tunings done",
                signal_number=2,
                fix=fix,
            ) from None


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    config: CompareConfig
    train: Source
    held: Source
    classes: tuple[str, ...]
    runtime: Runtime
    folder: Path
    progress: Progress

    def rate(self, factor: float) -> float:
        """A multiple of the recipe's learning rate."""
        optimizer = self.config.optimizer
        return factor * scaled_rate(optimizer.lr, optimizer.lr_per_512, self.config.data.batch_size)

    def labels(self, seed: int) -> Source:
        """The training images whose labels a seed may use."""
        budget = self.config.data.labels
        return self.train if budget is None else label_budget(self.train, budget, seed)


@dataclass(frozen=True)
class Fit:
    """One fine-tuning, done.

    Attributes:
        results: as the record has them.
        hits: (n,) whether each held-out image was classified rightly.
    """

    results: dict[str, Any]
    hits: Hits

    @property
    def spent(self) -> Spent:
        """Its cost; energy None where nothing counted it."""
        return Spent(self.results["seconds"], self.results.get("joules"))


def cost_of(fits: list[Fit], lost: list[Spent]) -> dict[str, Any]:
    """What a row's fine-tunings took, those that choose its learning rate among them.

    Args:
        lost: of learning rates under which training diverged.
    """
    spent = Spent()
    for one in [*(fit.spent for fit in fits), *lost]:
        spent += one
    seen = [fit.results.get("images_seen", math.nan) for fit in fits]  # an earlier version: none
    images = None if math.isnan(sum(seen)) else int(sum(seen))
    return {"fits": len(fits) + len(lost), "images_seen": images, **asdict(spent)}


def layer_decay(config: CompareConfig, row: Row) -> float:
    """The recipe's; but layers without knowledge to keep all learn at the full rate."""
    return 1.0 if row.fresh else config.optimizer.layer_decay


def fit_once(
    setting: Setting,
    row: Row,
    name: str,
    *,
    seed: int,
    factor: float,
    train: Source,
    held: Source,
) -> Fit:
    """One fine-tuning, unless its result is already there."""
    config = setting.config
    folder = setting.folder / "rows" / row.name / name
    file = folder / "result.json"
    rate = setting.rate(factor)
    asked = {"row": row.name, "seed": seed, "lr": rate}
    found = _kept(file, held, asked) if config.run.resume else None
    if found is None:
        found = _fit(setting, row, f"{row.title}, {name}", folder, asked, train, held)
        setting.progress.anew += 1
    setting.progress.done += 1
    relative = str(folder.relative_to(setting.folder))
    return Fit({**found.results, "folder": relative}, found.hits)


def _fit(
    setting: Setting,
    row: Row,
    title: str,
    folder: Path,
    asked: dict[str, Any],
    train: Source,
    held: Source,
) -> Fit:
    config = setting.config
    folder.mkdir(parents=True, exist_ok=True)
    job = config.model_copy(
        update={
            "run": config.run.model_copy(update={"seed": asked["seed"], "tensorboard": False}),
            "optimizer": config.optimizer.model_copy(
                update={"lr": asked["lr"], "layer_decay": layer_decay(config, row)}
            ),
        }
    )
    model = row.make(asked["seed"])
    tuned = tune(
        classification(model, job, classes=setting.classes, runtime=setting.runtime),
        job,
        train=train,
        held=held,
        runtime=setting.runtime,
        folder=folder,
        title=f"[{setting.progress.label}] {title}",
    )
    scores = tuned.scores
    assert scores is not None, "compare has no stop_at"
    results = {
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "images_seen": tuned.fit.step * config.data.batch_size,
        "seconds": tuned.fit.seconds,
        "joules": tuned.fit.joules,
    }
    if setting.runtime.first:
        arrays = score_arrays(scores)
        write_record(
            folder / "result.json", "compare-fit", config=asked, results=results, arrays=arrays
        )
        # of many models, the scores stay
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Fit(results, (scores.predictions == scores.labels).numpy())


def _kept(file: Path, held: Source, asked: dict[str, Any]) -> Fit | None:
    """A fine-tuning of an earlier session; None if there is none that is whole.

    Raises:
        DataError: it was scored on other images.
    """
    if not file.is_file():
        return None
    try:
        record = read_record(file, "compare-fit")
        arrays = read_arrays(file.with_suffix(".npz"))
        predictions, labels = arrays["predictions"], arrays["labels"]
        same = record["config"] == asked
        results = dict(record["results"])
    except (RunError, OSError, ValueError, KeyError) as error:
        say(f"note: {file.parent} is done once more, since its record cannot be read ({error})")
        return None
    if not same:
        return None
    if not np.array_equal(labels, labelled(held, "scoring")):
        raise DataError(
            f"the images that are scored are not those of the earlier session ({file.parent})",
            fix="put the data back, or begin a new run in another --out",
        )
    return Fit(results, predictions == labels)


@dataclass
class Sweep:
    """The learning rates that a row tries, on a held-out part of the training labels.

    Attributes:
        trials: what the record says of each.
        lost: the cost of those that diverged.
    """

    trials: list[dict[str, Any]] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)
    lost: list[Spent] = field(default_factory=list)

    def best(self) -> float:
        """The factor of the best trial; of equal ones the first tried.

        Raises:
            NonFiniteError: every one diverged.
        """
        whole = [trial for trial in self.trials if trial["val_top1"] is not None]
        if not whole:
            tried = ", ".join(f"{trial['lr']:.2g}" for trial in self.trials)
            raise NonFiniteError(
                f"training diverged under every learning rate tried ({tried})",
                fix="give smaller --lrs",
            )
        return float(max(whole, key=lambda trial: trial["val_top1"])["factor"])

    def beyond(self) -> float | None:
        """The factor past the end of the grid that the best one is at; None if it is within."""
        tried = sorted(trial["factor"] for trial in self.trials)
        best = self.best()
        if best == tried[-1]:
            return best * best / tried[-2]
        return best * best / tried[1] if best == tried[0] else None


def sweep(setting: Setting, row: Row) -> Sweep:
    """Try the learning rates; past the outermost one too, where that is the best."""
    config, found = setting.config, Sweep()
    if len(config.lrs) == 1:
        return found
    for factor in config.lrs:
        _try(setting, row, found, factor)
    for _ in range(config.extend_lrs):
        further = found.beyond()
        if further is None:
            break
        setting.progress.fits += 1
        _try(setting, row, found, further)
    return found


def _try(setting: Setting, row: Row, found: Sweep, factor: float) -> None:
    seed, rate = setting.config.run.seed, setting.rate(factor)
    rest, chosen_on = split(setting.labels(seed), setting.config.sweep_fraction, seed)
    name = f"lr-{rate:.4g}"
    trial: dict[str, Any] = {"factor": factor, "lr": rate, "val_top1": None}
    began = time.monotonic()
    try:
        fit = fit_once(setting, row, name, seed=seed, factor=factor, train=rest, held=chosen_on)
    except NonFiniteError as error:
        say(f"note: {row.title} diverged at a learning rate of {rate:.2g} ({error})")
        found.lost.append(Spent(time.monotonic() - began, None))
        shutil.rmtree(setting.folder / "rows" / row.name / name / "checkpoints", ignore_errors=True)
        setting.progress.done += 1
    else:
        trial |= {"val_top1": fit.results["top1"], "folder": fit.results["folder"]}
        found.fits.append(fit)
    found.trials.append(trial)

"""The `compare` record and what lies beside it, read once into typed, immutable values.

All accuracies are shares in 0..1; differences are shares too, of the same images.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from featdistill.core.errors import RunError
from featdistill.core.records import read_record
from featdistill.engine.rundir import read_metrics
from featdistill.report.style import FURTHER_ROLES, OWN_ROLES


class _Part(BaseModel):
    """Immutable; keys that the report does not show are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Data(_Part):
    """Which images were used for what; `labels` is the label budget as given, None: all."""

    name: str
    train_images: int
    labels: str | int | None = None
    labelled_images: int
    test_images: int
    classes: int


class Recipe(_Part):
    """What all rows share; `lr` is the recipe's own, before each row chose its multiple."""

    steps: int
    epochs: float
    batch_size: int
    image_size: int
    layer_decay: float | None = None
    lr: float


class Model(_Part):
    """One model of the comparison."""

    spec: str
    architecture: str
    parameters: int
    image_size: int
    width: int
    grid: tuple[int, int]
    weights: str


class Trial(_Part):
    """One learning rate, scored on held-out training labels; None where training diverged."""

    lr: float
    val_top1: float | None
    folder: str = ""


class Run(_Part):
    """One scored fine-tuning."""

    seed: int
    top1: float
    top5: float | None = None
    seconds: float | None = None
    folder: str


class Spread(_Part):
    """Mean over n seeds and their standard deviation, None where n = 1."""

    mean: float
    std: float | None = None
    n: int


class Spending(_Part):
    """Images, time and energy, each None where it is not known."""

    images_seen: int | None = None
    seconds: float | None = None
    joules: float | None = None


class Stage(Spending):
    """One run on the way to a model: `pretrain`, `distill` or `finetune`."""

    kind: str
    name: str


class Cost(_Part):
    """What a row took: the run that made its model first, then those of its teachers.

    `unknown` names models on that way of which there is no record.
    """

    made: tuple[Stage, ...] = ()
    unknown: tuple[str, ...] = ()
    finetuning: Spending = Spending()

    @property
    def making(self) -> Spending | None:
        """Of the model itself; None where there is no record, all zero for fresh weights."""
        if self.made:
            return self.made[0]
        return None if self.unknown else Spending(images_seen=0, seconds=0, joules=0)

    @property
    def images_before(self) -> int | None:
        """Images seen in the making of its teachers; None where that is not known in full."""
        seen = [stage.images_seen for stage in self.made[1:]]
        return None if self.unknown or None in seen else sum(n for n in seen if n is not None)


class SegmentRun(_Part):
    """One scored segmentation."""

    seed: int
    miou: float


class RowSegmentation(_Part):
    """A row's segmentations, one for each seed."""

    runs: tuple[SegmentRun, ...] = Field(min_length=1)
    miou: Spread


class Segmentation(_Part):
    """What the rows' segmentations share; `prior_miou` is of the guess by position alone."""

    data: str
    test_images: int
    prior_miou: float
    head: str


class Row(_Part):
    """One starting point (`teacher`, `student`, others, `scratch`) with all its runs."""

    name: str
    title: str
    model: Model
    sweep: tuple[Trial, ...] = ()
    lr: float
    runs: tuple[Run, ...]
    top1: Spread
    knn: Mapping[int, float] | None = None
    cost: Cost | None = None
    segmentation: RowSegmentation | None = None

    @property
    def at_edge(self) -> bool:
        """Whether the chosen learning rate is the smallest or largest of those tried."""
        rates = [trial.lr for trial in self.sweep]
        return len(rates) > 1 and self.lr in (min(rates), max(rates))


class Difference(Spread):
    """Top-1 of one row minus another's, paired by seed.

    `images_interval` counts the sampling of test images alone, `interval` that of seeds too.
    """

    of: str
    minus: str
    per_seed: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    images_interval: tuple[float, float] | None = None
    resamples: int | None = None

    @property
    def shown(self) -> tuple[float, float] | None:
        """The widest interval that there is."""
        return self.interval or self.images_interval

    @property
    def wins(self) -> int:
        """Under how many seeds `of` scored higher."""
        return sum(d > 0 for d in self.per_seed)


class Comparison(_Part):
    """The `results` of a `compare` record."""

    data: Data
    recipe: Recipe
    rows: tuple[Row, ...] = Field(min_length=1)
    segmentation: Segmentation | None = None
    differences: tuple[Difference, ...] = ()
    verdict: str
    seconds: float

    def row(self, name: str) -> Row | None:
        """The row of that name, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def title(self, name: str) -> str:
        """The title of a row; its name where there is no such row."""
        row = self.row(name)
        return row.title if row else name

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed that scored a run, in the order of the first row."""
        return tuple(dict.fromkeys(run.seed for row in self.rows for run in row.runs))

    @property
    def shown_k(self) -> int | None:
        """The kNN neighbourhood to show: of those that all rows with kNN have, that nearest 20.

        20 is the customary one (DINO); one k for all rows, so that none may choose its best.
        """
        known = [set(row.knn) for row in self.rows if row.knn]
        common = set.intersection(*known) if known else set()
        return min(common, key=lambda k: (abs(k - 20), k), default=None)

    @property
    def against_teacher(self) -> tuple[Difference, ...]:
        """The differences of other rows to the teacher."""
        return tuple(one for one in self.differences if one.minus == "teacher" and one.per_seed)

    def role(self, name: str) -> str:
        """The colour role of a row: its own, or for further rows the next that is free."""
        if name in OWN_ROLES:
            return name
        others = [row.name for row in self.rows if row.name not in OWN_ROLES]
        place = others.index(name) if name in others else 0
        return FURTHER_ROLES[place % len(FURTHER_ROLES)]

    def to_teacher(self, row: Row) -> Difference | None:
        """A row minus the teacher; None for the teacher, or where there is none.

        The paired difference where the record has it; else that of the means, without a spread.
        """
        teacher = self.row("teacher")
        if teacher is None or row.name == "teacher":
            return None
        for found in self.differences:
            if (found.of, found.minus) == (row.name, "teacher"):
                return found
        mean = row.top1.mean - teacher.top1.mean
        return Difference(of=row.name, minus="teacher", mean=mean, n=row.top1.n)

    def miou_to_teacher(self, row: Row) -> tuple[float, float | None] | None:
        """(mean, std) over seeds of a row's mIoU minus the teacher's; None for the teacher."""
        teacher = self.row("teacher")
        if teacher is None or row.name == "teacher":
            return None
        if teacher.segmentation is None or row.segmentation is None:
            return None
        base = {run.seed: run.miou for run in teacher.segmentation.runs}
        each = [run.miou - base[run.seed] for run in row.segmentation.runs if run.seed in base]
        if not each:
            return None
        return statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else None


def parse_results(results: Mapping[str, Any]) -> Comparison:
    """The `results` of a `compare` record.

    Raises:
        RunError: a part is absent or of another type; says the first such.
    """
    try:
        return Comparison.model_validate(results)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(
            f"the comparison's record is not complete (results.{where}: {first['msg']})",
            fix="run `featdistill compare` again",
        ) from None


@dataclass(frozen=True)
class Series:
    """A measured quantity over training steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


def series(metrics: list[dict[str, Any]], key: str) -> Series:
    """The finite values of `key` in the lines of a metrics.jsonl; maybe none."""
    found: list[tuple[int, float]] = []
    for line in metrics:
        step, value = (line.get("step"), line.get(key)) if isinstance(line, dict) else (None, None)
        if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
            found.append((step, float(value)))
    return Series(tuple(s for s, _ in found), tuple(v for _, v in found))


@dataclass(frozen=True)
class Making:
    """How one of the two models came to be, as far as its files were kept.

    Attributes:
        name: `teacher` or `student`.
        kind: `distill` or `pretrain`.
        curves: label -> series, at least one.
        results: the `results` of its record; empty where there is none.
    """

    name: str
    kind: str
    curves: Mapping[str, Series]
    results: Mapping[str, Any]


CURVES = {
    "distill": {"loss": "loss", "cosine": "cosine"},
    "pretrain": {"loss": "loss", "agreement": "agreement"},
}
# what a run measures besides, if it has images for it
SIGNAL = {
    "loss on held-out images": "holdout_loss",
    "variance of the target explained, held-out images": "holdout_explained_variance",
    "effective rank of the features, held-out images": "student_rank",
    "nearest neighbours, top-1 as a share": "knn_top1",
}


def read_making(folder: Path, name: str) -> Making | None:
    """How `name` came to be, from `folder`/inputs; None where that was not kept."""
    source = folder / "inputs" / name
    metrics = read_metrics(source / "metrics.jsonl")
    for kind, curves in CURVES.items():
        record = _record_or_none(source / f"{kind}.json", kind)
        found = {label: series(metrics, key) for label, key in curves.items()}
        found = {label: curve for label, curve in found.items() if len(curve.steps) > 1}
        if found and (record is not None or len(found) == len(curves)):
            more = {label: series(metrics, key) for label, key in SIGNAL.items()}
            found |= {label: curve for label, curve in more.items() if len(curve.steps) > 1}
            results = record.get("results") if record else None
            return Making(name, kind, found, results if isinstance(results, dict) else {})
    return None


# what neither XML nor a font has: control characters, halves of characters (as of a file's name
# that is no UTF-8), and code points that stand for none
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def showable(value: Any) -> Any:
    """A record's values with U+FFFD for each character in their texts that no page can show."""
    if isinstance(value, str):
        return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {showable(k): showable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [showable(v) for v in value]
    return value


def _record_or_none(file: Path, kind: str) -> dict[str, Any] | None:
    """A record that the page can do without."""
    try:
        return showable(read_record(file, kind))
    except RunError:
        return None

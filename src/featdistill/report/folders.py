"""Which records lie in the folders that a report is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.core.errors import ConfigError, RunError
from featdistill.core.parsing import read_arrays
from featdistill.core.records import read_record
from featdistill.engine.rundir import read_metrics
from featdistill.report.comparison import CURVES, SIGNAL, Series, series, showable

_RUNS = ("pretrain", "distill", "finetune", "segment")
# label -> key in metrics.jsonl
_CURVES = {
    **CURVES,
    "finetune": {"loss": "loss", "top-1 on held-out images": "val_top1"},
    "segment": {"loss": "main_loss", "mIoU on held-out images": "val_miou"},
}
DIAGNOSES = ("probe", "diagnose-attention", "diagnose-features", "landscape", "curvature")


@dataclass(frozen=True)
class Found:
    """One record.

    Attributes:
        file: where it lies.
        kind: `distill`, `compare`, `diagnose-features`, ...
        record: the whole of it.
    """

    file: Path
    kind: str
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, as the page calls it."""
        return self.file.resolve().parent.name

    @property
    def results(self) -> Mapping[str, Any]:
        """What was found; empty if the record lacks it."""
        results = self.record.get("results")
        return results if isinstance(results, dict) else {}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays beside it; none where there is no such file."""
        file = self.file.with_suffix(".npz")
        if not file.is_file():
            return {}
        try:
            return read_arrays(file)
        except (OSError, ValueError) as error:
            raise RunError(f"'{file}' is not a file of arrays ({error})") from None

    @property
    def curves(self) -> dict[str, Series]:
        """What a run logged, by label; those with two points or more."""
        metrics = read_metrics(self.file.parent / "metrics.jsonl")
        keys = _CURVES.get(self.kind, {}) | (SIGNAL if self.kind == "distill" else {})
        found = {label: series(metrics, key) for label, key in keys.items()}
        return {label: one for label, one in found.items() if len(one.steps) > 1}


@dataclass(frozen=True)
class Material:
    """What a report is made of.

    Attributes:
        comparison: at most one.
        runs: pre-training, distillations, fine-tunings and segmentations, in the order given.
        diagnoses: in the page's order.
    """

    comparison: Found | None
    runs: tuple[Found, ...]
    diagnoses: tuple[Found, ...]


def gather(folders: Sequence[Path]) -> Material:
    """Every record in these folders (below them only the students of a distillation of several).

    Raises:
        RunError: a folder is absent or has no record; a record cannot be read.
        ConfigError: two comparisons, whose verdicts one page cannot join.
    """
    found = [one for folder in folders for one in _of(folder)]
    compared = [one for one in found if one.kind == "compare"]
    if len(compared) > 1:
        names = " and ".join(f"'{one.file.parent}'" for one in compared)
        raise ConfigError([f"{names} are two comparisons; expected one for each report"])
    return Material(
        compared[0] if compared else None,
        tuple(one for one in found if one.kind in _RUNS),
        tuple(one for kind in DIAGNOSES for one in found if one.kind == kind),
    )


def _of(folder: Path) -> list[Found]:
    if not folder.is_dir():
        raise RunError(f"no folder '{folder}'", fix="give the --out of a run, or several")
    known = ("compare", *_RUNS, *DIAGNOSES)
    files = [folder / f"{kind}.json" for kind in known]
    found = [Found(f, f.stem, showable(read_record(f, f.stem))) for f in files if f.is_file()]
    if not found:
        students = sorted(file.parent for file in folder.glob("*/distill.json"))
        found = [record for student in students for record in _of(student)]
    if not found:
        begun = (folder / "config.yaml").is_file()
        raise RunError(
            f"nothing to report in '{folder}'",
            expected=f"one of {', '.join(f.name for f in files)}",
            fix="finish that run first (--resume)" if begun else None,
        )
    return found


def as_json(record: Mapping[str, Any]) -> str:
    """A record's configuration, for people."""
    return json.dumps(record.get("config") or {}, indent=2, ensure_ascii=False)

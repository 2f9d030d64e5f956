"""What a probe found: under one seed, of one model, and as records keep it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featdistill.core.errors import RunError
from featdistill.core.parsing import read_arrays
from featdistill.core.records import read_record, write_record
from featdistill.evaluation.classification import Scores, accuracy_by_class
from featdistill.evaluation.linear import Linear

_NUMBERS = ("top1", "top5", "loss", "calibration_error")
_FILE = "probe-fit.json"


@dataclass(frozen=True)
class SeedProbe:
    """A linear probe under one seed.

    Attributes:
        head: of the features as they are.
        scores: on the held-out images.
        facts: how it came about: the chosen setting, the grid, steps; ready for JSON.
        labelled: which training images it learnt from, if a budget chose them.
    """

    seed: int
    head: Linear
    scores: Scores
    facts: Mapping[str, Any]
    labelled: np.ndarray | None = None

    @property
    def results(self) -> dict[str, Any]:
        """For a record."""
        numbers = {name: getattr(self.scores, name) for name in _NUMBERS}
        mean = self.scores.mean_by_class
        return {"seed": self.seed, **numbers, "mean_by_class": mean, **self.facts}


@dataclass(frozen=True)
class ModelProbe:
    """A model's linear probes, seed by seed.

    Attributes:
        channels: of the vector that was classified.
    """

    channels: int
    runs: tuple[SeedProbe, ...]

    def spread(self, name: str) -> dict[str, Any]:
        """Mean, standard deviation (None of a single seed) and number of a score over the seeds."""
        values = [float(getattr(run.scores, name)) for run in self.runs]
        std = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.fmean(values), "std": std, "n": len(values)}

    @property
    def results(self) -> dict[str, Any]:
        """For a record."""
        return {
            "channels": self.channels,
            "runs": [run.results for run in self.runs],
            **{name: self.spread(name) for name in _NUMBERS},
        }


def write_fit(folder: Path, run: SeedProbe) -> None:
    """Keep what one seed found, so that a resumed command need not find it again."""
    arrays = {
        "weight": run.head.weight.numpy(),
        "bias": run.head.bias.numpy(),
        "predictions": run.scores.predictions.numpy(),
        "labels": run.scores.labels.numpy(),
    }
    if run.labelled is not None:
        arrays["labelled_images"] = run.labelled
    config = {"seed": run.seed}
    write_record(folder / _FILE, "probe-fit", config=config, results=run.results, arrays=arrays)


def read_fit(folder: Path) -> SeedProbe | None:
    """What an earlier run found under a seed; None if it did not come to that."""
    file = folder / _FILE
    if not file.is_file():
        return None
    results = dict(read_record(file, "probe-fit")["results"])
    try:
        arrays = read_arrays(file.with_suffix(".npz"))
        head = Linear(torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"]))
        predictions, labels = (torch.from_numpy(arrays[n]) for n in ("predictions", "labels"))
        scores = Scores(
            **{name: results.pop(name) for name in _NUMBERS},
            by_class=accuracy_by_class(predictions, labels, len(head.bias)),
            predictions=predictions,
            labels=labels,
        )
        del results["mean_by_class"]
        return SeedProbe(results.pop("seed"), head, scores, results, arrays.get("labelled_images"))
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"'{file}' or what lies beside it is damaged ({error})", fix=f"delete '{folder}'"
        ) from None


def arrays_of(probes: Sequence[ModelProbe]) -> dict[str, np.ndarray]:
    """Of all models and seeds: `predictions` (models, seeds, images), `labels` (images,), and
    `labelled_images` (seeds, labels) under a budget; for paired comparisons."""
    runs = probes[0].runs
    arrays = {
        "predictions": np.stack([[r.scores.predictions.numpy() for r in p.runs] for p in probes]),
        "labels": runs[0].scores.labels.numpy(),
    }
    labelled = [run.labelled for run in runs if run.labelled is not None]
    if labelled:
        arrays["labelled_images"] = np.stack(labelled)
    return arrays

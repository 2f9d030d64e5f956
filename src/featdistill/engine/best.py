"""The best state of a run by one score, kept beside the newest checkpoints.

    checkpoints/best/step-00000400/    manifest.json (metric, mode, value) and model.safetensors

It is written as every checkpoint is, so a kill at any instant leaves the last one whole. The value
to beat is in its manifest: a resumed run goes on from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from featdistill.core.errors import RunError
from featdistill.engine.checkpoint import Checkpoint, Checkpoints, model_state
from featdistill.engine.tracking import say
from featdistill.engine.writer import Writer

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Choice:
    """The score that decides, and whether a low or a high one is good."""

    metric: str
    mode: Mode

    def beats(self, value: float, other: float) -> bool:
        """Whether `value` is strictly better; what is no number never is."""
        if not math.isfinite(value):
            return False
        return value < other if self.mode == "min" else value > other


class Best:
    """Keeps the best state.

    Args:
        folder: where it is.
        resume: go on from the value there, if it is of the same score; else it is forgotten.
        writer: writes in the background; None: `offer` itself does.
    """

    def __init__(
        self, folder: Path, choice: Choice, *, resume: bool, writer: Writer | None = None
    ) -> None:
        self.choice, self._writer = choice, writer
        self.value = math.inf if choice.mode == "min" else -math.inf
        # the others go by `_keep`, not by age
        self._store = Checkpoints(folder, keep=1_000_000, writer=writer)
        found = read_best(folder) if resume else None
        if found is not None and found.manifest.get("metric") == choice.metric:
            self.value = float(found.manifest["value"])

    def offer(self, step: int, scores: Mapping[str, float], objective: nn.Module) -> bool:
        """Keep the objective's state if its score is better than all before; whether it was.

        Raises:
            RunError: the disk refuses; the best before is intact. With a writer, that one says so.
        """
        value = scores.get(self.choice.metric, math.nan)
        if not self.choice.beats(value, self.value):
            return False
        files = {"model": model_state(objective)}
        if self._writer is None:
            self._keep(step, files, value)
        else:
            self._writer.add(lambda: self._keep(step, files, value))
        self.value = value
        return True

    def _keep(self, step: int, files: Mapping[str, Mapping[str, Tensor]], value: float) -> None:
        """Write a state; the one before goes only then."""
        facts = {"metric": self.choice.metric, "mode": self.choice.mode, "value": value}
        self._store.save(step, files, facts)
        for old in self._store.steps():
            if old != step:
                self._store.delete(old)


def read_best(folder: Path) -> Checkpoint | None:
    """The best state in `checkpoints/best`; None where there is none.

    A kill between a new best and the end of the old leaves both: the better is taken.
    """
    store, whole = Checkpoints(folder), []
    for step in store.steps():
        try:
            whole.append(store.read(step))
        except RunError as error:
            say(f"the best state so far is lost: {error}")
    if not whole:
        return None
    newest = whole[-1].manifest
    same = [c for c in whole if c.manifest.get("metric") == newest.get("metric")]
    sign = 1 if newest.get("mode") == "max" else -1
    return max(same, key=lambda c: (sign * float(c.manifest["value"]), c.step))

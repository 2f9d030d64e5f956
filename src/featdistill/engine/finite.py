"""Steps whose loss, gradient or teacher was no number: noticed without waiting, written down."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from featdistill.core.errors import NonFiniteError, RunError
from featdistill.core.parsing import parse_json
from featdistill.core.types import Batch
from featdistill.data.sources import Source

NonFinitePolicy = Literal["stop", "skip"]
_GRADIENT = "gradient"


@dataclass(frozen=True)
class NonFinite:
    """What one process saw of a step that was no number.

    Attributes:
        step: the step's number, from 1, as in the log.
        what: `loss`, what the loss was made of (`teacher`), or `gradient` if only that.
        indices: of the images of the micro-batches that it happened in.
        images: their names.
    """

    step: int
    rank: int
    what: tuple[str, ...]
    indices: tuple[int, ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class _Watched:
    """A step's values on their way from the device."""

    step: int
    values: Tensor
    arrived: Any  # a CUDA event; None where there is nothing to wait for
    names: Sequence[str]
    parts: Sequence[Batch]


class FiniteWatch:
    """Looks at a few values of each step, once they have come from the device by themselves.

    Args:
        source: whose images are named.
        rank: of this process.
    """

    def __init__(self, source: Source, rank: int) -> None:
        self._source, self._rank = source, rank
        self._pending: deque[_Watched] = deque()
        self._found: list[NonFinite] = []

    def look(
        self,
        step: int,
        parts: Sequence[Batch],
        values: Sequence[Mapping[str, Tensor]],
        norm: Tensor,
    ) -> None:
        """After a step.

        Args:
            step: its number, from 1.
            parts: its micro-batches; of each, `values` by name.
            norm: of the gradient.
        """
        names = list(values[0])
        packed = torch.stack([*(v[n].float() for v in values for n in names), norm.float()])
        arrived = None
        if packed.device.type == "cuda":
            there = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            packed = there.copy_(packed, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        # the images are not kept: only their numbers are wanted
        bare = [Batch((), None, part.indices, part.positions) for part in parts]
        self._pending.append(_Watched(step, packed, arrived, names, bare))

    @property
    def any(self) -> bool:
        """Whether some step was no number, as far as is known by now."""
        while self._pending and (
            self._pending[0].arrived is None or self._pending[0].arrived.query()
        ):
            self._judge(self._pending.popleft())
        return bool(self._found)

    def take(self) -> list[NonFinite]:
        """What was found since the last call; waits for the device."""
        while self._pending:
            watched = self._pending.popleft()
            if watched.arrived is not None:
                watched.arrived.synchronize()
            self._judge(watched)
        found, self._found = self._found, []
        return found

    def _judge(self, watched: _Watched) -> None:
        *values, norm = watched.values.tolist()
        wide = len(watched.names)
        what, indices = dict[str, None](), list[int]()
        for place, part in enumerate(watched.parts):
            mine = values[place * wide : (place + 1) * wide]
            bad = [n for n, v in zip(watched.names, mine, strict=True) if not math.isfinite(v)]
            if bad:
                what |= dict.fromkeys(bad)
                indices += part.indices.tolist()
        if not what:
            if math.isfinite(norm):
                return
            what = {_GRADIENT: None}
            indices = [i for part in watched.parts for i in part.indices.tolist()]
        names = tuple(self._source.identify(i) for i in indices)
        row = NonFinite(watched.step, self._rank, tuple(what), tuple(indices), names)
        self._found.append(row)


class NonFiniteSteps:
    """The list of such steps, nonfinite.jsonl, and the run's end where there are too many.

    Args:
        file: where they are listed.
        policy: `stop` at the first one, or `skip` up to `limit` of them.
        limit: how many steps of the whole run may be skipped.
        resume_at: forget those of later steps, which a resumed run takes again.

    Raises:
        RunError: the list of an earlier session is damaged, or cannot be written.
    """

    def __init__(
        self, file: Path, *, policy: NonFinitePolicy, limit: int, resume_at: int = 0
    ) -> None:
        self.file, self.policy, self.limit = file, policy, limit
        self._steps: set[int] = set()
        if not file.is_file():
            return
        whole = file.read_bytes()
        lines = whole[: whole.rfind(b"\n") + 1].splitlines(keepends=True)
        try:
            steps = [int(parse_json(line)["step"]) for line in lines]
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f"'{file}' is damaged", fix="delete it: the steps are counted again"
            ) from None
        kept = [(n, line) for n, line in zip(steps, lines, strict=True) if n <= resume_at]
        self._steps = {n for n, _ in kept}
        if not kept:
            file.unlink()
            return
        begun = file.with_name(f".{file.name}.tmp")  # a kill meanwhile loses no line
        self._write(begun, b"".join(line for _, line in kept), "wb")
        os.replace(begun, file)

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, rows: Iterable[NonFinite]) -> list[str]:
        """Note what all processes saw.

        Returns:
            What to say of it, a line for each step.

        Raises:
            NonFiniteError: the run is to stop.
        """
        rows = sorted(_causes(list(rows)), key=lambda row: (row.step, row.rank))
        if not rows:
            return []
        text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        self._write(self.file, text.encode(), "ab")
        self._steps |= {row.step for row in rows}
        said = {
            row.step: f"step {row.step} was not finite ({', '.join(row.what)})"
            for row in reversed(rows)
        }
        if self.policy == "stop" or len(self._steps) > self.limit:
            stop = self.policy == "stop"
            many = "" if stop else f", and {len(self._steps)} steps were so"
            raise NonFiniteError(
                f"{said[rows[0].step]}{many}; the weights never saw it, and its images are in "
                f"'{self.file}'",
                expected=None if stop else f"at most {self.limit} (--run.nonfinite_limit)",
                fix="look at those images and the teacher's features, try --precision float32 or "
                "a smaller --lr" + (", or go on with --resume --run.nonfinite skip" * stop),
            )
        return [
            f"WARNING: {said[n]}: skipped ({len(self._steps)} of at most {self.limit}; its images "
            f"are in '{self.file}')"
            for n in sorted(said)
        ]

    def _write(self, file: Path, data: bytes, mode: Literal["wb", "ab"]) -> None:
        try:
            with open(file, mode) as out:
                out.write(data)
        except OSError as error:
            raise RunError(
                f"cannot write '{file}' ({error.strerror or error})",
                fix="make room, then go on with the same command and --resume",
            ) from None


def _causes(rows: list[NonFinite]) -> list[NonFinite]:
    """Without those who saw only the gradient of a step whose loss another process had."""
    known = {row.step for row in rows if row.what != (_GRADIENT,)}
    return [row for row in rows if row.what != (_GRADIENT,) or row.step not in known]

"""Processes agree on what to do after a step, whichever of them has cause to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featdistill.engine.runtime import Runtime


class Vote:
    """Each process says a few numbers after each step, and learns the largest of all processes'.

    A step's vote is counted while the next one is computed, on the CPU: nobody waits for a device.

    Args:
        count: how many numbers.
    """

    def __init__(self, runtime: Runtime, count: int) -> None:
        self._count = count
        self._group: Any = None
        self._pending: tuple[Tensor, Any] | None = None
        if runtime.share.world > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def cast(self, *numbers: int) -> tuple[int, ...]:
        """After each step: this process's numbers, 0 or more.

        Returns:
            The largest numbers; of several processes, those of the step before.
        """
        assert len(numbers) == self._count
        if self._group is None:
            return numbers
        found = self.close()
        vote = torch.tensor(numbers)
        work = torch.distributed.all_reduce(
            vote, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        self._pending = vote, work
        return found

    def close(self) -> tuple[int, ...]:
        """Wait for the votes that are out."""
        if self._pending is None:
            return (0,) * self._count
        vote, work = self._pending
        self._pending = None
        work.wait()
        return tuple(vote.tolist())

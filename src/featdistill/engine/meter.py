"""What a training loop counts between two log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from featdistill.engine.runtime import Runtime


class Meter:
    """Sums on the device over the steps that counted; only `take` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited = 0.0
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        # images and steps that counted, and the sum of their gradients' norms
        self._counted = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._images = self._steps = self._before = 0
        self.waited = 0.0
        self._since = time.monotonic()

    def add(self, sums: Mapping[str, Tensor], images: int, norm: Tensor, bad: Tensor) -> None:
        """A step.

        Args:
            sums: of values over its images.
            norm: of its gradient.
            bad: on the device, 1 if it does not count.
        """
        good = bad == 0
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + torch.where(good, value, 0.0)
        one = torch.ones_like(norm)
        self._counted += torch.where(good, torch.stack([images * one, one, norm]), 0.0)
        self._images += images
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leave some time out of the speed."""
        self._since += seconds

    def state(self, runtime: Runtime) -> dict[str, Tensor]:
        """The sums since the last log line, over all processes, for a checkpoint."""
        world = runtime.share.world
        sums = {f"sum/{name}": value.clone() for name, value in self._sums.items()}
        counted = self._counted.clone()
        counted[0] *= world
        if world > 1:
            sums = {name: runtime.sum(value) for name, value in sums.items()}
        counts = torch.tensor([self._images * world, self._steps], dtype=torch.float64)
        return {"counts": counts, "counted": counted, **sums}

    def restore(self, state: Mapping[str, Tensor], runtime: Runtime) -> None:
        """Go on from such sums, so that the next line says what it would have said."""
        world = runtime.share.world  # which may be another than it was
        images, steps = state["counts"].tolist()
        self._images = self._before = int(images) // world
        self._steps = int(steps)
        if "counted" in state:
            self._counted = state["counted"].to(self.device, copy=True)
        else:  # a checkpoint of an earlier version, whose steps all counted
            self._counted[:] = torch.tensor([images, steps, float(state["norms"])])
        self._counted[0] /= world
        self._sums = {
            name.removeprefix("sum/"): value.to(self.device) / world
            for name, value in state.items()
            if name.startswith("sum/")
        }

    def take(self, runtime: Runtime) -> tuple[dict[str, float], float, float]:
        """Means since the last call, the share of time spent waiting, and images a second.

        Steps that did not count are no part of the means, but their number is; without any that
        counted there are no means.
        """
        world, names = runtime.share.world, list(self._sums)
        images, steps, norms = self._counted.tolist()  # the same in all processes
        values: dict[str, float] = {}
        if steps:
            packed = torch.stack([self._sums[n].float() for n in names]) / images
            means = (runtime.sum(packed) / world).tolist()
            values = dict(zip(names, means, strict=True)) | {"grad_norm": norms / steps}
        if steps < self._steps:
            values["skipped_steps"] = self._steps - steps
        elapsed = max(1e-9, time.monotonic() - self._since)
        speed = (self._images - self._before) * world / elapsed
        waiting = min(1.0, self.waited / elapsed)
        self._reset()
        return values, waiting, speed

"""What a training loop counts between two log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from featdistill.core.errors import NonFiniteError
from featdistill.engine.runtime import Runtime


class Meter:
    """Sums on the device; only `take` and `check` wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited = 0.0
        self._reset()
        self._bad = torch.zeros((), device=device)

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._images = self._before = 0.0
        self._norms = torch.zeros((), device=self.device)
        self._steps = 0
        self.waited = 0.0
        self._since = time.monotonic()

    def add(self, total: Tensor, parts: Mapping[str, Tensor], images: float) -> None:
        for name, value in {"loss": total, **parts}.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach() * images
        self._images += images

    def observe(self, norm: Tensor, bad: Tensor) -> None:
        self._norms += norm
        self._bad += bad
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leave some time out of the speed."""
        self._since += seconds

    def state(self, runtime: Runtime) -> dict[str, Tensor]:
        """The sums since the last log line, as means over processes, for a checkpoint."""
        sums = {f"sum/{name}": value for name, value in self._sums.items()}
        if runtime.share.world > 1:
            sums = {k: runtime.sum(v.clone()) / runtime.share.world for k, v in sums.items()}
        counts = torch.tensor([self._images, self._steps], dtype=torch.float64)
        return {"counts": counts, "norms": self._norms.clone(), **sums}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such sums, so that the next line says what it would have said."""
        self._images, steps = state["counts"].tolist()
        self._steps, self._before = int(steps), self._images
        self._norms = state["norms"].to(self.device)
        self._sums = {
            name.removeprefix("sum/"): value.to(self.device)
            for name, value in state.items()
            if name.startswith("sum/")
        }

    def check(self) -> None:
        """Raise NonFiniteError if a gradient was no number since the last look."""
        count = int(self._bad.item())
        if count:
            raise NonFiniteError(
                f"the loss or a gradient was not finite in {count} of the last steps; the weights "
                "were left as they were before",
                fix="try a smaller --lr, --precision float32, or look at the teacher's features",
            )

    def take(self, runtime: Runtime) -> tuple[dict[str, float], float, float]:
        """Means since the last call, the share of time spent waiting, and images a second."""
        self.check()
        names = list(self._sums)
        packed = torch.stack([self._sums[n].float() for n in names]) / self._images
        means = (runtime.sum(packed) / runtime.share.world).tolist()
        values = dict(zip(names, means, strict=True))
        values["grad_norm"] = float(self._norms) / max(1, self._steps)
        elapsed = max(1e-9, time.monotonic() - self._since)
        speed = (self._images - self._before) * runtime.share.world / elapsed
        waiting = min(1.0, self.waited / elapsed)
        self._reset()
        return values, waiting, speed

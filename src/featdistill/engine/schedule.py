"""How long a run is, and its learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine or a polynomial, by step.

    Attributes:
        steps: optimiser steps of the whole run.
        warmup: of them, steps of linear warm-up.
        peak, start, final: learning rates.
        power: of the polynomial (1: a line) from peak to final rate; None: a cosine.
    """

    steps: int
    warmup: int
    peak: float
    start: float
    final: float
    power: float | None = None

    def rate(self, step: int, *, scale: float = 1.0) -> float:
        """Learning rate of step 0, 1, ..., `steps` - 1.

        Args:
            scale: of the peak alone (layer decay): the first and the last rate are everybody's, as
                in the official code (optimizer.py and lr_scheduler.py, with timm 0.4.12), even
                where the scaled peak is below them.
        """
        peak = self.peak * scale
        if step < self.warmup:
            return self.start + (peak - self.start) * step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.power is not None:
            left: float = (1 - progress) ** self.power
        else:
            left = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final + (peak - self.final) * left


def build_schedule(
    *,
    per_epoch: int,
    epochs: float | None,
    steps: int | None,
    peak: float,
    warmup: float,
    start_ratio: float,
    final_ratio: float,
    power: float | None = None,
) -> Schedule:
    """A schedule from epochs or steps and from ratios to the peak rate.

    Args:
        per_epoch: steps in an epoch.
        warmup: share of the steps.
        start_ratio, final_ratio: first and last rate over the peak.
        power: of a polynomial decay; None: a cosine.
    """
    total = steps if steps is not None else max(1, round((epochs or 1) * per_epoch))
    first, last = min(peak, peak * start_ratio), peak * final_ratio
    return Schedule(total, round(warmup * total), peak, first, last, power)


def scaled_rate(lr: float | None, lr_per_512: float, batch_size: int) -> float:
    """The peak rate: as given, or by the linear rule (Goyal et al. 2017)."""
    return lr if lr is not None else lr_per_512 * batch_size / 512

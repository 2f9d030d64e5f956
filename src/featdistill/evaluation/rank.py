"""Effective rank of features: RankMe (Garrido et al. 2023, arXiv 2210.02885, equations 1 and 2).

n rows (images or tokens), C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Moments:
    """Second moments of features, collected batch by batch: all that their spectrum needs.

    Sums are float64 on the features' device; memory is (C + 1)^2 whatever the number of rows.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        # of rows (1, x): count, sum and products in one matrix
        self._products = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in rows (n, C)."""
        assert rows.ndim == 2, rows.shape
        assert rows.shape[1] == self.channels, rows.shape
        whole = torch.nn.functional.pad(rows.double(), (1, 0), value=1.0)
        self._products = self._products.to(rows.device) + whole.T @ whole

    def merge(self, other: Moments) -> None:
        """Take in what another one has seen."""
        assert self.channels == other.channels, (self.channels, other.channels)
        self._products = self._products + other._products.to(self._products.device)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by `total` of them: those of all processes."""
        self._products = total(self._products)

    @property
    def count(self) -> int:
        """Rows so far."""
        return int(self._products[0, 0].item())

    def singular_values(self, *, centred: bool = False) -> Tensor:
        """Of the (n, C) matrix of all rows: (C,) float64 on the CPU, falling.

        Those below the rounding of float64 sums (a share sqrt(C eps) of the largest) are zero.

        Args:
            centred: of the rows minus their mean; RankMe does not centre.
        """
        sums = self._products.cpu()
        products = sums[1:, 1:]
        # of all rows, centred or not: what is left of equal rows after centring is rounding
        floor = float(products.trace()) * self.channels * torch.finfo(torch.float64).eps
        if centred and self.count:
            products = products - torch.outer(sums[0, 1:], sums[0, 1:]) / sums[0, 0]
        if not bool(torch.isfinite(products).all()):
            return torch.full((self.channels,), float("nan"), dtype=torch.float64)
        values = torch.linalg.eigvalsh(products).flip(0)
        return torch.where(values > floor, values, 0.0).sqrt()


def effective_rank(singular_values: Tensor) -> float:
    """RankMe: exp of the entropy (nats) of singular values divided by their sum.

    Between 1 and the number of values that are not zero: 1 for one direction, k for k equally
    strong ones. 0 if all are zero; NaN if one is NaN.
    """
    values = singular_values.double()
    total = values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(values / total).sum().exp())


def collapse(
    history: Sequence[float], teacher: float, *, share: float, evaluations: int
) -> str | None:
    """Whether a student's features have collapsed into few directions: in words, or None.

    Its latest rank is below `share` of its first, or of the teacher's. A fresh student is below the
    teacher's at first; so that counts only once it was above, or when half of the run is over.

    Args:
        history: the student's ranks, from before training until now.
        teacher: the teacher's, on the same images.
        share: 0: never.
        evaluations: how many ranks there will be.
    """
    now = history[-1]
    if now < share * history[0]:
        return f"{now:.1f}, it began with {history[0]:.1f}"
    floor = share * teacher
    if now < floor and (max(history) >= floor or 2 * len(history) > evaluations):
        return f"{now:.1f}, the teacher's is {teacher:.1f}"
    return None

"""Linear CKA between layers and models, by the unbiased minibatch estimator.

B images of an update, M points of measurement (the layers of one or several models), C channels, n
images of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 256  # as Nguyen et al. 2021
_FEWEST = 4  # the unbiased estimator divides by n - 3


def unbiased_hsic(rows: Sequence[Tensor]) -> Tensor:
    """HSIC with linear kernels between all pairs of features of the same n images.

    HSIC_1 of Song et al. 2012 (Feature selection via dependence maximization, equation 5) is the
    inner product of U-centred kernels divided by n (n - 3) (Szekely and Rizzo 2014, Partial
    distance correlation, equation 2.1), so that one product gives all pairs.

    Args:
        rows: M tensors (n, C_m), n at least 4.

    Returns:
        (M, M) float64; may be negative, for its mean is right.
    """
    n = len(rows[0])
    assert n >= _FEWEST, n
    # centring takes any shift away; this one makes that exact for rows that are all the same
    shifted = [x.double() - x[:1].double() for x in rows]
    centred = torch.stack([_u_centred(x @ x.T).flatten() for x in shifted])
    return centred @ centred.T / (n * (n - 3))


def _u_centred(kernel: Tensor) -> Tensor:
    """A kernel (n, n) without its diagonal, less the means of its rows and columns."""
    n = len(kernel)
    kernel = kernel - torch.diag(kernel.diagonal())
    sums = kernel.sum(1)
    rows = sums / (n - 2)
    centred = kernel - rows[:, None] - rows[None, :] + sums.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal())


class LinearCKA:
    """Linear CKA between M points of measurement, streamed over images.

    HSIC is averaged over blocks of images before the ratio is taken (Nguyen et al. 2021,
    arXiv 2010.15327, equations 2 and 3). The estimate depends slightly on which images share a
    block, so blocks are made of an image's place in the data, `index // block`, and not of the
    batches in which images happen to come: neither batch size, order nor the number of processes
    changes the result. Up to `block` images it is that of the whole at once.

    Rows of blocks that are not complete wait in memory: less than one block, if images come in
    order.

    Args:
        points: M.
        block: images of a block, at least 4.
    """

    def __init__(self, points: int, *, block: int = BLOCK) -> None:
        assert block >= _FEWEST, block
        self.points, self.block = points, block
        self._hsic = torch.zeros(points, points, dtype=torch.float64)  # weighted by images
        self._done = 0
        self._waiting: dict[int, dict[int, tuple[Tensor, ...]]] = {}
        self._next = 0

    @torch.no_grad()
    def update(self, rows: Sequence[Tensor], indices: Sequence[int] | Tensor | None = None) -> None:
        """Take in B images.

        Args:
            rows: M tensors (B, C_m), one row an image.
            indices: each image's place in the data; by default they follow on each other. An image
                that comes twice counts once.
        """
        assert len(rows) == self.points, (len(rows), self.points)
        count = len(rows[0])
        assert all(x.ndim == 2 and len(x) == count for x in rows), [x.shape for x in rows]
        places = range(self._next, self._next + count) if indices is None else indices
        self._next += count
        # a copy, since a view would keep whole batches alive
        kept = [x.detach().to(torch.float64, copy=True) for x in rows]
        for at, place in enumerate(int(i) for i in places):
            self._take(place, tuple(x[at] for x in kept))
        self._reduce_complete()

    def _take(self, place: int, image: tuple[Tensor, ...]) -> None:
        self._waiting.setdefault(place // self.block, {})[place % self.block] = image

    def _reduce_complete(self) -> None:
        for number in [n for n, images in self._waiting.items() if len(images) == self.block]:
            self._hsic += self.block * self._of_block(self._waiting.pop(number))
            self._done += self.block

    def _of_block(self, images: dict[int, tuple[Tensor, ...]]) -> Tensor:
        ordered = [images[i] for i in sorted(images)]
        return unbiased_hsic([torch.stack(point) for point in zip(*ordered, strict=True)]).cpu()

    def merge(self, other: LinearCKA) -> None:
        """Take in what another one has seen: other images of the same data, by their indices."""
        assert (self.points, self.block) == (other.points, other.block)
        self._hsic += other._hsic
        self._done += other._done
        for number, images in other._waiting.items():
            self._waiting.setdefault(number, {}).update(images)
        self._reduce_complete()

    @property
    def count(self) -> int:
        """Images that `compute` uses: all, but for those of incomplete blocks of less than 4."""
        return self._done + sum(len(i) for i in self._waiting.values() if len(i) >= _FEWEST)

    def compute(self) -> Tensor:
        """(M, M) float64 on the CPU: 1 for features equal up to rotation, shift and scale.

        0 is expected of independent features, so small negative values occur. NaN where a point
        does not vary between images, and everywhere with less than 4 images.
        """
        hsic = self._hsic.clone()
        for number in sorted(self._waiting):
            images = self._waiting[number]
            if len(images) >= _FEWEST:
                hsic += len(images) * self._of_block(images)
        own = hsic.diagonal()
        own = torch.where(own > 0, own, torch.nan).sqrt()
        return hsic / own[:, None] / own[None, :]

"""Measures of attention: streaming, each with `update`, `merge` and `compute`.

Each works by itself on a tensor of attention weights and a token layout:

    distance = AttentionDistance()
    distance.update(weights, TokenLayout(grid=(14, 14), prefix=1, patch=16))
    distance.compute().mean  # (H,) in pixels

Prefix tokens are dropped and the rows renormalised; what the patches gave to the prefix is a
measure of its own. Values are accumulated in float64, an image is a unit of weight 1, and errors
are standard errors over images. Where Swin's shift mask divides a window, a query is measured
against the keys that it may see; what needs whole windows (NMI, mean maps) leaves divided ones out.

Dimensions: B images, W windows, H heads, N tokens of a window, n patch tokens of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.diagnostics.attention_layout import TokenLayout
from featdistill.diagnostics.attention_rows import Rows

Unit = Literal["pixels", "patches", "relative"]
# below this share of uniform attention's square, a deviation from it is rounding
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over images.

    Attributes:
        mean: one value, or one for each head (H,).
        error: its standard error, NaN for a single image.
        images: how many.
    """

    mean: np.ndarray
    error: np.ndarray
    images: int

    def times(self, factor: float) -> Estimate:
        """In another unit."""
        return Estimate(self.mean * factor, self.error * abs(factor), self.images)


class Moments:
    """Mean and spread of a stream of arrays, in float64 (Chan et al. 1979's update)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Take in (B, ...): B observations."""
        values = values.double()
        mean = values.mean(0)
        self._combine(len(values), mean, (values - mean).square().sum(0))

    def merge(self, other: Moments) -> None:
        """Take in what another has seen."""
        if other.mean is not None and other.squares is not None:
            self._combine(other.count, other.mean, other.squares)

    def _combine(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        mean, squares = mean.to(self.mean.device), squares.to(self.mean.device)
        total, delta = self.count + count, mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.count = total

    def estimate(self) -> Estimate:
        """What was seen. Raises ModelError if nothing was."""
        if self.mean is None or self.squares is None:
            raise ModelError("a measure of attention was asked before it saw any")
        variance = self.squares / (self.count - 1) if self.count > 1 else self.mean * math.nan
        error = (variance / self.count).sqrt()
        return Estimate(self.mean.cpu().numpy(), error.cpu().numpy(), self.count)


class Measure:
    """What the measures share: weights go in by `update`, or shared products by `add`."""

    def update(self, weights: Tensor, layout: TokenLayout) -> Self:
        """Take in a layer's weights (B * W, H, N, N).

        Raises:
            ModelError: the shape is not the layout's.
        """
        return self.add(Rows(weights, layout))

    def add(self, rows: Rows) -> Self:
        """Take in rows that other measures take in too."""
        raise NotImplementedError

    def merge(self, other: Self) -> Self:
        """Take in what another of the same kind has seen (of other images)."""
        raise NotImplementedError


class _Streamed(Measure):
    """A measure that is the mean of something of each image."""

    def __init__(self) -> None:
        self.moments = Moments()

    def add(self, rows: Rows) -> Self:
        self.moments.update(self.of(rows))
        return self

    def merge(self, other: Self) -> Self:
        self.moments.merge(other.moments)
        return self

    def of(self, rows: Rows) -> Tensor:
        """(B, ...): of each image."""
        raise NotImplementedError

    def compute(self) -> Estimate:
        """Mean and standard error over images."""
        return self.moments.estimate()


class AttentionDistance(_Streamed):
    """Mean distance between a query and what it attends to, for each head (H,).

    The mean over queries of sum_k A[q, k] D[q, k], D Euclidean on the token grid (Dosovitskiy et
    al. 2021, arXiv 2010.11929, figure 7; Raghu et al. 2021, arXiv 2108.08810).
    """

    def __init__(self) -> None:
        super().__init__()
        self.layout: TokenLayout | None = None
        self.uniform = math.nan

    def of(self, rows: Rows) -> Tensor:
        self.layout, self.uniform = rows.layout, rows.geometry.uniform
        return rows.per_image(rows.distance)

    def merge(self, other: Self) -> Self:
        if self.layout is None:
            self.layout, self.uniform = other.layout, other.uniform
        return super().merge(other)

    def compute(self, unit: Unit = "pixels") -> Estimate:
        """In pixels, patches, or relative to uniform attention over the same keys."""
        found = self.moments.estimate()
        assert self.layout is not None
        factor = {"pixels": self.layout.patch, "patches": 1.0, "relative": 1 / self.uniform}[unit]
        return found.times(factor)


class AttentionEntropy(_Streamed):
    """Entropy of the rows, for each head (H,), in nats or relative to uniform attention."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = Moments()

    def add(self, rows: Rows) -> Self:
        most = rows.keys.log()
        share = torch.where(most > 0, rows.entropy / most.clamp_min(1e-9), 1.0)
        self.relative.update(rows.per_image(share))
        return super().add(rows)

    def of(self, rows: Rows) -> Tensor:
        return rows.per_image(rows.entropy)

    def merge(self, other: Self) -> Self:
        self.relative.merge(other.relative)
        return super().merge(other)

    def compute(self, unit: Literal["nats", "relative"] = "nats") -> Estimate:
        """In nats, or as a share of the logarithm of how many keys a query may see."""
        return (self.moments if unit == "nats" else self.relative).estimate()


class PrefixMass(_Streamed):
    """What share of their attention the patches give to prefix tokens, for each head (H,)."""

    def of(self, rows: Rows) -> Tensor:
        return rows.per_image(rows.prefix_mass)


class MutualInformation(_Streamed):
    """Normalised mutual information of query and key, for each head (H,): 0 if all rows are alike.

    I(Q; K) / sqrt(H(Q) H(K)) with uniform queries (Park et al. 2023, arXiv 2305.00729),
    inside each window.
    """

    def of(self, rows: Rows) -> Tensor:
        column = rows.whole.mean(2, dtype=torch.float32).double()  # (B, W', H, n): p(k)
        of_keys = torch.special.entr(column).sum(-1)
        given_query = rows.only_whole(rows.entropy).double().mean(2)
        shared = (of_keys - given_query).clamp_min(0)
        scale = (math.log(rows.patches) * of_keys).sqrt()
        return (shared / scale.clamp_min(1e-12)).mean(1)


class _OfPairs(_Streamed):
    """A measure of pairs of heads."""

    what: str

    def add(self, rows: Rows) -> Self:
        if rows.heads < 2:
            raise ModelError(f"{self.what} of a single head", expected="at least two heads")
        return super().add(rows)


class HeadDivergence(_OfPairs):
    """Kullback-Leibler divergence KL(A_h || A_g) of two heads' rows in nats, mean over pairs."""

    what = "divergence between heads"

    def of(self, rows: Rows) -> Tensor:
        # sum over h != g of (a_h log a_h - a_h log a_g); the diagonal cancels
        h = rows.heads
        total = -h * rows.entropy.sum(-1) - rows.cross.sum((-2, -1))
        return rows.per_image(total / (h * (h - 1))).clamp_min(0)


@dataclass(frozen=True)
class Similarity:
    """Cosines of pairs of heads, mean over pairs, images (and queries).

    Attributes:
        per_query: of the two heads' rows.
        flat: of their whole maps.
        per_query_centred, flat_centred: likewise, of what differs from uniform attention; a
            row that does not differ counts as 0.
    """

    per_query: Estimate
    flat: Estimate
    per_query_centred: Estimate
    flat_centred: Estimate


class HeadSimilarity(_OfPairs):
    """How alike a layer's heads are: 1 if they attend alike, for each image by itself.

    As Wei et al. 2022 (arXiv 2205.14141) compare heads: per query token.
    """

    what = "similarity between heads"

    def of(self, rows: Rows) -> Tensor:
        centred = rows.gram
        uniform = (1 / rows.keys)[..., None]  # (B * W, n, 1, 1): its square's sum over the keys
        flat, flat_uniform = (
            t.unflatten(0, (rows.images, rows.windows)).double().sum((1, 2))
            for t in (centred, uniform)
        )
        return torch.stack(
            [
                rows.per_image(_pair_cosine(centred + uniform, uniform)),
                _pair_cosine(flat + flat_uniform, flat_uniform),
                rows.per_image(_pair_cosine(centred, uniform)),
                _pair_cosine(flat, flat_uniform),
            ],
            -1,
        )

    def compute(self) -> Similarity:  # type: ignore[override]
        """The four ways to compare."""
        all_ = self.moments.estimate()
        return Similarity(*(Estimate(all_.mean[i], all_.error[i], all_.images) for i in range(4)))


def _pair_cosine(gram: Tensor, uniform: Tensor) -> Tensor:
    """(..., H, H) inner products -> (...): mean cosine of two different heads."""
    heads = gram.shape[-1]
    squares = gram.diagonal(dim1=-2, dim2=-1)
    known = squares > _ROUNDING * uniform[..., 0]
    inverse = torch.where(known, squares.clamp_min(1e-37).rsqrt(), 0.0)
    cosines = (inverse[..., None, :] @ gram @ inverse[..., :, None]).squeeze(-1).squeeze(-1)
    return (cosines - known.sum(-1)) / (heads * (heads - 1))


@dataclass(frozen=True)
class Pattern:
    """What share of a mean map's variance a pattern explains (R2; NaN for a uniform map).

    Attributes:
        column: every query attends to the same keys.
        relative: a query attends by the offset to the key: the diagonal pattern.
    """

    column: np.ndarray
    relative: np.ndarray


class MeanMaps(Measure):
    """The mean map over images for each head, (H, n, n), and what it looks like."""

    def __init__(self) -> None:
        self.images = 0
        self.total: Tensor | None = None  # (n, H, n) float64
        self.layout: TokenLayout | None = None

    def add(self, rows: Rows) -> Self:
        self.layout = rows.layout
        windows = rows.whole.shape[1]
        self._accumulate(rows.whole.sum((0, 1)).double() / windows, rows.images)
        return self

    def merge(self, other: Self) -> Self:
        if other.total is not None:
            self.layout = other.layout
            self._accumulate(other.total, other.images)
        return self

    def _accumulate(self, total: Tensor, images: int) -> None:
        if self.total is None:
            self.total = torch.zeros_like(total)
        self.total += total.to(self.total.device)
        self.images += images

    def compute(self) -> np.ndarray:
        """(H, n, n): rows sum to 1; with windows, the mean over them too."""
        if self.total is None:
            raise ModelError("a mean map was asked before any attention was seen")
        return (self.total / self.images).transpose(0, 1).cpu().numpy()

    def pattern(self) -> Pattern:
        """Of each head's mean map."""
        maps = self.compute()
        assert self.layout is not None
        return map_pattern(maps, _square_of(self.layout))

    def layer_pattern(self) -> Pattern:
        """Of the mean over heads."""
        maps = self.compute()
        assert self.layout is not None
        return map_pattern(maps.mean(0), _square_of(self.layout))


def _square_of(layout: TokenLayout) -> tuple[int, int]:
    return layout.grid if layout.window is None else layout.window.size


def map_pattern(maps: np.ndarray, grid: tuple[int, int]) -> Pattern:
    """R2 of the best column fit c[k] and of the best fit r[dy, dx] of maps (..., n, n).

    Both are least squares: the mean of a column, and the mean over all pairs of one offset.
    """
    maps = np.asarray(maps, np.float64)
    y, x = (a.ravel() for a in np.divmod(np.arange(grid[0] * grid[1]), grid[1]))
    dy, dx = (a[None, :] - a[:, None] for a in (y, x))
    offset = ((dy + grid[0] - 1) * (2 * grid[1] - 1) + dx + grid[1] - 1).ravel()
    pairs = np.bincount(offset)
    flat = maps.reshape(-1, maps.shape[-1] ** 2)
    fitted = np.stack([(np.bincount(offset, m) / np.maximum(pairs, 1))[offset] for m in flat])
    mean = flat.mean(1, keepdims=True)
    total = np.square(flat - mean).sum(1)
    known = total > _ROUNDING * np.square(mean[:, 0]) * flat.shape[1]
    column = np.broadcast_to(maps.mean(-2, keepdims=True), maps.shape).reshape(flat.shape)
    shares = [
        np.where(known, 1 - np.square(flat - fit).sum(1) / np.where(known, total, 1), np.nan)
        for fit in (column, fitted)
    ]
    return Pattern(*(s.reshape(maps.shape[:-2]) for s in shares))

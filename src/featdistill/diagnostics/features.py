"""What a layer's features are like: their spectrum over the image, token norms, variance and rank.

Each measure is a small class: `update` with a layer's map, `merge` with another process's, and
`compute`. Sums are float64 and over images, so neither batches nor processes change a result.

B images of an update, n images so far, C channels, h w the token grid, N = h w.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featdistill.evaluation.rank import Moments, effective_rank

OUTLIER_RATIO = 3.0
_FLOOR = 1e-6  # added to amplitudes before the logarithm, as Park and Kim's code does
# norms between 1e-4 and 1e6, twenty bins a decade; the ends take what is beyond
NORM_EDGES = torch.logspace(-4, 6, 201, dtype=torch.float64)


class ImageMean:
    """Mean over images, and its standard error, of values (D,) for each image."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self._sums = torch.zeros(2, size, dtype=torch.float64)  # of the values, of their squares

    def update(self, values: Tensor) -> None:
        """Take in (B, D)."""
        values = values.detach().double()
        self._sums += torch.stack([values.sum(0), values.square().sum(0)]).cpu()
        self.count += len(values)

    def merge(self, other: ImageMean) -> None:
        """Take in what another one has seen."""
        self._sums += other._sums
        self.count += other.count

    def mean(self) -> Tensor:
        """(D,); NaN without images."""
        return self._sums[0] / self.count if self.count else self._sums[0] * torch.nan

    def standard_error(self) -> Tensor:
        """(D,); NaN with less than two images."""
        if self.count < 2:
            return self._sums[0] * torch.nan
        spread = (self._sums[1] - self.count * self.mean().square()).clamp(min=0)
        return (spread / (self.count - 1) / self.count).sqrt()


def diagonal_frequencies(height: int, width: int) -> list[tuple[int, int]]:
    """Places (v, u) in an unshifted 2-d spectrum from constant to fastest, along the diagonal.

    On a grid that is not square they are those nearest to equal shares of both fastest ones.
    """
    steps = min(height, width) // 2
    if steps == 0:
        return [(0, 0)]
    return [
        (round(k * (height // 2) / steps), round(k * (width // 2) / steps))
        for k in range(steps + 1)
    ]


@dataclass(frozen=True)
class FourierResult:
    """A layer's spectrum.

    Attributes:
        frequency: (K,) in units of pi for each token: 0 constant, 1 alternating from token to token
            (a little less where the grid's sides are odd).
        relative: (K,) mean over images and channels of the log amplitude (nats) less that of the
            constant part.
        error: (K,) standard error of `relative` over images.
    """

    frequency: Tensor
    relative: Tensor
    error: Tensor

    @property
    def high(self) -> float:
        """Relative log amplitude at the highest frequency."""
        return float(self.relative[-1])


class FourierAmplitude:
    """Relative log amplitude of the map's 2-d spectrum along the diagonal.

    Park and Kim 2022 (How do vision transformers work?, arXiv 2202.06709, figures 2a and 8).
    Low at high frequencies: the layer smooths.

    Args:
        grid: (h, w).
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self._places = diagonal_frequencies(*grid)
        self._mean = ImageMean(len(self._places))

    @torch.no_grad()
    def update(self, maps: Tensor) -> None:
        """Take in (B, C, h, w)."""
        assert tuple(maps.shape[-2:]) == self.grid, maps.shape
        amplitude = torch.fft.fft2(maps.double()).abs()
        v, u = zip(*self._places, strict=True)
        logs = (amplitude[..., list(v), list(u)] + _FLOOR).log().mean(1)
        self._mean.update(logs - logs[:, :1])

    def merge(self, other: FourierAmplitude) -> None:
        """Take in what another one has seen."""
        assert self.grid == other.grid
        self._mean.merge(other._mean)

    def compute(self) -> FourierResult:
        """The spectrum over all images so far."""
        height, width = self.grid
        shares = [(v / height + u / width) for v, u in self._places]
        frequency = torch.tensor(shares, dtype=torch.float64)
        return FourierResult(frequency, self._mean.mean(), self._mean.standard_error())


@dataclass(frozen=True)
class NormResult:
    """Norms of a layer's patch tokens.

    Attributes:
        mean, median: over tokens of all images (the median to a bin's width, 12 %).
        largest: the mean over images of the image's largest norm, divided by its median.
        outliers: share of tokens whose norm is beyond `ratio` times their image's median.
        outliers_error: its standard error over images.
        histogram: tokens by norm, between `NORM_EDGES`.
    """

    mean: float
    median: float
    largest: float
    outliers: float
    outliers_error: float
    histogram: Tensor


class TokenNorms:
    """Euclidean norms of patch tokens, and those few that are far larger than the rest.

    Darcet et al. 2023 (Vision transformers need registers, arXiv 2309.16588, section 2.1) call a
    token of DINOv2 an outlier whose norm is above 150, read off its histogram. That number holds
    for one model; here it is a multiple of the median norm of the image.

    Args:
        ratio: the multiple.
    """

    def __init__(self, *, ratio: float = OUTLIER_RATIO) -> None:
        self.ratio = ratio
        self._mean = ImageMean(3)  # norm, largest, outliers
        self._histogram = torch.zeros(len(NORM_EDGES) - 1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, maps: Tensor) -> None:
        """Take in (B, C, h, w), before any norm: after one all tokens are alike."""
        norms = maps.double().flatten(2).norm(dim=1)
        median = norms.quantile(0.5, dim=1, keepdim=True)
        largest = norms.amax(1) / median[:, 0].clamp(min=1e-300)
        outliers = (norms > self.ratio * median).double().mean(1)
        self._mean.update(torch.stack([norms.mean(1), largest, outliers], 1))
        edges = NORM_EDGES.to(norms.device)
        places = torch.bucketize(norms.flatten(), edges[1:-1], right=True)
        self._histogram += places.bincount(minlength=len(edges) - 1).cpu()

    def merge(self, other: TokenNorms) -> None:
        """Take in what another one has seen."""
        assert self.ratio == other.ratio
        self._mean.merge(other._mean)
        self._histogram += other._histogram

    def compute(self) -> NormResult:
        """Over all images so far."""
        mean, largest, outliers = self._mean.mean().tolist()
        error = float(self._mean.standard_error()[2])
        return NormResult(mean, self._median(), largest, outliers, error, self._histogram.clone())

    def _median(self) -> float:
        """The geometric middle of the bin that holds the median."""
        total = float(self._histogram.sum())
        if not total:
            return float("nan")
        at = int(torch.searchsorted(self._histogram.cumsum(0), total / 2))
        return float((NORM_EDGES[at] * NORM_EDGES[at + 1]).sqrt())


@dataclass(frozen=True)
class VarianceResult:
    """How features vary.

    Attributes:
        spatial: between the tokens of an image (divided by N), mean over channels
            and images.
        spatial_error: its standard error over images.
        between: of the mean token between images, mean over channels; NaN with one image.
    """

    spatial: float
    spatial_error: float
    between: float


class FeatureVariance:
    """Variance within images (Park and Kim 2022, figure 9) and between them.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._spatial = ImageMean(1)
        self._pooled = ImageMean(channels)

    @torch.no_grad()
    def update(self, maps: Tensor) -> None:
        """Take in (B, C, h, w)."""
        flat = maps.double().flatten(2)
        self._spatial.update(flat.var(dim=2, correction=0).mean(1, keepdim=True))
        self._pooled.update(flat.mean(2))

    def merge(self, other: FeatureVariance) -> None:
        """Take in what another one has seen."""
        self._spatial.merge(other._spatial)
        self._pooled.merge(other._pooled)

    def compute(self) -> VarianceResult:
        """Over all images so far."""
        between = self._pooled.standard_error().square() * self._pooled.count
        return VarianceResult(
            float(self._spatial.mean()),
            float(self._spatial.standard_error()),
            float(between.mean()),
        )


class EffectiveRank:
    """RankMe of the mean token of each image; at most the number of images, and of channels.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._moments = Moments(channels)

    @torch.no_grad()
    def update(self, maps: Tensor) -> None:
        """Take in (B, C, h, w)."""
        self._moments.add(maps.double().mean((2, 3)))

    def merge(self, other: EffectiveRank) -> None:
        """Take in what another one has seen."""
        self._moments.merge(other._moments)

    def compute(self) -> float:
        """Between 1 and min(n, C)."""
        return effective_rank(self._moments.singular_values())


@dataclass(frozen=True)
class LayerResult:
    """All of a layer's results."""

    fourier: FourierResult
    norms: NormResult
    variance: VarianceResult
    rank: float


class LayerMeasures:
    """All measures of one layer's map.

    Args:
        channels: C.
        grid: (h, w).
    """

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        self.fourier = FourierAmplitude(grid)
        self.norms = TokenNorms()
        self.variance = FeatureVariance(channels)
        self.rank = EffectiveRank(channels)

    def update(self, maps: Tensor) -> None:
        """Take in (B, C, h, w)."""
        for measure in (self.fourier, self.norms, self.variance, self.rank):
            measure.update(maps)

    def merge(self, other: LayerMeasures) -> None:
        """Take in what another one has seen."""
        self.fourier.merge(other.fourier)
        self.norms.merge(other.norms)
        self.variance.merge(other.variance)
        self.rank.merge(other.rank)

    def compute(self) -> LayerResult:
        """Over all images so far."""
        return LayerResult(
            self.fourier.compute(),
            self.norms.compute(),
            self.variance.compute(),
            self.rank.compute(),
        )

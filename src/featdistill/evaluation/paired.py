"""Differences between models that were trained under the same seeds and scored on the same images.

Letters: S seeds, n test images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featdistill.core.seeds import generator

LEVEL = 0.95
RESAMPLES = 10_000

Hits = NDArray[np.bool_]
Range = tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """The accuracy of one model minus another's, as shares.

    Attributes:
        per_seed: the difference under each seed.
        images: the interval that the sampling of test images alone gives, for these very runs.
        interval: the one that counts other seeds too; None where a single seed tells nothing of
            others.
    """

    per_seed: tuple[float, ...]
    images: Range
    interval: Range | None

    @property
    def mean(self) -> float:
        """Over seeds and images."""
        return math.fsum(self.per_seed) / len(self.per_seed)

    @property
    def std(self) -> float | None:
        """Over seeds; None for one."""
        return float(np.std(self.per_seed, ddof=1)) if len(self.per_seed) > 1 else None


def paired(one: Hits, two: Hits, *, seed: int = 0, resamples: int = RESAMPLES) -> Paired:
    """How much more often `one` is right than `two`, with 95 % intervals.

    The bootstrap of test images is exact and cheap whatever their number: an image's difference,
    summed over seeds, is one of 2 S + 1 values, so that resampling images is drawing how often each
    value comes, from one multinomial.

    Seeds are too few to be resampled (three of them have ten distinct resamples, and cover the
    truth in 79 to 87 % of cases where seeds matter): their part is the standard error over seeds
    times Student's t of S - 1 degrees. What differs from seed to seed on single images is a part of
    that error, so the images' part is shrunk to what seeds have in common, by the variance
    components of the two-way table (Searle, Casella and McCulloch 1992, chapter 4). Simulated
    coverage: 94 to 97 % (docs/lab-notes.md).

    Args:
        one, two: (S, n) whether an image was classified rightly; equal seeds in equal rows.
        seed: of the resampling.
    """
    assert one.shape == two.shape
    assert one.size
    seeds, images = one.shape
    table = one.astype(np.int8) - two.astype(np.int8)
    per_seed = table.mean(axis=1, dtype=np.float64)
    values, counts = np.unique(table.sum(axis=0, dtype=np.int64), return_counts=True)
    draw = generator(seed, "paired bootstrap")
    drawn = draw.multinomial(images, counts / images, size=resamples)
    mean = float(per_seed.mean())
    wobble = drawn @ values / (images * seeds) - mean
    each = tuple(map(float, per_seed))
    alone = _range(mean + wobble)
    if seeds == 1:
        return Paired(each, alone, None)
    error = float(np.std(per_seed, ddof=1)) / math.sqrt(seeds)
    others = error * draw.standard_t(seeds - 1, size=resamples)
    low, high = _range(mean + _shared(table) * wobble + others)
    # never narrower than images alone: seeds that happen to agree are no knowledge of the images
    return Paired(each, alone, (min(low, alone[0]), max(high, alone[1])))


def _shared(table: NDArray[np.int8]) -> float:
    """What is left of images' sampling error without the noise of single runs: a factor, 0..1."""
    seeds, images = table.shape
    of_image = table.mean(axis=0, dtype=np.float64)
    of_seed = table.mean(axis=1, dtype=np.float64)
    if images == 1:
        return 1.0
    # mean squares of images, and of what neither image nor seed explains; without an (S, n) table
    mean = of_seed.mean()
    total = float((table != 0).sum()) - seeds * images * mean**2  # the entries' squares are 0 or 1
    among_images = seeds * float(((of_image - mean) ** 2).sum())
    among_seeds = images * float(((of_seed - mean) ** 2).sum())
    if among_images <= 0:
        return 0.0
    rest = max(total - among_images - among_seeds, 0.0) / (seeds - 1)
    return math.sqrt(max(1 - rest / among_images, 0.0))


def _range(draws: NDArray[np.float64]) -> Range:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def verdict(found: Paired) -> str:
    """One honest sentence on student minus teacher: better, worse, or not to be told apart.

    A difference is one where the interval leaves zero out; under how many seeds it shows is said.
    """
    each, mean, n = found.per_seed, found.mean, len(found.per_seed)
    size = f"{abs(mean) * 100:.1f} points of top-1"
    if found.interval is None:
        word = "above" if mean > 0 else "below" if mean < 0 else "level with"
        return (
            f"Under a single seed the distilled student is {size} {word} its teacher (95% interval "
            f"from the test images alone: {signed(*found.images)}); more seeds would tell."
        )
    low, high = found.interval
    wins = sum(d > 0 for d in each)
    count = f"better under {wins} of {n} seeds"
    said = f"95% interval {signed(low, high)}; {count}"
    if low > 0 or high < 0:
        word = "better" if mean > 0 else "worse"
        return f"Fine-tuned, the distilled student is {word} than its teacher by {size} ({said})."
    sign = "+" if mean >= 0 else "-"
    return (
        f"Fine-tuned, student and teacher cannot be told apart: {sign}{size} for the student "
        f"({said})."
    )


def signed(low: float, high: float) -> str:
    """An interval of differences in points: `+0.4 to +2.1`."""
    # + 0.0 makes a plain zero of a negative one
    return " to ".join(f"{round(100 * end, 1) + 0.0:+.1f}" for end in (low, high))

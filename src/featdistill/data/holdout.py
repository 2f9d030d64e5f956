"""Images that a label-free training is measured on, and never sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from featdistill.core.errors import ConfigError, DataError
from featdistill.core.seeds import generator
from featdistill.data.open import open_data
from featdistill.data.parts import Data
from featdistill.data.sources import Source, Subset

From = Literal["training", "validation", "test", "other", "nowhere"]


@dataclass(frozen=True)
class HeldOut:
    """What is left to train on, and the slice that is held out.

    Attributes:
        images: None: nothing is measured.
        taken_from: the part that they come from.
    """

    train: Source
    images: Source | None
    taken_from: From

    def describe(self) -> str:
        """In a few words."""
        if self.images is None:
            return "nothing (--holdout 0.02 takes a share of the training images)"
        count = f"{len(self.images):,} images"
        match self.taken_from:
            case "training":
                return f"{count} taken out of the training images"
            case "other":
                return f"{count} of {self.images.name}"
            case part:
                return f"{count} of the {part} part"


def hold_out(data: Data, wanted: str | None, *, seed: int, most: int) -> HeldOut:
    """Hold out a slice.

    Args:
        wanted: a share (`0.02`, `2%`) or a number of images of the training part, which then does
            not train on them; or another data set, of which at most `most` images are taken (its
            held-out part, or all of it); or `auto`: at most `most` images of the data's own
            validation or test part, and nothing where there is none, so that it never takes a
            training image; None: nothing.
        seed: of the choice.
        most: of images that are not the user's number.

    Raises:
        DataError: the number leaves nothing to train on, or there is no such data.
        ConfigError: it is no possible number.
    """
    if wanted is None:
        return HeldOut(data.train, None, "nowhere")
    if wanted == "auto":
        part: From = "validation" if data.val is not None else "test"
        if data.held_out is None:
            return HeldOut(data.train, None, "nowhere")
        return HeldOut(data.train, _some(data.held_out, most, seed), part)
    count = _count(wanted, len(data.train))
    if count is None:
        other = _other(wanted)
        source = other.train if other.held_out is None else other.held_out
        return HeldOut(data.train, _some(source, most, seed), "other")
    if count == 0:
        return HeldOut(data.train, None, "nowhere")
    if count >= len(data.train):
        raise DataError(
            f"--holdout {wanted} takes {count:,} of the {len(data.train):,} training images",
            fix="give fewer, so that there is something to train on",
        )
    held = _choice(len(data.train), count, seed)
    rest = np.setdiff1d(np.arange(len(data.train)), held)
    return HeldOut(Subset(data.train, rest), Subset(data.train, held), "training")


def without(data: Data, held: HeldOut) -> Data:
    """The data without what was held out."""
    return replace(data, train=held.train)


def _count(wanted: str, images: int) -> int | None:
    """How many images a number means; None for what is no number."""
    text = wanted.strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    if not text.endswith("%") and share >= 1 and share == int(share):
        return int(share)
    if not 0 <= share < 1:
        raise ConfigError(
            [
                f"--holdout is '{wanted}'; expected a share below 1 (0.02 or 2%), a number of "
                "images, a data set, auto or none"
            ]
        )
    return max(1, round(share * images)) if share else 0


def _other(wanted: str) -> Data:
    try:
        return open_data(wanted)
    except DataError as error:
        raise DataError(
            f"--holdout is no number, and as a data set: {error.given}",
            expected="a share (0.02), a number of images, a data set, auto or none",
            fix=error.fix,
        ) from None


def _choice(images: int, count: int, seed: int) -> np.ndarray:
    return np.sort(generator("holdout", seed).permutation(images)[:count])


def _some(source: Source, most: int, seed: int) -> Source:
    if len(source) <= most:
        return source
    return Subset(source, _choice(len(source), most, seed))

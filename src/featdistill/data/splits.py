"""Parts of a source: held-out shares and label budgets, stratified and seeded."""

from __future__ import annotations

import numpy as np

from featdistill.core.errors import DataError
from featdistill.core.seeds import generator
from featdistill.data.parts import some
from featdistill.data.sources import Source, Subset, labelled


def split(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Hold out a share of a source, of each class where it has labels; (rest, held out)."""
    rest, held = split_places(len(source), source.labels, fraction, seed)
    if not len(held) or not len(rest):
        raise DataError(
            f"a share of {fraction} of the {len(source)} images of '{source.name}' leaves a part "
            "empty",
            fix="change --val-fraction, or give --val-data",
        )
    return Subset(source, rest), Subset(source, held)


def split_places(
    count: int, labels: np.ndarray | None, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The places of images, less a share of each class, and that share; either may be empty."""
    order = generator(seed, "split").permutation(count)
    groups = [order] if labels is None else [order[labels[order] == c] for c in np.unique(labels)]
    held = np.sort(np.concatenate([g[: round(fraction * len(g))] for g in groups]))
    return np.setdiff1d(np.arange(count), held), held


def label_budget(source: Source, budget: str, seed: int) -> Subset:
    """A stratified, seeded part of a labelled source: `N` (`N/class`) images a class, or `P%`.

    A smaller budget of the same seed is a part of a larger one.

    Raises:
        DataError: no such budget, a class with fewer images, or one that would have none.
    """
    labels = labelled(source, "a label budget")
    share, count = _parse_budget(budget)
    order = generator(seed, "labels").permutation(len(source))
    chosen, empty, small = [], [], []
    for c in np.unique(labels):
        mine = order[labels[order] == c]
        n = count if share is None else round(share * len(mine))
        name = str(c) if source.classes is None else source.classes[c]
        if n == 0:
            empty.append(f"{name} ({len(mine)} images)")
        if n > len(mine):
            small.append(f"{name} ({len(mine)})")
        chosen.append(mine[:n])
    if small:
        raise DataError(
            f"label budget of {count} images a class, but '{source.name}' has classes with fewer: "
            f"{some(small)}",
            fix="give a smaller --labels",
        )
    if empty:
        raise DataError(
            f"a label budget of {budget.strip()} leaves classes of '{source.name}' without any "
            f"image: {some(empty)}",
            fix="give a larger --labels, or a number of images: --labels 1",
        )
    return Subset(source, np.sort(np.concatenate(chosen)))


def _parse_budget(budget: str) -> tuple[float | None, int]:
    """A share of each class, or else a number of images of each."""
    text = budget.strip()
    share, count = None, 0
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
        else:
            count = int(text.removesuffix("/class"))
    except ValueError:
        raise DataError(f"label budget '{budget}'", expected="N or N/class, or P%") from None
    if (share is not None and not 0 < share <= 1) or (share is None and count < 1):
        raise DataError(f"label budget '{budget}'", expected="N >= 1, or a share up to 100%")
    return share, count

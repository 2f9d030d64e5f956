"""Parts of a source: held-out shares and label budgets, stratified and seeded."""

from __future__ import annotations

import numpy as np

from featdistill.core.errors import DataError
from featdistill.core.seeds import generator
from featdistill.data.sources import Source, Subset, labelled


def split(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Hold out a share of a source, of each class where it has labels; (rest, held out)."""
    order = generator(seed, "split").permutation(len(source))
    groups = (
        [order]
        if source.labels is None
        else [order[source.labels[order] == c] for c in np.unique(source.labels)]
    )
    held = np.sort(np.concatenate([g[: round(fraction * len(g))] for g in groups]))
    rest = np.setdiff1d(np.arange(len(source)), held)
    if not len(held) or not len(rest):
        raise DataError(
            f"a share of {fraction} of the {len(source)} images of '{source.name}' leaves a part "
            "empty",
            fix="change --val-fraction, or give --val-data",
        )
    return Subset(source, rest), Subset(source, held)


def label_budget(source: Source, budget: str, seed: int) -> Source:
    """A stratified, seeded part of a labelled source: `N` images a class, or `P%` of each."""
    labels = labelled(source, "a label budget")
    text = budget.strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else None
        count = None if share is not None else int(text)
    except ValueError:
        raise DataError(f"label budget '{budget}'", expected="N (a class) or P%") from None
    if (share is not None and not 0 < share <= 1) or (count is not None and count < 1):
        raise DataError(f"label budget '{budget}'", expected="N >= 1, or a share up to 100%")
    order = generator(seed, "labels").permutation(len(source))
    chosen = []
    for c in np.unique(labels):
        mine = order[labels[order] == c]
        n = count if count is not None else max(1, round((share or 0) * len(mine)))
        if n > len(mine):
            raise DataError(
                f"label budget of {n} images a class, but class {c} of '{source.name}' has "
                f"{len(mine)}",
                fix="give a smaller --labels",
            )
        chosen.append(mine[:n])
    return Subset(source, np.sort(np.concatenate(chosen)))

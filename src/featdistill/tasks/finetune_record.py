"""What the record of a fine-tuning says of its scores and of the labels that it used."""

from __future__ import annotations

from typing import Any

import numpy as np

from featdistill.config.commands import FinetuneConfig
from featdistill.data.sources import Source, Subset, labelled
from featdistill.evaluation.classification import Scores


def score_arrays(scores: Scores) -> dict[str, Any]:
    """Predictions and labels by image, for paired comparisons later."""
    return {"predictions": scores.predictions.numpy(), "labels": scores.labels.numpy()}


def by_class(scores: Scores, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Accuracy and images of each class; no accuracy where there is no image."""
    counts = scores.labels.bincount(minlength=len(names)).tolist()
    return [
        {"class": name, "accuracy": accuracy if images else None, "images": images}
        for name, accuracy, images in zip(names, scores.by_class.tolist(), counts, strict=True)
    ]


def weakest(scores: Scores, names: tuple[str, ...], limit: int = 3) -> str:
    """The classes that are named right least often, in words."""
    seen = [row for row in by_class(scores, names) if row["images"]]
    seen.sort(key=lambda row: row["accuracy"])
    return ", ".join(f"{row['class']} {row['accuracy']:.1%}" for row in seen[:limit])


def labels_used(config: FinetuneConfig, train: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """How many labels were learnt from, for the record, and which, if a budget chose them."""
    labels = labelled(train, "fine-tuning")
    counts = np.bincount(labels, minlength=len(train.classes or ()))
    facts = {
        "budget": config.data.labels,
        "seed": config.run.seed,
        "images": len(train),
        "fewest": int(counts.min()),
        "most": int(counts.max()),
    }
    if config.data.labels is None or not isinstance(train, Subset):
        return facts, {}
    return facts, {"labelled_images": train.chosen}

"""A segmentation as a section of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from featdistill.report import segmentation_figures
from featdistill.report.folders import Found
from featdistill.report.gallery import Gallery, Section, Table
from featdistill.report.tables import NOTHING, percent

Results = Mapping[str, Any]


def segmentation(gallery: Gallery, found: Found) -> Iterator[Section]:
    """IoU by class, the best and the worst images, and the table of all classes."""
    results, arrays = found.results, found.arrays
    shown = [
        gallery.add(
            segmentation_figures.by_class(results, arrays),
            "iou-by-class",
            "Which classes it knows",
            f"Intersection over union on {results['images']:,} held-out images, best first; the "
            "marks: the best guess that ignores the image (each position's most frequent training "
            "class).",
            f"Weakest: {', '.join(_weakest(results))}.",
        )
    ]
    for which in ("best", "worst"):
        drawn = segmentation_figures.pictures(results, arrays, which)
        if drawn is None:
            continue
        names = [one["image"] for one in results["pictures"] if one["which"] == which]
        shown.append(
            gallery.add(
                drawn,
                f"{which}-images",
                f"The {which} images",
                f"Mean IoU of each image on its left; dark in the last column: wrong, grey: "
                f"unlabelled. {', '.join(names)}.",
                f"Images, labels and predictions of {', '.join(names)}.",
            )
        )
    yield Section(
        f"Segmentation: {found.name}",
        f"mIoU {percent(results['miou'], results['miou_error'])} (standard error over images); a "
        f"guess by position alone has {percent(results['prior']['miou'])}. What is not above the "
        "marks has been learnt from the place, not from the picture.",
        tuple(shown),
        _table(results, arrays),
    )


def _table(results: Results, arrays: Mapping[str, np.ndarray]) -> Table:
    prior, rows = segmentation_figures.prior_iou(arrays), results["by_class"]
    total = max(1, sum(row["pixels"] for row in rows))
    lines = tuple(
        (
            row["class"],
            percent(row["iou"]),
            percent(row["accuracy"]),
            percent(prior[i]),
            percent(row["pixels"] / total),
        )
        for i, row in enumerate(rows)
    )
    return Table(
        ("IoU", "Accuracy", "IoU by position", "Share of pixels"),
        lines,
        f"Every class, on labelled pixels at the labels' own size; {NOTHING}: not a pixel to judge "
        "by.",
    )


def _weakest(results: Results, limit: int = 3) -> list[str]:
    """The classes of lowest IoU, in words."""
    rows = sorted((r for r in results["by_class"] if r["iou"] is not None), key=lambda r: r["iou"])
    return [f"{row['class']} {percent(row['iou'])}" for row in rows[:limit]]

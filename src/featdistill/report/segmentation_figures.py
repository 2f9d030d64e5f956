"""The figures of a segmentation; call them inside `style.house()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from featdistill.data.palette import overlay
from featdistill.report import plotstyle, style
from featdistill.report.feature_figures import short
from featdistill.report.tables import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
_MOST = 24  # classes in the figure; the table has all


def by_class(results: Results, arrays: Arrays) -> Figure:
    """IoU of the classes, best first, beside what a guess by position alone would have."""
    rows = shown_classes(results)
    prior = prior_iou(arrays)
    figure, (axes,) = style.new_figure(height=0.8 + 0.2 * len(rows))
    heights = list(range(len(rows), 0, -1))
    values = [100 * row["iou"] for _, row in rows]
    axes.barh(heights, values, height=0.62, color=style.LIGHT["other"], alpha=0.85)
    axes.scatter(
        [100 * prior[place] for place, _ in rows],
        heights,
        marker="|",
        s=70,
        linewidths=1.8,
        color=style.LIGHT["ink"],
        zorder=3,
        label="by position alone",
    )
    axes.set_yticks(heights, [short(row["class"], 18) for _, row in rows])
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.set_xlim(0, 100)
    axes.grid(False, axis="y")
    # above the bars: among them its mark would look like one of the marks
    axes.legend(
        frameon=False,
        fontsize=8.5,
        handletextpad=0.1,
        borderpad=0,
        loc="lower right",
        bbox_to_anchor=(1.02, 0.985),
    )
    axes.set_title("IoU on held-out images, %", color=style.LIGHT["muted"])
    return figure


def shown_classes(results: Results) -> list[tuple[int, Mapping[str, Any]]]:
    """(place, row) of the classes that the figure has room for: best first, the ends if many."""
    rows = [(i, row) for i, row in enumerate(results["by_class"]) if row["iou"] is not None]
    rows.sort(key=lambda pair: -pair[1]["iou"])
    half = _MOST // 2
    return rows if len(rows) <= _MOST else rows[:half] + rows[-half:]


def prior_iou(arrays: Arrays) -> np.ndarray:
    """(K,) IoU of the guess by position; 0 where a class is neither labelled nor guessed."""
    matrix = arrays["prior_confusion"].astype(float)
    right = matrix.diagonal()
    return right / np.maximum(1, matrix.sum(0) + matrix.sum(1) - right)


def pictures(results: Results, arrays: Arrays, which: str) -> Figure | None:
    """The best or the worst images: image, label, prediction, and what is wrong."""
    found = [i for i, one in enumerate(results["pictures"]) if one["which"] == which]
    if not found:
        return None
    columns = ("image", "label", "prediction", "wrong")
    tall = max(_aspect(arrays[f"picture{i}_image"]) for i in found)
    height = 0.3 + len(found) * tall * style.WIDTH / len(columns)
    figure, axes = plotstyle.panels(
        len(found), len(columns), height=height, share_x=False, share_y=False
    )
    for row, place in enumerate(found):
        image, label, guess = (
            arrays[f"picture{place}_{part}"] for part in ("image", "label", "prediction")
        )
        shown = (
            image,
            overlay(image, label, 0.75),
            overlay(image, guess, 0.75),
            np.repeat((255 * _errors(label, guess))[..., None], 3, 2).astype(np.uint8),
        )
        for column, one in enumerate(shown):
            plotstyle.picture(axes[row, column], one, scale=(0, 255), cmap=style.SEQUENTIAL)
            if row == 0:
                axes[row, column].set_title(columns[column], color=style.LIGHT["muted"])
        miou = results["pictures"][place]["miou"]
        axes[row, 0].set_ylabel(percent(miou), rotation=90)
    return figure


def _errors(label: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Light where right, dark where wrong, grey where nobody knows."""
    return np.where(label < 0, 0.6, np.where(label == guess, 0.97, 0.1))


def _aspect(image: np.ndarray) -> float:
    return image.shape[0] / image.shape[1]

"""The figures of `diagnose features`, from its record alone; call them inside `style.house()`.

They read of diagnose-features.json (`results`): `models`, each with `name` and `layers`, whose
entries have `frequency`, `relative_log_amplitude`, `outliers`, `variance_spatial`, `rank` and their
like, and `cka.points`, (name, layer) of each row; of the npz: `cka`, and for model number i
`i.pictures` and `i.photographs` (n, h, w, 3) uint8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from featdistill.report import plotstyle, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
NARROW = 11  # letters beside a picture
_PICTURES = 4  # a column's width has room for four


@dataclass(frozen=True)
class Curve:
    """A quantity of each layer.

    Attributes:
        key: of a layer in the record; its standard error is under `key`_error, if it has one.
        title: what it is and its unit.
        log: whether its axis is logarithmic.
    """

    key: str
    title: str
    log: bool = False


CURVES = (
    Curve("rank", "Effective rank (RankMe)"),
    Curve("variance_spatial", "Variance between tokens of an image (log)", log=True),
    Curve("outliers", "Outlier tokens, share of all"),
    Curve("norm_largest_over_median", "Largest token norm / median"),
)


def names(results: Results) -> list[str]:
    """The models' names, in order."""
    return [model["name"] for model in results["models"]]


def cka(results: Results, arrays: Arrays) -> Figure:
    """All layers of all models against each other, 0 to 1."""
    matrix = np.asarray(arrays["cka"], dtype=np.float64)
    figure, axes = plotstyle.panels(1, 1, height=3.6)
    axis: Axes = axes[0, 0]
    image = plotstyle.picture(axis, matrix, scale=(0, 1), cmap=style.SEQUENTIAL)
    sizes = [len(model["layers"]) for model in results["models"]]
    ends = np.cumsum([0, *sizes])
    for end in ends[1:-1]:
        axis.axhline(end - 0.5, color=style.LIGHT["paper"], linewidth=1.6)
        axis.axvline(end - 0.5, color=style.LIGHT["paper"], linewidth=1.6)
    middles = [(a + b - 1) / 2 for a, b in pairwise(ends)]
    labels = [short(name, NARROW) for name in names(results)]
    axis.set_xticks(middles, labels)
    axis.set_yticks(middles, labels, rotation=90, va="center")
    axis.tick_params(length=0)
    plotstyle.title(axis, "Linear CKA, layers first to last in each block")
    plotstyle.colour_bar(figure, image, axis, "CKA")
    return figure


def spectrum(results: Results) -> Figure:
    """High-frequency amplitude by depth, and the last layer's whole spectrum."""
    figure, axes = plotstyle.panels(2, 1, height=4.6, share_x=False, share_y=False)
    depth, last = axes[:, 0]
    looks = plotstyle.looks(names(results))
    for model in results["models"]:
        look, layers = looks[model["name"]], model["layers"]
        high = [number(layer["relative_log_amplitude"][-1]) for layer in layers]
        error = [number(layer["relative_log_amplitude_error"][-1]) for layer in layers]
        draw_line(depth, depths(layers), high, look, short(model["name"]), error)
        end = layers[-1]
        values = [number(v) for v in end["relative_log_amplitude"]]
        draw_line(last, end["frequency"], values, look, short(model["name"]))
    by_depth(depth, results)
    plotstyle.title(depth, "Relative log amplitude at the highest frequency, nats")
    plotstyle.title(last, "Last layer: relative log amplitude, nats")
    last.set_xlabel("spatial frequency, \N{GREEK SMALL LETTER PI} for each token")
    depth.legend(frameon=False, fontsize=8.5)
    return figure


def curves(results: Results) -> Figure:
    """Rank, variance and token norms by depth."""
    figure, axes = plotstyle.panels(len(CURVES), 1, height=1.65 * len(CURVES), share_y=False)
    looks = plotstyle.looks(names(results))
    for axis, curve in zip(axes[:, 0], CURVES, strict=True):
        for model in results["models"]:
            layers = model["layers"]
            values = [number(layer[curve.key]) for layer in layers]
            error = [number(layer.get(f"{curve.key}_error")) for layer in layers]
            draw_line(
                axis, depths(layers), values, looks[model["name"]], short(model["name"]), error
            )
        if curve.log and all(
            (number(layer[curve.key]) or 0) > 0 for m in results["models"] for layer in m["layers"]
        ):
            plotstyle.log_vertical(axis)
        else:
            drawn = [layer[curve.key] or 0 for m in results["models"] for layer in m["layers"]]
            axis.set_ylim(0, 1.12 * max(drawn) or 1)
        plotstyle.title(axis, curve.title)
        axis.grid(False, axis="x")
    by_depth(axes[-1, 0], results)
    axes[0, 0].legend(frameon=False, fontsize=8.5)
    return figure


def pictures(results: Results, arrays: Arrays) -> Figure | None:
    """Photographs, and under each what every model makes of it; None where there are none."""
    found = [i for i in range(len(results["models"])) if f"{i}.pictures" in arrays]
    if not found:
        return None
    first = arrays[f"{found[0]}.photographs"][:_PICTURES]
    rows = [first, *(arrays[f"{i}.pictures"][:_PICTURES] for i in found)]
    labels = ["image", *(short(names(results)[i], NARROW) for i in found)]
    height = 0.15 + len(rows) * style.WIDTH / (_PICTURES + 0.25)
    figure, axes = plotstyle.panels(
        len(rows), len(first), height=height, share_x=False, share_y=False
    )
    for row, (line, label) in enumerate(zip(rows, labels, strict=True)):
        for column, image in enumerate(line):
            plotstyle.picture(axes[row, column], image, scale=(0, 255), cmap=style.SEQUENTIAL)
        axes[row, 0].set_ylabel(label, rotation=90)
    return figure


def draw_line(
    axis: Axes,
    places: Sequence[float],
    values: Sequence[float],
    look: plotstyle.Look,
    label: str,
    errors: Sequence[float] | None = None,
) -> None:
    """A model's values, with a band of their standard errors if all are known."""
    axis.plot(
        places,
        values,
        color=look.colour,
        marker=look.marker,
        linestyle=look.dashes,
        markersize=4,
        linewidth=1.4,
        label=label,
    )
    if errors is not None and np.isfinite(errors).all():
        low, high = np.subtract(values, errors), np.add(values, errors)
        axis.fill_between(places, low, high, color=look.colour, alpha=0.2, linewidth=0)


def depths(layers: Sequence[Any]) -> list[float]:
    """Each layer's place between the first, 0, and the last, 1: so that depths may differ."""
    return [i / max(len(layers) - 1, 1) for i in range(len(layers))]


def by_depth(axis: Axes, results: Results) -> None:
    """Names the horizontal axis: layers, or shares of the depth where models differ in it."""
    counts = {len(model["layers"]) for model in results["models"]}
    if len(counts) == 1:
        count = counts.pop()
        shown = sorted(
            {round(i * (count - 1) / min(count - 1, 5)) for i in range(6)} if count > 1 else {0}
        )
        axis.set_xticks([i / max(count - 1, 1) for i in shown], [str(i + 1) for i in shown])
        axis.set_xlabel("layer")
    else:
        axis.set_xlabel("depth, first layer to last")
    axis.grid(False, axis="x")


def number(value: Any) -> float:
    """JSON's null is not a number."""
    return float("nan") if value is None else float(value)


def short(name: str, most: int = 26) -> str:
    """A name of at most so many letters: of a longer path its last part, cut at the end."""
    if len(name) > most:
        name = name.rstrip("/").rpartition("/")[2]
    return name if len(name) <= most else f"{name[: most - 1]}…"

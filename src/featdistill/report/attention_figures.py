"""The figures of `diagnose attention`, from its record alone; call them inside `style.house()`.

They read of diagnose-attention.json (`results`):

    data        {name, images}
    unit        of distances: `pixels`, `patches`, or `relative` to uniform attention
    models      a list, each {name, spec, weights, layers}; a layer has
        distance, distance_error        (H,) mean over images and queries, for each head
        similarity, similarity_error    mean over images and head pairs; null with one head
        column_r2, relative_r2          of the layer's mean map; null if there is none

and of the npz for layer j of model i, where there is one: `i.map.j` (N, N), the mean map over
images and heads, without prefix tokens, rows adding up to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from featdistill.report import plotstyle, style
from featdistill.report.feature_figures import (
    NARROW,
    by_depth,
    depths,
    draw_line,
    names,
    number,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"pixels": "pixels", "patches": "patches", "relative": "share of uniform attention's"}
_RARE = 0.01  # share of a map's weights beyond either end of the scale
_MAPS = 5  # a column's width has room for five


def distances(results: Mapping[str, Any]) -> Figure:
    """Each head of each layer as a dot, a panel for each model, one scale (the paper's teaser)."""
    models = results["models"]
    figure, axes = plotstyle.panels(len(models), 1, height=0.4 + 1.9 * len(models))
    looks = plotstyle.looks(names(results))
    every = [layer["distance"] for model in models for layer in model["layers"]]
    high = plotstyle.limits(every, margin=0)[1]
    for axis, model in zip(axes[:, 0], models, strict=True):
        look, layers = looks[model["name"]], model["layers"]
        places = depths(layers)
        for place, layer in zip(places, layers, strict=True):
            heads = [number(d) for d in layer["distance"]]
            axis.scatter(
                [place] * len(heads),
                heads,
                s=16,
                color=look.colour,
                marker=look.marker,
                alpha=0.75,
                linewidths=0,
            )
        means = [float(np.mean([number(d) for d in layer["distance"]])) for layer in layers]
        axis.plot(places, means, color=style.LIGHT["ink"], linewidth=0.9)
        axis.set_ylim(0, 1.08 * high)
        plotstyle.title(
            axis, f"{short(model['name'])}: attention distance, {UNITS[results['unit']]}"
        )
        axis.grid(False, axis="x")
    by_depth(axes[-1, 0], results)
    return figure


def similarity(results: Mapping[str, Any]) -> Figure:
    """How alike a layer's heads are, by depth; below, what pattern its mean map has."""
    figure, axes = plotstyle.panels(3, 1, height=5.2)
    looks = plotstyle.looks(names(results))
    parts = (
        ("similarity", "Similarity of heads (cosine)"),
        ("relative_r2", "Diagonal pattern: R² of the best offset fit"),
        ("column_r2", "Column pattern: R² of the best column fit"),
    )
    for axis, (key, text) in zip(axes[:, 0], parts, strict=True):
        for model in results["models"]:
            layers = model["layers"]
            values = [number(layer.get(key)) for layer in layers]
            errors = [number(layer.get(f"{key}_error")) for layer in layers]
            look, label = looks[model["name"]], short(model["name"])
            draw_line(axis, depths(layers), values, look, label, errors)
        axis.set_ylim(-0.03, 1.05)
        axis.grid(False, axis="x")
        plotstyle.title(axis, text)
    by_depth(axes[-1, 0], results)
    axes[0, 0].legend(frameon=False, fontsize=8.5)
    return figure


def maps(results: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Figure | None:
    """A wall of mean maps, a row for each model, on one scale; None where there are none."""
    rows = []
    for i, model in enumerate(results["models"]):
        there = [j for j in range(len(model["layers"])) if f"{i}.map.{j}" in arrays]
        if there:
            count = min(_MAPS, len(there))
            chosen = [there[round(k * (len(there) - 1) / max(count - 1, 1))] for k in range(count)]
            rows.append((model["name"], [(j, arrays[f"{i}.map.{j}"]) for j in chosen]))
    if not rows:
        return None
    columns = max(len(row) for _, row in rows)
    # as multiples of uniform attention, so that grids of any size share a scale
    scaled = [[(j, m * m.shape[-1]) for j, m in row] for _, row in rows]
    low, high = _scale([m for row in scaled for _, m in row])
    height = 0.35 + len(rows) * (0.2 + 0.82 * style.WIDTH / (columns + 0.6))
    figure, axes = plotstyle.panels(len(rows), columns, height=height, share_x=False, share_y=False)
    for line, (name, _), row in zip(axes, rows, scaled, strict=True):
        for axis in line[len(row) :]:
            axis.axis("off")
        for axis, (j, values) in zip(line, row, strict=False):
            image = plotstyle.picture(axis, values, scale=(low, high), cmap=style.SEQUENTIAL)
            plotstyle.title(axis, f"layer {j + 1}")
        line[0].set_ylabel(short(name, NARROW))
    plotstyle.colour_bar(figure, image, axes, "attention / uniform")
    return figure


def _scale(maps: list[np.ndarray]) -> tuple[float, float]:
    """One for all maps, without the rarest weights; from 0, near uniform maps have no shape."""
    low = min(float(np.quantile(m, _RARE)) for m in maps)
    high = max(float(np.quantile(m, 1 - _RARE)) for m in maps)
    # nothing but rounding would fill a scale narrower than this
    return (low, high) if high - low > 1e-3 * high else (0.0, 1.05 * high)

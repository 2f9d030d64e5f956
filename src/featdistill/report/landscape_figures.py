"""The figures of `landscape` and `curvature`, from their records; call them in `style.house()`.

They read of landscape.json (`results`):

    kind        plane, line or between; plane, where there is none
    data        {name, images}
    objective   what the loss is, in words, with its unit
    models      a list, each {name, spec, weights} and of a plane or line:
                rise      a list of {radius, mean, error, lowest, highest}
                low_area  a list of {rise, mean, error}

and of the npz: `coordinates` (K,), the steps along each direction, in units of the filters' norms
(between: 0 is the first model and 1 the second); for model number i `i.loss`, and of classifiers
`i.accuracy`: (planes, K, K) with rows along the second direction, or (lines, K). Between two models
all is number 0's. Points that are not measured yet are NaN; losses that are no number infinite.

Of curvature.json (`results`): `data`, `objective`, and `models`, each {name, spec, weights,
eigenvalues, residuals, trace, trace_error}: eigenvalues of the Hessian from the largest, with their
residuals; trace and its error may be null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from featdistill.report import plotstyle, style
from featdistill.report.feature_figures import draw_line, names, number, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
_STEEP = 30.0  # past this ratio of largest to smallest loss the scale is logarithmic


def kind_of(results: Results) -> str:
    """`plane`, `line` or `between`."""
    return str(results.get("kind", "plane"))


def drawn(results: Results, arrays: Arrays) -> np.ndarray:
    """The steps that are drawn: of an unfinished landscape every n-th, the finest full grid.

    Empty where there is not even the coarsest.
    """
    steps = np.asarray(arrays["coordinates"], float)
    models = 1 if kind_of(results) == "between" else len(results["models"])
    tables = [np.asarray(arrays[f"{i}.loss"], float) for i in range(models)]
    half = len(steps) // 2
    for stride in range(1, half + 1):
        some = slice(half % stride, None, stride)
        taken = [t[..., some, some] if t.ndim == 3 else t[..., some] for t in tables]
        if len(steps[some]) > 2 and not any(np.isnan(t).any() for t in taken):
            return steps[some]
    return steps[:0]


def planes(results: Results, arrays: Arrays, what: str) -> list[np.ndarray]:
    """The first plane of each model at the steps that are drawn; what is no number is NaN."""
    chosen = np.isin(arrays["coordinates"], drawn(results, arrays))
    found = []
    for i in range(len(results["models"])):
        plane = np.asarray(arrays[f"{i}.{what}"][0], float)[np.ix_(chosen, chosen)]
        found.append(np.where(np.isfinite(plane), plane, np.nan))
    return found


def heights(results: Results, arrays: Arrays) -> tuple[list[np.ndarray], str]:
    """The losses of `planes`, all linear or all decimal logarithms; their label."""
    found = planes(results, arrays, "loss")
    finite = np.concatenate([p[np.isfinite(p)] for p in found])
    if finite.size and finite.min() > 0 and finite.max() / finite.min() > _STEEP:
        return [np.log10(p) for p in found], "log10 of the loss"
    return found, "loss"


def surfaces(results: Results, arrays: Arrays) -> Figure:
    """The loss over the plane as a surface, a panel for each model, one scale."""
    from matplotlib.ticker import MaxNLocator

    found, label = heights(results, arrays)
    steps = drawn(results, arrays)
    x, y = np.meshgrid(steps, steps)
    low, high = plotstyle.limits(found, margin=0)
    count = len(found)
    figure, axes = plotstyle.panels(
        count,
        1,
        height=3.1 * count,
        share_x=False,
        share_y=False,
        subplot_kw={"projection": "3d"},
    )
    for axis, plane, name in zip(axes[:, 0], found, names(results), strict=True):
        axis.plot_surface(
            x,
            y,
            plane,
            cmap=style.SEQUENTIAL,
            vmin=low,
            vmax=high,
            linewidth=0.15,
            edgecolor=style.LIGHT["muted"],
            rcount=len(steps),
            ccount=len(steps),
        )
        axis.set_zlim(low, high)
        axis.set_zlabel(label)
        axis.view_init(28, -58)
        for side in (axis.xaxis, axis.yaxis, axis.zaxis):
            side.set_major_locator(MaxNLocator(4))
        axis.tick_params(labelsize=7, pad=0)
        plotstyle.title(axis, f"{short(name)}: {label}")
    return figure


def contours(results: Results, arrays: Arrays, what: str = "loss") -> Figure:
    """The loss or the accuracy from above, at the same levels for all models."""
    from matplotlib.ticker import MaxNLocator

    found, label = heights(results, arrays) if what == "loss" else _accuracies(results, arrays)
    steps = drawn(results, arrays)
    low, high = plotstyle.limits(found, margin=0)
    # at round numbers, from the one below all to the one above
    levels = MaxNLocator(12).tick_values(low, high if high > low else low + 1)
    count = len(found)
    figure, axes = plotstyle.panels(1, count, height=0.9 + 3.2 / max(count, 1), width=style.WIDTH)
    for axis, plane, name in zip(axes[0], found, names(results), strict=True):
        image = axis.contourf(steps, steps, plane, levels=levels, cmap=style.SEQUENTIAL)
        axis.contour(
            steps, steps, plane, levels=levels, colors=style.LIGHT["paper"], linewidths=0.4
        )
        axis.plot(0, 0, "+", color=style.LIGHT["paper"], markersize=7)
        axis.set_aspect("equal")
        axis.grid(False)
        plotstyle.title(axis, short(name, 14))
    plotstyle.colour_bar(figure, image, axes, label)
    return figure


def _accuracies(results: Results, arrays: Arrays) -> tuple[list[np.ndarray], str]:
    return planes(results, arrays, "accuracy"), "accuracy"


def rises(results: Results) -> Figure | None:
    """The mean rise of the loss at each radius; None where none is measured yet."""
    if not any(model.get("rise") for model in results["models"]):
        return None
    figure, axes = plotstyle.panels(1, 1, height=2.8)
    axis = axes[0, 0]
    looks = plotstyle.looks(names(results))
    for model in results["models"]:
        points, look = model.get("rise") or [], looks[model["name"]]
        radii = [p["radius"] for p in points]
        draw_line(
            axis,
            radii,
            [number(p["mean"]) for p in points],
            look,
            short(model["name"]),
            [number(p["error"]) for p in points],
        )
        axis.vlines(
            radii,
            [number(p["lowest"]) for p in points],
            [number(p["highest"]) for p in points],
            color=look.colour,
            linewidth=0.8,
            alpha=0.6,
        )
    axis.axhline(0, color=style.LIGHT["ink"], linewidth=0.8)
    axis.set_xlim(left=0)
    axis.set_xlabel("radius, norms of the weights")
    axis.legend(frameon=False, fontsize=8.5, loc="upper left")
    plotstyle.title(axis, "Mean rise of the loss")
    return figure


def profiles(results: Results, arrays: Arrays) -> Figure:
    """The loss (and the accuracy) along lines: their mean, and a band from lowest to highest."""
    between = kind_of(results) == "between"
    steps = drawn(results, arrays)
    chosen = np.isin(arrays["coordinates"], steps)
    rows = ["loss", "accuracy"] if "0.accuracy" in arrays else ["loss"]
    called = [" to ".join(short(n, 12) for n in names(results))] if between else names(results)
    looks = plotstyle.looks(called)
    figure, axes = plotstyle.panels(len(rows), 1, height=0.6 + 2.2 * len(rows), share_y=False)
    for axis, what in zip(axes[:, 0], rows, strict=True):
        for i, name in enumerate(called):
            lines = np.asarray(arrays[f"{i}.{what}"], float)[:, chosen]
            lines = np.where(np.isfinite(lines), lines, np.nan)
            look = looks[name]
            draw_line(axis, list(steps), list(lines.mean(0)), look, short(name))
            if len(lines) > 1:
                axis.fill_between(
                    steps, lines.min(0), lines.max(0), color=look.colour, alpha=0.2, linewidth=0
                )
        for place in (0.0, 1.0) if between else (0.0,):
            axis.axvline(place, color=style.LIGHT["muted"], linewidth=0.8)
        plotstyle.title(axis, what.capitalize())
    if between:
        axes[-1, 0].set_xlabel(f"0: {short(names(results)[0])}, 1: {short(names(results)[1])}")
    else:
        axes[-1, 0].set_xlabel("step, norms of the weights")
        axes[0, 0].legend(frameon=False, fontsize=8.5)
    return figure


def eigenvalues(results: Results) -> Figure:
    """The largest eigenvalues of the Hessian as bars, models beside each other."""
    figure, axes = plotstyle.panels(1, 1, height=2.8)
    axis = axes[0, 0]
    looks, models = plotstyle.looks(names(results)), results["models"]
    most = max(len(model["eigenvalues"]) for model in models)
    wide = 0.8 / len(models)
    for place, model in enumerate(models):
        values = [number(v) for v in model["eigenvalues"]]
        residuals = [number(v) for v in model.get("residuals") or [None] * len(values)]
        axis.bar(
            np.arange(len(values)) + (place - (len(models) - 1) / 2) * wide,
            values,
            width=0.92 * wide,
            color=looks[model["name"]].colour,
            label=short(model["name"]),
            yerr=residuals if np.isfinite(residuals).all() else None,
            error_kw={"elinewidth": 0.8, "ecolor": style.LIGHT["ink"]},
        )
    axis.axhline(0, color=style.LIGHT["ink"], linewidth=0.8)
    axis.set_xticks(range(most), [str(k + 1) for k in range(most)])
    axis.grid(False, axis="x")
    axis.set_xlabel("eigenvalue, from the largest")
    axis.legend(frameon=False, fontsize=8.5)
    plotstyle.title(axis, "Largest eigenvalues of the Hessian")
    return figure

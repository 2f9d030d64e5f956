"""The figures of `landscape` and `curvature`, from their records; call them in `style.house()`.

They read of landscape.json (`results`):

    data        {name, images}
    objective   what the loss is, in words, with its unit
    models      a list, each {name, spec, weights}

and of the npz: `coordinates` (K,), the steps along both directions, in units of the filters' norms;
for model number i `i.loss` (planes, K, K), rows along the second direction.

Of curvature.json (`results`): `data`, `objective`, and `models`, each {name, spec, weights,
eigenvalues, residuals, trace, trace_error}: eigenvalues of the Hessian from the largest, with their
residuals; trace and its error may be null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from featdistill.report import plotstyle, style
from featdistill.report.feature_figures import names, number, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
_STEEP = 30.0  # past this ratio of largest to smallest loss the scale is logarithmic


def heights(results: Results, arrays: Arrays) -> tuple[list[np.ndarray], str]:
    """The first plane of each model, (K, K), all linear or all decimal logarithms; its label."""
    planes = [np.asarray(arrays[f"{i}.loss"][0], float) for i in range(len(results["models"]))]
    finite = np.concatenate([p[np.isfinite(p)] for p in planes])
    if finite.size and finite.min() > 0 and finite.max() / finite.min() > _STEEP:
        return [np.log10(p) for p in planes], "log10 of the loss"
    return planes, "loss"


def surfaces(results: Results, arrays: Arrays) -> Figure:
    """The loss over the plane as a surface, a panel for each model, one scale."""
    from matplotlib.ticker import MaxNLocator

    planes, label = heights(results, arrays)
    steps = np.asarray(arrays["coordinates"], float)
    x, y = np.meshgrid(steps, steps)
    low, high = plotstyle.limits(planes, margin=0)
    count = len(planes)
    figure, axes = plotstyle.panels(
        count,
        1,
        height=3.1 * count,
        share_x=False,
        share_y=False,
        subplot_kw={"projection": "3d"},
    )
    for axis, plane, name in zip(axes[:, 0], planes, names(results), strict=True):
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


def contours(results: Results, arrays: Arrays) -> Figure:
    """The same as contours, at the same levels for all models."""
    planes, label = heights(results, arrays)
    steps = np.asarray(arrays["coordinates"], float)
    low, high = plotstyle.limits(planes, margin=0)
    levels = np.linspace(low, high if high > low else low + 1, 13)
    count = len(planes)
    figure, axes = plotstyle.panels(1, count, height=0.9 + 3.2 / max(count, 1), width=style.WIDTH)
    for axis, plane, name in zip(axes[0], planes, names(results), strict=True):
        drawn = axis.contourf(steps, steps, plane, levels=levels, cmap=style.SEQUENTIAL)
        axis.contour(
            steps, steps, plane, levels=levels, colors=style.LIGHT["paper"], linewidths=0.4
        )
        axis.plot(0, 0, "+", color=style.LIGHT["paper"], markersize=7)
        axis.set_aspect("equal")
        axis.grid(False)
        plotstyle.title(axis, short(name, 14))
    plotstyle.colour_bar(figure, drawn, axes, label)
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

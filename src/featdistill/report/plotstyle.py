"""What the figures of the diagnostics share: looks of models, panels on one scale, colour bars.

The palette, the settings and the files' formats are those of `style` and `svg`; draw inside
`style.house()`, then `svg.save`:

    with style.house():
        figure, axes = plotstyle.panels(1, len(names))
        ...
        svg.save(figure, folder, "name")  # PNG, SVG and PDF, the same bytes each time
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featdistill.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

FULL_WIDTH = 6.9  # inches: a page's text block; `style.WIDTH` is a column

_MARKERS = ("s", "o", "^", "D", "v", "P")
_DASHES: tuple[Any, ...] = (
    "-",
    "-",
    (0, (4, 2)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (2, 1)),
)


@dataclass(frozen=True)
class Look:
    """How one model is drawn in every figure; told apart by shape and line as well as by colour."""

    colour: str
    marker: str
    dashes: Any


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each model.

    `teacher`, `student` and `scratch` have their own, the same as in the page; the others take
    what is left, in the order given. Past six models looks repeat.
    """
    own = {name: style.ROLES.index(name) for name in names if name in style.ROLES[:3]}
    free = [i for i in range(len(style.ROLES)) if i not in own.values()] or [0]
    others = [name for name in dict.fromkeys(names) if name not in own]
    places = own | {name: free[i % len(free)] for i, name in enumerate(others)}
    return {
        name: Look(style.LIGHT[style.ROLES[i]], _MARKERS[i], _DASHES[i])
        for name, i in places.items()
    }


def limits(
    arrays: Iterable[Any],
    *,
    margin: float = 0.05,
    floor: float | None = None,
    ceiling: float | None = None,
) -> tuple[float, float]:
    """One pair of limits for all panels: the finite values and a margin, inside floor and ceiling.

    Args:
        arrays: of any shapes; those without a finite value say nothing.
        margin: share of the range, added at both ends.
    """
    flat = [np.asarray(a, dtype=np.float64).ravel() for a in arrays]
    values = np.concatenate([a[np.isfinite(a)] for a in flat] or [np.zeros(0)])
    if not values.size:
        return (0.0, 1.0) if floor is None else (floor, floor + 1.0 if ceiling is None else ceiling)
    low, high = float(values.min()), float(values.max())
    pad = margin * ((high - low) or abs(low) or 1.0)
    low, high = low - pad, high + pad
    return (
        low if floor is None else max(low, floor),
        high if ceiling is None else min(high, ceiling),
    )


def panels(
    rows: int,
    columns: int,
    *,
    width: float = style.WIDTH,
    height: float,
    share_x: bool = True,
    share_y: bool = True,
    **options: Any,
) -> tuple[Figure, Any]:
    """A figure of equal panels, by default on one scale.

    Args:
        width, height: of the whole, in inches.
        options: of matplotlib's `Figure.subplots`.

    Returns:
        The figure and its axes, an array (rows, columns).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=share_x, sharey=share_y, squeeze=False, **options)
    return figure, axes


def picture(axes: Axes, values: Any, *, scale: tuple[float, float], cmap: str) -> AxesImage:
    """A matrix as squares; no ticks, no grid. `scale` is the same for all panels of a figure."""
    image = axes.imshow(np.asarray(values), vmin=scale[0], vmax=scale[1], cmap=cmap)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def colour_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    """One bar for all `axes`; the label says the quantity and its unit."""
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=24, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.grid(False)


def title(axes: Axes, text: str) -> None:
    """A panel's title, in the house's quiet colour; control characters of a file's name go."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    axes.set_title(clean, color=style.LIGHT["muted"])


def log_vertical(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers; the house does not parse others."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axis = axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def layer_ticks(axes: Axes, layers: int) -> None:
    """Layers along the horizontal axis, counted from 1, at most about seven labels."""
    step = max(1, math.ceil(layers / 7))
    places = list(range(0, layers, step))
    axes.set_xticks(places, [str(place + 1) for place in places])
    axes.set_xlim(-0.6, layers - 0.4)
    axes.grid(False, axis="x")

"""The figures of a comparison; call them inside `style.house()`.

Accuracies are drawn in percent, differences in percentage points.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from featdistill.report import style
from featdistill.report.comparison import Comparison, Difference, Making, Row, Series
from featdistill.report.tables import MINUS, NOTHING, rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_THIN = 0.7
_MANY_POINTS = 60  # past this a curve is drawn faint, with its moving mean over it


def accuracy(found: Comparison) -> Figure:
    """Top-1 of every run by row, equal seeds joined, with mean and standard deviation."""
    rows = found.rows
    figure, (axes,) = style.new_figure(height=0.9 + 0.52 * len(rows))
    for one, two in pairwise(range(len(rows))):
        _join_seeds(axes, rows[one], rows[two], one, two)
    for place, row in enumerate(rows):
        _row_of_dots(axes, place, row, found.role(row.name))
    axes.set_xlim(*_zoom(found))
    _name_lines(axes, found, [row.name for row in rows])
    axes.set_title("Top-1 accuracy on the test images, %", color=style.LIGHT["muted"])
    return figure


def _name_lines(axes: Axes, found: Comparison, names: Sequence[str]) -> None:
    """Rows of the comparison from top to bottom, named at the left in their colours."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [_short(found.title(name)) for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(style.colour(found.role(name)))
    axes.tick_params(axis="y", length=0, labelsize=9, pad=6)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def _join_seeds(axes: Axes, one: Row, two: Row, at: int, to: int) -> None:
    other = {run.seed: run.top1 for run in two.runs}
    for run in one.runs:
        if run.seed in other:
            axes.plot(
                [100 * run.top1, 100 * other[run.seed]],
                [at, to],
                color=style.LIGHT["muted"],
                linewidth=_THIN,
                alpha=0.6,
                zorder=1,
            )


def _row_of_dots(axes: Axes, place: int, row: Row, role: str) -> None:
    colour, mean = style.colour(role), 100 * row.top1.mean
    axes.scatter(
        [100 * run.top1 for run in row.runs],
        [place] * len(row.runs),
        s=30,
        color=colour,
        marker=style.marker(role),
        edgecolors=style.LIGHT["paper"],
        linewidths=0.6,
        zorder=3,
    )
    if row.top1.std is None:
        return
    below, reach = place + 0.26, 100 * row.top1.std
    axes.plot([mean, mean], [below - 0.1, below + 0.1], color=colour, linewidth=2.4, zorder=3)
    axes.plot([mean - reach, mean + reach], [below] * 2, color=colour, linewidth=1, zorder=3)


def _zoom(found: Comparison) -> tuple[float, float]:
    """Limits in percent: what is drawn and a margin, at least two points, never past 0 or 100."""
    ends = [100 * run.top1 for row in found.rows for run in row.runs]
    for row in found.rows:
        reach = 100 * (row.top1.std or 0.0)
        ends += [100 * row.top1.mean - reach, 100 * row.top1.mean + reach]
    low, high = min(ends), max(ends)
    margin = max(0.1 * (high - low), 1 - (high - low) / 2, 0.1)
    # a little past 0 and 100, so that a dot there is not cut
    return max(low - margin, -0.5), min(high + margin, 100.5)


def differences(found: Comparison) -> Figure | None:
    """Every row minus the teacher, with intervals; None where there are no differences.

    The row from scratch has a panel of its own: it may lie so far off that the others' differences
    would shrink to nothing beside it.
    """
    shown = found.against_teacher
    groups = [[d for d in shown if (d.of == "scratch") == fresh] for fresh in (False, True)]
    groups = [group for group in groups if group]
    if not groups:
        return None
    sizes = [len(group) for group in groups]
    height = 0.85 * len(groups) + 0.5 * sum(sizes)
    figure, panels = style.new_figure(len(groups), height=height, ratios=sizes)
    for axes, group in zip(panels, groups, strict=True):
        _forest(axes, group, found)
    panels[0].set_title("Top-1 minus the teacher's, points", color=style.LIGHT["muted"])
    return figure


def _forest(axes: Axes, group: Sequence[Difference], found: Comparison) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.axvline(0, color=style.LIGHT["ink"], linewidth=0.9)
    for place, one in enumerate(group):
        _whiskers(axes, place, one, found.role(one.of))
    _name_lines(axes, found, [one.of for one in group])
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(_signed)


def _whiskers(axes: Axes, place: int, one: Difference, role: str) -> None:
    """One row's mean, its seeds, and what is known of the uncertainty."""
    colour, mean = style.colour(role), 100 * one.mean
    bars = [(one.interval, 1.1, 1.0), (one.images_interval, 4.0, 0.5)]
    if one.shown is None and one.std is not None:  # of an earlier version
        bars = [((one.mean - one.std, one.mean + one.std), 1.1, 1.0)]
    for ends, width, alpha in bars:
        if ends is not None:
            drawn = [100 * end for end in ends]
            look = {"linewidth": width, "alpha": alpha, "solid_capstyle": "butt"}
            axes.plot(drawn, [place] * 2, color=colour, **look)  # type: ignore[arg-type]
    each = [100 * d for d in one.per_seed]
    below = [place + 0.24] * len(each)
    axes.scatter(each, below, s=14, color=colour, marker=style.marker(role), alpha=0.75, zorder=3)
    axes.scatter(
        [mean],
        [place],
        s=42,
        color=colour,
        marker=style.marker(role),
        edgecolors=style.LIGHT["paper"],
        linewidths=0.7,
        zorder=4,
    )


def _signed(value: float, _: float) -> str:
    """A tick of differences: signed, with a true minus."""
    text = f"{abs(value):.10g}"
    return text if value == 0 else f"{'+' if value > 0 else MINUS}{text}"


def finetuning(found: Comparison, curves: Mapping[str, Sequence[Series]]) -> Figure | None:
    """Test accuracy as fine-tuning goes on; thin lines for seeds, thick for their mean.

    Args:
        curves: row name -> one series per seed, of shares.
    """
    figure, (axes,) = style.new_figure(height=3.2)
    ends: list[tuple[float, str, str]] = []
    last = 0
    for row in found.rows:
        drawn = [one for one in curves.get(row.name, ()) if len(one.steps) > 1]
        if not drawn:
            continue
        mean = _mean(drawn)
        if len(drawn) > 1:
            for one in drawn:
                axes.plot(
                    one.steps,
                    _percents(one),
                    color=style.colour(found.role(row.name)),
                    linewidth=_THIN,
                    alpha=0.4,
                )
        axes.plot(
            mean.steps,
            _percents(mean),
            color=style.colour(found.role(row.name)),
            linestyle=style.dashes(found.role(row.name)),
            linewidth=1.8,
        )
        ends.append((100 * mean.values[-1], row.title, found.role(row.name)))
        last = max(last, mean.steps[-1])
    if not ends:
        return None
    axes.set_xlim(0, last)
    _label_ends(axes, ends)
    _steps(axes)
    axes.set_title("Top-1 accuracy on the test images, %", color=style.LIGHT["muted"])
    return figure


def _percents(one: Series) -> list[float]:
    return [100 * value for value in one.values]


def _mean(drawn: Sequence[Series]) -> Series:
    """The mean over series, at the steps that all of them have."""
    tables = [dict(zip(one.steps, one.values, strict=True)) for one in drawn]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    if not common:
        return drawn[0]
    return Series(
        tuple(common), tuple(float(np.mean([table[step] for table in tables])) for step in common)
    )


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Titles in their roles' colours at curves' ends, moved apart where they would overlap."""
    ends = sorted(ends, key=lambda end: end[0])
    low, high = axes.get_ylim()
    places = spread_apart([value for value, _, _ in ends], gap=0.085 * (high - low))
    for place, (_, title, role) in zip(places, ends, strict=True):
        axes.annotate(
            _short(title),
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            color=style.colour(role),
            va="center",
            annotation_clip=False,
        )


def spread_apart(values: Sequence[float], gap: float) -> list[float]:
    """Rising values, moved as little as need be to lie at least `gap` apart."""
    clusters: list[list[float]] = []
    for value in values:
        clusters.append([value])
        while len(clusters) > 1 and _foot(clusters[-1], gap) < _head(clusters[-2], gap) + gap:
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [_foot(c, gap) + i * gap for c in clusters for i in range(len(c))]


def _foot(cluster: list[float], gap: float) -> float:
    """The lowest place of a cluster that is set evenly around its mean."""
    return float(np.mean(cluster)) - gap * (len(cluster) - 1) / 2


def _head(cluster: list[float], gap: float) -> float:
    return _foot(cluster, gap) + gap * (len(cluster) - 1)


def _steps(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(False, axis="x")
    axes.set_xlabel("optimiser step")


def sweep(found: Comparison) -> Figure | None:
    """Accuracy on held-out training labels by learning rate; the chosen one ringed."""
    rows = [row for row in found.rows if len(row.sweep) > 1]
    if not rows:
        return None
    figure, (axes,) = style.new_figure(height=3.2)
    axes.set_xscale("log")
    ends = []
    for layer, row in enumerate(rows):
        scores = {t.lr: 100 * t.val_top1 for t in row.sweep if t.val_top1 is not None}
        drawn, role = dict(sorted(scores.items())), found.role(row.name)
        _sweep_line(axes, row.lr, role, drawn, layer)
        ends.append((list(drawn.values())[-1], row.title, role))
    rates = sorted({trial.lr for row in rows for trial in row.sweep})
    axes.set_xticks(rates, [rate(value) for value in rates])
    axes.minorticks_off()
    axes.grid(False, axis="x")
    axes.margins(x=0.06, y=0.1)
    _label_ends(axes, ends)
    axes.set_xlabel("peak learning rate (log)")
    axes.set_title("Top-1 on held-out training labels, %", color=style.LIGHT["muted"])
    return figure


def _sweep_line(
    axes: Axes, chosen: float, role: str, drawn: Mapping[float, float], layer: int
) -> None:
    """One row's line; upper layers are finer, so that equal lines do not hide each other."""
    colour, finer = style.colour(role), 0.6**layer
    rates, scores = list(drawn), list(drawn.values())
    axes.plot(
        rates,
        scores,
        color=colour,
        linestyle=style.dashes(role),
        linewidth=1 + 1.6 * finer,
        marker=style.marker(role),
        markersize=4 + 4 * finer,
    )
    at = int(np.argmin(np.abs(np.log(rates) - np.log(chosen))))
    axes.plot(
        rates[at],
        scores[at],
        "o",
        markersize=12 + 5 * finer,
        markerfacecolor="none",
        markeredgecolor=colour,
    )


def making(made: Making) -> Figure:
    """How a model came to be: each measured quantity against the step, in its own panel."""
    figure, panels = style.new_figure(
        len(made.curves), height=1.6 * len(made.curves) + 0.2, share_x=True
    )
    for axes, (label, one) in zip(panels, made.curves.items(), strict=True):
        colour = style.colour(made.name)
        many = len(one.steps) > _MANY_POINTS
        axes.plot(one.steps, one.values, color=colour, linewidth=1.5, alpha=0.35 if many else 1)
        if many:
            smooth = _moving_mean(one, len(one.steps) // 25)
            axes.plot(smooth.steps, smooth.values, color=colour, linewidth=1.6)
        axes.set_title(label.capitalize(), color=style.LIGHT["muted"])
        _steps(axes)
        axes.label_outer()
    return figure


def _moving_mean(one: Series, window: int) -> Series:
    """The mean of `window` neighbours, at the middle one; shorter than the series by window - 1."""
    values = np.convolve(one.values, np.ones(window) / window, mode="valid")
    first = (window - 1) // 2
    return Series(one.steps[first : first + len(values)], tuple(values.tolist()))


def _short(title: str) -> str:
    """A title from a file as at most two short lines that any font can draw."""
    text = "".join(c if c.isprintable() else " " for c in title)
    return "\n".join(textwrap.wrap(text, 18, max_lines=2, placeholder="…")) or NOTHING

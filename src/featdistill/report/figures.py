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
from featdistill.report.tables import MINUS, NOTHING, percent, points, rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_THIN = 0.7
_MANY_POINTS = 60  # past this a curve is drawn faint, with its moving mean over it


def accuracy(found: Comparison) -> Figure:
    """Top-1 of every run by row, equal seeds joined, with mean and standard deviation."""
    figure, (axes,) = style.new_figure(height=3.2)
    for one, two in pairwise(range(len(found.rows))):
        _join_seeds(axes, found.rows[one], found.rows[two], one, two)
    for place, row in enumerate(found.rows):
        _row_of_dots(axes, place, row)
    axes.set_ylim(*_zoom(found))
    axes.set_xlim(-0.5, len(found.rows) - 0.5)
    labels = [f"{_short(row.title)}\n{percent(row.top1.mean, row.top1.std)}" for row in found.rows]
    axes.set_xticks(range(len(found.rows)), labels, linespacing=1.5)
    for label, row in zip(axes.get_xticklabels(), found.rows, strict=True):
        label.set_color(style.colour(row.name))
    axes.tick_params(axis="x", length=0, labelsize=9, pad=6)
    axes.grid(False, axis="x")
    axes.set_title("Top-1 accuracy on the test images, %", color=style.LIGHT["muted"])
    return figure


def _join_seeds(axes: Axes, one: Row, two: Row, at: int, to: int) -> None:
    other = {run.seed: run.top1 for run in two.runs}
    for run in one.runs:
        if run.seed in other:
            axes.plot(
                [at, to],
                [100 * run.top1, 100 * other[run.seed]],
                color=style.LIGHT["muted"],
                linewidth=_THIN,
                alpha=0.6,
                zorder=1,
            )


def _row_of_dots(axes: Axes, place: int, row: Row) -> None:
    colour, mean = style.colour(row.name), 100 * row.top1.mean
    axes.scatter(
        [place] * len(row.runs),
        [100 * run.top1 for run in row.runs],
        s=30,
        color=colour,
        marker=style.marker(row.name),
        edgecolors=style.LIGHT["paper"],
        linewidths=0.6,
        zorder=3,
    )
    if row.top1.std is None:
        return
    beside, reach = place + 0.2, 100 * row.top1.std
    axes.plot([beside - 0.07, beside + 0.07], [mean, mean], color=colour, linewidth=2.4, zorder=3)
    axes.plot([beside] * 2, [mean - reach, mean + reach], color=colour, linewidth=1, zorder=3)


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
    """The paired differences, one dot per seed, against zero; None where there are none."""
    shown = [d for d in found.differences if d.per_seed]
    if not shown:
        return None
    lines = sum(len(d.per_seed) + (d.n > 1) for d in shown)
    figure, panels = style.new_figure(len(shown), height=0.85 * len(shown) + 0.19 * lines)
    for axes, difference in zip(panels, shown, strict=True):
        _strip(axes, difference, found)
    return figure


def _strip(axes: Axes, difference: Difference, found: Comparison) -> None:
    from matplotlib.ticker import MaxNLocator

    each = [100 * d for d in difference.per_seed]
    colour = style.colour(difference.of)
    axes.axvline(0, color=style.LIGHT["ink"], linewidth=0.9)
    heights = list(range(len(each), 0, -1))
    for value, height in zip(each, heights, strict=True):
        axes.plot([0, value], [height, height], color=colour, linewidth=_THIN, alpha=0.6)
    axes.scatter(each, heights, s=30, color=colour, marker=style.marker(difference.of), zorder=3)
    names = [f"seed {seed}" for seed in found.seeds]
    ticks = list(zip(heights, names if len(names) == len(each) else [""] * len(each), strict=True))
    if difference.n > 1:
        _mean_line(axes, difference, colour)
        ticks.append((0, f"mean {points(difference.mean)}"))
    axes.set_yticks([t for t, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(-0.7 if difference.n > 1 else 0.4, len(each) + 0.6)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(_signed)
    of, minus = (_short(found.title(name)) for name in (difference.of, difference.minus))
    axes.set_title(f"{of} minus {minus}, points".replace("\n", " "), color=style.LIGHT["muted"])


def _mean_line(axes: Axes, difference: Difference, colour: str) -> None:
    mean, reach = 100 * difference.mean, 100 * (difference.std or 0.0)
    axes.plot([mean - reach, mean + reach], [0, 0], color=colour, linewidth=1)
    axes.plot([mean, mean], [-0.32, 0.32], color=colour, linewidth=2.4)


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
    ends: list[tuple[float, Row]] = []
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
                    color=style.colour(row.name),
                    linewidth=_THIN,
                    alpha=0.4,
                )
        axes.plot(
            mean.steps,
            _percents(mean),
            color=style.colour(row.name),
            linestyle=style.dashes(row.name),
            linewidth=1.8,
        )
        ends.append((100 * mean.values[-1], row))
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


def _label_ends(axes: Axes, ends: list[tuple[float, Row]]) -> None:
    """The rows' titles at their curves' ends, moved apart where they would overlap."""
    ends = sorted(ends, key=lambda end: end[0])
    low, high = axes.get_ylim()
    places = spread_apart([value for value, _ in ends], gap=0.085 * (high - low))
    for place, (_, row) in zip(places, ends, strict=True):
        axes.annotate(
            _short(row.title),
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            color=style.colour(row.name),
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
        trials = sorted(row.sweep, key=lambda trial: trial.lr)
        _sweep_line(axes, row, [t.lr for t in trials], [100 * t.val_top1 for t in trials], layer)
        ends.append((100 * trials[-1].val_top1, row))
    rates = sorted({trial.lr for row in rows for trial in row.sweep})
    axes.set_xticks(rates, [rate(value) for value in rates])
    axes.minorticks_off()
    axes.grid(False, axis="x")
    axes.margins(x=0.06, y=0.1)
    _label_ends(axes, ends)
    axes.set_xlabel("peak learning rate (log)")
    axes.set_title("Top-1 on held-out training labels, %", color=style.LIGHT["muted"])
    return figure


def _sweep_line(axes: Axes, row: Row, rates: list[float], scores: list[float], layer: int) -> None:
    """One row's line; upper layers are finer, so that equal lines do not hide each other."""
    colour, finer = style.colour(row.name), 0.6**layer
    axes.plot(
        rates,
        scores,
        color=colour,
        linestyle=style.dashes(row.name),
        linewidth=1 + 1.6 * finer,
        marker=style.marker(row.name),
        markersize=4 + 4 * finer,
    )
    at = int(np.argmin(np.abs(np.log(rates) - np.log(row.lr))))
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

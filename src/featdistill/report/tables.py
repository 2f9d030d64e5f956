"""Numbers as people read them, and the comparison as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from featdistill.report.comparison import Comparison, Difference, Row, parse_results

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def percent(value: float | None, spread: float | None = None) -> str:
    """A share as percent: `95.3%`, or `95.3 ± 0.4%` with its standard deviation."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if spread is None:
        return f"{100 * value:.1f}%"
    return f"{100 * value:.1f} ± {100 * spread:.1f}%"


def points(value: float | None, spread: float | None = None) -> str:
    """A difference of shares in percentage points, always signed: `+1.2`, `−0.4 ± 0.2`, `0.0`."""
    if value is None or not math.isfinite(value):
        return NOTHING
    size = f"{abs(100 * value):.1f}"
    sign = "" if float(size) == 0 else "+" if value > 0 else MINUS
    return f"{sign}{size}" if spread is None else f"{sign}{size} ± {100 * spread:.1f}"


def interval(ends: tuple[float, float]) -> str:
    """An interval of differences in percentage points: `−0.4 to +2.1`."""
    return " to ".join(points(end) for end in ends)


def difference(found: Difference) -> str:
    """A difference with what is known of its uncertainty: `+1.2 (−0.4 to +2.1)`."""
    if found.shown is None:
        return points(found.mean, found.std)
    return f"{points(found.mean)} ({interval(found.shown)})"


def energy(joules: float) -> str:
    """An energy: `0.35 Wh`, `12 kWh`."""
    value, unit = (joules / 3.6e6, "kWh") if joules >= 3.6e6 else (joules / 3600, "Wh")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def count(value: int) -> str:
    """A number of parameters: `85.8 M`, `12.3 k`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def room(value: int) -> str:
    """Bytes of memory or disk: `1.5 MiB`, `3.20 GiB`, `1,542 GiB`."""
    if value < 2**30 / 10:
        return f"{value / 2**20:.1f} MiB"
    return f"{value / 2**30:.2f} GiB" if value < 10 * 2**30 else f"{value / 2**30:,.0f} GiB"


def of_seeds(n: int) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n} seed{'' if n == 1 else 's'}"


def rate(value: float) -> str:
    """A learning rate: `0.001`, `1.2e-05`."""
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """A duration: `42 s`, `12 min`, `3 h 05 min`."""
    whole = round(value)
    if whole < 90:
        return f"{whole} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def sampling_error(share: float, images: int) -> float:
    """Standard error of an accuracy because its test images are a sample: sqrt(p (1 - p) / n)."""
    inside = min(max(share, 0.0), 1.0)
    return math.sqrt(inside * (1 - inside) / max(images, 1))


def knn_at(row: Row, k: int | None) -> float | None:
    """A row's kNN accuracy with k neighbours, None where it has none."""
    return row.knn.get(k) if row.knn and k is not None else None


def comparison_table(results: Mapping[str, Any]) -> Table:
    """The comparison for the terminal: one line per row.

    Args:
        results: the `results` of a `compare` record.

    Raises:
        RunError: the record is not complete.
    """
    from rich.table import Table
    from rich.text import Text

    found = parse_results(results)
    n = max(row.top1.n for row in found.rows)
    table = Table(
        title=f"{of_seeds(n)}, {found.data.labelled_images:,} labelled images",
        caption=_caption(found, n) or None,
    )
    for column in _columns(found):
        table.add_column(column, justify="left" if column == "" else "right", overflow="fold")
    for row in found.rows:
        # Text, since rich would read [brackets] in a title as markup
        table.add_row(Text(row.title), *_cells(found, row))
    return table


def _columns(found: Comparison) -> list[str]:
    knn = [f"kNN (k = {found.shown_k})"] if found.shown_k is not None else []
    return ["", "parameters", "learning rate", *knn, "top-1", "minus teacher (points)"]


def _caption(found: Comparison, n: int) -> str:
    parts = ["± is the standard deviation over seeds"] * (n > 1)
    if any(one.shown for one in found.differences):
        parts.append("in brackets: 95% interval")
    return "; ".join(parts)


def _cells(found: Comparison, row: Row) -> list[str]:
    k = found.shown_k
    against = found.to_teacher(row)
    return [
        count(row.model.parameters),
        rate(row.lr),
        *([percent(knn_at(row, k))] if k is not None else []),
        percent(row.top1.mean, row.top1.std),
        difference(against) if against else NOTHING,
    ]

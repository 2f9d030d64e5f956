"""What a comparison's rows took: lines of the page's table, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featdistill.report import tables
from featdistill.report.comparison import Comparison, Cost, Spending, parse_results

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = "not known"


@dataclass(frozen=True)
class Line:
    """A line of the page's table, one cell for each row of the comparison."""

    label: str
    cells: tuple[str, ...]
    strong: bool = False
    code: bool = False


def cost_lines(found: Comparison) -> list[Line]:
    """Images, time and energy of making each model and of fine-tuning it.

    Energy has lines only where something counted it, and what came before a model only where
    something did.
    """
    costs = [row.cost for row in found.rows]
    if not any(costs):
        return []

    lines = []
    if any(cost is not None and (len(cost.made) > 1 or cost.unknown) for cost in costs):
        cells = [UNKNOWN if cost is None else _before(cost) for cost in costs]
        lines.append(Line("Its teachers, images seen", tuple(cells)))
    making = [None if cost is None else cost.making for cost in costs]
    finetuning = [None if cost is None else cost.finetuning for cost in costs]
    for name, spent in (("Making it", making), ("Fine-tuning", finetuning)):
        lines.append(Line(f"{name}, images seen", tuple(map(_images, spent))))
        lines.append(Line(f"{name}, time", tuple(map(_time, spent))))
        if any(one is not None and one.joules for one in spent):
            lines.append(Line(f"{name}, energy", tuple(map(_energy, spent))))
    return lines


def cost_table(results: Mapping[str, Any]) -> Table | None:
    """The same for the terminal, one line for each row; None where nothing was recorded.

    Args:
        results: the `results` of a `compare` record.
    """
    from rich.table import Table
    from rich.text import Text

    found = parse_results(results)
    lines = cost_lines(found)
    if not lines:
        return None
    table = Table(title="What it took", padding=0)  # for a terminal of 80 columns
    table.add_column("")
    for line in lines:
        table.add_column(line.label, justify="right")
    for row, *cells in zip(found.rows, *(line.cells for line in lines), strict=True):
        table.add_row(Text(row.title), *cells)
    return table


def _images(spent: Spending | None) -> str:
    return UNKNOWN if spent is None or spent.images_seen is None else f"{spent.images_seen:,}"


def _time(spent: Spending | None) -> str:
    if spent is None or spent.seconds is None:
        return UNKNOWN
    return tables.seconds(spent.seconds) if spent.images_seen != 0 else tables.NOTHING


def _energy(spent: Spending | None) -> str:
    if spent is None or spent.joules is None:
        return UNKNOWN
    return tables.energy(spent.joules) if spent.images_seen != 0 else tables.NOTHING


def _before(cost: Cost) -> str:
    if not cost.made:
        return UNKNOWN if cost.unknown else "0"
    return UNKNOWN if cost.images_before is None else f"{cost.images_before:,}"

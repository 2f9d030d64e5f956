"""One self-contained HTML page of a comparison, drawn from the files of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featdistill.core.errors import RunError
from featdistill.core.records import read_record
from featdistill.engine.rundir import read_metrics
from featdistill.report import figures, style, svg, tables, words
from featdistill.report.comparison import (
    Comparison,
    Making,
    Row,
    Series,
    parse_results,
    read_making,
    series,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Shown:
    """A figure of the page: its SVG and the words around it."""

    number: int
    title: str
    drawing: Markup
    caption: str


@dataclass(frozen=True)
class Line:
    """A line of the page's table, one cell for each row of the comparison."""

    label: str
    cells: tuple[str, ...]
    strong: bool = False
    code: bool = False


def write_report(folder: Path) -> Path:
    """Draw a finished comparison: `folder`/report/index.html, and each figure as PNG and SVG.

    Reads `compare.json`, the metrics of its runs and, where they were kept, those of the models'
    making in `inputs/`.

    Args:
        folder: what `featdistill compare` wrote.

    Returns:
        The page. It needs no other file, no network and no script.

    Raises:
        RunError: there is no such record, it is not complete, or the page cannot be written.
    """
    record = read_record(folder / "compare.json", "compare")
    found = parse_results(record.get("results") or {})
    made = [one for name in ("teacher", "student") if (one := read_making(folder, name))]
    curves = {row.name: _curves(folder, row) for row in found.rows}
    out = folder / "report"
    try:
        out.mkdir(exist_ok=True)
        gallery = _Gallery(out)
        answer = _answer(gallery, found)
        training = _training(gallery, found, curves, made)
        page = out / "index.html"
        page.write_text(_render(record, found, answer, training, made), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the report in '{out}' ({error.strerror or error})") from None
    return page


def _curves(folder: Path, row: Row) -> list[Series]:
    """Test accuracy by step, for each seed whose metrics are there."""
    runs = (read_metrics(folder / run.folder / "metrics.jsonl") for run in row.runs)
    return [one for metrics in runs if (one := series(metrics, "val_top1")).steps]


class _Gallery:
    """Numbers the figures, and writes each in its formats."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._count = 0

    def add(self, figure: Figure, name: str, title: str, caption: str, description: str) -> Shown:
        from markupsafe import Markup

        self._count += 1
        text = svg.save(figure, self._out, name)
        drawing = svg.inline(text, name=name, title=title, description=description)
        # safe: made by an XML writer, which escaped every text and attribute
        return Shown(self._count, title, Markup(drawing), caption)


def _answer(gallery: _Gallery, found: Comparison) -> list[Shown]:
    """The figures that answer the question."""
    with style.house():
        dots = figures.accuracy(found)
        strips = figures.differences(found)
        shown = [gallery.add(dots, "accuracy", "Accuracy by row", *words.accuracy(found))]
        if strips is not None:
            title = "What distillation changed"
            shown.append(gallery.add(strips, "differences", title, *words.differences(found)))
    return shown


def _training(
    gallery: _Gallery,
    found: Comparison,
    curves: Mapping[str, Sequence[Series]],
    made: Sequence[Making],
) -> list[Shown]:
    """The figures that say how it came to that; those for which there are files."""
    shown = []
    with style.house():
        lines = figures.finetuning(found, curves)
        if lines is not None:
            shown.append(gallery.add(lines, "finetuning", "Fine-tuning", *words.finetuning(found)))
        rates = figures.sweep(found)
        if rates is not None:
            title = "Choosing the learning rate"
            shown.append(gallery.add(rates, "learning-rate", title, *words.sweep(found)))
        for one in made:
            shown.append(
                gallery.add(
                    figures.making(one), f"{one.kind}-{one.name}", *words.making(one, found)
                )
            )
    return shown


def _groups(found: Comparison) -> list[list[Line]]:
    """The page's table: rows of the comparison as its columns, so that seeds lie side by side."""
    rows = found.rows
    models = [row.model for row in rows]
    k = found.shown_k
    about = [
        Line("Model", tuple(m.spec for m in models), code=True),
        Line("Architecture", tuple(m.architecture for m in models), code=True),
        Line("First weights", tuple(m.weights for m in models)),
        Line("Parameters", tuple(tables.count(m.parameters) for m in models)),
        Line(
            "Tokens",
            tuple(
                f"{m.grid[0]} \N{MULTIPLICATION SIGN} {m.grid[1]}, width {m.width}" for m in models
            ),
        ),
    ]
    before = [Line("Learning rate", tuple(tables.rate(row.lr) for row in rows))]
    if k is not None:
        cells = tuple(tables.percent(tables.knn_at(row, k)) for row in rows)
        before.append(Line(f"kNN, k = {k}", cells))
    by_seed = [{run.seed: run.top1 for run in row.runs} for row in rows]
    scores = [
        Line(f"Top-1, seed {seed}", tuple(tables.percent(table.get(seed)) for table in by_seed))
        for seed in found.seeds
    ]
    means = tuple(tables.percent(row.top1.mean, row.top1.std) for row in rows)
    result = [
        Line("Top-1, mean" if len(found.seeds) > 1 else "Top-1", means, strong=True),
        Line("Minus teacher, points", tuple(_to_teacher(found, row) for row in rows), strong=True),
    ]
    return [about, before, scores if len(found.seeds) > 1 else [], result]


def _to_teacher(found: Comparison, row: Row) -> str:
    difference = found.to_teacher(row)
    return tables.points(*difference) if difference else tables.NOTHING


def _render(
    record: Mapping[str, Any],
    found: Comparison,
    answer: Sequence[Shown],
    training: Sequence[Shown],
    made: Sequence[Making],
) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    files = resources.files("featdistill.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    # safe: the package's own
    css = Markup(f"{style.css()}\n{files.joinpath('page.css').read_text(encoding='utf-8')}")
    return template.render(
        c=found,
        css=css,
        created=str(record.get("created") or "")[:10],
        role=style.role,
        percent=tables.percent,
        points=tables.points,
        of_seeds=tables.of_seeds,
        to_teacher=found.to_teacher,
        answer=answer,
        training=training,
        groups=[group for group in _groups(found) if group],
        table_caption=words.table(found),
        reading=words.reading(found),
        facts=words.facts(found, record, made),
        config=json.dumps(record.get("config") or {}, indent=2, ensure_ascii=False),
    )

"""One self-contained HTML page of a comparison, runs and diagnoses, drawn from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from featdistill.core.errors import RunError
from featdistill.engine.rundir import read_metrics
from featdistill.report import figures, runs, style, tables, words
from featdistill.report.comparison import (
    Comparison,
    Making,
    Row,
    Series,
    parse_results,
    read_making,
    series,
)
from featdistill.report.costs import Line, cost_lines
from featdistill.report.diagnoses import sections
from featdistill.report.folders import Found, Material, as_json, gather
from featdistill.report.gallery import Gallery, Section, Shown
from featdistill.report.tables import NOTHING


def write_report(*folders: Path, out: Path | None = None) -> Path:
    """Draw what was found: `out`/index.html, and each figure as PNG, SVG and PDF.

    Reads the records in these folders, the metrics of their runs and, where they were kept, those
    of a comparison's models in `inputs/`.

    Args:
        folders: what `compare`, `distill`, `finetune`, `pretrain`, `diagnose` or `landscape` wrote.
        out: by default `report` in the first of them.

    Returns:
        The page. It needs no other file and no network.

    Raises:
        RunError: there is no such record, it is not complete, or the page cannot be written.
        ConfigError: there are two comparisons.
    """
    material = gather(folders)
    out = folders[0] / "report" if out is None else out
    compared = None if material.comparison is None else _compared(material.comparison, material)
    try:
        out.mkdir(parents=True, exist_ok=True)
        gallery = Gallery(out)
        answer = _answer(gallery, compared.found) if compared else []
        training = _training(gallery, compared) if compared else []
        with style.house():
            training += runs.curves(gallery, material)
            diagnoses = [
                s
                for one in (*material.runs, *material.diagnoses)
                if one.kind == "segment" or one in material.diagnoses
                for s in sections(gallery, one)
            ]
        page = out / "index.html"
        page.write_text(_render(material, compared, answer, training, diagnoses), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the report in '{out}' ({error.strerror or error})") from None
    return page


@dataclass(frozen=True)
class Compared:
    """A comparison and what lies beside its record."""

    found: Comparison
    curves: Mapping[str, Sequence[Series]]
    made: tuple[Making, ...]


def _compared(one: Found, material: Material) -> Compared:
    folder, found = one.file.parent, parse_results(one.results)
    made = (read_making(folder, name) for name in ("teacher", "student"))
    curves = {row.name: _curves(folder, row) for row in found.rows}
    # the run itself may be given as well, and is then drawn by its own name
    given = [(run.kind, run.results) for run in material.runs]
    return Compared(found, curves, tuple(m for m in made if m and (m.kind, m.results) not in given))


def _curves(folder: Path, row: Row) -> list[Series]:
    """Test accuracy by step, for each seed whose metrics are there."""
    runs = (read_metrics(folder / run.folder / "metrics.jsonl") for run in row.runs)
    return [one for metrics in runs if (one := series(metrics, "val_top1")).steps]


def _answer(gallery: Gallery, found: Comparison) -> list[Shown]:
    """The figures that answer the question."""
    with style.house():
        dots = figures.accuracy(found)
        strips = figures.differences(found)
        shown = [gallery.add(dots, "accuracy", "Accuracy by row", *words.accuracy(found))]
        if strips is not None:
            title = "Against the teacher"
            shown.append(gallery.add(strips, "differences", title, *words.differences(found)))
    return shown


def _training(gallery: Gallery, compared: Compared) -> list[Shown]:
    """The figures that say how it came to that; those for which there are files."""
    shown = []
    found = compared.found
    with style.house():
        lines = figures.finetuning(found, compared.curves)
        if lines is not None:
            shown.append(gallery.add(lines, "finetuning", "Fine-tuning", *words.finetuning(found)))
        rates = figures.sweep(found)
        if rates is not None:
            title = "Choosing the learning rate"
            shown.append(gallery.add(rates, "learning-rate", title, *words.sweep(found)))
        for one in compared.made:
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
    costs = cost_lines(found)
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
    segmented = _segmented(found)
    return [about, before, scores if len(found.seeds) > 1 else [], result, segmented, costs]


def _segmented(found: Comparison) -> list[Line]:
    """The lines of a comparison's segmentations; none where there are none."""
    shared = found.segmentation
    if shared is None:
        return []
    each = [row.segmentation for row in found.rows]
    by_seed = [{run.seed: run.miou for run in one.runs} if one else {} for one in each]
    lines = [
        Line(f"mIoU, seed {seed}", tuple(tables.percent(table.get(seed)) for table in by_seed))
        for seed in found.seeds
        if len(found.seeds) > 1
    ]
    means = tuple(tables.percent(one.miou.mean, one.miou.std) if one else NOTHING for one in each)
    name = shared.data.rstrip("/").rpartition("/")[2]
    lines.append(Line(f"mIoU, {shared.head}, {name}", means, strong=True))
    apart = (found.miou_to_teacher(row) for row in found.rows)
    cells = tuple(tables.points(*one) if one else NOTHING for one in apart)
    lines.append(Line("Minus teacher, points of mIoU", cells, strong=True))
    prior = tables.percent(shared.prior_miou)
    lines.append(Line("mIoU by position alone", (prior,) * len(found.rows)))
    return lines


def _to_teacher(found: Comparison, row: Row) -> str:
    difference = found.to_teacher(row)
    return tables.difference(difference) if difference else tables.NOTHING


def _accounts(material: Material, compared: Compared | None) -> list[runs.Account]:
    """What each record was made with."""
    found = [
        runs.account(one, as_json(one.record)) for one in (*material.runs, *material.diagnoses)
    ]
    if compared is None or material.comparison is None:
        return found
    record = material.comparison.record
    facts = tuple(words.facts(compared.found, record, compared.made))
    return [runs.Account("Comparison", facts, as_json(record)), *found]


def _words(compared: Compared | None) -> dict[str, Any]:
    """What the page says of a comparison."""
    if compared is None:
        return {"c": None, "groups": [], "table_caption": "", "reading": [], "notices": []}
    found = compared.found
    return {
        "c": found,
        "to_teacher": found.to_teacher,
        "groups": [group for group in _groups(found) if group],
        "table_caption": words.table(found),
        "reading": words.reading(found),
        "notices": [text for text in (words.price(found), words.edge_warning(found)) if text],
    }


def _render(
    material: Material,
    compared: Compared | None,
    answer: Sequence[Shown],
    training: Sequence[Shown],
    diagnoses: Sequence[Section],
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
    everything = [material.comparison, *material.runs, *material.diagnoses]
    records = [one for one in everything if one is not None]
    return template.render(
        **_words(compared),
        verdict=compared.found.verdict if compared else runs.verdict(material),
        subject=compared.found.data.name
        if compared
        else ", ".join(dict.fromkeys(r.name for r in records)),
        css=css,
        created=str(records[0].record.get("created") or "")[:10],
        role=compared.found.role if compared else style.role,
        percent=tables.percent,
        points=tables.points,
        interval=tables.interval,
        of_seeds=tables.of_seeds,
        answer=answer,
        run_names=[one.name for one in material.runs],
        run_lines=runs.table(material),
        training=training,
        diagnoses=diagnoses,
        scripted=any(figure.scripted for s in diagnoses for figure in s.figures),
        accounts=_accounts(material, compared),
        files=list(dict.fromkeys(one.file.name for one in records)),
    )

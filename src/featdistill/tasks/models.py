"""`featdistill models`: the students, the known teachers, and what else timm has to teach."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console

from featdistill.config.commands import ModelsConfig
from featdistill.core.errors import ModelError, did_you_mean
from featdistill.models import catalogue
from featdistill.models.catalogue import Entry, StudentEntry
from featdistill.report.tables import count

_SHOWN = 60
_FULL_WIDTH = 100  # columns; a narrower terminal gets fewer of the table's
_UNKNOWN = "?"


def run(config: ModelsConfig) -> dict[str, list[dict[str, Any]]]:
    """List students and teachers, those that match the search, or one of them in full."""
    search = (config.search or "").strip()
    exact = catalogue.find(search)
    students = () if exact else tuple(s for s in catalogue.students() if search.lower() in s.name)
    known = (exact,) if exact else catalogue.search(search)
    others = _others(search) if search and not exact else []
    if not (students or known or others):
        names = [e.name for e in catalogue.teachers()]
        if not search.startswith("timm/"):
            names = [name.removeprefix("timm/") for name in names]
            names += {word.lower() for e in catalogue.teachers() for word in e.family.split()}
        raise ModelError(
            f"no known model and none of timm's pretrained weights is called '{search}'",
            fix=did_you_mean(search, names) or "try dino, clip, deit, mae, swin, beit, ...",
        )
    found = {
        "students": [{**asdict(s), "grid": s.grid} for s in students],
        "catalogue": [{**asdict(e), "grid": e.grid} for e in known],
        "teachers": others,
    }
    if config.as_json:
        print(json.dumps(found, indent=2))
        return found
    console = Console(highlight=False, soft_wrap=True)
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else _FULL_WIDTH
    lines = _one(exact) if exact else _all(students, known, others, width, whole=not search)
    for line in lines:
        console.print(line, markup=False)
    return found


def _others(search: str) -> list[dict[str, Any]]:
    """timm's weights whose name contains the search, without those of the catalogue."""
    import timm

    rows = []
    for name in timm.list_pretrained(f"*{search.removeprefix('timm/')}*"):
        if catalogue.find(name) is not None:
            continue
        config = timm.get_pretrained_cfg(name)
        rows.append(
            {
                "name": f"timm/{name}",
                "image_size": config.input_size[-1],
                "mean": list(config.mean),
                "std": list(config.std),
                "licence": config.license,
                "link": config.hf_hub_id and f"hf-hub:{config.hf_hub_id}",
            }
        )
    return rows


def _all(
    students: Sequence[StudentEntry],
    known: Sequence[Entry],
    others: Sequence[dict[str, Any]],
    width: int,
    *,
    whole: bool,
) -> list[str]:
    lines: list[str] = []
    if students:
        lines += ["students, at 224 pixels (--student)", *_student_table(students), ""]
    if known:
        lines += _teacher_table(known, width)
    if others:
        title = f"{'also ' if known else ''}in timm"
        lines += [f"{title}: {len(others)} weights", *_other_table(others[:_SHOWN])]
        if len(others) > _SHOWN:
            lines.append(f"... and {len(others) - _SHOWN} more; --json lists all")
        lines.append("")
    if any(not e.in_timm for e in known):
        lines.append("weights of a name without timm/ are a file to download; NAME shows where")
    lines.append("featdistill models NAME shows one in full, models WORD searches timm too")
    if whole:
        lines.append("any timm/NAME is a student, and a teacher if timm has weights for it")
    return lines


def _student_table(students: Iterable[StudentEntry]) -> list[str]:
    rows = [
        (s.name, count(s.parameters), _tokens(s), str(s.width), str(s.depth), s.position)
        for s in students
    ]
    return _aligned([("name", "parameters", "tokens", "width", "layers", "position"), *rows])


def _teacher_table(entries: Sequence[Entry], width: int) -> list[str]:
    wide = width >= _FULL_WIDTH
    head = ("name", "parameters", "image", "tokens", "width", "mean/std")
    table = [head, *(_cells(e) for e in entries)]
    if not wide:
        table = [tuple(row[i] for i in (0, 1, 3, 4)) for row in table]
    title, *rows = _aligned(table)
    lines = ["teachers (--teacher); tokens: the map, and how many are before it", title, ""]
    at = iter(rows)
    for family, group in groupby(entries, key=lambda e: e.family):
        members = list(group)
        usual = members[0] if len(members) == 1 else _usual(members)
        about = [f"{family}: {usual.method}", f"{usual.data}; licence {usual.licence}", usual.link]
        about += [usual.note] if usual.note else []
        for text in about:
            lines += textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
        for entry in members:
            lines += [next(at), *_special(entry, usual, width)]
        lines.append("")
    return lines


def _usual(members: Sequence[Entry]) -> Entry:
    """The member that the most others share their data with."""
    data = [m.data for m in members]
    return max(members, key=lambda m: data.count(m.data))


def _special(entry: Entry, usual: Entry, width: int) -> list[str]:
    """What sets an entry apart from its family."""
    texts = [entry.data] if entry.data != usual.data else []
    texts += [f"licence {entry.licence}"] if entry.licence != usual.licence else []
    texts += [entry.note] if entry.note and entry.note != usual.note else []
    if not texts:
        return []
    return textwrap.wrap(
        "; ".join(texts), width, initial_indent="      ", subsequent_indent="      "
    )


def _cells(entry: Entry) -> tuple[str, ...]:
    return (
        entry.name,
        count(entry.parameters),
        str(entry.image_size or _UNKNOWN),
        _tokens(entry),
        str(entry.width or _UNKNOWN),
        entry.mean_std or _UNKNOWN,
    )


def _tokens(entry: Entry | StudentEntry) -> str:
    if entry.grid is None:
        return _UNKNOWN
    more = f"+{len(entry.prefix)}" if entry.prefix else ""
    return f"{entry.grid[0]}x{entry.grid[1]}{more}"


def _other_table(rows: Iterable[dict[str, Any]]) -> list[str]:
    cells = [(r["name"], str(r["image_size"]), r["licence"] or "unknown") for r in rows]
    return _aligned([("name", "image", "licence"), *cells])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _one(entry: Entry) -> list[str]:
    """Everything about one teacher."""
    grid, unknown = entry.grid, "unknown"
    prefix = "".join(f" + {name}" for name in entry.prefix)
    facts = {
        "family": f"{entry.family}: {entry.method}",
        "trained on": entry.data,
        "licence": entry.licence,
        "parameters": f"{entry.parameters:,}",
        "image": f"{entry.image_size}x{entry.image_size} pixels" if entry.image_size else unknown,
        "tokens": f"{grid[0]}x{grid[1]}{prefix}, patches of {entry.patch}" if grid else unknown,
        "width": str(entry.width or unknown),
        "mean": ", ".join(map(str, entry.mean)) or unknown,
        "std": ", ".join(map(str, entry.std)) or unknown,
        "weights": entry.url or "never published",
        "project": entry.link,
        "paper": entry.paper,
    }
    if entry.note:
        facts["note"] = entry.note
    if entry.url is not None:
        facts["use"] = _use(entry)
    return [entry.name, *(f"  {key:<10}  {value}" for key, value in facts.items())]


def _use(entry: Entry) -> str:
    if entry.in_timm:
        return f"--teacher {entry.name}"
    return f"download it, then --teacher {entry.file or 'FILE'}"

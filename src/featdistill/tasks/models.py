"""`featdistill models`: the students, and what timm has to teach them."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from featdistill.config.commands import ModelsConfig
from featdistill.core.errors import ModelError
from featdistill.models.students import SIZES, SwinSize

_SHOWN = 60


def run(config: ModelsConfig) -> dict[str, list[dict[str, Any]]]:
    """List students, and the timm weights whose name contains the search."""
    students = [] if config.search else _students()
    teachers = _teachers(config.search) if config.search else []
    if config.search and not teachers:
        raise ModelError(
            f"timm has no pretrained weights with '{config.search}' in their name",
            fix="try dino, clip, deit, mae, swin, beit, ...",
        )
    if config.as_json:
        print(json.dumps({"students": students, "teachers": teachers}, indent=2))
    else:
        _show(students, teachers)
    return {"students": students, "teachers": teachers}


def _students() -> list[dict[str, Any]]:
    rows = []
    for name, size in SIZES.items():
        swin = isinstance(size, SwinSize)
        rows.append(
            {
                "name": name,
                "width": size.width * 8 if isinstance(size, SwinSize) else size.width,
                "depth": sum(size.depths) if isinstance(size, SwinSize) else size.depth,
                "patch": size.patch,
                "position": "continuous bias per block" if swin else "shared relative bias",
            }
        )
    return rows


def _teachers(search: str) -> list[dict[str, Any]]:
    import timm

    rows = []
    for name in timm.list_pretrained(f"*{search}*"):
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


def _show(students: list[dict[str, Any]], teachers: list[dict[str, Any]]) -> None:
    console = Console()
    for title, rows in (("students", students), ("teachers", teachers)):
        if not rows:
            continue
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        columns = [c for c in rows[0] if c not in ("mean", "std", "link")]
        for column in columns:
            table.add_column(column)
        for row in rows[:_SHOWN]:
            table.add_row(*(str(row[c] if row[c] is not None else "unknown") for c in columns))
        console.print(table)
        if len(rows) > _SHOWN:
            console.print(f"... and {len(rows) - _SHOWN} more; --json lists all")
    if students:
        console.print(
            "\nany timm architecture is a student too: --student timm/NAME\n"
            "featdistill models dino (or clip, deit, mae, swin, ...) searches timm for teachers"
        )

"""Numbers as text, and the table of the terminal."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from featdistill.report.comparison import parse_results, read_making, series
from featdistill.report.figures import spread_apart
from featdistill.report.tables import (
    NOTHING,
    comparison_table,
    count,
    percent,
    points,
    sampling_error,
    seconds,
)

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(0.9534), "95.3%"),
        (percent(0.9534, 0.004), "95.3 ± 0.4%"),
        (percent(None), NOTHING),
        (percent(math.nan), NOTHING),
        (points(0.0124), "+1.2"),
        (points(-0.0124, 0.003), "\N{MINUS SIGN}1.2 ± 0.3"),
        (points(-0.0001), "0.0"),  # neither -0.0 nor +0.0
        (points(None), NOTHING),
        (count(85_800_000), "85.8 M"),
        (count(1_210), "1.2 k"),
        (count(12), "12"),
        (seconds(42), "42 s"),
        (seconds(725), "12 min"),
        (seconds(11_100), "3 h 05 min"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected


def test_sampling_error_is_binomial() -> None:
    assert sampling_error(0.5, 100) == pytest.approx(0.05)
    assert sampling_error(1.0, 100) == 0


def test_table_for_the_terminal(make_comparison: Make) -> None:
    lines = _printed(make_comparison())
    assert [lines[name] for name in ("Teacher", "Distilled student", "From scratch")] == [
        ["85.8 M", "0.001", "93.1%", "95.4 ± 0.4%", NOTHING],
        ["85.8 M", "0.001", "90.0%", "96.6 ± 0.3%", "+1.2 ± 0.2"],
        ["85.8 M", "0.004", NOTHING, "84.6 ± 1.3%", "\N{MINUS SIGN}10.8"],
    ]


def test_table_shows_markup_as_it_is(make_comparison: Make) -> None:
    folder = make_comparison(seeds=(1,))
    results = _results(folder)
    results["rows"][0]["title"] = "[red]T[/nothing]"
    (folder / "compare.json").write_text(
        json.dumps({"kind": "compare", "results": results}), encoding="utf-8"
    )
    assert _printed(folder)["[red]T[/nothing]"][3:] == ["95.0%", NOTHING]


def test_one_k_for_all_rows(make_comparison: Make) -> None:
    results = _results(make_comparison())
    assert parse_results(results).shown_k == 20
    results["rows"][0]["knn"] = {"1": 0.9, "5": 0.9, "10": 0.95, "200": 0.99}
    results["rows"][1]["knn"] = {"1": 0.9, "5": 0.9, "20": 0.95}
    assert parse_results(results).shown_k == 5
    results["rows"][1]["knn"] = None
    assert parse_results(results).shown_k == 10


def test_series_keeps_finite_numbers() -> None:
    lines = [{"step": 1, "x": 0.5}, {"step": 2}, {"step": 3, "x": math.inf}, {"step": 4, "x": "a"}]
    found = series([*lines, 7, {"step": 5, "x": 2}], "x")  # type: ignore[list-item]
    assert (found.steps, found.values) == ((1, 5), (0.5, 2.0))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 5.0], [1.0, 5.0]),
        ([2.0, 2.0], [1.5, 2.5]),
        ([0.0, 2.0, 2.2], [0.0, 1.6, 2.6]),
        ([2.0, 2.0, 2.9], [1.3, 2.3, 3.3]),  # the pair, set apart, meets the third
    ],
)
def test_labels_are_spread_apart(values: list[float], expected: list[float]) -> None:
    assert spread_apart(values, gap=1.0) == pytest.approx(expected)


def _results(folder: Path) -> dict:
    return json.loads((folder / "compare.json").read_text(encoding="utf-8"))["results"]


def _printed(
    folder: Path, table: Callable[[dict], Table | None] = comparison_table
) -> dict[str, list[str]]:
    """First cell -> the others, of each line of the table as printed."""
    out = io.StringIO()
    Console(file=out, width=120).print(table(_results(folder)))
    rows = [line.strip("│").split("│") for line in out.getvalue().splitlines() if "│" in line]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in rows}


def test_a_distillations_curves_hold_what_was_measured_on_held_out_images(
    make_comparison: Make,
) -> None:
    folder = make_comparison()
    made = read_making(folder, "student")
    assert made is not None
    assert list(made.curves) == ["loss", "cosine"]  # a run without a held-out slice
    with (folder / "inputs/student/metrics.jsonl").open("a") as file:
        for step in (0, 700):
            row = {"step": step, "holdout_loss": 0.5, "student_rank": 3.0 + step}
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"step": 700, "knn_top1": 0.5}) + "\n")
    made = read_making(folder, "student")
    assert made is not None
    added = {label: one for label, one in made.curves.items() if "held-out" in label}
    assert list(made.curves) == ["loss", "cosine", *added]  # and no curve of a single point
    assert [one.steps for one in added.values()] == [(0, 700)] * 2
    assert [one.values for one in added.values()] == [(0.5, 0.5), (3.0, 703.0)]

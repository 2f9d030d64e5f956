"""A comparison's page: intervals, costs and further rows; and records that lack them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from featdistill.report import figures, style, words
from featdistill.report.comparison import Comparison, parse_results
from featdistill.report.costs import cost_lines, cost_table
from featdistill.report.page import write_report
from featdistill.report.tables import NOTHING, difference, energy, interval
from tests.report.conftest import ALL
from tests.report.test_report_page import Page
from tests.report.test_report_tables import _printed, _results

Make = Callable[..., Path]
MINUS = "\N{MINUS SIGN}"


def found_in(folder: Path) -> Comparison:
    return parse_results(json.loads((folder / "compare.json").read_text())["results"])


def test_the_page_of_six_rows(make_comparison: Make) -> None:
    page = Page(write_report(make_comparison(names=ALL, whole=True)))
    for said in (
        # the price comes right after the verdict
        "(better under 3 of 3 seeds). The price of the student: 19,200 images seen and 3 min, "
        "besides the 25,600 that its teacher had seen. From scratch chose the outermost rate",
        f"Minus teacher, points {NOTHING} +1.2 ({MINUS}0.8 to +3.2) +1.2",
        "Its teachers, images seen 0 25,600 44,800 not known not known 0",
        "Making it, images seen 25,600 19,200 12,800 19,200 not known 0",
        f"Making it, time 11 min 3 min 3 min 3 min not known {NOTHING}",
        "Fine-tuning, images seen 76,800 76,800",
        "10,000 resamples of the same test images",
        "Of 5 such intervals, about one in twenty misses",
        "Thick bar: 95% interval from the test images alone",
        "not available: this machine does not count it",
        "Time 40 min for all fine-tunings, 63 s for each scored",
    ):
        assert said in page.text, said
    assert "energy" not in page.text
    (table, *_) = page.all("table")
    assert table.get("class") == "wide"
    headers = [a.get("class") for a in page.all("th") if a.get("scope") == "col"]
    assert headers == ["teacher", "student", "other", "fifth", "sixth", "scratch"]
    styles = " ".join(a.get("style") or "" for _, a in page.elements)
    for role in style.ROLES:
        assert f"var(--{role})" in styles
        assert f".{role} {{ --row: var(--{role}); }}" in page.source


def test_energy_is_shown_where_it_was_counted(make_comparison: Make) -> None:
    folder = make_comparison(names=ALL, whole=True, joules=7200.0)
    page = Page(write_report(folder))
    assert "Fine-tuning, energy 2 Wh 2 Wh" in page.text
    assert "12 Wh for fine-tuning" in page.text
    assert "Making it, energy" not in page.text
    labels = [line.label for line in cost_lines(found_in(folder))]
    assert labels[-1] == "Fine-tuning, energy"


def test_the_terminal_says_intervals_and_costs(make_comparison: Make) -> None:
    folder = make_comparison(names=ALL, whole=True)
    assert _printed(folder)["Second round"][-1] == f"+1.2 ({MINUS}0.8 to +3.2)"
    lines = _printed(folder, cost_table)
    assert lines["Second round"] == ["44,800", "12,800", "3 min", "76,800", "7 min"]
    assert lines["My own model"][:3] == ["not known"] * 3
    assert lines["From scratch"][:3] == ["0", "0", NOTHING]
    assert cost_table(_results(make_comparison())) is None


def test_the_figure_has_a_line_for_each_row(make_comparison: Make) -> None:
    found = found_in(make_comparison(names=ALL, whole=True))
    drawn = figures.differences(found)
    assert drawn is not None
    known, fresh = drawn.axes  # what starts from nothing has a scale of its own
    assert [label.get_text() for label in known.get_yticklabels()] == [
        "Distilled student",
        "Second round",
        "Distilled on\nlogits",
        "My own model",
    ]
    assert [label.get_text() for label in fresh.get_yticklabels()] == ["From scratch"]
    ends = {tuple(map(float, line.get_xdata())) for line in known.lines}
    student = found.against_teacher[0]
    for shown in (student.interval, student.images_interval):
        assert shown is not None
        assert (100 * shown[0], 100 * shown[1]) in ends
    assert figures.differences(found.model_copy(update={"differences": ()})) is None


def test_one_seed_has_an_interval_of_images_alone(make_comparison: Make) -> None:
    folder = make_comparison(seeds=(1,), whole=True)
    page = Page(write_report(folder))
    assert "With a single seed they say nothing of other seeds" in page.text
    assert "of other seeds one run tells nothing" in page.text
    assert "+1.4 (+0.6 to +2.2)" in page.text
    assert "other seeds counted too" not in page.text


def test_a_record_of_an_earlier_version(make_comparison: Make) -> None:
    """No intervals and no costs: the standard deviation stands in, and nothing is invented."""
    folder = make_comparison()
    page = Page(write_report(folder))
    assert "+1.2 ± 0.2" in page.text
    assert "interval from" not in page.text
    assert "images seen" not in page.text.split("What was run")[0].split("How it got")[0]
    assert "The price" not in page.text
    assert words.price(found_in(folder)) == ""
    drawn = figures.differences(found_in(folder))
    assert drawn is not None


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        ({"unknown": ["hub"]}, "not recorded"),
        ({"made": [{"kind": "distill", "name": "s", "images_seen": 64}]}, "64 images seen."),
        (
            {
                "made": [
                    {
                        "kind": "distill",
                        "name": "s",
                        "images_seen": 64,
                        "seconds": 100,
                        "joules": 3.6e6,
                    }
                ],
                "unknown": ["timm/a"],
            },
            "64 images seen, 2 min and 1 kWh; what its teacher had taken is not recorded.",
        ),
    ],
)
def test_the_price_is_what_is_known(make_comparison: Make, cost: dict, said: str) -> None:
    results = json.loads((make_comparison() / "compare.json").read_text())["results"]
    results["rows"][1]["cost"] = cost
    assert said in words.price(parse_results(results))


def test_a_rate_that_diverged_is_no_point(make_comparison: Make) -> None:
    folder = make_comparison()
    record = json.loads((folder / "compare.json").read_text())
    row = record["results"]["rows"][2]  # it chose the largest of those that held
    row["sweep"].append({"lr": 0.016, "val_top1": None})
    (folder / "compare.json").write_text(json.dumps(record))
    found = found_in(folder)
    assert not found.rows[2].at_edge
    assert words.edge_warning(found) == ""
    drawn = figures.sweep(found)
    assert drawn is not None
    assert max(map(len, (line.get_xdata() for line in drawn.axes[0].lines))) == 3
    write_report(folder)


def test_numbers_with_their_uncertainty(make_comparison: Make) -> None:
    whole = found_in(make_comparison(whole=True)).differences[0]
    assert difference(whole) == f"+1.2 ({MINUS}0.8 to +3.2)"
    assert difference(whole.model_copy(update={"interval": None})) == "+1.2 (+0.4 to +2.0)"
    assert interval((-0.0004, 0.021)) == "0.0 to +2.1"
    assert (energy(1260), energy(3.6e9)) == ("0.35 Wh", "1,000 kWh")

"""The page of single runs and of diagnoses, with and without a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featdistill.cli.main import main
from featdistill.core.errors import FeatDistillError
from featdistill.core.records import write_record
from featdistill.report import feature_figures, style
from featdistill.report.page import write_report
from tests.report.test_report_page import Page

Make = Callable[..., Path]


def finetuned(folder: Path, top1: float, images: int = 1000) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": s, "loss": 2.0 / s, "val_top1": top1 - 1 / s} for s in range(10, 100, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    results = {"top1": top1, "top5": 0.99, "images": images, "steps": 90, "seconds": 12.0}
    write_record(folder / "finetune.json", "finetune", config={"lr": 0.125}, results=results)
    return folder


def _layer(depth: int) -> dict[str, Any]:
    return {
        "grid": [4, 4],
        "channels": 8,
        "rank": 3.5 + depth,
        "rank_limit": 8,
        "frequency": [0, 0.5, 1],
        "relative_log_amplitude": [0, -1.0, -2.0 - depth],
        "relative_log_amplitude_error": [0, 0.1, 0.1],
        "norm_mean": 1.0,
        "norm_median": 1.0,
        "norm_largest_over_median": 1.5,
        "outliers": 0.02 * depth,
        "outliers_error": 0.001,
        "variance_spatial": 0.1,
        "variance_spatial_error": 0.01,
        "variance_between": None,
    }


def diagnosed(folder: Path, names: tuple[str, ...] = ("teacher", "student")) -> Path:
    folder.mkdir(parents=True)
    depth = 3
    models = [
        {
            "name": n,
            "spec": f"runs/{n}",
            "weights": "hub",
            "layers": [_layer(i) for i in range(depth)],
        }
        for n in names
    ]
    rng = np.random.default_rng(0)
    arrays = {"cka": np.eye(depth * len(names))}
    for i in range(len(names)):
        arrays |= {
            f"{i}.pictures": rng.integers(0, 255, (2, 4, 4, 3), dtype=np.uint8),
            f"{i}.photographs": rng.integers(0, 255, (2, 32, 32, 3), dtype=np.uint8),
        }
    write_record(
        folder / "diagnose-features.json",
        "diagnose-features",
        config={},
        results={
            "data": {"name": "photographs", "images": 40},
            "cka": {"block": 256, "images": 40},
            "models": models,
        },
        arrays=arrays,
    )
    return folder


def test_runs_side_by_side(tmp_path: Path) -> None:
    one, two = finetuned(tmp_path / "one", 0.9), finetuned(tmp_path / "two", 0.95)
    page = Page(write_report(one, two, out=tmp_path / "page"))
    # 2 sqrt(0.9 0.1 / 1000 + 0.95 0.05 / 1000) = 2.3 points
    assert (
        "two scores 95.0% top-1, one 90.0%: 5.0 points apart, more than two standard errors of "
        "1,000 test images (2.3 points)" in page.text
    )
    assert "Top-1 90.0% 95.0%" in page.text
    assert "The whole configuration" in page.text
    assert '"lr": 0.125' in page.text
    assert len(page.all("figure")) == 2
    assert {f.name for f in (tmp_path / "page").glob("*.png")} == {
        "run-finetune.png",
        "run-finetune-2.png",
    }


def test_a_difference_within_sampling_error_is_called_that(tmp_path: Path) -> None:
    page = write_report(finetuned(tmp_path / "a", 0.95), finetuned(tmp_path / "b", 0.94))
    assert "not more than two standard errors" in Page(page).text
    assert page == tmp_path / "a" / "report" / "index.html"


def test_one_run_is_not_called_better(tmp_path: Path) -> None:
    text = Page(write_report(finetuned(tmp_path / "one", 0.9))).text
    assert "one classifies 90.0% of 1,000 held-out images rightly" in text
    assert "a comparison can say (featdistill compare)" in text


def test_a_diagnosis_alone(tmp_path: Path) -> None:
    page = Page(write_report(diagnosed(tmp_path / "d")))
    assert "How teacher and student look inside" in page.text
    assert "Features, layer by layer" in page.text
    assert "At the last layer: teacher -4.00 nats, student -4.00 nats." in page.text
    assert len(page.all("figure")) == 4
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(ids)) == len(ids)


def test_a_comparison_with_its_diagnosis(make_comparison: Make, tmp_path: Path) -> None:
    page = Page(write_report(make_comparison(), diagnosed(tmp_path / "d")))
    order = [
        page.text.index(said)
        for said in (
            "is better than its teacher",
            "All numbers",
            "How it got there",
            "Features, layer by layer",
            "What was run",
        )
    ]
    assert order == sorted(order)


def test_a_model_of_the_comparison_is_drawn_once(make_comparison: Make) -> None:
    folder = make_comparison()
    alone = Page(write_report(folder)).all("figure")
    with_run = Page(write_report(folder, folder / "inputs/student")).all("figure")
    assert len(with_run) == len(alone)


@pytest.mark.parametrize("names", [("x",), ("a", "b", "c", "d", "e", "f", "g")])
def test_any_number_of_models(names: tuple[str, ...], tmp_path: Path) -> None:
    assert write_report(diagnosed(tmp_path / "d", names)).is_file()


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script> $\\alpha$"
    page = Page(write_report(diagnosed(tmp_path / "d", (name,))))
    assert not page.all("script")
    assert name in page.text


def test_the_same_record_gives_the_same_page(tmp_path: Path) -> None:
    folder = diagnosed(tmp_path / "d")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("teacher", "teacher"),
        ("runs/a", "runs/a"),
        ("timm/vit_tiny", "vit_tiny"),
        ("timm/swin_base_patch4", "swin_base…"),
        ("a/very/long/one/", "one"),
    ],
)
def test_names_that_fit(name: str, expected: str) -> None:
    assert feature_figures.short(name, 10) == expected


def test_curves_show_the_record() -> None:
    models = [{"name": "m", "layers": [_layer(i) for i in range(3)]}]
    with style.house():
        figure = feature_figures.curves({"models": models})
        rank = figure.axes[0].get_lines()[0]
        depth = feature_figures.spectrum({"models": models}).axes[0].get_lines()[0]
    assert list(rank.get_ydata()) == [3.5, 4.5, 5.5]
    assert list(depth.get_ydata()) == [-2, -3, -4]


def _refused(words: list[Path | str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", *map(str, words)]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "no folder" in _refused([tmp_path / "nowhere"], capsys)
    assert "nothing to report" in _refused([tmp_path / "empty"], capsys)
    (tmp_path / "empty/config.yaml").write_text("")
    assert "--resume" in _refused([tmp_path / "empty"], capsys)
    run = finetuned(tmp_path / "run", 0.9)
    assert "more than once" in _refused(["--run", run, "--run", run], capsys)
    assert "run" in _refused([], capsys)


def test_damaged_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = diagnosed(tmp_path / "d")
    (folder / "diagnose-features.npz").write_bytes(b"no")
    assert "not a file of arrays" in _refused([folder], capsys)
    (folder / "diagnose-features.npz").unlink()
    assert "is not complete" in _refused([folder], capsys)
    (folder / "diagnose-features.json").write_text("{")
    assert "is not a JSON record" in _refused([folder], capsys)


def test_two_comparisons(make_comparison: Make, tmp_path: Path) -> None:
    one = make_comparison()
    (tmp_path / "again").mkdir()
    (tmp_path / "again/compare.json").write_text((one / "compare.json").read_text())
    with pytest.raises(FeatDistillError, match="two comparisons"):
        write_report(one, tmp_path / "again")


def test_names_that_no_font_and_no_page_has(make_comparison: Make, tmp_path: Path) -> None:
    """Of a file whose name is no UTF-8, or that holds what a terminal obeys."""
    name = "x\0\x1b[31m\udcff\ufffe"
    page = write_report(make_comparison(spec=name), diagnosed(tmp_path / "d", ("teacher", name)))
    assert "x\ufffd\ufffd[31m\ufffd\ufffd" in Page(page).text
    assert not set("\0\x1b\ufffe") & set(page.read_text(encoding="utf-8"))

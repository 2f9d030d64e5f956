"""A probe's section: its table, its figure, and what a report says first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featdistill.core.errors import RunError
from featdistill.core.records import write_record
from featdistill.report.page import write_report
from tests.report.test_report_page import Page

DECAYS = (1e-6, 1e-5, 1e-4)


def run(seed: int, top1: float, lr: float | None) -> dict[str, Any]:
    grid = [
        {"lr": lr, "weight_decay": d, "val_top1": top1 - 0.1 * i, "val_loss": 1.0 + i}
        for i, d in enumerate(DECAYS)
    ]
    scores = {"top1": top1, "top5": 0.99, "loss": 0.5, "calibration_error": 0.02}
    chosen = {"lr": lr, "weight_decay": 1e-6, "edge": ["weight_decay below"]}
    return {"seed": seed, **scores, **chosen, "mean_by_class": 0.77, "grid": grid}


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "std": 0.0125, "n": len(values)}


def probed(folder: Path, *, style: str = "grid", lr: float | None = None) -> Path:
    models = []
    for name, top1 in (("teacher", 0.8), ("<b>student</b>", 0.85)):
        runs = [run(seed, top1, lr) for seed in (1, 2)]
        scores = {k: spread([r[k] for r in runs]) for k in ("top1", "top5", "calibration_error")}
        models.append(
            {"name": name, "spec": f"runs/{name}", "weights": "w", "runs": runs, **scores}
        )
    data = {"test_images": 599, "test_name": "digits/test", "labelled_images": 1198}
    results = {"data": data, "style": style, "pool": "mean", "layers": 1, "models": models}
    write_record(folder / "probe.json", "probe", config={"lr": 0.125}, results=results)
    return folder


def test_a_probe_is_on_the_page(tmp_path: Path) -> None:
    page = write_report(probed(tmp_path / "probed"))
    text = " ".join(Page(page).texts)
    for part in ("Linear probe: probed", "80.0 ± 1.2%", "85.0 ± 1.2%", "77.0%", "1e-06 (edge)"):
        assert part in text, part
    assert "599 held-out images of digits/test" in text
    assert "Learning rate" not in text
    assert "<b>student</b>" not in page.read_text()
    assert (page.parent / "probe.png").is_file()


def test_learning_rates_where_there_were_any(tmp_path: Path) -> None:
    text = write_report(probed(tmp_path / "probed", lr=0.3)).read_text()
    assert "Learning rate" in text
    assert "at its best learning rate" in text


def test_online_there_was_nothing_to_choose(tmp_path: Path) -> None:
    page = write_report(probed(tmp_path / "probed", style="online", lr=0.3))
    assert "Choosing" not in page.read_text()
    assert not (page.parent / "probe.png").exists()


def test_a_record_that_is_not_complete(tmp_path: Path) -> None:
    file = probed(tmp_path / "probed") / "probe.json"
    record = json.loads(file.read_text())
    del record["results"]["models"][0]["runs"][0]["edge"]
    file.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"not complete.*featdistill probe"):
        write_report(tmp_path / "probed")

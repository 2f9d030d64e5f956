"""`compare`: rows, intervals and costs, stops in the middle, and rows that come later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featdistill
from featdistill.core.errors import ConfigError, DataError, Interrupted, NonFiniteError, RunError
from featdistill.engine.loop import _Loop
from featdistill.evaluation.paired import paired
from featdistill.tasks import compare_fits
from featdistill.tasks.compare_fits import Fit, Progress, sweep
from tests.tasks.conftest import SHAPE, TINY

FEW = {**TINY, "steps": 3, "labels": "20", "batch_size": 16, "lrs": [1.0], "knn": None}


@pytest.fixture(scope="session")
def second(student: Path) -> Path:
    """A second round: the student has become a teacher."""
    out = student.parent / "again"
    featdistill.distill(
        teacher=student, student={"name": "vit-t", **SHAPE}, steps=2, out=out, **TINY
    )
    return out


@pytest.fixture(scope="session")
def pooled(teacher: Path) -> Path:
    out = teacher.parent / "gap"
    featdistill.distill(
        teacher=teacher,
        student={"name": "vit-t", **SHAPE},
        target="gap",
        steps=2,
        out=out,
        **TINY,
    )
    return out


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the page, which takes longer to draw than all the rest."""
    monkeypatch.setattr("featdistill.report.page.write_report", lambda folder: folder / "none")


@pytest.fixture
def options(teacher: Path, student: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        **FEW,
        "teacher": teacher,
        "student": student,
        "out": tmp_path / "compared",
        "seeds": [1, 2],
        "view": {"randaugment": None},
    }


def rows_by_name(results: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in results["rows"]}


def test_the_answer_is_whole_and_resumes(options: dict[str, Any]) -> None:
    options |= {"lrs": [0.5, 1.0], "extend_lrs": 0, "knn": {"k": [1, 5]}}
    result = featdistill.compare(**options)
    rows = rows_by_name(result.results)
    assert list(rows) == ["teacher", "student", "scratch"]
    assert rows["scratch"]["knn"] is None
    for row in rows.values():
        assert [r["seed"] for r in row["runs"]] == [1, 2]
        assert row["lr"] in [s["lr"] for s in row["sweep"]]
        assert row["top1"]["mean"] == pytest.approx(np.mean([r["top1"] for r in row["runs"]]))
        # two rates on 160 and two seeds on 200 labelled images, 3 steps each
        assert row["cost"]["finetuning"]["fits"] == 4
        assert row["cost"]["finetuning"]["images_seen"] == 4 * 3 * 16
    assert result.report.is_file()
    out = Path(options["out"])
    stamp = (out / "rows/teacher/seed-1/result.json").stat().st_mtime_ns
    (out / "rows/student/seed-2/result.json").unlink()
    (out / "rows/student/seed-1/result.npz").write_bytes(b"PK torn")
    again = featdistill.compare(**options, resume=True)
    assert (out / "rows/teacher/seed-1/result.json").stat().st_mtime_ns == stamp
    assert again.results["differences"] == result.results["differences"]


@pytest.mark.usefixtures("undrawn")
def test_intervals_are_of_the_predictions_that_were_kept(options: dict[str, Any]) -> None:
    result = featdistill.compare(**options)
    differences = {(d["of"], d["minus"]): d for d in result.results["differences"]}
    assert list(differences) == [
        ("student", "teacher"),
        ("scratch", "teacher"),
        ("student", "scratch"),
    ]

    def hits(name: str) -> np.ndarray:
        files = (Path(options["out"]) / f"rows/{name}/seed-{s}/result.npz" for s in (1, 2))
        stored = [np.load(file) for file in files]
        return np.stack([one["predictions"] == one["labels"] for one in stored])

    for (of, minus), one in differences.items():
        expected = paired(hits(of), hits(minus), seed=0)
        assert one["images_interval"] == list(expected.images)
        assert one["interval"] == list(expected.interval or ())
        assert one["per_seed"] == list(expected.per_seed)
    assert "95% interval" in result.verdict


def test_further_rows_and_what_each_had_cost(
    options: dict[str, Any], second: Path, pooled: Path
) -> None:
    result = featdistill.compare(**options, also=[second, f"Mean only={pooled}"])
    rows = rows_by_name(result.results)
    assert list(rows) == ["teacher", "student", "second-round", "mean-only", "scratch"]
    assert [row["title"] for row in rows.values()][2:4] == ["Second round", "Mean only"]
    assert [(d["of"], d["minus"]) for d in result.results["differences"]] == [
        *((name, "teacher") for name in ("student", "second-round", "mean-only", "scratch")),
        ("student", "scratch"),
    ]
    made = {
        name: [(stage["kind"], stage["images_seen"]) for stage in row["cost"]["made"]]
        for name, row in rows.items()
    }
    pretrained, distilled = ("pretrain", 6 * 32), ("distill", 6 * 32)
    assert made == {
        "teacher": [pretrained],
        "student": [distilled, pretrained],
        "second-round": [("distill", 2 * 32), distilled, pretrained],
        "mean-only": [("distill", 2 * 32), pretrained],
        "scratch": [],
    }
    assert all(not row["cost"]["unknown"] for row in rows.values())
    page = result.report.read_text(encoding="utf-8")
    for said in ("Second round", "Mean only", "Its teachers, images seen", "192 images seen"):
        assert said in page, said


@pytest.mark.usefixtures("undrawn")
def test_rows_and_seeds_may_come_later(options: dict[str, Any], second: Path) -> None:
    first = featdistill.compare(**options, scratch=False)
    out = Path(options["out"])
    stamp = (out / "rows/teacher/seed-1/result.json").stat().st_mtime_ns
    options |= {"seeds": [1, 2, 3], "also": [str(second)]}
    more = featdistill.compare(**options, resume=True)
    assert (out / "rows/teacher/seed-1/result.json").stat().st_mtime_ns == stamp
    rows, before = rows_by_name(more.results), rows_by_name(first.results)
    assert list(rows) == ["teacher", "student", "second-round", "scratch"]
    assert rows["student"]["runs"][:2] == before["student"]["runs"]
    assert "resume: false" in (out / "config.yaml").read_text()
    again = featdistill.compare(config=out / "config.yaml", resume=True)
    assert rows_by_name(again.results).keys() == rows.keys()
    with pytest.raises(RunError, match=r"optimizer\.layer_decay"):
        featdistill.compare(**options, layer_decay=0.5, resume=True)


class Killed(BaseException):
    """What no handler may catch, as kill -9."""


@pytest.mark.usefixtures("undrawn")
def test_killed_in_the_middle_it_ends_in_the_same_numbers(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"run": {"checkpoint_every": 1}, "scratch": False}
    whole = featdistill.compare(**{**options, "out": tmp_path / "whole"})
    real, calls = _Loop._save, [0]

    def save(loop: _Loop, done: int) -> None:
        real(loop, done)
        calls[0] += 1
        if calls[0] == 8:  # in the third fine-tuning, after its second step
            raise Killed

    monkeypatch.setattr(_Loop, "_save", save)
    with pytest.raises(Killed):
        featdistill.compare(**options)
    monkeypatch.setattr(_Loop, "_save", real)
    out = Path(options["out"])
    assert len(list(out.glob("rows/*/*/result.json"))) == 2
    assert list(out.glob("rows/student/seed-1/checkpoints/step-00000002"))
    resumed = featdistill.compare(**options, resume=True)
    assert resumed.results["differences"] == whole.results["differences"]
    for mine, theirs in zip(resumed.results["rows"], whole.results["rows"], strict=True):
        for key in ("top1", "sweep", "lr", "model"):
            assert mine[key] == theirs[key]
        losses = [[run["loss"] for run in row["runs"]] for row in (mine, theirs)]
        assert losses[0] == losses[1]


def test_an_interrupt_says_how_far_it_was(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options |= {"knn": {"k": [1]}, "scratch": False}
    with monkeypatch.context() as patch:
        patch.setattr("featdistill.tasks.compare.knn_of", interrupted)
        with pytest.raises(
            Interrupted, match=r"2 of 4 fine-tunings done; go on .*--resume"
        ) as said:
            featdistill.compare(**options)
    assert said.value.exit_code == 130
    monkeypatch.setattr("featdistill.tasks.compare_fits.tune", _stopped)
    with pytest.raises(Interrupted, match=r"stopped at step 1 of 3.*; 2 of 4 .* are done") as said:
        featdistill.compare(**options, resume=True)
    assert said.value.exit_code == 143


def _stopped(*_: object, **__: object) -> None:
    raise Interrupted("stopped at step 1 of 3; the state is saved", signal_number=15)


@pytest.mark.usefixtures("undrawn")
def test_other_test_images_are_refused(options: dict[str, Any]) -> None:
    options |= {"scratch": False}
    featdistill.compare(**options)
    file = Path(options["out"]) / "rows/teacher/seed-1/result.npz"
    stored = dict(np.load(file))
    np.savez(file, predictions=stored["predictions"], labels=stored["labels"][::-1])
    with pytest.raises(DataError, match="not those of the earlier session"):
        featdistill.compare(**options, resume=True)


@pytest.mark.usefixtures("undrawn")
def test_other_weights_are_refused(options: dict[str, Any], second: Path, pooled: Path) -> None:
    options |= {"scratch": False, "seeds": [1]}
    featdistill.compare(**options, also={"more": second})
    with pytest.raises(RunError, match="began from other weights"):
        featdistill.compare(**options, also=[f"more={pooled}"], resume=True)


def test_rows_that_cannot_be_told_apart_are_refused(
    options: dict[str, Any], teacher: Path, student: Path, pooled: Path
) -> None:
    twins = {**options, "student": teacher.parent / "student" / ".." / "teacher"}
    with pytest.raises(ConfigError, match="--teacher and --student are one model"):
        featdistill.compare(**twins)
    with pytest.raises(ConfigError, match="--student and --also are one model"):
        featdistill.compare(**options, also=[f"twin={student}"])
    copy = teacher.parent / "gap-copy"
    if not copy.exists():
        copy.symlink_to(pooled / "export")
    other = pooled / "export" / "model.safetensors"
    with pytest.raises(ConfigError, match=r"would be called 'Distilled on pooled features'.*NAME="):
        featdistill.compare(**options, also=[str(pooled), str(other)])
    assert not Path(options["out"]).exists()


def test_a_classifier_that_cannot_be_is_said_before_any_training(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row has no CLS token; nothing may be trained by then."""
    monkeypatch.setattr("featdistill.tasks.compare_fits.tune", _stopped)
    options |= {"also": ["timm/resnet18"], "image_size": 32, "pool": "cls"}
    monkeypatch.setattr("featdistill.tasks.compare_rows.ModelConfig", _random)
    with pytest.raises(featdistill.FeatDistillError, match=r"cls|CLS"):
        featdistill.compare(**options)
    assert not Path(options["out"]).exists()


def _random(spec: str) -> Any:
    from featdistill.config.sections import ModelConfig

    return ModelConfig(spec=spec, weights="random")


def fake_fits(
    monkeypatch: pytest.MonkeyPatch, scores: Callable[[float], float | None]
) -> list[float]:
    """Fine-tunings that score by their learning rate's factor; None: they diverge."""
    tried: list[float] = []

    def fit_once(*_: object, factor: float, **__: object) -> Fit:
        tried.append(factor)
        top1 = scores(factor)
        if top1 is None:
            raise NonFiniteError("no number")
        return Fit(
            {"top1": top1, "folder": "f", "seconds": 1.0, "images_seen": 8}, np.ones(1, bool)
        )

    monkeypatch.setattr(compare_fits, "fit_once", fit_once)
    monkeypatch.setattr(compare_fits, "split", lambda *_: (None, None))
    return tried


class Grid:
    """As much of a setting as a sweep looks at."""

    def __init__(self, folder: Path, lrs: tuple[float, ...], extend: int) -> None:
        from types import SimpleNamespace

        self.config = SimpleNamespace(
            lrs=lrs, extend_lrs=extend, sweep_fraction=0.2, run=SimpleNamespace(seed=0)
        )
        self.folder, self.progress = folder, Progress(10)

    labels = staticmethod(lambda seed: None)
    rate = staticmethod(lambda factor: 1e-3 * factor)


@pytest.mark.parametrize(
    ("lrs", "extend", "peak", "tried"),
    [
        ((0.25, 1, 4), 1, 1.0, [0.25, 1, 4]),  # the best is within
        ((0.25, 1, 4), 1, 99.0, [0.25, 1, 4, 16]),
        ((0.25, 1, 4), 2, 99.0, [0.25, 1, 4, 16, 64]),
        ((4, 1, 0.5), 2, 0.4, [4, 1, 0.5, 0.25]),  # once more, and it is within
        ((0.25, 1, 4), 0, 99.0, [0.25, 1, 4]),
        ((2.0,), 3, 99.0, []),  # a single rate is not a sweep
    ],
)
def test_a_sweep_goes_past_its_end_no_further_than_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lrs: tuple[float, ...],
    extend: int,
    peak: float,
    tried: list[float],
) -> None:
    seen = fake_fits(monkeypatch, lambda factor: 1 / (1 + abs(np.log(factor / peak))))
    grid: Any = Grid(tmp_path, lrs, extend)
    found = sweep(grid, None)  # type: ignore[arg-type]
    assert seen == tried
    assert grid.progress.fits == 10 + len(tried) - len(lrs if len(lrs) > 1 else ())
    if tried:
        assert found.best() == min(tried, key=lambda factor: abs(np.log(factor / peak)))


def test_a_rate_that_diverges_is_a_bad_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    row: Any = SimpleNamespace(title="Teacher", name="teacher")
    grid: Any = Grid(tmp_path, (1, 4), 1)
    seen = fake_fits(monkeypatch, lambda factor: factor if factor <= 4 else None)
    found = sweep(grid, row)
    assert seen == [1, 4, 16]
    assert found.best() == 4
    assert found.trials[-1]["val_top1"] is None
    cost = compare_fits.cost_of(found.fits, found.lost)
    assert (cost["fits"], cost["joules"]) == (3, None)
    fake_fits(monkeypatch, lambda _: None)
    with pytest.raises(NonFiniteError, match=r"every learning rate tried \(0\.001, 0\.004\)"):
        sweep(grid, row)


def test_an_outermost_rate_is_warned_of(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options |= {"lrs": [0.5, 1.0], "extend_lrs": 0, "scratch": False, "seeds": [1]}
    result = featdistill.compare(**options)  # of two rates each is outermost
    assert all(row["at_edge"] for row in result.results["rows"])
    assert "outermost rate tried" in result.report.read_text(encoding="utf-8")
    record = json.loads(result.record.read_text())
    assert [row["at_edge"] for row in record["results"]["rows"]] == [True, True]

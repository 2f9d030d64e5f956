"""`curvature`: classifiers and distillations, resumed, in float64, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featdistill
from featdistill.cli.main import main
from featdistill.config.resolve import resolve
from featdistill.core.errors import FeatDistillError
from featdistill.diagnostics.curvature import HessianOperator
from featdistill.engine.runtime import Runtime
from featdistill.tasks import curvature as task
from featdistill.tasks.losses import subjects_of

COMMON: dict[str, Any] = {
    "data": "digits",
    "workers": 0,
    "device": "cpu",
    "images": 24,
    "batch_size": 8,
    "top": 3,
    "probes": 4,
}


def measured(out: Path, **options: Any) -> Any:
    return featdistill.curvature(out=out, **{**COMMON, **options})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier so small that its Hessian can be written down."""
    folder = tmp_path_factory.mktemp("tiny")
    shape = {"name": "vit-t", "width": 4, "depth": 1, "heads": 2, "patch": 4}
    run = {"data": "digits", "image_size": 8, "batch_size": 32, "workers": 0, "device": "cpu"}
    run |= {"steps": 3, "lr": 1e-2}
    featdistill.pretrain(model=shape, out=folder / "p", **run)
    out = folder / "f"
    featdistill.finetune(
        model=folder / "p", out=out, view={"randaugment": None}, mix={"mixup": 0.0}, **run
    )
    return out


@pytest.fixture(scope="module")
def found(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return measured(tmp_path_factory.mktemp("curved") / "c", model=classifier, name="student")


def test_the_record_has_everything(found: Any) -> None:
    record = json.loads(found.record.read_text())
    assert record["kind"] == "curvature"
    results = record["results"]
    assert results["objective"] == "Cross-entropy, nats"
    assert (results["data"]["images"], results["precision"]) == (24, "float32")
    [model] = results["models"]
    assert model["name"] == "student"
    assert model["eigenvalues"] == sorted(model["eigenvalues"], reverse=True)
    assert len(model["eigenvalues"]) == len(model["residuals"]) == model["asked"] == 3
    assert model["settled"]
    assert model["deviation"] < 0.05
    assert model["trace_error"] > 0
    assert model["trained"] < model["parameters"] + 1
    assert found.models["student"].products == model["products"]


def test_the_page_shows_it(found: Any, tmp_path: Path) -> None:
    assert main(["report", str(found.record.parent), "--out", str(tmp_path / "report")]) == 0
    page = next((tmp_path / "report").glob("*.html")).read_text()
    assert "The steepest directions" in page
    assert f"student {found.models['student'].trace:.4g} \N{PLUS-MINUS SIGN}" in page


def test_of_a_classifier_it_is_the_dense_hessian(tiny: Path, tmp_path: Path) -> None:
    spec = str(tiny)
    options = {"model": spec, "tolerance": 1e-6, "precision": "float64"}
    found = measured(tmp_path / "o", **options).models[spec]
    whole = dense({**COMMON, **options, "model": [spec], "out": "o"})
    values = torch.linalg.eigvalsh(whole).flip(0)
    np.testing.assert_allclose(found.eigenvalues, values[:3].numpy(), rtol=1e-4)
    assert abs(found.trace - float(values.sum())) < 4 * found.trace_error
    single = measured(tmp_path / "s", **{**options, "precision": "float32"}).models[spec]
    np.testing.assert_allclose(single.eigenvalues, found.eigenvalues, rtol=1e-4)
    other = measured(tmp_path / "b", **{**options, "batch_size": 5}).models[spec]
    np.testing.assert_allclose(other.eigenvalues, found.eigenvalues, rtol=1e-6)
    assert other.trace == pytest.approx(found.trace, rel=1e-6)


def dense(options: dict[str, Any]) -> torch.Tensor:
    """The Hessian of the same images by torch's double backward, row by row, all at once."""
    config = resolve("curvature", options, recipe=None, config=None)
    [subject] = subjects_of(config, Runtime(device="cpu", precision="float32")).subjects  # type: ignore[arg-type]
    subject.module.double()
    parameters = list(subject.parameters.values())
    loss = torch.cat([subject.losses(piece) for piece in subject.pieces]).mean()
    assert loss.dtype == torch.float64
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
    )
    rows = []
    for g in gradient:
        row = torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([h.flatten() for h in row]))
    return torch.stack(rows)


def test_of_a_distillation(student: Path, tmp_path: Path) -> None:
    options = {"model": student, "name": "student", "top": 2, "tolerance": 1e-4}
    found = measured(tmp_path / "d", **options)
    results = json.loads(found.record.read_text())["results"]
    assert results["objective"].startswith("Distillation loss (smooth-l1")
    [model] = results["models"]
    assert model["settled"]
    assert model["deviation"] < 0.05
    # the projector is among what was learned
    assert model["trained"] > model["parameters"]
    exact = measured(tmp_path / "e", **{**options, "precision": "float64"}).models["student"]
    np.testing.assert_allclose(found.models["student"].eigenvalues, exact.eigenvalues, rtol=1e-3)


def test_a_finished_model_is_not_measured_again(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second model: the first is kept, and the whole is what it is in one go."""
    options = {"model": [classifier, classifier], "name": ["a", "b"], "probes": 2}
    whole = measured(tmp_path / "whole", **options)
    real, calls = task.curvature, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(task, "curvature", dies)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "o", **options)
    partial = json.loads((tmp_path / "o/curvature.json").read_text())["results"]["models"]
    assert [m["name"] for m in partial] == ["a"]
    again = measured(tmp_path / "o", **options, resume=True)
    assert len(calls) == 3
    for name in "ab":
        one, other = again.models[name], whole.models[name]
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
        assert one.trace == other.trace
    with pytest.raises(FeatDistillError, match="another configuration"):
        measured(tmp_path / "o", **{**options, "top": 2}, resume=True)


def test_what_is_frozen_does_not_count(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    class Watched(HessianOperator):
        def __init__(self, parameters: Any, *args: Any, **kwargs: Any) -> None:
            sizes.append(sum(p.numel() for p in parameters))
            super().__init__(parameters, *args, **kwargs)

    real = task.subjects_of

    def frozen(*args: Any) -> Any:
        gathered = real(*args)
        for name, parameter in gathered.subjects[0].parameters.items():
            parameter.requires_grad_(name.startswith("head"))
        return gathered

    monkeypatch.setattr(task, "HessianOperator", Watched)
    monkeypatch.setattr(task, "subjects_of", frozen)
    found = measured(tmp_path / "o", model=classifier, name="c", probes=0)
    [size] = sizes
    assert size == 32 * 10 + 10
    assert found.models["c"].trace is None


# mistakes


def fails(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> str:
    base = ["curvature", "--data", "digits", "--out", str(out), "--device", "cpu"]
    assert main([*base, *words]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert not (out / "curvature.json").exists()
    return lines[0]


def test_a_model_without_a_loss(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = fails(capsys, tmp_path / "o", "--model", str(teacher))
    assert "has no classifier, so no loss; fine-tune or probe it first" in err
    assert not (tmp_path / "o").exists()


def test_more_eigenvalues_than_parameters(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = fails(capsys, tmp_path / "o", "--model", str(tiny), "--name", "tiny", "--top", "9999")
    assert "--top 9999, but 'tiny' has " in err
    assert "trainable parameters; expected fewer" in err


def test_a_search_that_does_not_fit_into_memory(
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(task, "_free_memory", lambda: 2**20)
    err = fails(capsys, tmp_path / "o", "--model", str(classifier))
    assert "the search keeps 20 vectors" in err
    assert "give a smaller --top" in err


def test_too_little_memory_for_a_batch(
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(task, "curvature", full)
    words = ("--model", str(classifier), "--images", "16")
    assert "give a smaller --batch-size" in fails(capsys, tmp_path / "o", *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--probes", "1"), "expected 0, or at least 2"),
        (("--top", "0"), "top"),
        (("--precision", "bf16"), "float64"),
        (("--tolerence", "1e-3"), "did you mean 'tolerance'"),
    ],
)
def test_options(
    words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(capsys, tmp_path / "o", "--model", "x", *words)

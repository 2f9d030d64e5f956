"""`diagnose features`: what it writes, for any batch size, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featdistill
from featdistill.cli.main import main
from featdistill.diagnostics.cka import LinearCKA
from featdistill.evaluation.rank import effective_rank

COMMON: dict[str, Any] = {"data": "digits", "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def found(teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return featdistill.diagnose(
        "features",
        model=[teacher, student],
        name=["teacher", "student"],
        images=50,
        batch_size=16,
        pictures=3,
        out=tmp_path_factory.mktemp("diagnosed") / "features",
        **COMMON,
    )


def test_the_record_has_everything(found: Any) -> None:
    record = json.loads(found.record.read_text())
    assert record["kind"] == "diagnose-features"
    results = record["results"]
    assert results["cka"]["points"] == [
        ["teacher", 0],
        ["teacher", 1],
        ["student", 0],
        ["student", 1],
    ]
    assert results["data"]["images"] == results["cka"]["images"] == 50
    layer = results["models"][0]["layers"][1]
    assert layer["grid"] == [2, 2]
    assert layer["frequency"] == [0, 1]
    assert layer["rank_limit"] == 32
    arrays = np.load(found.record.with_suffix(".npz"))
    assert arrays["cka"].shape == (4, 4)
    np.testing.assert_allclose(np.diag(arrays["cka"]), 1)
    assert arrays["0.pictures"].shape == (3, 2, 2, 3)
    assert arrays["1.photographs"].shape == (3, 8, 8, 3)
    assert arrays["0.norms"].sum(1).tolist() == [200, 200]


def test_numbers_are_those_of_the_features(found: Any, teacher: Path, student: Path) -> None:
    """Taken another way: all images at once, straight from the models."""
    from featdistill.config.sections import DataConfig
    from featdistill.data.views import EvalView
    from featdistill.tasks.common import images_of

    source = images_of(DataConfig(path="digits"))
    chosen = [i * len(source) // 50 for i in range(50)]
    view = EvalView(8)
    images = torch.stack([view(source.read(i))[0] for i in chosen]).float() / 255
    rows = []
    for path in (teacher, student):
        with torch.no_grad():
            seen = featdistill.load_backbone(str(path)).eval()(images, (0, 1))
        rows += [seen.layers[i].map.mean((2, 3)) for i in (0, 1)]
    cka = LinearCKA(4)
    cka.update(rows)
    torch.testing.assert_close(found.cka, cka.compute(), rtol=1e-4, atol=1e-4)
    rank = effective_rank(torch.linalg.svdvals(rows[3].double()))
    assert found.layers["student"][1].rank == pytest.approx(rank, rel=1e-4)


def test_the_batch_size_changes_nothing(
    found: Any, teacher: Path, student: Path, tmp_path: Path
) -> None:
    again = featdistill.diagnose(
        "features",
        model=[teacher, student],
        name=["teacher", "student"],
        images=50,
        batch_size=7,
        pictures=0,
        out=tmp_path / "again",
        **COMMON,
    )
    torch.testing.assert_close(again.cka, found.cka, rtol=1e-5, atol=1e-5)
    assert again.layers["teacher"][0].rank == pytest.approx(
        found.layers["teacher"][0].rank, rel=1e-5
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--images", "3"], ("3 images", "at least 4")),
        (["--name", "a", "--name", "b"], ("--name given 2 times for 1 models",)),
        (["--data.labels", "5"], ("--data.labels is of no use",)),
        (["--image-size", "7"], ("7",)),
    ],
)
def test_mistakes(
    words: list[str],
    says: tuple[str, ...],
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    basis = ["--model", str(teacher), "--data", "digits", "--workers", "0", "--out", str(out)]
    assert main(["diagnose", "features", *basis, *words]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    for part in says:
        assert part in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["diagnose", "featurs", "--model", "x"], "features"),
        (["diagnose", "--model", "x"], "kind"),
        (["diagnos"], "did you mean 'diagnose'"),
    ],
)
def test_mistyped(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--data", "digits", "--out", "nowhere"]) == 2
    assert says in capsys.readouterr().err


def test_a_model_twice(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(featdistill.FeatDistillError, match="same name"):
        featdistill.diagnose("features", model=[teacher, teacher], out=tmp_path / "o", **COMMON)

"""Fine-tune, score, predict, compare, export, check, pretrain: end to end on embedded data."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import featdistill
from featdistill.core.errors import ConfigError, DataError, ModelError
from featdistill.data.open import open_data
from tests.tasks.conftest import SHAPE, TINY


def test_finetune_scores_every_held_out_image(classifier: Path) -> None:
    record = json.loads((classifier / "finetune.json").read_text())
    arrays = np.load(classifier / "finetune.npz")
    hits = arrays["predictions"] == arrays["labels"]
    assert len(hits) == 599
    assert record["results"]["top1"] == pytest.approx(hits.mean())


def test_a_classifier_goes_on_at_another_size(classifier: Path, tmp_path: Path) -> None:
    """As the last step of 89.0 %: the head is kept, the positions are carried over."""
    options = {**TINY, "image_size": 12, "lr": 1e-12}
    larger = featdistill.finetune(model=classifier, steps=1, out=tmp_path / "kept", **options)
    first, second = (featdistill.load_backbone(str(run)) for run in (classifier, larger.out))
    head, before = (m.model.get_classifier().weight.detach() for m in (second, first))
    torch.testing.assert_close(head, before, rtol=0, atol=1e-6)
    assert (first.image_size, second.image_size) == ((8, 8), (12, 12))
    assert (first.mean.tolist(), first.std.tolist()) == (second.mean.tolist(), second.std.tolist())
    fresh = featdistill.finetune(
        model=classifier, steps=1, head="fresh", out=tmp_path / "fresh", **options
    )
    weight = featdistill.load_backbone(str(fresh.out)).model.get_classifier().weight.detach()
    assert weight.abs().max() < 1e-3 < before.abs().max()


def test_a_label_budget_is_recorded(student: Path, tmp_path: Path) -> None:
    result = featdistill.finetune(model=student, steps=1, labels="5%", out=tmp_path / "r", **TINY)
    record = json.loads((result.out / "finetune.json").read_text())["results"]["labels"]
    chosen = np.load(result.out / "finetune.npz")["labelled_images"]
    train = open_data("digits").train
    counts = np.bincount(train.labels[chosen])
    assert np.array_equal(counts, np.round(0.05 * np.bincount(train.labels)))
    assert (record["budget"], record["images"]) == ("5%", len(chosen))
    assert (record["fewest"], record["most"]) == (counts.min(), counts.max())


def test_finetuned_export_is_a_timm_classifier(classifier: Path) -> None:
    model = timm.create_model(f"local-dir:{classifier / 'export'}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
    assert model.pretrained_cfg["label_names"] == [str(d) for d in range(10)]


def test_predict_writes_what_the_classifier_says(classifier: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 30, 3), 80 * i, np.uint8)).save(folder / f"{i}.png")
    result = featdistill.predict(
        model=classifier, data=folder, out=tmp_path / "out", top=3, workers=0, device="cpu"
    )
    assert [p.image for p in result.predictions] == ["0.png", "1.png", "2.png"]
    model = featdistill.load_backbone(str(classifier))
    grey = torch.full((1, 3, 8, 8), 80 / 255)
    expected = model(grey).logits.softmax(1).topk(3)
    assert result.predictions[1].probabilities == pytest.approx(
        expected.values[0].tolist(), abs=1e-5
    )
    assert result.csv is not None
    rows = list(csv.DictReader(result.csv.open()))
    assert len(rows) == 9
    assert rows[3]["class"] == model.class_names[expected.indices[0, 0]]


def test_predict_wants_a_classifier(student: Path) -> None:
    with pytest.raises(ModelError, match="no classifier"):
        featdistill.predict(model=student, data="digits")


def test_knn_takes_several_models(teacher: Path, student: Path, tmp_path: Path) -> None:
    result = featdistill.knn(
        model=[str(teacher), str(student)], data="digits", out=tmp_path / "knn", device="cpu"
    )
    assert set(result.top1) == {str(teacher), str(student)}
    assert all(0.1 < best <= 1 for best in result.best.values())
    assert result.record is not None


def test_export_command_equals_the_run(student: Path, tmp_path: Path) -> None:
    exported = featdistill.export(model=student, out=tmp_path / "out")
    assert exported.difference < 1e-5
    assert "pretrained=True" in exported.snippet
    assert "licen" in (tmp_path / "out/README.md").read_text() or True


def test_check_says_when_data_are_too_few(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"name": "vit-t", **SHAPE}
    result = featdistill.check(teacher=teacher, student=shape, steps=10, **TINY)
    assert result.warning is not None
    assert "--student-init teacher" in result.warning
    assert result.views == 320
    assert "token grid" in capsys.readouterr().out
    continued = featdistill.check(
        teacher=teacher, student=shape, student_init="teacher", steps=10, **TINY
    )
    assert continued.warning is None


def test_pretrain_refuses_what_would_change_its_negatives(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="negatives"):
        featdistill.pretrain(out=tmp_path / "x", run={"micro_batches": 2}, steps=2, **TINY)


def test_held_out_classes_must_be_the_training_ones(student: Path, tmp_path: Path) -> None:
    for part, names in (("train", "ab"), ("val", "bc")):
        for name in names:
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "x.png")
    with pytest.raises(DataError, match="c"):
        featdistill.knn(model=str(student), data=tmp_path / "data")

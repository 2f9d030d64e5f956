"""segment: a run, its scores counted again by hand, stop and resume, prediction, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import featdistill
from featdistill.core.errors import FeatDistillError, RunError
from featdistill.data.joint_views import ScoringView
from featdistill.data.segmentation import open_segmentation
from featdistill.models.segmenter_files import load_segmenter
from featdistill.report.page import write_report
from featdistill.tasks import segment_predict
from tests.data.segmentation_folders import ade20k, save
from tests.tasks.test_distill_task import differing

SMALL: dict[str, Any] = {
    "image_size": 16,
    "batch_size": 4,
    "workers": 0,
    "device": "cpu",
    "lr": 3e-3,
    "steps": 6,
    "head": {"channels": 8, "auxiliary": 4, "layers": (0, 0, 1, 1)},
    "run": {"tensorboard": False, "log_every": 1},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ade20k(tmp_path_factory.mktemp("data") / "scenes")


def segment(model: Path, data: Path, out: Path, **options: Any) -> Any:
    merged = {**SMALL, **options}
    merged["run"] = {**SMALL["run"], **options.get("run", {})}
    return featdistill.segment(model=model, data=data, out=out, **merged)


@pytest.fixture(scope="module")
def segmented(student: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "segmented"
    segment(
        student,
        scenes,
        out,
        steps=120,
        lr=1e-2,
        ema=0.9,
        test={"scales": (0.75, 1.0), "flip": True},
    )
    return out


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "segment.json").read_text())["results"]


def test_scores_are_those_of_the_written_segmenter(segmented: Path, scenes: Path) -> None:
    """Counted again pixel by pixel from its files, one window at a time."""
    trained = load_segmenter(str(segmented))
    held = open_segmentation(str(scenes)).val
    assert held is not None
    matrix = np.zeros((3, 3), dtype=int)
    for index in range(len(held)):
        image, mask = held.read_pair(index)
        seen = ScoringView(16)(image, mask, (0, 0, 0))[0].float() / 255
        total, times = torch.zeros(3, *seen.shape[1:]), torch.zeros(seen.shape[1:])
        places = sorted({min(i * 10, seen.shape[2] - 16) for i in range(3)})
        for left in places:
            with torch.no_grad():
                window = trained.segmenter.logits(seen[None, :, :, left : left + 16])[0]
            total[:, :, left : left + 16] += window
            times[:, left : left + 16] += 1
        found = torch.nn.functional.interpolate((total / times)[None], mask.shape, mode="bilinear")[
            0
        ].argmax(0)
        for label, guess in zip(mask.flatten().tolist(), found.flatten().tolist(), strict=True):
            if label >= 0:
                matrix[label, guess] += 1
    arrays = np.load(segmented / "segment.npz")
    assert np.array_equal(arrays["confusion"], matrix)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    got = results(segmented)
    assert got["miou"] == pytest.approx(np.mean(matrix.diagonal() / union))
    assert got["aacc"] == pytest.approx(matrix.diagonal().sum() / matrix.sum())
    assert [row["pixels"] for row in got["by_class"]] == matrix.sum(1).tolist()
    assert got["images"] == 4


def test_it_learns(segmented: Path) -> None:
    """Three colours, three classes: 120 steps beat the guess by position clearly."""
    got = results(segmented)
    assert got["miou"] > got["prior"]["miou"] + 0.1
    assert got["ema"]["decay"] == 0.9
    assert got["looks"]["miou"] > got["prior"]["miou"]
    assert load_segmenter(str(segmented / "segmenter-ema")).segmenter.class_names[2] == "dot"


def test_the_prior_is_each_positions_most_frequent_class(segmented: Path, scenes: Path) -> None:
    data = open_segmentation(str(scenes))
    assert data.val is not None
    train = [data.train.read_mask(i).numpy() for i in range(len(data.train))]
    rows, columns = train[0].shape
    votes = np.zeros((3, rows, columns), dtype=int)
    for mask in train:
        take = [int((c + 0.5) * mask.shape[1] / columns) for c in range(columns)]
        for k in range(3):
            votes[k] += mask[:, take] == k
    best = votes.argmax(0)
    common = int(votes.sum((1, 2)).argmax())
    best[votes.sum(0) == 0] = common
    hits = total = 0
    for i in range(len(data.val)):
        mask = data.val.read_mask(i).numpy()
        take = [int((c + 0.5) * columns / mask.shape[1]) for c in range(mask.shape[1])]
        hits += int((best[:, take] == mask)[mask >= 0].sum())
        total += int((mask >= 0).sum())
    assert results(segmented)["prior"]["aacc"] == pytest.approx(hits / total)


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_stop_and_resume_equal_an_unbroken_run_bit_for_bit(
    student: Path, scenes: Path, tmp_path: Path, head: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options: dict[str, Any] = {"head": {**SMALL["head"], "kind": head}, "ema": 0.5}
    segment(student, scenes, whole, **options)
    part = segment(student, scenes, broken, schedule={"stop_at": 3}, **options)
    assert (part.steps, part.miou, part.export) == (3, None, None)
    done = segment(student, scenes, broken, run={"resume": True}, **options)
    assert done.steps == 6
    assert differing(whole, broken) == []
    assert results(whole)["miou"] == results(broken)["miou"]
    again = segment(student, scenes, broken, run={"resume": True}, **options)
    assert again.miou == done.miou


def test_a_frozen_backbone_learns_nothing(student: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    segment(student, scenes, out, train="head", head={"kind": "linear"})
    trained = load_segmenter(str(out)).segmenter.backbone
    other = tmp_path / "other"
    segment(student, scenes, other, train="head", head={"kind": "linear"}, steps=1)
    before = load_segmenter(str(other)).segmenter.backbone.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_scoring_alone_finds_the_same(segmented: Path, scenes: Path, tmp_path: Path) -> None:
    scored = featdistill.segment(
        model=segmented, data=scenes, out=tmp_path / "o", train="none", device="cpu", workers=0
    )
    assert scored.miou == results(segmented)["miou"]
    assert scored.export is None
    arrays = [np.load(f / "segment.npz")["counts"] for f in (tmp_path / "o", segmented)]
    assert np.array_equal(*arrays)


def test_whole_images_where_the_model_takes_them(scenes: Path, tmp_path: Path) -> None:
    result = segment(
        Path("timm/convnext_atto"),
        scenes,
        tmp_path / "o",
        weights="random",
        steps=1,
        head={"channels": 8, "auxiliary": 4},
        image_size=32,
        test={"mode": "whole"},
    )
    assert result.miou is not None


def predict(segmented: Path, images: Path, out: Path, **options: Any) -> Any:
    return featdistill.segment(model=segmented, predict=images, out=out, device="cpu", **options)


def test_predicted_masks_are_data_again(segmented: Path, scenes: Path, tmp_path: Path) -> None:
    """The index PNGs, taken as labels of their images, score 100 %: values and sizes fit."""
    images = scenes / "images" / "validation"
    done = predict(segmented, images, tmp_path / "masks")
    assert done.images == 4
    data = tmp_path / "data"
    for part in ("training", "validation"):
        (data / "annotations").mkdir(parents=True, exist_ok=True)
        (data / "images").mkdir(exist_ok=True)
        (data / "images" / part).symlink_to(images)
        (data / "annotations" / part).symlink_to(tmp_path / "masks" / "index")
    (data / "classes.txt").write_text((scenes / "classes.txt").read_text())
    scored = featdistill.segment(
        model=segmented, data=data, out=tmp_path / "o", train="none", device="cpu", workers=0
    )
    assert scored.aacc == 1.0
    mask = Image.open(tmp_path / "masks/index/001.png")
    assert mask.mode == "P"
    assert mask.size == Image.open(images / "001.png").size
    assert set(np.unique(np.asarray(mask))) <= {1, 2, 3}
    over = Image.open(tmp_path / "masks/overlay/001.jpg")
    assert over.size == mask.size
    record = json.loads((tmp_path / "masks/segment-predict.json").read_text())["results"]
    palette = np.array(mask.getpalette()).reshape(-1, 3)
    assert all(palette[c["value"]].tolist() == c["colour"] for c in record["classes"])


def test_prediction_goes_on_where_it_was_killed(
    segmented: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = scenes / "images" / "validation", tmp_path / "masks"
    with pytest.raises(FeatDistillError, match="no predictions to go on with"):
        predict(segmented, images, out, resume=True)
    whole = predict(segmented, images, tmp_path / "whole")
    seen: list[int] = []
    real = segment_predict._predict

    def die(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(segment_predict, "_predict", die)
    with pytest.raises(KeyboardInterrupt):
        predict(segmented, images, out)
    with pytest.raises(RunError, match="not empty"):
        predict(segmented, images, out)
    with pytest.raises(RunError, match="made with other test"):
        predict(segmented, images, out, resume=True, flip=True)
    assert predict(segmented, images, out, resume=True).images == whole.images
    assert len(seen) == 3 + 2
    for name in ("index/000.png", "index/003.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_images_that_cannot_be_predicted_are_named(segmented: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    save(images / "a" / "one.png", np.zeros((20, 20, 3), dtype=np.uint8))
    (images / "two.png").write_bytes(b"nothing")
    done = predict(segmented, images, tmp_path / "o")
    assert done.images == 1
    assert len(done.unreadable) == 1
    assert "two.png" in done.unreadable[0]
    assert (tmp_path / "o/index/a/one.png").is_file()
    (images / "a" / "one.jpg").write_bytes((images / "a" / "one.png").read_bytes())
    with pytest.raises(FeatDistillError, match="'a/one' without their suffix"):
        predict(segmented, images, tmp_path / "p")


def test_the_page_shows_classes_and_pictures(segmented: Path, tmp_path: Path) -> None:
    page = write_report(segmented, out=tmp_path).read_text()
    assert "a guess by position alone has" in page
    for word in ("The best images", "The worst images", "Which classes it knows", "left", "dot"):
        assert word in page
    got = results(segmented)
    assert f"{100 * got['miou']:.1f}" in page
    assert [p["which"] for p in got["pictures"]] == ["best"] * 2 + ["worst"] * 2
    assert got["pictures"][0]["miou"] >= got["pictures"][-1]["miou"]
    assert {f.name for f in tmp_path.glob("*.png")} >= {"best-images.png", "iou-by-class.png"}


def test_two_segmenters_are_ranked_with_their_errors(
    segmented: Path, student: Path, scenes: Path, tmp_path: Path
) -> None:
    segment(student, scenes, tmp_path / "other", steps=1)
    page = write_report(segmented, tmp_path / "other", out=tmp_path / "r").read_text()
    assert "points apart" in page
    assert "One run each: how far seeds spread is not known" in page

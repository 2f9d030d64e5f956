"""Two processes (gloo) take the same steps as one: same order, same masks, same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featdistill.data.open import open_data
from featdistill.data.views import EvalView
from featdistill.models.load import load_backbone
from featdistill.tasks import api
from tests.data.segmentation_folders import ade20k

WORDS = [
    *("--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "random"),
    *("--teacher-image-size", "32", "--student", "vit-t", "--student.width", "64"),
    *("--student.depth", "2", "--student-patch", "4", "--drop-path", "0.3"),
    *("--image-size", "16", "--data", "digits", "--batch-size", "16", "--steps", "4"),
    *("--lr", "1e-3", "--workers", "0", "--device", "cpu"),
    *("--run.log_every", "1", "--run.tensorboard", "false"),
]


def featdistill(*words: str) -> None:
    command = [sys.executable, "-m", "featdistill", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def rows(out: Path, *more: str, read: bool = True) -> list[dict[str, float]]:
    featdistill("distill", *WORDS, "--out", str(out), *more)
    return metrics(out) if read else []


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


def test_processes_and_micro_batches_change_only_rounding(tmp_path: Path) -> None:
    """With a held-out slice that two processes cannot share evenly."""
    held = ("--holdout", "61")
    one = rows(tmp_path / "one", *held)
    two = rows(tmp_path / "two", *held, "--run.devices", "2", "--run.micro_batches", "2")
    names = ("loss", "holdout_loss", "holdout_explained_variance", "student_rank", "teacher_rank")
    for name, times in zip(names, (4, 5, 5, 5, 5), strict=True):
        alone, together = ([row[name] for row in run if name in row] for run in (one, two))
        assert len(alone) == times
        assert together == pytest.approx(alone, rel=1e-4), name


def test_two_processes_fill_the_cache_of_one(tmp_path: Path) -> None:
    """Each its shards, to the same bits, and both read all; two students of each step's batch."""
    cache = ("--teacher-cache-views", "1", "--student", "vit-t")
    one = rows(tmp_path / "one", "--teacher-cache", str(tmp_path / "a"), *cache[:2])
    both = ("--run.devices", "2", "--teacher-cache", str(tmp_path / "b"))
    rows(tmp_path / "two", *cache, *both, read=False)
    files = [sorted((tmp_path / name).rglob("*.safetensors")) for name in "ab"]
    assert len(files[0]) == len(files[1]) == 5
    for mine, theirs in zip(*files, strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    for student in ("vit-t", "vit-t-2"):
        two = metrics(tmp_path / "two" / student)
        losses = ([row["loss"] for row in run if "loss" in row] for run in (one, two))
        alone, together = losses
        assert together == pytest.approx(alone, rel=1e-4)


def test_two_processes_with_a_cache_take_the_same_steps(tmp_path: Path) -> None:
    """Each keeps all images on its device; on disk they are written once, by one of them."""
    folder = tmp_path / "cache"
    both = ("--run.devices", "2")
    plain = rows(tmp_path / "plain", *both)
    device = rows(tmp_path / "device", *both, "--data.cache", "device")
    where = ("--data.cache", "disk", "--data.cache_folder", str(folder))
    disk = rows(tmp_path / "disk", *both, *where)
    for name in ("loss", "grad_norm", "student_rank"):
        found = [[row[name] for row in run if name in row] for run in (plain, device, disk)]
        assert len(found[0]) >= 4
        assert found[1] == pytest.approx(found[0], rel=1e-5), name
        assert found[2] == pytest.approx(found[0], rel=1e-5), name
    entries = sorted(path.suffix for path in folder.iterdir())
    assert entries == ["", "", ".lock", ".lock"], "training images, and those held out"


def test_two_processes_score_every_image_once(tmp_path: Path) -> None:
    """599 images, 300 + 299: the record is what one process finds, image by image."""
    out = tmp_path / "run"
    featdistill(
        *("finetune", "--weights", "random", "--data", "digits"),
        *("--image-size", "32", "--batch-size", "64", "--steps", "8", "--out", str(out)),
        *("--model", "timm/vit_tiny_patch16_224", "--lr", "1e-3", "--workers", "0"),
        *("--device", "cpu", "--run.devices", "2", "--run.tensorboard", "false"),
    )
    got = json.loads((out / "finetune.json").read_text())["results"]
    arrays = np.load(out / "finetune.npz")
    held, classifier = open_data("digits").held_out, load_backbone(str(out)).eval()
    view = EvalView(32, 0.875)
    with torch.no_grad():
        logits = torch.cat(
            [classifier(view(held.read(i))[0][None].float() / 255).logits for i in range(len(held))]
        )
    labels, predictions = torch.from_numpy(held.labels), logits.argmax(1)
    assert got["images"] == len(held) == 599
    assert np.array_equal(arrays["labels"], held.labels)
    assert np.array_equal(arrays["predictions"], predictions.numpy())
    hits = predictions == labels
    fives = [int((row > row[y]).sum()) < 5 for row, y in zip(logits, labels, strict=True)]
    assert got["top1"] == pytest.approx(hits.double().mean())
    assert got["top5"] == pytest.approx(sum(fives) / 599)
    assert got["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4
    )
    for c, row in enumerate(got["by_class"]):
        mine = labels == c
        assert row["images"] == int(mine.sum()), row
        assert row["accuracy"] == pytest.approx(hits[mine].double().mean())


def test_two_processes_diagnose_what_one_does(tmp_path: Path) -> None:
    """51 images, 26 + 25: heads, maps, CKA, spectra and pictures of both kinds."""
    words = ("--model", "timm/vit_tiny_patch16_224", "--weights", "random", "--image-size", "32")
    words += ("--data", "digits", "--images", "51", "--batch-size", "8", "--workers", "0")
    words += ("--device", "cpu")
    for kind in ("attention", "features"):
        found = []
        for processes in (1, 2):
            out = tmp_path / f"{kind}-{processes}"
            more = ("--out", str(out), "--run.devices", str(processes))
            featdistill("diagnose", kind, *words, *more)
            results = json.loads((out / f"diagnose-{kind}.json").read_text())["results"]
            del results["seconds"]
            found.append((_flat(results), np.load(out / f"diagnose-{kind}.npz")))
        (one, arrays), (two, others) = found
        assert one.keys() == two.keys()
        for name, value in one.items():
            want = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert two[name] == want, name
        assert sorted(arrays) == sorted(others)
        for name in arrays:
            close = {"rtol": 1e-4, "atol": 2 if arrays[name].dtype == np.uint8 else 1e-5}
            np.testing.assert_allclose(others[name].astype(float), arrays[name], **close)


def _flat(value: object, path: str = "") -> dict[str, object]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for n, part in items for k, v in _flat(part, f"{path}.{n}").items()}
    return {path: value}


def test_two_processes_find_the_curvature_of_one(tmp_path: Path) -> None:
    """Five batches, three and two; resumed with another number of processes, nothing is done."""
    common: dict[str, Any] = {"data": "digits", "image_size": 8, "batch_size": 32, "workers": 0}
    common |= {"device": "cpu", "steps": 3, "lr": 1e-3}
    shape = {"name": "vit-t", "width": 16, "depth": 1, "heads": 2, "patch": 4}
    api.pretrain(model=shape, out=tmp_path / "pretrained", **common)
    api.finetune(model=tmp_path / "pretrained", out=tmp_path / "tuned", **common)
    words = ("curvature", "--model", str(tmp_path / "tuned"), "--data", "digits", "--workers", "0")
    words += ("--device", "cpu", "--images", "40", "--batch-size", "8")
    words += ("--top", "2", "--probes", "3", "--tolerance", "1e-5")
    found = []
    for processes in (1, 2):
        out = tmp_path / f"curvature-{processes}"
        featdistill(*words, "--out", str(out), "--run.devices", str(processes))
        [row] = json.loads((out / "curvature.json").read_text())["results"]["models"]
        found.append([*row["eigenvalues"], row["trace"], row["trace_error"]])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    featdistill(*words, "--out", str(out), "--resume")
    [again] = json.loads((out / "curvature.json").read_text())["results"]["models"]
    assert again["seconds"] == row["seconds"]


def test_two_processes_segment_as_one(tmp_path: Path) -> None:
    """UperNet's batch norms see both halves of a batch; 5 images are scored 3 + 2, all at once."""
    scenes = str(ade20k(tmp_path / "scenes", val=5))
    learn = [
        *("--model", "timm/vit_tiny_patch16_224", "--weights", "random", "--data", scenes),
        *("--image-size", "32", "--batch-size", "4", "--steps", "4", "--lr", "1e-3"),
        *("--head.channels", "8", "--head.auxiliary", "4", "--run.log_every", "1"),
    ]
    usual = ["--workers", "0", "--device", "cpu", "--run.tensorboard", "false"]
    usual += ["--run.precision", "float32"]
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    featdistill("segment", *learn, *usual, "--out", str(one))
    featdistill("segment", *learn, *usual, "--out", str(two), "--run.devices", "2")
    logged = [
        [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    for name in ("main_loss", "auxiliary_loss", "grad_norm"):
        alone, together = ([row[name] for row in rows if name in row] for rows in logged)
        assert len(alone) == 4
        assert together == pytest.approx(alone, rel=1e-3), name
    words = ["--model", str(one), "--data", scenes, "--train", "none", "--run.devices", "2"]
    featdistill("segment", *words, *usual, "--out", str(again))
    whole, shared = (np.load(out / "segment.npz") for out in (one, again))
    for name in ("counts", "confusion"):
        assert np.array_equal(whole[name], shared[name]), name


def test_two_processes_probe_as_one(tmp_path: Path) -> None:
    """The batch norm before the head is of the whole batch, whoever holds which part."""
    words = (
        *("probe", "--model", "timm/resnet18", "--weights", "random", "--data", "digits"),
        *("--image-size", "32", "--batch-size", "32", "--steps", "6", "--style", "online"),
        *("--lr", "0.5", "--seeds", "1", "--workers", "0", "--run.precision", "float32"),
        *("--device", "cpu", "--run.tensorboard", "false"),
    )
    found = []
    for name, more in (("one", ()), ("two", ("--run.devices", "2"))):
        featdistill(*words, "--out", str(tmp_path / name), *more)
        found.append(np.load(tmp_path / name / "seed-1/probe-fit.npz"))
    one, two = found
    assert np.abs(one["weight"] - two["weight"]).max() < 1e-3 * np.abs(one["weight"]).max()
    assert len(two["predictions"]) == 599
    assert (one["predictions"] == two["predictions"]).mean() > 0.99

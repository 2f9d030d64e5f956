"""What only a CUDA device can show; skipped where there is none (`make test-gpu`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featdistill
from featdistill.data.device_cache import device_batches, to_device
from featdistill.data.loader import Share
from featdistill.data.sources import ArraySource
from featdistill.data.views import CropView
from featdistill.diagnostics.capture import capture_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPTIONS: dict[str, Any] = {
    "teacher": "timm/vit_tiny_patch16_224",
    "teacher_weights": "random",
    "teacher_image_size": 32,
    "student": {"name": "vit-t", "patch": 4, "depth": 2},
    "image_size": 16,
    "data": "digits",
    "batch_size": 32,
    "steps": 8,
    "lr": 1e-3,
    "workers": 0,
}


def losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_float32_on_cuda_takes_the_steps_of_the_cpu(tmp_path: Path) -> None:
    run = {"log_every": 1, "tensorboard": False}
    for device in ("cpu", "cuda"):
        options = {**OPTIONS, "device": device, "precision": "float32"}
        featdistill.distill(out=tmp_path / device, run=run, **options)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_bf16_is_near_float32(tmp_path: Path) -> None:
    run = {"log_every": 1, "tensorboard": False}
    for precision in ("float32", "bf16"):
        options = {**OPTIONS, "device": "cuda", "precision": precision}
        featdistill.distill(out=tmp_path / precision, run=run, **options)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "float32"), rel=0.05)


FAMILIES = {
    "vit_tiny_patch16_224": 64,
    "beitv2_base_patch16_224": 64,
    "swinv2_tiny_window8_256": 64,
    "convnext_tiny": 64,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # cuDNN's convolutions round their input to TF32 unless told otherwise
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    backbone = featdistill.load_backbone(
        f"timm/{name}", weights="random", image_size=FAMILIES[name]
    ).eval()
    images = torch.rand(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here = backbone(images)
        there = backbone.cuda()(images.cuda())
    for one, other in ((here.map, there.map), (here.prefix, there.prefix)):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beitv2_base_patch16_224"])
def test_attention_under_fused_kernels_is_that_of_the_cpu(name: str) -> None:
    backbone = featdistill.load_backbone(f"timm/{name}", weights="random", image_size=64).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def seen(device: str) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        backbone.to(device)
        with torch.no_grad(), capture_attention(backbone, lambda a: kept.append(a.weights.cpu())):
            backbone(images.to(device))
        return kept

    here, there = seen("cpu"), seen("cuda")
    assert len(here) == len(there) == len(backbone.layer_grids)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_a_run_stopped_and_resumed_takes_the_same_steps(tmp_path: Path) -> None:
    run = {"log_every": 1, "tensorboard": False, "checkpoint_every": 4}
    options = {**OPTIONS, "device": "cuda", "precision": "float32", "run": run}
    featdistill.distill(out=tmp_path / "whole", **options)
    featdistill.distill(out=tmp_path / "halves", **options, schedule={"stop_at": 4})
    featdistill.distill(out=tmp_path / "halves", **options, resume=True)
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_the_whole_loop(tmp_path: Path) -> None:
    """Every command that computes, each from the last one's folder, in bf16."""
    small: dict[str, Any] = {"device": "cuda", "data": "digits", "workers": 2, "batch_size": 32}
    shape = {"name": "vit-t", "width": 48, "depth": 2, "heads": 3, "patch": 4}
    short = {**small, "image_size": 16, "steps": 6, "lr": 1e-3}
    teacher, student, tuned = (str(tmp_path / n) for n in ("teacher", "student", "tuned"))
    featdistill.pretrain(model=shape, out=teacher, **short)
    featdistill.distill(teacher=teacher, student=shape, out=student, **short)
    result = featdistill.finetune(model=student, out=tuned, ema=0.9, **short)
    assert result.top1 is not None
    scores = featdistill.knn(model=[teacher, student], image_size=16, k=[5], **small)
    assert all(0.05 < best <= 1 for best in scores.best.values())
    featdistill.predict(
        model=tuned, data="digits", device="cuda", workers=0, out=tmp_path / "predicted"
    )
    for kind in ("attention", "features"):
        featdistill.diagnose(
            kind, model=[teacher, student], images=64, out=tmp_path / kind, **small
        )
    compared = featdistill.compare(
        teacher=teacher, student=student, out=tmp_path / "compared", seeds=[1], lrs=[1.0], **short
    )
    assert compared.report.is_file()


def test_landscape_and_curvature_are_those_of_the_cpu(tmp_path: Path) -> None:
    run = {"tensorboard": False}
    featdistill.distill(out=tmp_path / "run", run=run, **{**OPTIONS, "device": "cpu"})
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        options = {"model": str(tmp_path / "run"), "data": "digits", "images": 32, "device": device}
        plane = featdistill.landscape(grid=3, out=tmp_path / f"plane-{device}", **options)
        bent = featdistill.curvature(top=2, probes=2, out=tmp_path / f"bent-{device}", **options)
        record = json.loads(bent.record.read_text())["results"]["models"][0]
        [losses_there] = plane.losses.values()
        found[device] = losses_there.ravel().tolist(), record["eigenvalues"]
    for here, there in zip(found["cpu"], found["cuda"], strict=True):
        assert there == pytest.approx(here, rel=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "sgd", "weight_decays": [1e-5], "lrs": [1.0], "probe": {"grid": {"steps": 200}}},
        {"style": "online", "steps": 20, "batch_size": 64, "lr": 0.1},
    ],
    ids=["lbfgs", "sgd", "online"],
)
def test_a_probe_on_cuda_is_that_of_the_cpu(tmp_path: Path, options: dict[str, Any]) -> None:
    model = {"model": "timm/vit_tiny_patch16_224", "weights": "random", "image_size": 32}
    found = []
    for device in ("cpu", "cuda"):
        common = {"data": "digits", "workers": 0, "device": device, "seeds": [1]}
        run = {"precision": "float32", "tensorboard": False}
        done = featdistill.probe(out=tmp_path / device, run=run, **model, **common, **options)
        found.append(done.top1["timm/vit_tiny_patch16_224"])
    assert found[1] == pytest.approx(found[0], abs=0.01)


def test_knn_on_cuda_is_that_of_the_cpu() -> None:
    model = {"model": "timm/vit_tiny_patch16_224", "weights": "random", "image_size": 32}
    one, two = (
        featdistill.knn(data="digits", workers=0, device=d, **model) for d in ("cpu", "cuda")
    )
    for k, top1 in one.top1["timm/vit_tiny_patch16_224"].items():
        assert two.top1["timm/vit_tiny_patch16_224"][k] == pytest.approx(top1, abs=0.005)


@pytest.mark.parametrize(("side", "size"), [(32, 32), (32, 64), (150, 8)])
def test_views_cut_on_cuda_are_the_cpu_s_to_the_bit(side: int, size: int) -> None:
    """By exact sums: in float32, and in float64 where images are far larger than views."""
    pixels = torch.randint(0, 256, (300, 3, side, side), dtype=torch.uint8)
    source = ArraySource("made", pixels, np.arange(300) % 5, tuple("abcde"))
    found = []
    for device in ("cpu", "cuda"):
        kept = to_device(source, torch.device(device), workers=0, progress=lambda done: None)
        batches = device_batches(
            kept, CropView(size), batch_size=64, seed=3, start=0, stop=8, share=Share()
        )
        found.append([b.to(torch.device("cpu")) for b in batches])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.images, two.images)
        assert one.labels is not None
        assert two.labels is not None
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.indices, two.indices)

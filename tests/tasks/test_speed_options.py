"""What makes a run faster or smaller is an option, and changes what it should and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import featdistill
from featdistill.cli.main import main
from featdistill.core.errors import RunError
from featdistill.engine import speed
from featdistill.tasks.bench.ways import WAYS, Setting, make
from tests.tasks.conftest import SHAPE, TINY
from tests.tasks.test_distill_task import differing, distill, losses


def test_recomputing_ends_at_the_same_weights(teacher: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "plain")
    distill(teacher, tmp_path / "again", run={"recompute": True})
    assert differing(tmp_path / "plain", tmp_path / "again") == []


@pytest.mark.parametrize("attention", ["naive", "fused"])
def test_other_attention_ends_close_by(teacher: Path, tmp_path: Path, attention: str) -> None:
    distill(teacher, tmp_path / "lean")
    distill(teacher, tmp_path / "other", run={"attention": attention})
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "lean"), rel=1e-4)


def test_bf16_on_a_cpu_is_close_and_told(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(teacher, tmp_path / "float32", run={"precision": "float32"})
    distill(teacher, tmp_path / "bf16", run={"precision": "bf16"})
    assert "threads, bf16" in capsys.readouterr().err
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "float32"), rel=0.02)


def test_a_teacher_kept_in_bf16_says_what_autocast_would(teacher: Path, tmp_path: Path) -> None:
    """Run in bf16, the teacher's own precision adds nothing: weights end equal to the bit."""
    distill(teacher, tmp_path / "auto", run={"precision": "bf16"})
    from featdistill.objectives import distillation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "lower_weights", lambda _: None)
        distill(teacher, tmp_path / "autocast", run={"precision": "bf16"})
    assert differing(tmp_path / "auto", tmp_path / "autocast") == []


def test_a_large_teacher_of_a_small_student_is_kept_in_bf16(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(speed, "bf16_pays", lambda model: seen.append(model) or len(seen) == 2)
    from featdistill.config.commands import DistillConfig
    from featdistill.config.resolve import resolve
    from featdistill.tasks.assembly import assemble

    values = {
        "teacher": str(teacher),
        "data": "digits",
        "image-size": 8,
        "batch-size": 32,
        "device": "cpu",
        "student": "vit-t",
        "student.width": 32,
        "student.depth": 2,
        "student.heads": 2,
        "student-patch": 4,
        "out": str(tmp_path / "run"),
    }
    config = resolve("distill", {k: str(v) for k, v in values.items()})
    assert isinstance(config, DistillConfig)
    assembly = assemble(config)
    assert assembly.runtime.precision == "float32"
    assert assembly.objective.teacher_precision == "bf16"


def test_skipping_trains_and_resumes_to_the_same_weights(teacher: Path, tmp_path: Path) -> None:
    shape = {"name": "vit-t", **SHAPE, "drop_path": 0.5, "drop_path_way": "skip"}

    def run(out: Path, **options: object) -> None:
        base = {**TINY, "steps": 6, "student": shape, "teacher": teacher}
        featdistill.distill(out=out, **{**base, **options})

    run(tmp_path / "whole")
    run(tmp_path / "parts", schedule={"stop_at": 3})
    run(tmp_path / "parts", resume=True)
    assert differing(tmp_path / "whole", tmp_path / "parts") == []


def test_skipping_resumes_in_the_same_parts_only(teacher: Path, tmp_path: Path) -> None:
    """Of each micro-batch a number is dropped: others than before, if it is another part."""
    shape = {"name": "vit-t", **SHAPE, "drop_path": 0.5, "drop_path_way": "skip"}
    base = {**TINY, "steps": 6, "student": shape, "teacher": teacher, "out": tmp_path / "run"}
    featdistill.distill(**base, schedule={"stop_at": 3})
    with pytest.raises(RunError, match="micro_batches: 1 -> 2"):
        featdistill.distill(**base, resume=True, run={"micro_batches": 2})


def test_what_cannot_be_done_is_one_line(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", "--teacher", str(teacher), "--data", "digits", "--image-size", "64"]
    words += ["--steps", "1", "--batch-size", "4", "--out", str(tmp_path / "run")]
    student = ["--student", "timm/edgenext_xx_small", "--drop-path", "0.5"]
    assert main([*words, *student, "--student.drop_path_way", "skip"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "cannot skip what it drops" in said
    assert not (tmp_path / "run").exists()


STEP = (
    *("bench", "step", "--teacher", "timm/vit_tiny_patch16_224", "--student", "vit-t"),
    *("--image-size", "32", "--batch-size", "2", "--rounds", "1", "--device", "cpu"),
)


def test_bench_step_prints_one_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    assert main([*STEP, "--json", "--profile", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in (
        *("images_per_second", "reference_images_per_second", "ratio", "flops_per_image"),
        *("ceiling_flops_per_second", "fraction_of_ceiling"),
    ):
        assert found[name] > 0, name
    assert found["step_seconds"].keys() == {"median", "min", "max"}
    assert found["images_per_second"] == pytest.approx(2 / found["step_seconds"]["median"])
    assert {"device", "threads", "precision", "versions"} <= found["set_up"].keys()
    assert (folder / "table.txt").read_text().strip()
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]


def first(way: str, *, cached: bool = False) -> dict[str, float]:
    """What a way says of its first step."""
    setting = Setting(
        teacher="timm/vit_tiny_patch16_224",
        student="vit-t",
        image_size=32,
        batch_size=2,
        device="cpu",
        threads=1,
        precision="float32",
        cached=cached,
        drop_path=0.0,
    )
    found: dict[str, float] = make(way, setting)()
    return found


def test_every_way_begins_with_the_same_loss() -> None:
    losses = [first(way)["loss"] for way in WAYS]
    assert losses == pytest.approx([losses[0]] * len(WAYS), rel=1e-5)


def test_with_a_cache_the_loss_is_the_same_and_the_work_less() -> None:
    live, cached = first("featdistill"), first("featdistill", cached=True)
    assert cached["loss"] == pytest.approx(live["loss"], rel=1e-3)  # what is cached is in bf16
    assert cached["flops"] < live["flops"]


def test_bench_step_tells_a_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*STEP[:2], "--student", "vit-q", "--rounds", "1"]) == 2
    assert "no student called 'vit-q'" in capsys.readouterr().err
    assert main([*STEP, "--teacher", "timm/vit_tinny", "--rounds", "1"]) == 2  # from its process
    assert "vit_tinny" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*STEP, "--profile", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_operations_are_the_formulas() -> None:
    """2 M_T + 6 (M_S + N d_S d_T) - 2 M_patch, of ViT-T and ViT-S; heads and norms aside."""
    from featdistill.models.load import load_backbone
    from featdistill.models.students import build_student
    from featdistill.objectives.distillation import FeatureDistillation
    from featdistill.tasks.bench.flops import flops_per_image

    def products(d: int, layers: int = 12, n: int = 17, p: int = 16) -> tuple[float, float]:
        patch = (n - 1) * d * 3 * p**2
        return patch + layers * n * 12 * d**2 + 2 * layers * n**2 * d, patch

    with torch.device("cpu"):
        objective = FeatureDistillation(
            teacher=load_backbone("timm/vit_small_patch16_224", weights="random", image_size=64),
            student=build_student("vit-t", image_size=64),
        )
    teacher, _ = products(384)
    student, patch = products(192)
    expected = 2 * teacher + 6 * (student + 17 * 192 * 384) - 2 * patch
    assert flops_per_image(objective) == pytest.approx(expected, rel=2e-3)
    assert flops_per_image(objective, cached=True) == pytest.approx(
        expected - 2 * teacher, rel=2e-3
    )

"""The dry step before a distillation: what it says, and that it leaves no trace."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import featdistill
from featdistill.config.resolve import resolve
from featdistill.config.sections import Target
from featdistill.core.errors import FeatDistillError, NonFiniteError, RunError
from featdistill.models.blocks import blocks_of
from featdistill.objectives.distillation import FeatureDistillation
from featdistill.tasks import preflight as preflight_module
from featdistill.tasks.assembly import Assembly, assemble, assemble_all, students_of
from featdistill.tasks.describe import describe, shapes
from featdistill.tasks.preflight import preflight
from tests.tasks.conftest import SHAPE, TINY
from tests.tasks.test_distill_task import differing, distill, losses

CONVOLUTIONAL = {"student": "timm/resnet10t", "drop_path": 0.0, "image_size": 32, "batch_size": 8}


def assembled(model: Path, **options: Any) -> tuple[Any, Assembly]:
    shape = {"name": "vit-t", **SHAPE, "drop_path": 0.3}
    options["teacher"] = {"spec": str(model), **options.get("teacher", {})}
    given = {"student": shape, "steps": 6, **TINY, **options}
    config: Any = resolve("check", given)
    return config, assemble(config)


def everything(assembly: Assembly) -> dict[str, torch.Tensor]:
    """Clones of all tensors of the objective and its teacher, buffers that are not saved too."""
    modules = {"objective": assembly.objective, "teacher": assembly.objective.teacher}
    return {
        f"{side}.{name}": tensor.detach().clone()
        for side, module in modules.items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


@pytest.mark.parametrize(
    "options",
    [
        {"run": {"micro_batches": 2}},
        {"whitening": "standardize"},
        {"whitening": "pca"},
        {"teacher": {"drop_path": 0.2}},
        {**CONVOLUTIONAL, "student_init": "random"},
    ],
    ids=str,
)
def test_a_run_is_the_same_with_and_without_it(
    teacher: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = dict(options)
    spec = {**options.pop("teacher", {}), "spec": str(teacher)}
    run = {"log_every": 1, **options.pop("run", {})}
    given: dict[str, Any] = {"student": {"name": "vit-t", **SHAPE, "drop_path": 0.3}, **TINY}
    given |= {"teacher": spec, "steps": 3, **options}
    featdistill.distill(out=tmp_path / "with", run=run, **given)
    featdistill.distill(out=tmp_path / "without", run={**run, "preflight": False}, **given)
    assert differing(tmp_path / "with", tmp_path / "without") == []
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_a_dry_step_on_the_student_itself_would_show(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    distill(teacher, tmp_path / "without", run={"preflight": False})
    monkeypatch.setattr(
        preflight_module, "copy", SimpleNamespace(deepcopy=lambda module, _: module)
    )
    distill(teacher, tmp_path / "with")
    assert differing(tmp_path / "with", tmp_path / "without")


def test_it_leaves_tensors_generators_and_the_teacher_alone(teacher: Path) -> None:
    config, assembly = assembled(teacher, whitening="standardize", teacher={"drop_path": 0.2})
    before = everything(assembly), random.getstate(), np.random.get_state(), torch.get_rng_state()
    preflight(config, assembly)
    after = everything(assembly)
    assert before[0].keys() == after.keys()
    assert [k for k, v in before[0].items() if not torch.equal(v, after[k])] == []
    assert random.getstate() == before[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2], strict=True))
    assert torch.equal(torch.get_rng_state(), before[3])
    assert all(p.grad is None for p in assembly.objective.parameters())
    assert not assembly.objective.teacher._forward_hooks
    assert not assembly.objective.teacher._forward_pre_hooks


def test_its_first_loss_is_the_runs(teacher: Path, tmp_path: Path) -> None:
    """The dry step is a step of the run: the same images, the same masks, the same loss."""
    options = {"run": {"log_every": 1}, "steps": 2}
    config, assembly = assembled(teacher, **options)
    batches, _ = preflight_module._load(config, assembly, 2)
    steps = preflight_module._steps(config, assembly, [assembly.objective], batches)
    distill(teacher, tmp_path / "run", **options)
    assert steps[0].loss == pytest.approx(losses(tmp_path / "run")[0], rel=1e-5)


def test_disk_is_what_a_run_writes(teacher: Path, tmp_path: Path) -> None:
    result = distill(teacher, tmp_path / "run")
    weights = [p for p in result.out.rglob("*.safetensors") if p.name != "random.safetensors"]
    config, assembly = assembled(teacher)
    cost = preflight(config, assembly)
    assert cost.disk == pytest.approx(sum(p.stat().st_size for p in weights), rel=0.1)
    assert cost.free is None  # a check writes nothing


def test_the_best_student_takes_room_too(teacher: Path, tmp_path: Path) -> None:
    """Its state, that of the one before it while it is written, and its export."""
    options = {"holdout": "0.1", "best": "holdout_loss"}
    out = distill(teacher, tmp_path / "run", **options).out
    [state] = (out / "checkpoints/best").rglob("model.safetensors")
    [export] = (out / "best/export").glob("*.safetensors")
    more = preflight(*assembled(teacher, **options)).disk - preflight(*assembled(teacher)).disk
    assert more == pytest.approx(2 * state.stat().st_size + export.stat().st_size, rel=0.1)


def test_times_are_split(teacher: Path) -> None:
    config, assembly = assembled(teacher)
    cost = preflight(config, assembly)
    assert cost.teacher > 0
    assert cost.student > 0
    assert cost.step == cost.teacher + cost.student
    # no workers: the loop loads, then steps
    assert cost.seconds == pytest.approx(6 * (cost.step + cost.loading))


def test_a_long_step_is_taken_once(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_module, "_LONG", 0.0)
    config, assembly = assembled(teacher)
    batches, _ = preflight_module._load(config, assembly, 3)
    assert len(preflight_module._steps(config, assembly, [assembly.objective], batches)) == 1
    assert preflight(config, assembly).step > 0


def test_what_is_compiled_in_the_run_is_compiled_in_the_dry_step(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where compiling makes the first step a long one."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    monkeypatch.setattr(preflight_module, "_LONG", 0.0)
    taken = []
    real = preflight_module._Clock.now

    def now(self: Any) -> float:
        taken.append(1)
        return real(self)

    config, assembly = assembled(teacher, run={"compile": "on"})
    blocks = blocks_of(assembly.objective.student)
    assert compiled == blocks
    compiled.clear()
    monkeypatch.setattr(preflight_module._Clock, "now", now)
    preflight(config, assembly)
    assert len(compiled) == len(blocks)
    assert not set(compiled) & set(blocks), "those of the copy"
    assert len(taken) == 2 * 4, "two steps, and in each a pass of the teacher"


def test_slow_loading_is_said(teacher: Path) -> None:
    config, assembly = assembled(teacher)
    cost = replace(preflight(config, assembly), teacher=0.5, student=0.5, loading=7.5, workers=2)
    assert "slower than the step, 8 would keep up (--workers)" in "\n".join(cost.lines(32, 100))
    enough = replace(cost, workers=8)
    assert "slower" not in "\n".join(enough.lines(32, 100))


@pytest.mark.parametrize("option", [{"resume": True}, {"run": {"preflight": False}}])
def test_none_where_none_is_wanted(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, Any]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry step was taken")

    if "resume" in option:
        distill(teacher, tmp_path / "run", schedule={"stop_at": 2})
    monkeypatch.setattr("featdistill.tasks.distill.preflight", refuse)
    assert distill(teacher, tmp_path / "run", **option).steps == 6
    with pytest.raises(AssertionError, match="dry step"):
        distill(teacher, tmp_path / "other")


def test_everything_is_said_once_on_screen_and_in_the_log(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(teacher, tmp_path / "run", teacher_image_size=16)
    screen = capsys.readouterr().err
    for text in (screen, (tmp_path / "run/log.txt").read_text()):
        for once in (
            "token grid",
            "one crop for both, rendered at 16x16; antialiased down to 8x8 for the student",
            "the teacher's 4x4 tokens to the student's 2x2 (bilinear), before whitening",
            "linear, 32 to 32 channels",
            "192 views",
            "--student-init teacher",
            "dry step",
            "whole run",
        ):
            assert text.count(once) == 1, (once, text)
    assert "dropped" not in screen


def test_what_is_dropped_and_resized_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    result = featdistill.check(
        teacher="timm/vit_tiny_patch16_224",
        teacher_weights="random",
        student="timm/vit_small_patch14_reg4_dinov2",
        **{**TINY, "image_size": 56, "batch_size": 2, "steps": 1},
    )
    text = capsys.readouterr().out
    assert "dropped    student.reg1" in text
    assert "rendered at 224x224; antialiased down to 56x56 for the student" in text
    assert "the teacher's 14x14 tokens to the student's 4x4" in text
    assert result.shapes["student"]["layout"] == "tokens (B, 21, 384)"
    assert result.shapes["teacher"]["prefix tokens"] == "cls"
    assert result.seconds_per_step > result.seconds_teacher > 0


@pytest.mark.parametrize(
    ("target", "says", "dropped"),
    [
        ("gap", "the mean of the 2x2 tokens of the teacher's output", "teacher.cls, student.cls: "),
        ("pooled", "the teacher's own pooled vector of 32", "dropped    student.cls: "),
    ],
)
def test_targets_that_are_one_vector(teacher: Path, target: str, says: str, dropped: str) -> None:
    config, assembly = assembled(teacher, target=target)
    text = "\n".join(describe(config, assembly, shapes(assembly)))
    assert says in text
    assert dropped in text


def test_every_target_is_described(classifier: Path) -> None:
    for target in Target:
        config, assembly = assembled(classifier, target=target.value)
        assert any(
            line.startswith("target ") for line in describe(config, assembly, shapes(assembly))
        )


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("swin_tiny_patch4_window7_224", "map (B, 2, 2, 768), channels last"),
        ("resnet10t", "map (B, 512, 2, 2), channels first"),
    ],
)
def test_layouts(teacher: Path, name: str, layout: str) -> None:
    result = featdistill.check(
        teacher=teacher,
        student={"name": f"timm/{name}", "drop_path": 0.0},
        **{**TINY, "image_size": 64, "batch_size": 2, "steps": 1},
    )
    assert result.shapes["student"]["layout"] == layout


def fail_with(error: Exception) -> Any:
    def forward(*_: Any) -> None:
        raise error

    return forward


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({}, r"give --run.micro_batches 2 \(the same training\), or a smaller --batch-size"),
        ({"run": {"micro_batches": 8}}, "--run.micro_batches 16"),
        ({"run": {"micro_batches": 32}}, "; give a smaller --batch-size"),
        # whose statistics micro-batches would change
        (CONVOLUTIONAL, "; give a smaller --batch-size"),
    ],
    ids=["one", "eight", "every", "batch-norm"],
)
def test_too_little_memory_says_what_to_do(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    options: dict[str, Any],
    fix: str,
) -> None:
    monkeypatch.setattr(FeatureDistillation, "forward", fail_with(error))
    given = {"student": {"name": "vit-t", **SHAPE}, **TINY, "steps": 1, **options}
    with pytest.raises(RunError, match=fix) as raised:
        featdistill.distill(teacher=teacher, out=tmp_path / "run", **given)
    assert "too little memory" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists(), "nothing may be left for the next attempt"


def test_other_errors_are_their_own(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureDistillation, "forward", fail_with(RuntimeError("a bug")))
    config, assembly = assembled(teacher)
    with pytest.raises(RuntimeError, match="a bug"):
        preflight(config, assembly)
    assert not assembly.objective.teacher._forward_hooks


def test_another_processs_failure_ends_this_one_too(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, assembly = assembled(teacher)
    other = RunError("the other's memory is too small")
    monkeypatch.setattr(type(assembly.runtime), "collect", lambda self, mine: [mine, other])
    with pytest.raises(RunError, match="the other's memory"):
        preflight(config, assembly)


def test_a_loss_that_is_no_number_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import torch\n\nclass Broken(torch.nn.Conv2d):\n"
        "    def forward(self, x):\n        return super().forward(x) / 0\n\n"
        "def net():\n    return Broken(3, 5, 4, stride=4)\n"
    )
    (tmp_path / "broken_teacher.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(NonFiniteError, match="nan"):
        featdistill.distill(
            teacher="broken_teacher:net",
            teacher_image_size=8,
            student={"name": "vit-t", **SHAPE},
            out=tmp_path / "run",
            **{**TINY, "steps": 2},
        )
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_found_before_the_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(FeatDistillError, match=r"where 0\.0 MiB are free"):
        distill(teacher, tmp_path / "deep/in/run")
    assert not (tmp_path / "deep").exists()


def test_with_a_cache_the_teachers_time_is_paid_once(teacher: Path, tmp_path: Path) -> None:
    kept = {"teacher_cache": {"folder": str(tmp_path / "cache"), "views": 2}, "holdout": "none"}
    config, assembly = assembled(teacher, **kept, steps=1000)
    cost = replace(preflight(config, assembly), teacher=3.0, student=1.0)
    assert cost.filling is not None
    assert cost.step == 1.0
    assert replace(cost, filling=None).step == 4.0
    said = " ".join("\n".join(cost.lines(32, 100)).split())
    assert "the student alone, since the cache spares the teacher's 3.00 s" in said
    assert "to fill the teacher cache" in said
    # 2 views of 1198 images, in batches of 32, each of which takes the teacher or its loading
    assert cost.filling > 2 * 1198 / 32 * cost.loading


def test_all_students_are_in_it(teacher: Path) -> None:
    options: dict[str, Any] = {**TINY, "teacher": str(teacher), "steps": 6}
    config: Any = resolve("check", {**options, "student": {"name": ("vit-t", "vit-t"), **SHAPE}})
    assembly, *others = assemble_all(students_of(config))
    one = preflight(config, assembly)
    both = preflight(config, assembly, others=others)
    assert both.disk == 2 * one.disk
    assert both.loss == pytest.approx(one.loss, rel=1e-6)

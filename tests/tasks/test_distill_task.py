"""The main job: what a run leaves behind, and that it can stop and go on anywhere."""

from __future__ import annotations

import json
import os
import shlex
import signal
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import featdistill
from featdistill.cli.main import main
from featdistill.core.errors import Interrupted, RunError
from featdistill.engine.checkpoint import Checkpoints
from featdistill.engine.loop import _Loop
from tests.tasks.conftest import SHAPE, TINY


def distill(teacher: Path, out: Path, **options: Any) -> Any:
    base: dict[str, Any] = {**TINY, "steps": 6}
    shape = {"name": "vit-t", **SHAPE, "drop_path": 0.3}
    return featdistill.distill(teacher=teacher, student=shape, out=out, **{**base, **options})


def state(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    checkpoint = Checkpoints(out / "checkpoints").latest()
    assert checkpoint is not None
    return {f"{f}/{k}": v for f, tensors in checkpoint.files.items() for k, v in tensors.items()}


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors that two runs' newest checkpoints do not share bit for bit."""
    a, b = state(one), state(other)
    return [
        k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])
    ]


def test_run_folder_holds_what_the_contract_says(student: Path) -> None:
    names = {p.name for p in student.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "log.txt", "checkpoints"} <= names
    assert {"export", "distill.json"} <= names
    assert any(n.startswith("events.") for n in names)
    config = yaml.safe_load((student / "config.yaml").read_text())
    assert config["objective"]["whitening"] == "layernorm"
    record = json.loads((student / "distill.json").read_text())
    assert record["results"]["pairing"]["prefix"] == ["cls"]


def test_checkpoint_holds_no_teacher_and_no_pickle(student: Path) -> None:
    tensors = load_file(next((student / "checkpoints").iterdir()) / "model.safetensors")
    assert all(name.startswith(("student.", "projector.")) for name in tensors)
    files = [p for p in (student / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_export_loads_in_plain_timm_and_equals_the_checkpoint(student: Path) -> None:
    model = timm.create_model(f"local-dir:{student / 'export'}", pretrained=True)
    trained = state(student)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"model/student.model.{name}"]), name


def test_stop_and_resume_equal_an_unbroken_run_bit_for_bit(teacher: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options: dict[str, Any] = {"objective": {"whitening": "standardize"}, "run": {"log_every": 1}}
    distill(teacher, whole, **options)
    stopped = distill(teacher, broken, schedule={"stop_at": 2}, **options)
    assert stopped.export is None
    assert stopped.steps == 2
    distill(teacher, broken, resume=True, **options)
    assert differing(whole, broken) == []
    assert losses(whole) == losses(broken)


def test_resume_check_can_fail(teacher: Path, tmp_path: Path) -> None:
    """The negative control of the test above: another seed is another run."""
    distill(teacher, tmp_path / "a")
    distill(teacher, tmp_path / "b", seed=1)
    assert differing(tmp_path / "a", tmp_path / "b")


def test_workers_change_nothing(teacher: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "a", workers=0)
    distill(teacher, tmp_path / "b", workers=2)
    assert differing(tmp_path / "a", tmp_path / "b") == []


def test_micro_batches_change_only_rounding(teacher: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "a", run={"log_every": 1})
    distill(teacher, tmp_path / "b", run={"log_every": 1, "micro_batches": 4})
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)


def test_signal_saves_and_resume_continues(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(teacher, tmp_path / "whole")
    real = _Loop._step

    def interrupt(self: _Loop, step: int, *rest: Any) -> None:
        real(self, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_Loop, "_step", interrupt)
    with pytest.raises(Interrupted, match="--resume") as stopped:
        distill(teacher, tmp_path / "broken")
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    monkeypatch.undo()
    distill(teacher, tmp_path / "broken", resume=True)
    assert differing(tmp_path / "whole", tmp_path / "broken") == []


def test_an_extended_run_and_its_record(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished one too: its record and its export are then of all steps, and say both plans."""
    distill(teacher, tmp_path / "a", steps=4)
    longer = distill(teacher, tmp_path / "a", steps=4, resume=True, extend="steps=8")
    assert longer.steps == 8
    said = capsys.readouterr().err
    assert "extended at step 4: the schedule was 4 steps" in said
    record = json.loads((tmp_path / "a/distill.json").read_text())
    assert record["config"]["schedule"]["steps"] == record["results"]["steps"] == 8
    found = [(plan["since"], plan["steps"]) for plan in record["results"]["schedules"]]
    assert found == [(0, 4), (4, 8)]
    again = featdistill.distill(config=tmp_path / "a/config.yaml", resume=True)
    assert again.steps == 8
    assert (
        json.loads((tmp_path / "a/distill.json").read_text())["results"]["schedules"]
        == (record["results"]["schedules"])
    )


def test_a_checkpoint_says_by_what_it_was_computed(student: Path) -> None:
    found = Checkpoints(student / "checkpoints").latest()
    assert found is not None
    known = found.manifest["environment"]
    assert known["versions"]["torch"] == metadata.version("torch")
    assert known["threads"] == torch.get_num_threads()
    assert {"cpu", "cpu_features", "kernels", "devices", "python"} <= known.keys()


def test_resume_with_another_configuration_is_refused(teacher: Path, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "a", schedule={"stop_at": 2})
    with pytest.raises(RunError, match=r"optimizer\.lr: 0\.001 -> 0\.01"):
        distill(teacher, tmp_path / "a", resume=True, lr=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": {"target": "gap"}},
        {"objective": {"whitening": "pca", "loss": "mse"}},
        {"objective": {"whitening": "l2", "loss": "cosine"}},
        {"objective": {"whitening": "none", "loss": "l1"}},
        {"student_init": "teacher"},
        {"position": "rpb"},
        {"position": "ape"},
        {"teacher_layer": 0},
        {"teacher_image_size": 16},
        {"teacher": {"drop_path": 0.2}},
    ],
    ids=str,
)
def test_alternatives_run(teacher: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    spec = {**options.pop("teacher", {}), "spec": str(teacher)}
    result = featdistill.distill(
        teacher=spec,
        student={"name": "vit-t", **SHAPE},
        out=tmp_path / "run",
        **{**TINY, "steps": 2, **options},
    )
    assert result.export is not None
    assert 0 < result.last["loss"] < 100


def test_a_custom_factory_is_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch\n\ndef net():\n    return torch.nn.Conv2d(3, 5, 4, stride=4)\n"
    (tmp_path / "my_teacher.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = featdistill.distill(
        teacher="my_teacher:net",
        teacher_image_size=8,
        student={"name": "vit-t", **SHAPE},
        out=tmp_path / "run",
        **{**TINY, "steps": 2},
    )
    assert result.export is not None


def test_a_student_that_continues_starts_as_its_teacher(teacher: Path, tmp_path: Path) -> None:
    """Positions too are kept, unless another scheme is asked for: its first loss says so."""
    options = {"student_init": "teacher", "run": {"log_every": 1}, "drop_path": 0.0}
    shape = {"name": "vit-t", **SHAPE}
    common = {"teacher": teacher, "student": shape, **TINY, "steps": 1, **options}
    kept = featdistill.distill(out=tmp_path / "a", **common)
    config = json.loads((kept.out / "export/config.json").read_text())
    assert config["model_args"]["use_abs_pos_emb"] is True
    lost = featdistill.distill(position="shared-rpb", out=tmp_path / "b", **common)
    config = json.loads((lost.out / "export/config.json").read_text())
    assert config["model_args"]["use_abs_pos_emb"] is False


def test_the_printed_next_command_works(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("featdistill.tasks.pretrain.say", said.append)
    featdistill.pretrain(
        model={"name": "vit-t", **SHAPE}, out=f"{tmp_path}/my run/", **{**TINY, "steps": 1}
    )
    words = shlex.split(said[-1].partition("next: featdistill ")[2])
    assert main([*words, "--batch-size", "8", "--steps", "1", "--workers", "0"]) == 0

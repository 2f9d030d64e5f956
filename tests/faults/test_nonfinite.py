"""Values that are no numbers: no weight sees them, all processes act at once, images are named."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from featdistill.cli.main import main
from featdistill.core.errors import NonFiniteError, RunError
from featdistill.core.types import Batch
from featdistill.engine import checkpoint
from featdistill.engine import step as steps
from featdistill.engine.finite import FiniteWatch
from featdistill.engine.rundir import read_metrics
from featdistill.engine.undo import Undo
from tests.faults import victim
from tests.faults.calm import BAD, STEPS, failing, run
from tests.faults.harness import newest
from tests.faults.team import order, said, together
from tests.faults.test_world_size import WORDS

AT = 3  # the step, from 0, that goes wrong
KINDS = sorted(BAD)
FULL = pytest.mark.faults


def bad(what: str, *, at: tuple[int, ...] = (AT,), rank: int = 0) -> tuple[str, dict[str, Any]]:
    return "poison", {"what": what, "steps": at, "ranks": [rank]}


def listed(folder: Path) -> list[dict[str, Any]]:
    file = folder / "nonfinite.jsonl"
    return [json.loads(row) for row in file.read_text().splitlines()]


def state(folder: Path) -> dict[str, str]:
    """Hashes of everything that a step may leave a trace in, but the random state."""
    manifest = newest(folder).manifest
    kinds = ("model", "optimizer", "average")
    return {kind: manifest["sha256"][f"{kind}.safetensors"] for kind in kinds}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped before the step."""
    folder = tmp_path_factory.mktemp("before")
    run(folder, stop_at=AT)
    return folder


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_skipped_step_leaves_no_trace(what: str, parts: int, tmp_path: Path) -> None:
    """Weights, optimiser, running statistics, average: to the bit those of the step before."""
    run(tmp_path / "before", stop_at=AT, micro_batches=parts)
    run(tmp_path / "now", stop_at=AT + 1, micro_batches=parts, nonfinite="skip", fault=bad(what))
    assert state(tmp_path / "now") == state(tmp_path / "before")
    [row] = listed(tmp_path / "now")
    place = what.removeprefix("infinite ")
    assert row["what"] == (["teacher", "loss"] if place == "teacher" else [place])
    assert row["step"] == AT + 1
    assert sorted(row["indices"]) == sorted(order(tmp_path / "now")[AT])
    assert row["images"] == [f"made[{i}]" for i in row["indices"]]


@pytest.mark.parametrize("what", ["teacher", "infinite loss"])
def test_without_the_guard_there_would_be_a_trace(
    what: str, before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controls: statistics that are not put back, and an infinite loss's finite gradient."""
    if what == "teacher":
        monkeypatch.setattr(Undo, "unless_good", lambda self, bad: None)
    else:
        monkeypatch.setattr(
            steps.Runtime, "backward", lambda self, loss, parts: (loss.total / parts).backward()
        )
    run(tmp_path, stop_at=AT + 1, nonfinite="skip", fault=bad(what))
    assert state(tmp_path)["model"] != state(before)["model"]


@pytest.mark.parametrize("what", KINDS)
def test_the_run_goes_on_and_ends_after_a_skipped_step(what: str, tmp_path: Path) -> None:
    result = run(tmp_path, nonfinite="skip", fault=bad(what), log_every=4)
    assert result.finished
    for tensors in newest(tmp_path).files.values():
        assert all(bool(t.double().isfinite().all()) for t in tensors.values())
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [row.get("skipped_steps") for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        1,
        None,
    ]


def test_the_logged_means_are_of_the_steps_that_counted(tmp_path: Path) -> None:
    run(tmp_path / "each", nonfinite="skip", fault=bad("loss"))
    run(tmp_path / "four", nonfinite="skip", fault=bad("loss"), log_every=4)
    each = read_metrics(tmp_path / "each/metrics.jsonl")
    assert "loss" not in each[AT]
    first = read_metrics(tmp_path / "four/metrics.jsonl")[0]
    for name in ("loss", "size", "grad_norm"):
        assert first[name] == pytest.approx(sum(row[name] for row in each[:3]) / 3)


def test_stop_is_the_default_and_ends_before_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=rf"step {AT + 1} was not finite \(loss\)") as caught:
        run(tmp_path, fault=bad("loss"))
    assert "--run.nonfinite skip" in str(caught.value)
    assert "nonfinite.jsonl" in str(caught.value)
    assert caught.value.exit_code == 3
    assert len(order(tmp_path)) == AT + 1
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_that_stopped_goes_on_past_the_step_with_skip(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        run(tmp_path / "a", fault=bad("loss"), checkpoint_every=2)
    assert run(tmp_path / "a", resume=True, nonfinite="skip", fault=bad("loss")).finished
    run(tmp_path / "b", nonfinite="skip", fault=bad("loss"))
    assert state(tmp_path / "a") == state(tmp_path / "b")
    assert [row["step"] for row in listed(tmp_path / "a")] == [AT + 1]


def test_the_limit_is_of_the_whole_run_whatever_its_sessions(tmp_path: Path) -> None:
    options: dict[str, Any] = {"nonfinite": "skip", "fault": bad("loss", at=(1, 3, 6))}
    run(tmp_path, stop_at=5, nonfinite_limit=2, **options)
    with pytest.raises(NonFiniteError, match=r"step 7 .* 3 steps were so.* at most 2 \(--run"):
        run(tmp_path, resume=True, nonfinite_limit=2, **options)
    assert [row["step"] for row in listed(tmp_path)] == [2, 4, 7]
    assert run(tmp_path, resume=True, nonfinite_limit=3, **options).finished
    assert [row["step"] for row in listed(tmp_path)] == [2, 4, 7]


def test_a_step_that_a_resume_takes_again_counts_once(tmp_path: Path) -> None:
    """It ends, by a defect, after the step was listed and before it was saved."""
    options: dict[str, Any] = {"nonfinite": "skip", "nonfinite_limit": 1, "checkpoint_every": 2}

    def both(place: str, at: int, value: torch.Tensor) -> torch.Tensor:
        value = failing("defect", step=3, ranks=[0])(place, at, value)
        return BAD["loss"](value) if place == "loss" and at == 2 else value

    from tests.faults import calm

    calm.FAULTS["both"] = lambda: both
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, fault=("both", {}), **options)
    assert [row["step"] for row in listed(tmp_path)] == [3]
    assert run(tmp_path, resume=True, fault=bad("loss", at=(2,)), **options).finished
    assert [row["step"] for row in listed(tmp_path)] == [3]


@pytest.mark.parametrize("content", [b"{}\n", b"[1]\n", b"no json\n", b"\0\n"])
def test_a_damaged_list_is_named(content: bytes, tmp_path: Path) -> None:
    run(tmp_path, stop_at=2)
    (tmp_path / "nonfinite.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=r"nonfinite.jsonl' is damaged; delete it"):
        run(tmp_path, resume=True)


def test_a_line_that_a_kill_cut_off(tmp_path: Path) -> None:
    run(tmp_path, stop_at=AT + 1, nonfinite="skip", fault=bad("loss"))
    with open(tmp_path / "nonfinite.jsonl", "ab") as out:
        out.write(b'{"step": 5, "ra')
    assert run(tmp_path, resume=True).finished
    assert [row["step"] for row in listed(tmp_path)] == [AT + 1]


class Late:
    """A CUDA event of values that are still on their way."""

    def __init__(self) -> None:
        self.there, self.waited = False, 0

    def query(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        self.waited += 1


def test_values_that_are_still_on_their_way() -> None:
    """They are not waited for but in `take`, and known in the order of their steps."""
    watch = FiniteWatch(victim.source(), 0)
    part = Batch((), None, torch.tensor([1, 2]), torch.arange(2))
    late = [Late(), Late()]
    for step, event in enumerate(late, 1):
        watch.look(step, [part], [{"loss": torch.tensor(float("nan"))}], torch.tensor(1.0))
        watch._pending[-1] = replace(watch._pending[-1], arrived=event)
    late[1].there = True
    assert not watch.any
    late[0].there = True
    assert watch.any
    assert [row.step for row in watch.take()] == [1, 2]
    assert [event.waited for event in late] == [0, 0]
    watch.look(3, [part], [{"loss": torch.tensor(1.0)}], torch.tensor(float("inf")))
    watch._pending[-1] = replace(watch._pending[-1], arrived=late[0])
    late[0].there = False
    assert not watch.any
    [row] = watch.take()
    assert (row.step, row.what, row.indices, late[0].waited) == (3, ("gradient",), (1, 2), 1)


@pytest.mark.parametrize("what", [pytest.param(k, marks=FULL) for k in KINDS[:-1]] + KINDS[-1:])
def test_one_process_of_two(what: str, tmp_path: Path) -> None:
    """Both skip the same step, and end with the same weights as one process that skipped it."""
    fault = bad(what, rank=1)
    assert together(tmp_path / "two", 2, nonfinite="skip", fault=fault) == [0, 0]
    run(tmp_path / "one", nonfinite="skip", fault=bad(what))
    [*rows] = listed(tmp_path / "two")
    assert {row["step"] for row in rows} == {AT + 1}
    if what == "gradient":  # which is everybody's at once
        assert [row["rank"] for row in rows] == [0, 1]
    else:
        assert [row["rank"] for row in rows] == [1]
        assert rows[0]["indices"] == order(tmp_path / "two")[AT][4:]
    two, one = newest(tmp_path / "two").files, newest(tmp_path / "one").files
    for kind in ("model", "optimizer", "average"):
        for name, value in one[kind].items():
            if name != "seen":
                assert torch.allclose(two[kind][name], value, rtol=1e-4, atol=1e-6), name
    assert "skipped (1 of at most 10" in said(tmp_path / "two")


def test_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher whose features are infinite, past the dry step that would say so before the run."""
    made = timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict()
    made["norm.weight"][:] = 3e38  # finite, or loading them would say so
    save_file(made, tmp_path / "broken.safetensors")
    place = WORDS.index("--teacher-weights") + 1
    words = [*WORDS[:place], str(tmp_path / "broken.safetensors"), *WORDS[place + 1 :]]
    skip = ["--run.nonfinite", "skip", "--run.nonfinite_limit", "2"]
    for name, more, says in (
        ("stop", [], "error: step 1 was not finite (teacher, loss); the weights never saw it"),
        ("skip", skip, "error: step 3 was not finite (teacher, loss), and 3 steps were so; the"),
    ):
        assert main([*words, *more, "--out", str(tmp_path / name)]) == 3
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith(says), err
        assert "Traceback" not in err
        assert not (tmp_path / name / "checkpoints").exists()
    assert [row["step"] for row in listed(tmp_path / "skip")] == [1, 2, 3]
    assert main([*WORDS, "--run.nonfinite", "never", "--out", str(tmp_path / "no")]) == 2
    assert "--run.nonfinite" in (err := capsys.readouterr().err)
    assert "'stop' or 'skip'" in err


def test_one_process_of_two_stops_both_after_the_same_step(tmp_path: Path) -> None:
    assert together(tmp_path, 2, fault=bad("loss", rank=1)) == [3, 3]
    text = said(tmp_path)
    assert text.count("error: ") == 1, text
    assert f"error: step {AT + 1} was not finite (loss); the weights never saw it" in text
    assert len(order(tmp_path)) == AT + 2, "votes are counted a step later"
    assert STEPS > AT + 2


def write_slowly(folder: Path, **options: Any) -> None:
    """A run on a disk that takes seconds for a checkpoint."""
    real = checkpoint._write

    def write(file: Path, tensors: Any) -> str:
        time.sleep(1.0)
        return real(file, tensors)

    checkpoint._write = write
    run(folder, **options)


@pytest.mark.faults
def test_an_end_that_all_come_to_waits_for_the_checkpoint(tmp_path: Path) -> None:
    """The process that has nothing to write ends first, and the others soon after."""
    options = {"fault": bad("loss", rank=1), "checkpoint_every": 3}
    assert together(tmp_path, 2, work=write_slowly, **options) == [3, 3]
    assert newest(tmp_path).step == 3

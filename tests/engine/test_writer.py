"""Writing in the background: in order, one at a time, and no error is lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featdistill.core.errors import RunError
from featdistill.engine import checkpoint
from featdistill.engine.best import Best, Choice
from featdistill.engine.checkpoint import Checkpoints
from featdistill.engine.writer import Abandoned, Writer
from tests.engine.test_loop import Line, plan, train

PATIENCE = 60.0  # seconds after which something hangs


def test_work_is_done_in_order_and_one_at_a_time() -> None:
    done: list[int] = []
    at_work = 0

    def work(number: int) -> Callable[[], None]:
        def run() -> None:
            nonlocal at_work
            at_work += 1
            assert at_work == 1
            assert threading.current_thread() is not threading.main_thread()
            done.append(number)
            at_work -= 1

        return run

    with Writer() as writer:
        for number in range(200):
            writer.add(work(number))
    assert done == list(range(200))


def test_a_later_step_waits_and_its_own_does_not() -> None:
    gate, done = threading.Event(), list[str]()

    def first() -> None:
        assert gate.wait(PATIENCE)
        done.append("first")

    with Writer() as writer:
        writer.room_for(1)
        writer.add(first)
        writer.room_for(1)  # would wait for ever
        writer.add(lambda: done.append("second"))
        assert done == []
        gate.set()
        writer.room_for(2)
        assert done == ["first", "second"]


def test_no_thread_is_left_between_writes() -> None:
    before = threading.active_count()
    with Writer() as writer:
        for step in range(20):
            writer.room_for(step)
            assert threading.active_count() == before
            writer.add(lambda: None)
    assert threading.active_count() == before


def test_an_error_ends_the_writing_and_comes_out() -> None:
    done: list[int] = []

    def fail() -> None:
        raise RunError("no room")

    with Writer() as writer:
        writer.add(lambda: done.append(1))
        writer.add(fail)
        writer.add(lambda: done.append(2))
        with pytest.raises(RunError, match="no room"):
            writer.wait()
        assert writer.failed
        writer.add(lambda: done.append(3))
        with pytest.raises(RunError, match="no room"):
            writer.wait()
    assert done == [1]


def test_the_end_at_once_leaves_a_checkpoint_after_the_file_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun, gate = checkpoint.save_file, threading.Event(), threading.Event()
    written: list[str] = []

    def slow(tensors: Any, file: Path) -> None:
        written.append(file.name)
        begun.set()
        assert gate.wait(PATIENCE)
        real(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    writer = Writer()
    store = Checkpoints(tmp_path, writer=writer)
    files = {name: {"w": torch.ones(2)} for name in ("a", "b", "c")}
    real_set = writer._abandoned.set

    def abandon() -> None:
        real_set()
        gate.set()

    monkeypatch.setattr(writer._abandoned, "set", abandon)
    writer.add(lambda: store.save(1, files, {}))
    assert begun.wait(PATIENCE)
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert written == ["a.safetensors"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Abandoned):
        writer.wait()


def test_the_loop_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 2 does not begin before step 4 has; it keeps the weights of step 2."""
    real, later = checkpoint.save_file, threading.Event()
    objective = Line()
    forward = objective.forward
    weights: dict[int, torch.Tensor] = {}

    def noted(batch: Any) -> Any:
        weights[batch.stream.step] = objective.line.bias.detach().clone()
        if batch.stream.step == 3:
            later.set()
        return forward(batch)

    def slow(*arguments: Any) -> None:
        assert later.wait(PATIENCE), "the loop waits for the write"
        real(*arguments)

    monkeypatch.setattr(objective, "forward", noted)
    monkeypatch.setattr(checkpoint, "save_file", slow)
    train(objective, tmp_path, plan(6, checkpoint_every=2, checkpoint_keep=9))
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.steps() == [2, 4, 6]
    for step in (2, 4):
        assert torch.equal(store.read(step).files["model"]["line.bias"], weights[step])
    assert not torch.equal(weights[2], weights[3])


def test_an_evaluation_finds_no_thread(tmp_path: Path) -> None:
    """It may fork loading processes."""
    threads: list[int] = []

    def evaluate() -> dict[str, float]:
        threads.append(threading.active_count())
        return {"score": float(len(threads))}

    before = threading.active_count()
    options = {"checkpoint_every": 1, "eval_every": 1, "best": Choice("score", "max")}
    train(Line(), tmp_path, plan(8, **options), evaluate=evaluate)
    assert threads == [before] * 8


@pytest.mark.parametrize("fails", ["checkpoint", "best"])
def test_a_failed_write_ends_the_run_with_its_own_line(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoints.save

    def save(self: Checkpoints, step: int, *arguments: Any) -> Path:
        if step == 4 and self.folder.name == {"checkpoint": "checkpoints"}.get(fails, "best"):
            raise RunError("cannot write the checkpoint (No space left on device)")
        return real(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save)
    objective = Line()
    options = {"checkpoint_every": 2, "eval_every": 2, "best": Choice("score", "max")}
    values = iter(range(100))
    with pytest.raises(RunError, match="No space left"):
        train(
            objective,
            tmp_path,
            plan(30, **options),
            evaluate=lambda: {"score": float(next(values))},
        )
    assert 4 <= len(objective.seen) <= 6, "at the latest where the next is due"
    assert Checkpoints(tmp_path / "checkpoints").steps()[0] == 2


def test_the_best_is_written_before_the_checkpoint_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two repeats the evaluation; the other way round it would be lost."""
    order: list[tuple[int, str]] = []
    real = Checkpoints.save

    def save(self: Checkpoints, step: int, *arguments: Any) -> Path:
        order.append((step, self.folder.name))
        return real(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save)
    scores = iter(range(10))
    options = {"checkpoint_every": 2, "eval_every": 2, "best": Choice("score", "max")}
    train(Line(), tmp_path, plan(4, **options), evaluate=lambda: {"score": float(next(scores))})
    assert order == [(2, "best"), (2, "checkpoints"), (4, "best"), (4, "checkpoints")]


def test_best_without_a_writer_has_written_when_it_returns(tmp_path: Path) -> None:
    best = Best(tmp_path, Choice("score", "max"), resume=False)
    assert best.offer(3, {"score": 1.0}, Line())
    manifest = json.loads((tmp_path / "step-00000003/manifest.json").read_text())
    assert manifest["value"] == 1.0

"""The best state is the one with the best score, whatever happens to the process."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from featdistill.core.errors import RunError
from featdistill.engine import checkpoint as module
from featdistill.engine.best import Best, Choice, Mode, read_best


def model(value: float) -> nn.Module:
    made = nn.Linear(1, 1, bias=False)
    nn.init.constant_(made.weight, value)
    return made


def offer(best: Best, step: int, value: float) -> bool:
    """The weight says which step it was."""
    return best.offer(step, {"score": value, "other": -value}, model(step))


def best(folder: Path, mode: Mode = "max", *, resume: bool = False, metric: str = "score") -> Best:
    return Best(folder, Choice(metric, mode), resume=resume)


def kept(folder: Path) -> tuple[int, float]:
    """Step and value of the best; its weights must be that step's, and the only ones there."""
    found = read_best(folder)
    assert found is not None
    assert float(found.files["model"]["weight"]) == found.step
    assert [p.name for p in folder.iterdir()] == [f"step-{found.step:08d}"]
    return found.step, float(found.manifest["value"])


@pytest.mark.parametrize(("mode", "expected"), [("max", (3, 0.9)), ("min", (5, 0.1))])
def test_the_best_of_all_is_kept(tmp_path: Path, mode: Mode, expected: tuple[int, float]) -> None:
    store = best(tmp_path, mode)
    for step, value in enumerate([0.5, 0.7, 0.9, 0.3, 0.1, 0.9], 1):
        offer(store, step, value)
    assert kept(tmp_path) == expected


def test_an_equal_score_and_no_number_replace_nothing(tmp_path: Path) -> None:
    store = best(tmp_path)
    assert not store.offer(1, {"score": float("nan")}, model(1))
    assert not store.offer(1, {"other": 1.0}, model(1))
    assert offer(store, 2, 0.5)
    assert not offer(store, 3, 0.5)
    assert not offer(store, 4, float("inf"))
    assert kept(tmp_path) == (2, 0.5)


def test_a_resumed_run_has_the_value_to_beat(tmp_path: Path) -> None:
    offer(best(tmp_path), 5, 0.8)
    again = best(tmp_path, resume=True)
    assert not offer(again, 3, 0.8)  # the steps since the last checkpoint come again
    assert not offer(again, 6, 0.7)
    assert offer(again, 4, 0.9)  # a better one of an earlier step wins too
    assert kept(tmp_path) == (4, 0.9)


def test_another_score_begins_anew(tmp_path: Path) -> None:
    offer(best(tmp_path), 5, 0.8)
    assert offer(best(tmp_path, "min", resume=True, metric="other"), 6, -0.9)
    assert kept(tmp_path) == (6, 0.9)


@pytest.mark.parametrize("killed_in", ["save_file", "write_json"])
def test_a_kill_while_writing_leaves_the_best_before(
    tmp_path: Path, killed_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = best(tmp_path)
    offer(store, 1, 0.5)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, killed_in, kill)
        with pytest.raises(KeyboardInterrupt):
            offer(store, 2, 0.6)
    again = best(tmp_path, resume=True)
    assert again.value == 0.5
    assert offer(again, 2, 0.6)
    found = read_best(tmp_path)
    assert found is not None
    assert found.step == 2


def test_a_kill_before_the_old_is_gone_leaves_the_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = best(tmp_path, "min")
    offer(store, 4, 0.5)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    offer(store, 2, 0.4)
    assert len(list(tmp_path.iterdir())) == 2
    found = read_best(tmp_path)
    assert found is not None
    assert found.step == 2


def test_a_damaged_one_is_no_value_to_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("featdistill.engine.best.say", said.append)
    offer(best(tmp_path), 1, 0.9)
    (tmp_path / "step-00000001/model.safetensors").write_bytes(b"")
    again = best(tmp_path, resume=True)
    assert "step-00000001" in said[0]
    assert offer(again, 2, 0.1)
    assert kept(tmp_path) == (2, 0.1)


def test_a_full_disk_leaves_the_best_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = best(tmp_path)
    offer(store, 1, 0.5)

    def full(*_: Mapping[str, torch.Tensor] | object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        offer(store, 2, 0.6)
    assert kept(tmp_path) == (1, 0.5)
    assert load_file(tmp_path / "step-00000001/model.safetensors")["weight"] == 1

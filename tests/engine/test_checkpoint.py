"""Checkpoints come back to the bit, or the one before them does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from featdistill.core.errors import RunError
from featdistill.engine import checkpoint as module
from featdistill.engine.checkpoint import (
    Checkpoints,
    read_checkpoint,
    restore,
    training_state,
)
from featdistill.engine.optimizer import adamw, parameter_groups, set_rates
from featdistill.engine.schedule import Schedule


class Tiny(nn.Module):
    """Two layers, a buffer, and a tied weight (which safetensors by itself would refuse)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x)))


def make(seed: int) -> tuple[Tiny, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tiny()
    optimizer = adamw(parameter_groups([("m.", model)], weight_decay=0.1), betas=(0.9, 0.99))
    set_rates(optimizer, Schedule(steps=1, warmup=0, peak=0.1, start=0.1, final=0.1), 0)
    return model, optimizer


def train(model: Tiny, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).pow(2).sum().backward()
        optimizer.step()


@pytest.fixture(autouse=True)
def _fork() -> Any:
    with torch.random.fork_rng():
        yield


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 1 and 2."""
    store = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2):
        store.save(step, {"model": {"w": torch.full((4,), float(step))}}, {"images": 8 * step})
    return store


def latest_step(store: Checkpoints) -> int:
    found = store.latest()
    assert found is not None
    assert torch.equal(found.files["model"]["w"], torch.full((4,), float(found.step)))
    return found.step


def test_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    model, optimizer = make(0)
    train(model, optimizer, 3)
    store = Checkpoints(tmp_path)
    store.save(3, training_state(model, optimizer), {})
    train(model, optimizer, 4)

    other, its_optimizer = make(1)
    found = store.latest()
    assert found is not None
    assert found.step == 3
    restore(found, other, its_optimizer)
    train(other, its_optimizer, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_nothing_is_pickled(tmp_path: Path) -> None:
    model, optimizer = make(0)
    train(model, optimizer, 1)
    path = Checkpoints(tmp_path).save(1, training_state(model, optimizer), {"images": 5})
    assert {p.name for p in path.iterdir()} == {
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
    }
    assert json.loads((path / "manifest.json").read_text())["images"] == 5
    for file in path.glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little")
        assert json.loads(file.read_bytes()[8 : 8 + length])


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").latest() is None
    assert Checkpoints(tmp_path).latest() is None


def test_the_newest_is_used_and_the_last_n_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 100, 1000):
        store.save(step, {"model": {"w": torch.full((4,), float(step))}}, {})
    assert store.steps() == [100, 1000]
    assert latest_step(store) == 1000
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000100", "step-00001000"}


def test_saving_a_step_again_replaces_it(store: Checkpoints) -> None:
    store.save(2, {"model": {"w": torch.full((4,), 2.0)}}, {"again": True})
    assert store.steps() == [1, 2]
    found = store.latest()
    assert found is not None
    assert found.manifest["again"] is True


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda p: _edit(p / "model.safetensors", lambda d: d[:-3]),
    "flipped": lambda p: _edit(p / "model.safetensors", lambda d: d[:-1] + bytes([d[-1] ^ 1])),
    "emptied": lambda p: _edit(p / "model.safetensors", lambda d: b""),
    "removed": lambda p: (p / "model.safetensors").unlink(),
    "manifest truncated": lambda p: _edit(p / "manifest.json", lambda d: d[:-3]),
    "manifest removed": lambda p: (p / "manifest.json").unlink(),
    "manifest a list": lambda p: _edit(p / "manifest.json", lambda d: b"[]"),
    "manifest not text": lambda p: _edit(p / "manifest.json", lambda d: b"\xff" + d),
    "another format": lambda p: _edit(
        p / "manifest.json", lambda d: d.replace(b'"format": 2', b'"format": 99')
    ),
    "checksums no table": lambda p: _edit(
        p / "manifest.json", lambda d: json.dumps({"format": 1, "step": 2, "sha256": []}).encode()
    ),
    "a file": lambda p: (shutil.rmtree(p), p.touch()),
}


def _edit(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(store: Checkpoints, damage: str) -> None:
    newest = store.folder / "step-00000002"
    DAMAGE[damage](newest)
    with pytest.raises(RunError, match="step-00000002"):
        read_checkpoint(newest)
    assert latest_step(store) == 1


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_no_flipped_byte_gives_a_wrong_state(store: Checkpoints, name: str) -> None:
    file = store.folder / "step-00000002" / name
    data = file.read_bytes()
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert latest_step(store) in (1, 2), f"byte {place}"


def test_all_damaged(store: Checkpoints) -> None:
    for step in (1, 2):
        DAMAGE["truncated"](store.folder / f"step-0000000{step}")
    with pytest.raises(RunError, match=r"step-00000002.*step-00000001.*no whole checkpoint"):
        store.latest()


def test_a_checkpoint_half_written_is_not_seen(store: Checkpoints) -> None:
    shutil.copytree(store.folder / "step-00000002", store.folder / ".writing-step-00000003")
    assert store.steps() == [1, 2]
    store.save(3, {"model": {"w": torch.full((4,), 3.0)}}, {})
    assert latest_step(store) == 3
    assert not list(store.folder.glob(".writing*"))


def test_what_else_lies_in_the_folder_is_left_alone(store: Checkpoints) -> None:
    shutil.copytree(store.folder / "step-00000002", store.folder / "step-00000002.backup")
    (store.folder / "notes.txt").touch()
    assert store.steps() == [1, 2]
    assert latest_step(store) == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        # what a full disk really gives (safetensors 0.8, on a full tmpfs)
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_earlier_ones(
    store: Checkpoints, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*No space left.*make room"):
        store.save(3, {"model": {"w": torch.zeros(4)}}, {})
    assert latest_step(store) == 2
    assert not list(store.folder.glob(".writing*"))


@pytest.mark.parametrize("killed_in", ["save_file", "write_json", "sync"])
def test_a_kill_while_writing_leaves_the_earlier_ones(
    store: Checkpoints, killed_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, killed_in, kill)
        with pytest.raises(KeyboardInterrupt):
            store.save(3, {"model": {"w": torch.full((4,), 3.0)}}, {})
    assert latest_step(store) == 2
    store.save(3, {"model": {"w": torch.full((4,), 3.0)}}, {})
    assert latest_step(store) == 3


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    model, optimizer = make(0)
    train(model, optimizer, 1)
    store = Checkpoints(tmp_path)
    store.save(1, training_state(model, optimizer), {})
    found = store.latest()
    assert found is not None
    other = nn.Linear(3, 2)
    groups = parameter_groups([("m.", other)], weight_decay=0.1)
    with pytest.raises(RunError, match="is not of this model"):
        restore(found, other, adamw(groups, betas=(0.9, 0.99)))

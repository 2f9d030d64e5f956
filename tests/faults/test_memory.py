"""Too little memory (mocked): half the micro-batch, the same global batch, the same result."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featdistill.core.errors import DataError, RunError
from featdistill.core.types import Batch, Loss
from featdistill.engine.batches import halved, is_out_of_memory
from featdistill.engine.rundir import read_metrics
from featdistill.engine.undo import Undo
from featdistill.models.load import load_backbone
from featdistill.objectives.classification import Classification
from tests.faults import victim
from tests.faults.harness import digest, newest
from tests.faults.team import said, together

ERRORS = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"
    ),
    "Python": MemoryError,
}


def scarce(most: int, kind: str = "CUDA", *, backward: bool = False, first: int = 0) -> Any:
    """A machine on which a pass over more than `most` images fails, from a step on, at its end."""
    real = victim.Restless.forward

    def forward(self: victim.Restless, batch: Batch) -> Loss:
        loss = real(self, batch)  # which drew, and moved its running statistics
        assert batch.stream is not None
        if len(batch) <= most or batch.stream.step < first:
            return loss
        if not backward:
            raise ERRORS[kind]()
        loss.total.register_hook(raising)
        return loss

    def raising(_: Tensor) -> None:
        raise ERRORS[kind]()

    return patch.object(victim.Restless, "forward", forward)


def train(folder: Path, **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    victim.run(folder, resume=False, **options)


@pytest.mark.parametrize("kind", list(ERRORS))
@pytest.mark.parametrize("backward", [False, True])
def test_the_result_is_that_of_as_many_micro_batches_from_the_start(
    kind: str, backward: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit, though each pass draws from all generators and moves a buffer."""
    train(tmp_path / "two", micro_batches=2)
    with scarce(2, kind, backward=backward):
        train(tmp_path / "halved")
    assert digest(tmp_path / "halved") == digest(tmp_path / "two")
    text = " ".join(capsys.readouterr().err.split())
    assert text.count("WARNING") == 1
    assert "too little memory for step 1; it is taken again" in text
    assert "--run.micro_batches 2 (2 images each)" in text


def test_in_the_midst_of_a_run(tmp_path: Path) -> None:
    """The same as to stop before that step, and to go on with half the micro-batch."""
    train(tmp_path / "a", stop_at=9)
    victim.run(tmp_path / "a", resume=True, micro_batches=2)
    with scarce(2, first=9):
        train(tmp_path / "b")
    assert digest(tmp_path / "b") == digest(tmp_path / "a")


def test_what_the_repeated_step_would_do_without_the_state_before(tmp_path: Path) -> None:
    """The control: with the draws and statistics of the failed pass left as they were."""
    train(tmp_path / "two", micro_batches=2)
    with scarce(2), patch.object(Undo, "rewind", lambda self: None):
        train(tmp_path / "halved")
    assert digest(tmp_path / "halved")["model"] != digest(tmp_path / "two")["model"]


def test_only_once(tmp_path: Path) -> None:
    with scarce(1), pytest.raises(RunError) as caught:
        train(tmp_path)
    assert str(caught.value) == (
        "there is too little memory for a step of 2 images, in 2 micro-batches; go on with "
        "--resume --run.micro_batches 4, or begin again with a smaller --batch-size, --image-size "
        "or model"
    )
    assert caught.value.exit_code == 2


def test_a_single_image_cannot_be_halved(tmp_path: Path) -> None:
    with scarce(0), pytest.raises(RunError, match="half of 1 is no whole number"):
        train(tmp_path, micro_batches=4)


def test_the_optimisers_own_memory(tmp_path: Path) -> None:
    """No smaller micro-batch would help."""
    with (
        patch("featdistill.engine.step.descend", side_effect=ERRORS["CUDA"]()),
        pytest.raises(RunError, match=r"too little memory .* for the optimiser"),
    ):
        train(tmp_path)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no"), OSError()],
)
def test_other_errors_are_not_swallowed(error: Exception, tmp_path: Path) -> None:
    assert not is_out_of_memory(error)
    with (
        patch.object(victim.Restless, "forward", side_effect=error),
        pytest.raises(type(error)) as caught,
    ):
        train(tmp_path)
    assert caught.value is error


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_two_ends_both_with_one_line(rank: int, tmp_path: Path) -> None:
    fault = ("failing", {"kind": "memory", "step": 2, "ranks": [rank]})
    assert together(tmp_path, 2, fault=fault, checkpoint_every=1) == [2, 2]
    text = said(tmp_path)
    assert text.count("error: ") == 1, text
    assert "for a step of 4 images, all at once; go on with --resume --run.micro_batches 2" in text
    assert newest(tmp_path).step == 2
    assert together(tmp_path, 2, resume=True, micro_batches=2) == [0, 0]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)


def classifier(mixup: float) -> Classification:
    backbone = load_backbone("timm/resnet10t", weights="random", image_size=32)
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)  # its batch norms stand still
    return Classification(backbone, mixup=mixup)


@pytest.mark.parametrize(
    ("made", "images", "parts", "why"),
    [
        (_Normed, 8, 1, "its loss, batch norm or skipping drop path needs the whole batch at once"),
        (lambda: classifier(0.8), 6, 1, "half of 6 is no even number"),
        (lambda: classifier(0.0), 3, 1, "half of 3 is no whole number"),
        (nn.Identity, 5, 5, "half of 1 is no whole number"),
    ],
)
def test_what_cannot_be_halved(
    made: Callable[[], nn.Module], images: int, parts: int, why: str
) -> None:
    with pytest.raises(RunError, match=f"{images // parts} images, and it cannot be halved: {why}"):
        halved(made(), images=images, parts=parts)


def test_what_can_be_halved() -> None:
    assert halved(classifier(0.8), images=8, parts=1) == 2
    assert halved(classifier(0.0), images=6, parts=1) == 2
    assert halved(nn.Identity(), images=8, parts=2) == 4


def test_undo_of_every_kind_of_change() -> None:
    """Batch norm's statistics (which torch moves in secret), draws, and a replaced buffer."""
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    module.register_buffer("table", torch.arange(3))
    undo = Undo(module, generators=True)
    undo.begin()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module(torch.randn(5, 2))
    module.table = torch.arange(3) + 1
    draws = torch.rand(1), np.random.rand(), random.random()
    assert not torch.equal(module.state_dict()["0.running_mean"], before["0.running_mean"])
    undo.unless_good(torch.tensor(0.0))
    assert not torch.equal(module.state_dict()["0.running_mean"], before["0.running_mean"])
    undo.rewind()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    module(torch.randn(5, 2))
    assert (torch.rand(1), np.random.rand(), random.random()) == draws
    undo.unless_good(torch.tensor(1.0))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_step_asks_the_device_nothing(tmp_path: Path) -> None:
    """On a CPU too, whatever waits for a device's value goes through this one operator."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from featdistill.engine.step import TrainingStep

    asked: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, call: Any, types: Any, arguments: Any = (), more: Any = None
        ) -> Any:
            asked.append(str(call))
            return call(*arguments, **(more or {}))

    real = TrainingStep.take

    def take(self: TrainingStep, step: int, batch: Batch) -> None:
        with Watch():
            real(self, step, batch)

    from tests.faults import calm

    with patch.object(TrainingStep, "take", take):
        calm.run(tmp_path, stop_at=2, clip=0.01, micro_batches=2)
    assert any("aten.mm" in name or "aten.addmm" in name for name in asked)
    waits = ("_local_scalar_dense", "is_nonzero", "aten.equal", "aten.nonzero")
    assert [name for name in asked if any(w in name for w in waits)] == []


def test_an_indivisible_batch_is_refused_by_the_loop_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a batch of 4 is not divisible by 1 processes x 3"):
        train(tmp_path, micro_batches=3)

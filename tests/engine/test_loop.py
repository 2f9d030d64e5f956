"""The loop itself, on an objective small enough to be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featdistill.core.errors import DataError, NonFiniteError
from featdistill.core.types import Batch, Loss
from featdistill.data.decode import BadImage
from featdistill.data.sources import ArraySource
from featdistill.data.views import CropView
from featdistill.engine.batches import check_batch
from featdistill.engine.best import Choice, read_best
from featdistill.engine.checkpoint import Checkpoints
from featdistill.engine.loop import fit
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.plan import Plan
from featdistill.engine.runtime import Runtime
from featdistill.engine.schedule import Schedule


class Line(nn.Module):
    """Predict an image's mean brightness; `poison` makes the loss of one step NaN."""

    def __init__(self, poison: int | None = None) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        nn.init.zeros_(self.line.weight)
        nn.init.zeros_(self.line.bias)
        self.poison = poison
        self.seen: list[list[int]] = []
        self.ended = 0

    def forward(self, batch: Batch) -> Loss:
        assert batch.stream is not None
        assert batch.images.dtype == torch.float32
        self.seen.append(batch.indices.tolist())
        brightness = batch.images.mean((1, 2, 3))
        error = (self.line(torch.ones(len(batch), 1))[:, 0] - brightness).square().mean()
        if batch.stream.step == self.poison:
            error = error * float("nan")
        return Loss(error, {"twice": 2 * error.detach()})

    def end_step(self, reduce: object) -> None:
        self.ended += 1


def source(images: int = 12) -> ArraySource:
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 255, (images, 3, 8, 8), np.uint8)
    )
    return ArraySource("made", pixels)


def plan(steps: int = 6, **options: object) -> Plan:
    base: dict[str, object] = {
        "source": source(),
        "view": CropView(8),
        "batch_size": 4,
        "schedule": Schedule(steps, 0, 0.1, 0.1, 0.1),
        "seed": 0,
        "workers": 0,
        "log_every": 1,
        "tensorboard": False,
        "quiet": True,
    }
    return Plan(**{**base, **options})  # type: ignore[arg-type]


def train(
    objective: Line, folder: Path, steps_plan: Plan, **options: object
) -> list[dict[str, float]]:
    optimizer = adamw(parameter_groups([("", objective)], weight_decay=0.0), betas=(0.9, 0.999))
    runtime = Runtime(device="cpu")
    fit(objective, optimizer, steps_plan, runtime=runtime, folder=folder, **options)  # type: ignore[arg-type]
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_image_once_an_epoch_and_a_row_a_step(tmp_path: Path) -> None:
    objective = Line()
    rows = train(objective, tmp_path, plan())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert sorted(i for step in objective.seen[:3] for i in step) == list(range(12))
    assert objective.seen[:3] != objective.seen[3:]
    assert objective.ended == 6
    assert all(row["twice"] == pytest.approx(2 * row["loss"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_run_goes_on_in_the_precision_that_it_began_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Line(), tmp_path, plan(stop_at=2))
    manifest = Checkpoints(tmp_path / "checkpoints").read(2).manifest
    assert manifest["precision"] == "float32"
    objective, runtime = Line(), Runtime(device="cpu")
    runtime.precision = "bf16"  # as on a machine that is quick at it
    optimizer = adamw(parameter_groups([("", objective)], weight_decay=0.0), betas=(0.9, 0.999))
    fit(objective, optimizer, plan(), runtime=runtime, folder=tmp_path, resume=True)
    assert runtime.precision == "float32"
    assert "the run began in float32 and goes on in it" in capsys.readouterr().err
    whole = Line()
    (tmp_path / "whole").mkdir()
    train(whole, tmp_path / "whole", plan())
    assert torch.equal(objective.line.weight, whole.line.weight)


def test_weights_equal_a_plain_loop(tmp_path: Path) -> None:
    objective = Line()
    train(objective, tmp_path, plan(clip=0.05))
    plain = Line()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    view, images = CropView(8), source()
    for step, indices in enumerate(objective.seen):
        views = [view(images.read(i), (0, step // 3, i))[0].float() / 255 for i in indices]
        brightness = torch.stack(views).mean((1, 2, 3))
        error = (plain.line(torch.ones(4, 1))[:, 0] - brightness).square().mean()
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
    assert torch.allclose(plain.line.bias, objective.line.bias, atol=1e-6)
    assert torch.allclose(plain.line.weight, objective.line.weight, atol=1e-6)


def test_a_loss_that_is_no_number_never_reaches_the_weights(tmp_path: Path) -> None:
    objective = Line(poison=3)
    with pytest.raises(NonFiniteError, match="not finite"):
        train(objective, tmp_path, plan(log_every=100))
    assert all(torch.isfinite(p).all() for p in objective.parameters())
    assert all(p.abs().sum() > 0 for p in objective.parameters())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_unreadable_images_are_listed_and_too_many_end_the_run(tmp_path: Path) -> None:
    class Broken(ArraySource):
        def read(self, index: int) -> torch.Tensor:
            if index == 5:
                raise BadImage("truncated")
            return super().read(index)

    broken = Broken("made", source().images)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train(Line(), tmp_path / "a", plan(source=broken, bad_image_limit=0.2))
    listed = (tmp_path / "a/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(row)["index"] for row in listed] == [5]
    with pytest.raises(DataError, match="1 of 12 images"):
        train(Line(), tmp_path / "b", plan(source=broken, bad_image_limit=0.01))


def test_evaluation_is_logged_in_evaluation_mode(tmp_path: Path) -> None:
    objective = Line()
    modes: list[bool] = []

    def evaluate() -> dict[str, float]:
        modes.append(objective.training)
        return {"val": 1.0}

    rows = train(objective, tmp_path, plan(eval_every=2), evaluate=evaluate)
    assert modes == [False] * 3
    assert [row["step"] for row in rows if "val" in row] == [2, 4, 6]
    assert objective.training


def test_the_best_state_is_kept_beside_the_newest(tmp_path: Path) -> None:
    values = iter([1.0, 5.0, 9.0, 2.0])  # before the first step, and after 2, 4 and 6
    objective = Line()
    weights: list[torch.Tensor] = []

    def evaluate() -> dict[str, float]:
        weights.append(objective.line.bias.detach().clone())
        return {"val": next(values)}

    made = plan(eval_every=2, eval_first=True, best=Choice("val", "max"))
    rows = train(objective, tmp_path, made, evaluate=evaluate)
    assert [row["step"] for row in rows if "val" in row] == [0, 2, 4, 6]
    found = read_best(tmp_path / "checkpoints/best")
    assert found is not None
    assert (found.step, found.manifest["value"]) == (4, 9.0)
    assert torch.equal(found.files["model"]["line.bias"], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert Checkpoints(tmp_path / "checkpoints").steps() == [6]


def test_batches_that_cannot_be_shared_out() -> None:
    with pytest.raises(DataError, match="not divisible"):
        check_batch(10, processes=2, micro_batches=2)
    with pytest.raises(DataError, match="odd"):
        check_batch(6, processes=1, micro_batches=2, even=True)
    check_batch(8, processes=2, micro_batches=2, even=True)

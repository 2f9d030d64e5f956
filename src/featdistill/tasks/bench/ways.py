"""The ways to take a step that `bench step` lets take turns, from the official one to `distill`'s.

Each is made in a process of its own, from the same weights, and trains on the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from featdistill.core.types import Batch
from featdistill.data.sources import ArraySource
from featdistill.engine.finite import FiniteWatch
from featdistill.engine.meter import Meter
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.runtime import Runtime, limit_threads
from featdistill.engine.schedule import build_schedule
from featdistill.engine.step import TrainingStep
from featdistill.models.load import load_backbone
from featdistill.models.students import build_student
from featdistill.objectives.distillation import FeatureDistillation
from featdistill.tasks.bench.common import seconds_of
from featdistill.tasks.bench.flops import flops_per_image
from featdistill.tasks.bench.reference_step import ReferenceStep

_SIDE = 3072
PRODUCT = 2 * _SIDE**3  # operations of a product of square matrices
COPIED = 1 << 28  # bytes of a copy
_RATE, _CLIP = 1e-5, 3.0
_LONG = 1_000_000  # steps of a schedule whose rate hardly moves

# what each way adds to the one before it
WAYS = ("reference", "loop in float32", "products in bf16", "teacher kept in bf16", "featdistill")


@dataclass(frozen=True)
class Setting:
    """What all ways have in common.

    Attributes:
        cached: all but the reference are brought what the teacher says, as a cache would.
    """

    teacher: str
    student: str
    image_size: int
    batch_size: int
    device: Literal["cpu", "cuda"]
    threads: int | None
    precision: Literal["auto", "float32", "bf16"]
    cached: bool
    drop_path: float


def make(way: str, setting: Setting) -> Callable[[], dict[str, Any]]:
    """A way's step, which says what it took and what its loss was."""
    limit_threads(setting.threads)
    torch.manual_seed(0)
    size = setting.image_size
    objective = FeatureDistillation(
        teacher=load_backbone(setting.teacher, weights="random", image_size=size),
        student=build_student(setting.student, image_size=size, drop_path=setting.drop_path),
    )
    cached = setting.cached and way != "reference"
    flops = flops_per_image(objective, cached=cached)
    count = setting.batch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    order = torch.arange(count)
    batch = Batch((images,), None, order, order)
    if cached:
        said = objective.taught_by(objective.teacher_features(batch.as_float()))
        batch = replace(batch, taught=said.bfloat16())
        objective.rest()
    if way == "reference":
        step, precision, device = _reference(objective, batch, setting)
    else:
        step, precision, device = _ours(way, objective, batch, setting)

    def work() -> dict[str, Any]:
        losses: list[Any] = []
        seconds = seconds_of(lambda: losses.append(step()), device)
        return {
            "seconds": seconds,
            "loss": float(losses[0]),
            "flops": flops,
            "precision": precision,
            "threads": torch.get_num_threads(),
        }

    return work


def _reference(
    objective: FeatureDistillation, batch: Batch, setting: Setting
) -> tuple[Callable[[], Any], str, torch.device]:
    device = torch.device(setting.device)
    step = ReferenceStep(objective, device=device, rate=_RATE, clip=_CLIP)

    def take() -> float:
        # normalised floats come from its loader; here from the bytes that ours come from
        return step(batch.to(device).as_float())

    # on CUDA it is float16, whose products are as fast as bf16's
    return take, "float32" if setting.device == "cpu" else "bf16", device


def _ours(
    way: str, objective: FeatureDistillation, batch: Batch, setting: Setting
) -> tuple[Callable[[], Any], str, torch.device]:
    plain = way != "featdistill"
    runtime = Runtime(
        device=setting.device,
        precision="float32" if way == "loop in float32" else setting.precision,
        attention="naive" if plain else "auto",
    )
    runtime.settle(objective.student)
    runtime.suit(objective.teacher)
    if way in ("teacher kept in bf16", "featdistill") and runtime.pays(objective.teacher):
        objective.teacher_precision = "bf16"
    groups = parameter_groups(
        [("student.model.", objective.student.model), ("projector.", objective.projector)],
        weight_decay=0.05,
    )
    optimizer = adamw(groups, betas=(0.9, 0.999))
    wrapped, stepper = runtime.prepare(objective, optimizer)
    objective.train()
    meter = _Losses(runtime.device)
    step = TrainingStep(
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        stepper=stepper,
        runtime=runtime,
        schedule=build_schedule(
            per_epoch=_LONG,
            epochs=None,
            steps=_LONG,
            peak=_RATE,
            warmup=0.0,
            start_ratio=1.0,
            final_ratio=1.0,
        ),
        seed=0,
        clip=_CLIP,
        parts=1,
        average=None,
        meter=meter,
        watch=FiniteWatch(ArraySource("noise", batch.images), 0),
    )
    taken = iter(range(_LONG))

    def take() -> Any:
        step.take(next(taken), batch)
        return meter.newest

    return take, runtime.precision, runtime.device


class _Losses(Meter):
    """A meter that says the newest step's loss, on the device."""

    newest: torch.Tensor

    def add(self, sums: Any, images: int, norm: torch.Tensor, bad: torch.Tensor) -> None:
        self.newest = sums["loss"] / images
        super().add(sums, images, norm, bad)


def products(device: str, threads: int | None) -> Callable[[], dict[str, float]]:
    """What the device does at best: seconds of a product of square matrices, and of a copy.

    A GPU is given many at once, since it takes less time for one than the host to ask for it.
    """
    limit_threads(threads)
    where = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(_SIDE, _SIDE, generator=generator).to(where)
    pairs = {"float32": square, "bf16": square.bfloat16()}
    many = 50 if where.type == "cuda" else 1
    source = torch.ones(COPIED // 4, device=where)
    target = torch.empty_like(source)
    works: dict[str, Callable[[], object]] = {
        "float32": lambda: pairs["float32"] @ pairs["float32"],
        "bf16": lambda: pairs["bf16"] @ pairs["bf16"],
        "copy": lambda: target.copy_(source),
    }

    def work() -> dict[str, float]:
        return {
            name: seconds_of(lambda one=one: [one() for _ in range(many)], where) / many  # type: ignore[misc]
            for name, one in works.items()
        }

    return work

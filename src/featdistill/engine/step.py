"""One training step: forward and backward passes, clipping, the optimiser, the average.

Where memory is too small, the passes are taken once more with micro-batches of half the size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from featdistill.core.seeds import SampleStream
from featdistill.core.types import Batch
from featdistill.engine.average import WeightAverage
from featdistill.engine.batches import halved, is_out_of_memory, too_little_memory
from featdistill.engine.finite import FiniteWatch
from featdistill.engine.meter import Meter
from featdistill.engine.optimizer import set_rates
from featdistill.engine.runtime import Prepared, Runtime
from featdistill.engine.schedule import Schedule
from featdistill.engine.tracking import say
from featdistill.engine.undo import Undo

_EPS = 1e-6  # torch's own, in `clip_grads_with_norm_`


@dataclass(frozen=True)
class _Passed:
    """What the passes of a step's micro-batches gave.

    Attributes:
        sums: of the loss and its parts over images.
        values: of each micro-batch, the loss and what it was made of.
    """

    parts: Sequence[Batch]
    sums: Mapping[str, Tensor]
    values: Sequence[Mapping[str, Tensor]]


@dataclass
class TrainingStep:
    """Takes steps.

    A step whose loss or gradient is no number leaves no trace: weights, optimiser, running
    statistics and average stay as they were. That is decided on the device, which is not asked.

    Attributes:
        wrapped, stepper: the objective and the optimiser as the runtime prepared them.
        clip: largest gradient norm, or None.
        parts: micro-batches of a process's share of a batch.
    """

    objective: nn.Module
    wrapped: Prepared
    optimizer: torch.optim.Optimizer
    stepper: Any
    runtime: Runtime
    schedule: Schedule
    seed: int
    clip: float | None
    parts: int
    average: WeightAverage | None
    meter: Meter
    watch: FiniteWatch
    _undo: Undo = field(init=False)
    _halved: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._undo = Undo(self.objective, generators=self.runtime.share.world == 1)

    def take(self, step: int, batch: Batch) -> None:
        """Step number `step`, from 0.

        Raises:
            RunError: there is too little memory, for half the micro-batch too.
        """
        set_rates(self.optimizer, self.schedule, step)
        self._undo.begin()
        while (passed := self._passes(step, batch)) is None:
            self._halve(step, len(batch))
        try:
            norm, bad = descend(self.optimizer, self.stepper, clip=self.clip)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise too_little_memory(len(batch), "for the optimiser") from None
        end_step = getattr(self.objective, "end_step", None)
        if end_step is not None:
            end_step(self.runtime.sum)
        self._undo.unless_good(bad)
        if self.average is not None:
            self.average.update(step, bad)
        self.meter.add(passed.sums, len(batch), norm, bad)
        self.watch.look(step + 1, passed.parts, passed.values, norm)

    def _passes(self, step: int, batch: Batch) -> _Passed | None:
        """Forward and backward passes; None if memory was too small for them."""
        try:
            return self._pass(step, batch.split(self.parts))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # not above: the error holds on to what the passes had made
        self.stepper.zero_grad()
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _pass(self, step: int, parts: Sequence[Batch]) -> _Passed:
        sums: dict[str, Tensor] = {}
        values = []
        for number, part in enumerate(parts, 1):
            stream = SampleStream(self.seed, step, part.positions)
            ready = self.runtime.batch(replace(part, stream=stream))
            with self.runtime.accumulating(self.wrapped, more=number < len(parts)):
                loss = self.wrapped(ready)
                self.runtime.backward(loss, len(parts))
            for name, value in {"loss": loss.total, **loss.parts}.items():
                sums[name] = sums.get(name, 0) + value.detach() * len(part)
            watched = {**loss.watched, "loss": loss.total}
            values.append({name: value.detach() for name, value in watched.items()})
        return _Passed(parts, sums, values)

    def _halve(self, step: int, images: int) -> None:
        """Micro-batches of half the size from here on, once, and everything as before the passes.

        Not of several processes: the others are in the midst of an exchange of gradients by then,
        which cannot be taken back.

        Raises:
            RunError: what can be done instead.
        """
        parts = halved(self.objective, images=images, parts=self.parts)
        if self.runtime.share.world > 1 or self._halved:
            how = f"in {self.parts} micro-batches" if self.parts > 1 else "all at once"
            raise too_little_memory(images // self.parts, how, micro_batches=parts)
        self.parts, self._halved = parts, True
        self._undo.rewind()
        say(
            f"WARNING: too little memory for step {step + 1}; it is taken again, and the run goes "
            f"on, with --run.micro_batches {parts} ({images // parts} images each): the same "
            "training but for rounding"
        )


def descend(
    optimizer: torch.optim.Optimizer, stepper: Any, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Clip and step, unless the gradient is no number; decided without asking the device.

    Args:
        stepper: the optimiser, or what stands for it.

    Returns:
        The gradient's norm, and 1 if there was no step, else 0; both on the device.
    """
    groups = optimizer.param_groups
    parameters = [p for g in groups for p in g["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip is not None and isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):
        # our fused ones divide by this as they read the gradients, which are not written once more
        optimizer.grad_scale = ((norm + _EPS) / clip).clamp(min=1)  # type: ignore[union-attr]
    elif clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    bad = (~torch.isfinite(norm)).float()
    # fused AdamW leaves weights and averages alone where this is 1 (GradScaler's own switch)
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    stepper.step()
    stepper.zero_grad()
    return norm, bad

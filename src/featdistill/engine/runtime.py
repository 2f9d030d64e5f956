"""Devices, processes and precision: the one file that knows of them (Lightning Fabric)."""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast
from uuid import uuid4

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from featdistill.core.errors import FeatDistillError, RunError
from featdistill.core.types import Batch, Loss
from featdistill.data.loader import Share
from featdistill.engine import peers, speed
from featdistill.engine.cost import Counter, Nothing, energy_counter
from featdistill.engine.tracking import console
from featdistill.models.attention import Kind, suit_attention

T = TypeVar("T")
DeviceName = Literal["auto", "cpu", "cuda"]
PrecisionName = Literal["auto", "float32", "bf16"]
AttentionName = Literal["auto", "fused", "lean", "naive"]


def pick_device(name: DeviceName) -> str:
    """`cpu` or `cuda`.

    Raises:
        RunError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("device 'cuda', but torch sees none", fix="use --device cpu or auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


class _Box:
    """Carries a batch past Fabric, which would look into (and refuse) a frozen dataclass."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch


class _Shell(nn.Module):
    """An objective in the form that Fabric and DDP want: tensors out, nothing to look into."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, box: _Box) -> dict[str, Any]:
        loss: Loss = self.objective(box.batch)
        return {"total": loss.total, "parts": dict(loss.parts), "watched": dict(loss.watched)}


class Prepared:
    """An objective on its device, under the precision and strategy: `Batch` to `Loss`."""

    def __init__(self, wrapped: Any, runtime: Runtime) -> None:
        self.wrapped, self.runtime = wrapped, runtime

    def __call__(self, batch: Batch) -> Loss:
        with self.runtime.autocast():
            return Loss(**self.wrapped(_Box(batch)))


class Runtime:
    """Where a run computes.

    Args:
        device: auto, cpu or cuda.
        devices: processes on this machine, one a device.
        nodes: machines.
        precision: `auto` is bf16 where it is fast: on a CUDA device that has it, and for a model
            that `settle` finds large enough on a CPU that is measured to be quick at it.
        attention: `auto` is fused on CUDA, and lean on a CPU, where fused attention with a
            learnable bias is slower.

    Raises:
        RunError: no such device.
    """

    def __init__(
        self,
        *,
        device: DeviceName = "auto",
        devices: int = 1,
        nodes: int = 1,
        precision: PrecisionName = "auto",
        attention: AttentionName = "auto",
    ) -> None:
        kind = pick_device(device)
        if kind == "cuda" and devices > torch.cuda.device_count():
            raise RunError(
                f"{devices} devices, but this machine has {torch.cuda.device_count()}",
                fix="give a smaller --run.devices",
            )
        self.attention, self._nodes = attention, nodes
        self._auto = precision == "auto"
        self._open = self._auto and kind == "cpu"  # until a model is there to ask
        if precision == "auto":
            precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        self.precision: Literal["float32", "bf16"] = precision
        if kind == "cpu":
            speed.keep_memory()
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # `describe` says it
        self.fabric = Fabric(
            accelerator=kind,
            devices=devices,
            num_nodes=nodes,
            precision="32-true",  # autocast is `Prepared`'s, which knows the model
            # heads that a classifier leaves unused get no gradient
            strategy="ddp_find_unused_parameters_true" if devices * nodes > 1 else "auto",
        )
        self.fabric.launch()
        console.quiet = not self.first
        if self.share.world > 1:
            token = self.fabric.broadcast(uuid4().hex)
            peers.join(rank=self.share.rank, world=self.share.world, token=token)

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.fabric.device

    @property
    def share(self) -> Share:
        """This process among all."""
        return Share(self.fabric.global_rank, self.fabric.world_size, self.processes_here)

    @property
    def processes_here(self) -> int:
        """Processes of this machine, about: of several machines, each has as many."""
        return max(1, self.fabric.world_size // self._nodes)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.fabric.is_global_zero

    def describe(self) -> str:
        """Device, processes and precision in a few words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        world = self.fabric.world_size
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{world} x {name}{threads}, {self.precision}"

    def settle(self, model: nn.Module) -> None:
        """Suit precision and attention to the model that is to be trained (or looked at)."""
        if self.pays(model):
            self.precision = "bf16"
        self.suit(model)

    def go_on_in(self, precision: Literal["float32", "bf16"]) -> bool:
        """Compute as a run was begun, if that was left open; whether it changes anything."""
        if not self._auto:
            return False
        changed, self.precision = precision != self.precision, precision
        self._open = False  # nor does another model of this session change it
        return changed

    def pays(self, model: nn.Module) -> bool:
        """Whether a model is quicker in bf16, where that is left open."""
        return self.precision == "bf16" or (
            self._open and self.first_does(lambda: speed.bf16_pays(model))
        )

    def suit(self, model: nn.Module) -> None:
        """Set a model's attention layers to the way that is quickest here."""
        suit_attention(model, self._attention)

    @property
    def _attention(self) -> Kind:
        if self.attention != "auto":
            return self.attention
        return "fused" if self.device.type == "cuda" else "lean"

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[Prepared, Any]:
        """Move an objective to the device and wrap it and its optimiser."""
        mover = getattr(objective, "to_device", None)
        if mover is not None:
            mover(self.device)
        wrapped, stepper = self.fabric.setup(_Shell(objective), optimizer)
        return Prepared(wrapped, self), stepper

    def backward(self, loss: Loss, parts: int) -> None:
        """Backward pass of one of `parts` micro-batches.

        A loss that is no number makes every gradient none, and with it that of all processes: an
        infinite one can have finite gradients of its own.
        """
        one = loss.total.detach() * 0 + 1  # or no number
        self.fabric.backward(loss.total * one / parts)

    @contextmanager
    def accumulating(self, prepared: Prepared, *, more: bool) -> Iterator[None]:
        """Skip the exchange of gradients while there are `more` micro-batches to come."""
        with self.fabric.no_backward_sync(prepared.wrapped, enabled=more and self.share.world > 1):
            yield

    def batch(self, batch: Batch) -> Batch:
        """A uint8 batch on the device, as float."""
        return batch.to(self.device).as_float()

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.share.world == 1:
            return value
        return self.fabric.all_reduce(value, reduce_op="sum")

    def sum_known(self, value: float | None) -> float | None:
        """Sum over all processes; None if one of them does not know its part."""
        if self.share.world == 1:
            return value
        part = math.nan if value is None else value
        total = self.sum(torch.tensor(part, dtype=torch.float64, device=self.device)).item()
        return None if math.isnan(total) else total

    def energy_counter(self) -> Counter | None:
        """Of this process's GPU; on a CPU, which processes share, for the first on it alone."""
        if self.device.type == "cpu" and self.fabric.local_rank:
            return Nothing()
        return energy_counter(self.device)

    def gather(self, value: Tensor) -> Tensor:
        """Concatenation over all processes of 1-d or 2-d tensors that may differ in length."""
        if self.share.world == 1:
            return value
        world, rows = self.share.world, value.contiguous().to(self.device)
        # as bytes, which every backend carries, whatever the type
        mine = rows.reshape(-1).view(torch.uint8)
        length = torch.tensor([mine.numel()], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(world)]
        torch.distributed.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        padded = torch.cat([mine, mine.new_zeros(longest - mine.numel())])
        parts = [torch.empty_like(padded) for _ in range(world)]
        torch.distributed.all_gather(parts, padded)
        whole = [p[: int(n)].view(value.dtype) for p, n in zip(parts, lengths, strict=True)]
        return torch.cat(whole).reshape(-1, *value.shape[1:]).to(value.device)

    def collect(self, value: Any) -> list[Any]:
        """Every process's object, in the order of ranks; their tensors on this one's device."""
        if self.share.world == 1:
            return [value]
        packed = io.BytesIO()
        torch.save(value, packed)
        parts: list[Any] = [None] * self.share.world
        torch.distributed.all_gather_object(parts, packed.getvalue())
        # not weights_only: these are our own processes' objects, not a file's
        return [
            value
            if rank == self.share.rank
            else torch.load(io.BytesIO(part), map_location=self.device, weights_only=False)
            for rank, part in enumerate(parts)
        ]

    def first_does(self, work: Callable[[], T]) -> T:
        """What the first process finds, everywhere; and its mistake is everybody's.

        Raises:
            FeatDistillError: the first process's.
        """
        if self.share.world == 1:
            return work()
        value: T | None = None
        error: FeatDistillError | None = None
        if self.first:
            try:
                value = work()
            except FeatDistillError as found:
                error = found
        value, error = self.fabric.broadcast((value, error))
        if error is not None:
            raise error
        return cast(T, value)

    def together(self, error: FeatDistillError | None) -> None:
        """Raise a mistake that any process made, everywhere; the first one's of several."""
        for found in self.collect(error):
            if found is not None:
                raise found

    def barrier(self) -> None:
        """Wait for all processes."""
        self.fabric.barrier()

    def autocast(self) -> Any:
        """The precision's context; a prepared objective brings its own."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def limit_threads(threads: int | None = None) -> None:
    """Use so many threads; without a number, at most the cores that this process may use."""
    cores = threads or len(os.sched_getaffinity(0))
    if threads or torch.get_num_threads() > cores:
        torch.set_num_threads(cores)

"""How a global batch is shared out among processes and micro-batches, and when it cannot be."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from featdistill.core.errors import DataError, RunError
from featdistill.core.types import Splitting
from featdistill.engine.batchnorm import JointBatchNorm2d
from featdistill.models.droppath import KeyedDropPath


def check_batch(batch_size: int, *, processes: int, micro_batches: int, even: bool = False) -> None:
    """Raise DataError if a global batch cannot be shared out."""
    parts = processes * micro_batches
    if batch_size % parts:
        raise DataError(
            f"a batch of {batch_size} is not divisible by {processes} processes x "
            f"{micro_batches} micro-batches",
            fix=f"give --batch-size {max(1, batch_size // parts) * parts}",
        )
    if even and batch_size // parts % 2:
        raise DataError(
            f"mixup and cutmix pair images, and {batch_size // parts} a micro-batch is odd",
            fix="give an even --batch-size, or --mix.mixup 0 --mix.cutmix 0",
        )


def check_batch_norm(objective: nn.Module, *, processes: int, micro_batches: int) -> None:
    """Raise DataError if a batch norm would see only a part of each batch.

    Those that can see all processes' images (`engine.batchnorm`) may be spread over processes.
    """
    norms = [m for m in objective.modules() if isinstance(m, _BatchNorm) and _learns(m)]
    alone = any(not isinstance(m, JointBatchNorm2d) for m in norms)
    parts = micro_batches * (processes if alone else 1)
    if norms and parts > 1:
        raise DataError(
            f"the model has batch norm, whose statistics {parts} parts of a batch would change",
            fix="train it with one process and one micro-batch"
            if alone
            else "train it with one micro-batch",
        )


def _learns(norm: nn.Module) -> bool:
    """Whether a norm is trained; a frozen one keeps its statistics too."""
    parameters = list(norm.parameters())
    return not parameters or any(p.requires_grad for p in parameters)


def splitting_of(objective: nn.Module) -> Splitting:
    """Into what a batch may be cut without another result."""
    if any(isinstance(m, _BatchNorm) and _learns(m) for m in objective.modules()):
        return "whole"
    # which images are skipped is drawn among those of a micro-batch
    if any(isinstance(m, KeyedDropPath) and m.slot.way == "skip" for m in objective.modules()):
        return "whole"
    found: Splitting = getattr(objective, "splitting", "any")
    return found


def halved(objective: nn.Module, *, images: int, parts: int) -> int:
    """Twice as many micro-batches of a process's `images`, when `parts` were too few for memory.

    Raises:
        RunError: they cannot be cut so.
    """
    each, splitting = images // parts, splitting_of(objective)
    if splitting == "whole":
        why = "its loss, batch norm or skipping drop path needs the whole batch at once"
    elif each % 2 or (splitting == "pairs" and each % 4):
        why = f"half of {each} is no {'even' if splitting == 'pairs' else 'whole'} number"
    else:
        return 2 * parts
    raise too_little_memory(each, f"and it cannot be halved: {why}")


def too_little_memory(images: int, more: str, *, micro_batches: int | None = None) -> RunError:
    """The error of a training step that memory is too small for.

    Args:
        micro_batches: that may help.
    """
    finer = f"go on with --resume --run.micro_batches {micro_batches}, or " if micro_batches else ""
    return RunError(
        f"there is too little memory for a step of {images} images, {more}",
        fix=f"{finer}begin again with a smaller --batch-size, --image-size or model",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no class of its own for the CPU's: "DefaultCPUAllocator: can't allocate memory"
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)

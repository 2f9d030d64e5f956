"""What is done to a timm model block by block: compiling, and recomputing instead of keeping."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from featdistill.core.errors import ModelError


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a model (or of what it is part of), first to last."""
    return [
        block
        for module in model.modules()
        if isinstance(found := getattr(module, "blocks", None), nn.ModuleList | nn.Sequential)
        for block in found
    ]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block in place; blocks that are alike share their code.

    Raises:
        ModelError: there are none.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ModelError(
            "the model has no blocks that could be compiled", fix="give --run.compile off"
        )
    # blocks of one class share torch's list of variants (shapes, training or not), of which it
    # would compile 8, and run the rest as they are
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(dynamic=False)


def recompute_blocks(model: nn.Module) -> None:
    """Keep each block's input only, and compute it again in the backward pass (Chen et al. 2016).

    Raises:
        ModelError: timm has no such way for this model.
    """
    able: list[Any] = [m for m in model.modules() if hasattr(m, "set_grad_checkpointing")]
    try:
        for module in able[:1]:
            module.set_grad_checkpointing(True)
    except AssertionError:
        able = []
    if not able:
        raise ModelError("the model cannot recompute its blocks", fix="leave --run.recompute out")

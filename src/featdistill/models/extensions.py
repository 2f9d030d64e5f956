"""What published models have and timm's constructors cannot be told.

These arguments stand in a `TimmBuild` beside timm's own, so that a model can be built again with
them; `timm_models.create` applies them. Plain timm does not know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# norm_eps: epsilon of every layer norm (EsViT's 1e-6; timm's Swin takes no epsilon)
# end_norm_period: a layer norm after every n-th block of a stage (SwinV2-G, not timm's Swin V2)
# rope_periods: DINOv3's, which its files hold as rounded to bfloat16
EXTENSIONS = ("norm_eps", "end_norm_period", "rope_periods")


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A build's arguments as timm's own and the extensions."""
    own = {k: v for k, v in arguments.items() if k not in EXTENSIONS}
    return own, {k: v for k, v in arguments.items() if k in EXTENSIONS}


def extend(model: Any, extensions: Mapping[str, Any]) -> None:
    """Apply extensions to a fresh timm model."""
    if "end_norm_period" in extensions:
        _end_norms(model, extensions["end_norm_period"])
    if "norm_eps" in extensions:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = extensions["norm_eps"]
    if "rope_periods" in extensions:
        periods = model.rope.periods
        periods.copy_(torch.tensor(extensions["rope_periods"]).to(periods))


def _end_norms(model: Any, period: int) -> None:
    """SwinV2-G's extra norms (Liu et al. 2022, section 3.3), named as feature distillation's."""
    for stage in model.layers:
        for number, block in enumerate(stage.blocks, 1):
            if number % period == 0:
                block.enorm = nn.LayerNorm(block.dim)
                block.register_forward_hook(_end_norm)


def _end_norm(block: Any, _: Any, output: Tensor) -> Tensor:
    return block.enorm(output)

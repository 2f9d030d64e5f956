"""What published models have and timm's constructors cannot be told.

These arguments stand in a `TimmBuild` beside timm's own, so that a model can be built again with
them; `timm_models.create` applies them. Plain timm does not know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

# norm_eps: epsilon of every layer norm (EsViT's 1e-6; timm's Swin takes no epsilon)
# end_norm_period: a layer norm after every n-th block of a stage (SwinV2-G, not timm's Swin V2)
# rope_periods: DINOv3's, which its files hold as rounded to bfloat16
# pad_first: where windows do not fill a map, the original Swins pad it and shift it then; timm
#   shifts first, so that the map's far edges meet in one window, and no mask parts them
EXTENSIONS = ("norm_eps", "end_norm_period", "rope_periods", "pad_first")


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
    if extensions.get("pad_first"):
        for block in _swin_blocks(model):
            block.__class__ = _PADS_FIRST[type(block)]
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


class _PadsFirst:
    """A Swin block that gets maps (B, h, w, C) which its windows fill, and gives back the rest."""

    window_size: tuple[int, int]

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        below, right = (
            -side % w for side, w in zip((height, width), self.window_size, strict=True)
        )
        padded = F.pad(x, (0, 0, 0, right, 0, below))
        return super()._attn(padded)[:, :height, :width]  # type: ignore[misc]


class _PaddedSwinBlock(_PadsFirst, SwinTransformerBlock):  # type: ignore[misc]
    pass


class _PaddedSwinV2Block(_PadsFirst, SwinTransformerV2Block):  # type: ignore[misc]
    pass


# classes instead of hooks or closures: copies of a model stay models of their own
_PADS_FIRST: dict[type, type] = {
    SwinTransformerBlock: _PaddedSwinBlock,
    SwinTransformerV2Block: _PaddedSwinV2Block,
}


def _swin_blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module) in _PADS_FIRST]


def windows_leave_a_rest(model: nn.Module) -> bool:
    """Whether a Swin has a map that its windows do not fill."""
    return any(
        side % window
        for block in _swin_blocks(model)
        for side, window in zip(block.input_resolution, block.window_size, strict=True)
    )

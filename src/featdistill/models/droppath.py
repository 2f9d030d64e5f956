"""Stochastic depth whose masks are addressed by (seed, step, layer, position of the sample).

timm's own `DropPath` draws from the process's global generator, so that its masks change with the
number of processes and micro-batches; this one takes its place in models that are trained here.

Two ways to drop: multiply a sample's branch by zero (timm's and the official code's), or skip it,
so that what is dropped is not computed. Skipping needs a number of samples that is known
beforehand, or shapes would change from step to step: of B samples round(B (1 - rate)) are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers import DropPath
from timm.models.beit import Block as BeitBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block as VitBlock
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.seeds import SampleStream

DropWay = Literal["multiply", "skip"]


class DropPathSlot:
    """The draws of the forward pass under way, shared by one model's drop-path layers.

    Attributes:
        always: drop in evaluation mode too (for a teacher that is to be perturbed).
        members: the layers that share it, first to last.
        way: how they drop.
    """

    def __init__(self, *, always: bool = False) -> None:
        self.always = always
        self.way: DropWay = "multiply"
        self.members: list[KeyedDropPath] = []

    @property
    def layers(self) -> int:
        """How many layers share it."""
        return len(self.members)

    @property
    def rate(self) -> float:
        """The highest among them, which timm calls the model's."""
        return max((member.rate for member in self.members), default=0.0)

    def fill(self, stream: SampleStream | None, device: torch.device, name: str) -> None:
        """Draw for all layers what the coming forward pass drops.

        Without a stream each layer draws for itself, from torch's global generator.
        """
        for member in self.members:
            member.factors = member.rows = None
        if stream is None or not self.members:
            return
        draws = stream.uniforms(f"drop-path/{name}", self.layers)
        rates = torch.tensor([[member.rate] for member in self.members])
        if self.way == "skip":
            for member, order in zip(self.members, draws.argsort(dim=1), strict=True):
                kept = member.kept(draws.shape[1])
                member.rows = _carried(order[-kept:].sort().values, device)
            return
        factors = _carried((draws >= rates) / (1 - rates), device)
        for member, row in zip(self.members, factors, strict=True):
            member.factors = row


def _carried(value: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


class KeyedDropPath(nn.Module):
    """Drop a residual branch of whole samples, and scale the others up (Huang et al. 2016).

    What a pass drops is set from outside, as tensors: a compiled block is the same for all layers.

    Args:
        rate: probability of dropping.
        slot: the model's.

    Attributes:
        factors: (B,) that the samples' branches are multiplied by in this pass, or None.
        rows: the samples whose branch is computed in this pass, where the others' is skipped.
    """

    factors: Tensor | None
    rows: Tensor | None

    def __init__(self, rate: float, slot: DropPathSlot) -> None:
        super().__init__()
        self.rate, self.slot, self.layer = rate, slot, slot.layers
        self.factors = self.rows = None
        slot.members.append(self)

    def kept(self, samples: int) -> int:
        """Of so many samples, how many are computed where the others are skipped."""
        return max(1, round(samples * (1 - self.rate)))

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.slot.always):
            return x
        factors = self.factors
        if factors is None:
            factors = (torch.rand(len(x), device=x.device) >= self.rate) / (1 - self.rate)
        return x * factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def added(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """`x` with its branch, computed for the rows that are kept."""
        if self.rows is None or not self.training:
            return x + self(branch(x))
        found = branch(x.index_select(0, self.rows))
        grown = found.to(x.dtype) * (len(x) / len(self.rows))
        return x.index_add(0, self.rows, grown)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def key_drop_path(model: nn.Module, slot: DropPathSlot) -> None:
    """Give a model's drop-path layers, timm's own or keyed before, to a slot."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DropPath | KeyedDropPath):
                rate: Any = child.rate if isinstance(child, KeyedDropPath) else child.drop_prob
                setattr(module, name, KeyedDropPath(float(rate), slot) if rate else nn.Identity())


def skip_dropped(model: nn.Module, slot: DropPathSlot) -> None:
    """Let a model skip what it drops, instead of multiplying it by zero.

    Raises:
        ModelError: it is of a family whose blocks are not known here.
    """
    if not slot.members:
        return
    blocks = [m for m in model.modules() if isinstance(getattr(m, "drop_path1", None), nn.Module)]
    within = {id(m) for b in blocks for m in (b.drop_path1, getattr(b, "drop_path2", None))}
    if any(id(member) not in within for member in slot.members) or any(
        type(block) not in _SKIPPING and type(block) not in _SKIPPING.values() for block in blocks
    ):
        raise ModelError(
            f"a {type(model).__name__} cannot skip what it drops",
            expected="a ViT, a BEiT or a Swin V2",
            fix="give --student.drop_path_way multiply",
        )
    for block in blocks:
        block.__class__ = _SKIPPING.get(type(block), type(block))
    slot.way = "skip"


def _added(drop: nn.Module, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    return drop.added(x, branch) if isinstance(drop, KeyedDropPath) else x + branch(x)


class _SkippingBeitBlock(BeitBlock):  # type: ignore[misc]
    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias, first, second = shared_rel_pos_bias, self.gamma_1, self.gamma_2
        if first is None:
            first = second = 1.0
        x = _added(
            self.drop_path1,
            x,
            lambda y: first * self.attn(self.norm1(y), shared_rel_pos_bias=bias),
        )
        return _added(self.drop_path2, x, lambda y: second * self.mlp(self.norm2(y)))


class _SkippingVitBlock(VitBlock):  # type: ignore[misc]
    def forward(self, x: Tensor, **how: Any) -> Tensor:
        x = _added(self.drop_path1, x, lambda y: self.ls1(self.attn(self.norm1(y), **how)))
        return _added(self.drop_path2, x, lambda y: self.ls2(self.mlp(self.norm2(y))))


class _SkippingSwinV2Block(SwinTransformerV2Block):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        x = _added(self.drop_path1, x, lambda y: self.norm1(self._attn(y)))
        return _added(self.drop_path2, x, lambda y: self.norm2(self.mlp(y)))


# classes instead of hooks or closures: copies of a model stay models of their own
_SKIPPING: dict[type, type] = {
    BeitBlock: _SkippingBeitBlock,
    VitBlock: _SkippingVitBlock,
    SwinTransformerV2Block: _SkippingSwinV2Block,
}

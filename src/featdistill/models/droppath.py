"""Stochastic depth whose masks are addressed by (seed, step, layer, position of the sample).

timm's own `DropPath` draws from the process's global generator, so that its masks change with the
number of processes and micro-batches; this one takes its place in models that are trained here.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from featdistill.core.seeds import SampleStream


class DropPathSlot:
    """The masks of the forward pass under way, shared by one model's drop-path layers.

    Attributes:
        always: drop in evaluation mode too (for a teacher that is to be perturbed).
        layers: how many share it.
        rate: the highest among them, which timm calls the model's.
    """

    def __init__(self, *, always: bool = False) -> None:
        self.always = always
        self.layers = 0
        self.rate = 0.0
        self._draws: Tensor | None = None

    def fill(self, stream: SampleStream | None, device: torch.device, name: str) -> None:
        """Draw all layers' uniforms for the coming forward pass, (layers, B) on `device`."""
        if stream is None or not self.layers:
            self._draws = None
            return
        draws = stream.uniforms(f"drop-path/{name}", self.layers)
        if device.type == "cuda":
            draws = draws.pin_memory()
        self._draws = draws.to(device, non_blocking=True)

    def draws(self, layer: int, samples: int, device: torch.device) -> Tensor:
        """(B,) uniforms of a layer; from torch's global generator outside an addressed pass."""
        if self._draws is None:
            return torch.rand(samples, device=device)
        return self._draws[layer]


class KeyedDropPath(nn.Module):
    """Drop a residual branch of whole samples, and scale the others up (Huang et al. 2016).

    Args:
        rate: probability of dropping.
        slot: where the model's masks are.
    """

    def __init__(self, rate: float, slot: DropPathSlot) -> None:
        super().__init__()
        self.rate, self.slot, self.layer = rate, slot, slot.layers
        slot.layers += 1
        slot.rate = max(slot.rate, rate)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.slot.always):
            return x
        draws = self.slot.draws(self.layer, x.shape[0], x.device)
        keep = (draws >= self.rate).to(x.dtype) / (1 - self.rate)
        return x * keep.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def key_drop_path(model: nn.Module, slot: DropPathSlot) -> None:
    """Give a model's drop-path layers, timm's own or keyed before, to a slot."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DropPath | KeyedDropPath):
                rate: Any = child.rate if isinstance(child, KeyedDropPath) else child.drop_prob
                setattr(module, name, KeyedDropPath(float(rate), slot) if rate else nn.Identity())

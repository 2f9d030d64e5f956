"""How the teacher's features are normalised before they are compared with the student's.

B batch, N tokens, C channels. Every whitening maps (B, N, C) to (B, N, C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WhiteningName = Literal["layernorm", "none", "l2", "standardize", "pca"]
Reduce = Callable[[Tensor], Tensor]  # a sum over all processes


class LayerNormWhitening(nn.Module):
    """LayerNorm over channels without learnt scale and shift, per token (paper, section 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])


class NoWhitening(nn.Module):
    """The features as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class L2Whitening(nn.Module):
    """Each token divided by its Euclidean length."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class Statistics(nn.Module):
    """Base of the whitenings that need statistics of the teacher's features first."""

    def calibrate(self, targets: Iterable[Tensor]) -> None:
        """Learn the statistics from raw targets, each (B, N, C)."""
        raise NotImplementedError


class Standardize(Statistics):
    """Each channel minus its running mean, over its running standard deviation.

    The statistics are calibrated before training and then follow it: what a step's forward passes
    have seen is added by `end_step`, once for all micro-batches and processes, so that neither
    changes the result.

    Args:
        channels: C.
        momentum: weight of a step's own statistics.
    """

    mean: Tensor
    var: Tensor
    pending: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.01, eps: float = 1e-6) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        # count, sum and sum of squares since the last step
        self.register_buffer("pending", torch.zeros(3, channels, dtype=torch.float64), False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._collect(x)
        return (x - self.mean) / torch.sqrt(self.var + self.eps)

    @torch.no_grad()
    def _collect(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        self.pending[0] += len(flat)
        self.pending[1] += flat.sum(0)
        self.pending[2] += flat.square().sum(0)

    @torch.no_grad()
    def end_step(self, reduce: Reduce = lambda x: x) -> None:
        """Move the running statistics by what was seen since the last call."""
        self._follow(reduce(self.pending), self.momentum)

    def _follow(self, seen: Tensor, momentum: float) -> None:
        count = seen[0].clamp_min(1)
        mean = seen[1] / count
        var = (seen[2] / count - mean.square()).clamp_min(0)
        weight = (momentum * (seen[0] > 0)).to(
            self.mean.dtype
        )  # where nothing was seen, nothing moves
        self.mean.lerp_(mean.to(self.mean.dtype), weight)
        self.var.lerp_(var.to(self.var.dtype), weight)
        self.pending.zero_()

    @torch.no_grad()
    def calibrate(self, targets: Iterable[Tensor]) -> None:
        self.pending.zero_()
        for x in targets:
            self._collect(x)
        self._follow(self.pending, 1.0)


class PcaWhitening(Statistics):
    """True whitening: decorrelated channels of unit variance, from a calibration pass.

    y = L^(-1/2) U' (x - m) for the features' covariance U L U'. Directions whose variance is below
    `floor` times the largest are scaled as if they had that variance, since they are noise.
    """

    mean: Tensor
    rotation: Tensor

    def __init__(self, channels: int, *, floor: float = 1e-5) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("rotation", torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.rotation

    @torch.no_grad()
    def calibrate(self, targets: Iterable[Tensor]) -> None:
        channels = len(self.mean)
        count, total = 0, torch.zeros(channels, dtype=torch.float64)
        outer = torch.zeros(channels, channels, dtype=torch.float64)
        for x in targets:
            flat = x.detach().reshape(-1, channels).double().cpu()
            count += len(flat)
            total += flat.sum(0)
            outer += flat.T @ flat
        mean = total / count
        values, vectors = torch.linalg.eigh(outer / count - torch.outer(mean, mean))
        scale = values.clamp_min(self.floor * float(values.max())).rsqrt()
        self.mean.copy_(mean)
        self.rotation.copy_(vectors * scale)


def build_whitening(name: WhiteningName, channels: int) -> nn.Module:
    """The whitening of this name for `channels` channels."""
    match name:
        case "layernorm":
            return LayerNormWhitening()
        case "none":
            return NoWhitening()
        case "l2":
            return L2Whitening()
        case "standardize":
            return Standardize(channels)
        case "pca":
            return PcaWhitening(channels)

"""The paper-style linear probe: a classifier of frozen features, trained on random crops.

B batch, D channels of an image's vector, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featdistill.core.seeds import torch_generator
from featdistill.core.types import Batch, Loss, Splitting
from featdistill.models.backbone import Backbone
from featdistill.models.modes import evaluating
from featdistill.models.pooling import Vector

_EPS, _MOMENTUM, _STD = 1e-6, 0.1, 0.01  # as in MAE's main_linprobe.py


class BatchStandardisation(nn.Module):
    """Batch norm without scale and shift, over all processes' share of a batch.

    In one process the same as `nn.BatchNorm1d(D, affine=False)`. That one would see each process's
    part alone; and `nn.SyncBatchNorm` works on GPUs only. No gradient passes it: frozen features
    need none.

    Args:
        total: sum over all processes.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, *, total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self._total = total
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            wide = x.double()
            ones = wide.new_full((1, x.shape[1]), len(x))
            count, sums = self._total(torch.cat([ones, wide.sum(0, keepdim=True)]))
            middle = sums / count
            squares = self._total((wide - middle).square().sum(0))
            mean, var = middle.float(), (squares / count).float()
            self.mean.lerp_(mean, _MOMENTUM)
            self.var.lerp_((squares / (count - 1).clamp_min(1)).float(), _MOMENTUM)
        return (x - mean) * torch.rsqrt(var + _EPS)


class LinearProbe(nn.Module):
    """Cross-entropy of a linear classifier on a frozen backbone's features.

    The backbone is not a submodule: no checkpoint, optimiser or gradient bucket can reach it. It
    sees images in evaluation mode, without gradients, and its own mode is as it was afterwards.

    Args:
        channels: D of `vector`.
        norm: batch norm before the head, or none.
        total: sum over all processes, for the batch norm.
        seed: of the head's first weights.
    """

    def __init__(
        self,
        backbone: Backbone,
        vector: Vector,
        *,
        channels: int,
        classes: int,
        norm: bool = True,
        total: Callable[[Tensor], Tensor] = lambda x: x,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._backbone, self.vector = [backbone], vector
        self.norm = BatchStandardisation(channels, total=total) if norm else nn.Identity()
        self.head = nn.Linear(channels, classes)
        draw = torch_generator("probe", seed)
        with torch.no_grad():
            self.head.weight.normal_(0.0, _STD, generator=draw)
            self.head.bias.zero_()

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone."""
        return self._backbone[0]

    def to_device(self, device: torch.device) -> None:
        """Move the backbone, which `nn.Module.to` does not see."""
        self.backbone.to(device)

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """(B, D) float32 of images in [0, 1]."""
        with evaluating(self.backbone):
            return self.vector.of(self.backbone(images, self.vector.layers)).float()

    def logits(self, images: Tensor) -> Tensor:
        """(B, K)."""
        return self.head(self.norm(self.vectors(images)))

    @property
    def splitting(self) -> Splitting:
        """Into what a batch may be cut: its norm must see the whole."""
        return "whole" if isinstance(self.norm, BatchStandardisation) else "any"

    def forward(self, batch: Batch) -> Loss:
        assert batch.labels is not None
        logits = self.logits(batch.images).float()
        with torch.no_grad():
            hit = (logits.argmax(1) == batch.labels).float().mean()
        return Loss(F.cross_entropy(logits, batch.labels), {"train_top1": hit})

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """(K, D) and (K,): the head and the norm before it as one linear layer, on the CPU."""
        weight, bias = self.head.weight.double().cpu(), self.head.bias.double().cpu()
        if isinstance(self.norm, BatchStandardisation):
            weight = weight * torch.rsqrt(self.norm.var.double().cpu() + _EPS)
            bias = bias - weight @ self.norm.mean.double().cpu()
        return weight.float(), bias.float()

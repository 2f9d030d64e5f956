"""The few types that the parts hand to each other.

Shapes: B batch, P prefix tokens, C channels, h w the token grid, D the model's own embedding, K
classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from featdistill.core.seeds import SampleStream


@dataclass(frozen=True)
class LayerFeatures:
    """What one intermediate layer gives: map (B, C, h, w) and prefix (B, P, C), before any norm."""

    map: Tensor
    prefix: Tensor


@dataclass(frozen=True)
class Features:
    """What a backbone says of images.

    Attributes:
        map: (B, C, h, w) patch features of the last layer, after the model's own final norm.
        prefix: (B, P, C) CLS, distillation and register tokens, after the same norm.
        prefix_names: P names: `cls`, `dist`, `reg1`, ...
        pooled: (B, D) as the model itself pools.
        logits: (B, K) if the model has a classifier.
        layers: intermediate layers that were asked for, by index.
    """

    map: Tensor
    prefix: Tensor
    prefix_names: tuple[str, ...]
    pooled: Tensor
    logits: Tensor | None = None
    layers: Mapping[int, LayerFeatures] = field(default_factory=dict)


@dataclass(frozen=True)
class Replaced:
    """A sample that could not be read: its index, the reason, and what stands in for it.

    Attributes:
        substitute: the sample that is shown instead; None: a black image.
    """

    index: int
    reason: str
    substitute: int | None


@dataclass(frozen=True)
class Batch:
    """One process's share of a training step (or a micro-batch of it).

    Attributes:
        views: each (B, 3, height, width); uint8 as it travels, float32 in [0, 1] after `as_float`.
        labels: (B,) int64, or None for unlabelled data.
        masks: (B, height, width) int16 class numbers, -1 where unlabelled; segmentation only.
        taught: (B, N, D), what the teacher says of the view (see `FeatureDistillation.taught_by`),
            bf16 from a cache; None: it has to be asked.
        indices: (B,) int64, each sample's place in its source.
        positions: (B,) int64 on CPU, each sample's place in the global batch.
        replaced: unreadable samples of this batch.
        stream: the address of this batch's random draws; None outside training.
    """

    views: tuple[Tensor, ...]
    labels: Tensor | None
    indices: Tensor
    positions: Tensor
    replaced: tuple[Replaced, ...] = ()
    stream: SampleStream | None = None
    masks: Tensor | None = None
    taught: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """The first (for most objectives the only) view."""
        return self.views[0]

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> Batch:
        """Everything but indices and positions, which stay on the CPU, on `device`."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def as_float(self) -> Batch:
        """The views as float32 in [0, 1]."""
        return replace(self, views=tuple(v.float().div_(255) for v in self.views))

    def pin_memory(self) -> Batch:
        """Page-locked copies, so that the journey to the device does not block."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with its views, labels, masks and what was taught changed."""
        return replace(
            self,
            views=tuple(change(v) for v in self.views),
            labels=None if self.labels is None else change(self.labels),
            masks=None if self.masks is None else change(self.masks),
            taught=None if self.taught is None else change(self.taught),
        )

    def split(self, parts: int) -> list[Batch]:
        """Contiguous micro-batches of equal size; the batch must divide."""
        assert len(self) % parts == 0, (len(self), parts)
        n = len(self) // parts
        cuts = [slice(i * n, (i + 1) * n) for i in range(parts)]
        return [
            replace(
                self,
                views=tuple(v[cut] for v in self.views),
                labels=None if self.labels is None else self.labels[cut],
                masks=None if self.masks is None else self.masks[cut],
                taught=None if self.taught is None else self.taught[cut],
                indices=self.indices[cut],
                positions=self.positions[cut],
            )
            for cut in cuts
        ]


@dataclass(frozen=True)
class Loss:
    """An objective's value.

    Attributes:
        total: to minimise.
        parts: worth logging (detached scalars).
        watched: sums of what the loss was made of, by name, to tell where a number was lost.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    watched: Mapping[str, Tensor] = field(default_factory=dict)


Splitting = Literal["any", "pairs", "whole"]


class Objective(Protocol):
    """What is learned. An `nn.Module` whose state is what a checkpoint keeps.

    If its loss is no mean over single samples, an attribute `splitting` says into what a batch may
    be cut: `pairs` of neighbours, or it must stay `whole`.
    """

    def __call__(self, batch: Batch) -> Loss: ...

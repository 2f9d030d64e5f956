"""A model that has a loss, on fixed images: what `landscape` and `curvature` look at.

Dimensions: B images of a batch, K classes, N tokens, D channels of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.types import Batch
from featdistill.models.backbone import Backbone
from featdistill.objectives.distillation import FeatureDistillation, distance

KindName = Literal["classification", "distillation"]


@dataclass(frozen=True)
class Piece:
    """A batch of the fixed images, on the model's device.

    Attributes:
        images: (B, 3, height, width) uint8.
        answers: what the outputs are compared with: labels (B,) int64, or targets (B, N, D).
    """

    images: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.images.nbytes + self.answers.nbytes


class Kept:
    """The pieces, over and over: in memory if they fit, else read again each time.

    Args:
        read: makes all pieces afresh, always the same.
        images: in all of them.
        budget: bytes that may be kept.
    """

    def __init__(self, read: Callable[[], Iterable[Piece]], *, images: int, budget: float) -> None:
        self._read, self.images, self.budget = read, images, budget
        self._kept: list[Piece] | None = None

    def __iter__(self) -> Iterator[Piece]:
        if self._kept is not None:
            yield from self._kept
            return
        found: list[Piece] | None = []
        # neither inference tensors, which a later backward pass refuses, nor a graph
        with torch.inference_mode(False), torch.no_grad():
            pieces = iter(self._read())
        while True:
            with torch.inference_mode(False), torch.no_grad():
                piece = next(pieces, None)
            if piece is None:
                break
            if found == [] and piece.bytes / len(piece) * self.images > self.budget:
                found = None
            if found is not None:
                found.append(piece)
            yield piece
        self._kept = found

    @property
    def in_memory(self) -> bool:
        """Whether the next pass reads nothing."""
        return self._kept is not None


class Subject:
    """A model that has a loss, in evaluation mode, on fixed images.

    Attributes:
        name: of the model, for people.
        kind: whose loss it is.
        objective: what the loss is, in words, with its unit.
        backbone: the model, or the student.
        module: images (B, 3, height, width) uint8 to outputs: logits (B, K), or projected features
            (B, N, D); float32, differentiable.
        parts: prefixes and modules, whose parameters are all that was learned.
        pieces: the images.
        facts: what two subjects must share, by what it is called, if one is to become the other.
    """

    def __init__(
        self,
        *,
        name: str,
        kind: KindName,
        objective: str,
        backbone: Backbone,
        module: nn.Module,
        parts: tuple[tuple[str, nn.Module], ...],
        losses: Callable[[Tensor, Tensor], Tensor],
        pieces: Kept,
        facts: Mapping[str, object],
    ) -> None:
        self.facts = {
            "image size": backbone.image_size,
            "normalisation": backbone.rgb,
            **facts,
        }
        self.name, self.kind, self.objective = name, kind, objective
        self.backbone, self.module, self.parts = backbone, module.eval(), parts
        self.losses_of, self.pieces = losses, pieces

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What was learned, by name: timm's names, and `projector.*`; no buffers."""
        return {
            f"{prefix}{name}": parameter
            for prefix, part in self.parts
            for name, parameter in part.named_parameters()
        }

    def losses(self, piece: Piece) -> Tensor:
        """Each image's loss, (B,) float32, differentiable; the subject's loss is their mean."""
        return self.losses_of(self.module(piece.images), piece.answers)


class _Logits(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        logits = self.backbone(images.float().div_(255)).logits
        assert logits is not None
        return _exact(logits)


class _Predictions(nn.Module):
    def __init__(self, objective: FeatureDistillation) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor) -> Tensor:
        return _exact(self.objective.predictions(_batch(images)))


def _exact(values: Tensor) -> Tensor:
    """In float32, or float64 if it is that."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _batch(images: Tensor) -> Batch:
    """The images as an objective wants them: no label, and no draw that would need an address."""
    order = torch.arange(len(images))
    return Batch((images.float().div_(255),), None, order, order)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) nats, of logits (B, K)."""
    return F.cross_entropy(logits, labels, reduction="none")


def classifier_subject(
    name: str,
    backbone: Backbone,
    batches: Callable[[], Iterable[Batch]],
    *,
    images: int,
    budget: float,
) -> Subject:
    """The cross-entropy of a classifier.

    Args:
        backbone: on its device.
        batches: reads the images, uint8, with labels that are numbered as the model's classes.
        images: how many they are.
        budget: bytes of them to keep.

    Raises:
        ModelError: the model has no classifier.
    """
    if not backbone.num_classes:
        raise ModelError(
            f"'{name}' has no classifier, so no loss",
            fix="fine-tune or probe it first, or give a run of distill",
        )
    device = backbone.mean.device

    def read() -> Iterator[Piece]:
        for batch in batches():
            assert batch.labels is not None
            on_device = batch.to(device)
            assert on_device.labels is not None
            yield Piece(on_device.images, on_device.labels)

    return Subject(
        name=name,
        kind="classification",
        objective="Cross-entropy, nats",
        backbone=backbone,
        module=_Logits(backbone),
        parts=(("", backbone.model),),
        losses=cross_entropies,
        pieces=Kept(read, images=images, budget=budget),
        facts={"classes": backbone.class_names or backbone.num_classes},
    )


def distillation_subject(
    name: str,
    objective: FeatureDistillation,
    batches: Callable[[], Iterable[Batch]],
    *,
    images: int,
    budget: float,
) -> Subject:
    """The distillation objective of a student, its projector and its (frozen) teacher.

    The targets do not depend on what was learned: each image's are computed once.

    Args:
        objective: on its device, the teacher too.
        batches, images, budget: as of `classifier_subject`; labels are not used.
    """
    objective.eval()
    device = objective.student.mean.device

    def read() -> Iterator[Piece]:
        for batch in batches():
            seen = batch.images.to(device, non_blocking=True)
            yield Piece(seen, objective.targets(_batch(seen)).float())

    def losses(predictions: Tensor, targets: Tensor) -> Tensor:
        return distance(objective.loss, predictions, targets, objective.beta, mean_over="image")

    return Subject(
        name=name,
        kind="distillation",
        objective=f"Distillation loss ({objective.loss} to the teacher's whitened "
        f"{objective.target}), no unit",
        backbone=objective.student,
        module=_Predictions(objective),
        parts=(("", objective.student.model), ("projector.", objective.projector)),
        losses=losses,
        pieces=Kept(read, images=images, budget=budget),
        facts={
            "teacher": objective.teacher.origin.weights,
            "whitening": type(objective.whitening).__name__,
            "beta": objective.beta,
        },
    )

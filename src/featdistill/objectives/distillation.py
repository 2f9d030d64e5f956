"""Feature distillation (Wei et al. 2022, arXiv 2205.14141, section 3).

    loss = smooth_l1( g(S(x)), whiten(T(x)), beta = 2 ), averaged over batch, tokens and channels

B batch, P paired prefix tokens, N = P + h w tokens, C student and D teacher channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.seeds import seeded_globals
from featdistill.core.types import Batch, Features, Loss
from featdistill.models.backbone import Backbone
from featdistill.models.lowered import lower_weights
from featdistill.objectives.whitening import (
    Reduce,
    Standardize,
    Statistics,
    WhiteningName,
    build_whitening,
)

Precision = Literal["float32", "bf16"]
TargetName = Literal["map", "gap", "pooled", "logits"]
DistanceName = Literal["smooth-l1", "mse", "l1", "cosine"]
ResampleOrder = Literal["before-whitening", "after-whitening"]

_PAIRABLE = ("cls",)


@dataclass(frozen=True)
class Pairing:
    """Which of the teacher's tokens the student learns.

    Attributes:
        prefix: names of prefix tokens that both have and that are paired.
        left_out: prefix tokens of one side that have no partner, as `teacher.reg1`.
        layer: the teacher's layer if not its last.
        teacher_grid, student_grid: (h, w).
    """

    prefix: tuple[str, ...]
    left_out: tuple[str, ...]
    layer: int | None
    teacher_grid: tuple[int, int]
    student_grid: tuple[int, int]

    @property
    def resampled(self) -> bool:
        """Whether the teacher's map is carried to another grid."""
        return self.teacher_grid != self.student_grid


def pair(teacher: Backbone, student: Backbone, layer: int | Literal["auto", "last"]) -> Pairing:
    """Decide what is learned from what.

    CLS pairs with CLS; registers and distillation tokens have no partner. `auto` takes the last
    layer, but of a hierarchical teacher the stage whose grid is the student's, if there is one
    (the official code gives a ViT student Swin's third stage).
    """
    chosen = None if layer in ("auto", "last") else int(layer)
    grids = teacher.layer_grids
    hierarchical = len(set(grids)) > 1
    if layer == "auto" and hierarchical and teacher.grid != student.grid:
        same = [i for i, grid in enumerate(grids) if grid == student.grid]
        chosen = same[-1] if same else None
    if chosen is not None and not -len(grids) <= chosen < len(grids):
        raise ModelError(
            f"teacher layer {chosen} of '{teacher.origin.spec}'",
            expected=f"0 to {len(grids) - 1}, or -{len(grids)} to -1, auto or last",
        )
    names = tuple(n for n in _PAIRABLE if n in teacher.prefix_names and n in student.prefix_names)
    left = [f"teacher.{n}" for n in teacher.prefix_names if n not in names]
    left += [f"student.{n}" for n in student.prefix_names if n not in names]
    grid = teacher.grid if chosen is None else grids[chosen]
    return Pairing(names, tuple(left), chosen, grid, student.grid)


def resample(map_: Tensor, grid: tuple[int, int]) -> Tensor:
    """Carry a map (B, C, h, w) to another grid: bilinear, antialiased where it shrinks."""
    if tuple(map_.shape[2:]) == grid:
        return map_
    return F.interpolate(map_, grid, mode="bilinear", align_corners=False, antialias=True)


def distance(
    name: DistanceName,
    prediction: Tensor,
    target: Tensor,
    beta: float = 2.0,
    *,
    mean_over: Literal["batch", "image"] = "batch",
) -> Tensor:
    """Mean distance of predictions from targets, both (B, ..., D); in float32 or better.

    Args:
        mean_over: `batch`: one number for all; `image`: (B,), a number for each.
    """
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    target = target.to(prediction.dtype)
    whole = mean_over == "batch"
    how = "mean" if whole else "none"  # torch's own mean where it has one: it is fused
    match name:
        case "smooth-l1":
            found = F.smooth_l1_loss(prediction, target, beta=beta, reduction=how)
        case "mse":
            found = F.mse_loss(prediction, target, reduction=how)
        case "l1":
            found = F.l1_loss(prediction, target, reduction=how)
        case "cosine":
            found = 1 - F.cosine_similarity(prediction, target, dim=-1)
            found = found.mean() if whole else found
    return found if whole else found.flatten(1).mean(1)


def _tokens(
    map_: Tensor, prefix: Tensor, names: tuple[str, ...], wanted: tuple[str, ...]
) -> Tensor:
    """The wanted prefix tokens and those of the map, (B, N, C)."""
    chosen = [prefix[:, names.index(n)].unsqueeze(1) for n in wanted]
    return torch.cat([*chosen, map_.flatten(2).transpose(1, 2)], dim=1)


class FeatureDistillation(nn.Module):
    """The student, its projector and the whitening; the teacher is beside them, not among them.

    Since the teacher is no submodule, it is in no checkpoint, no optimiser and no gradient bucket;
    it stays in evaluation mode.

    Args:
        teacher: frozen.
        student: to be trained.
        target: `map` (every token of the last layer), `gap` (mean of the map), `pooled` (as the
            teacher pools itself: CLIP's projected embedding) or `logits`.
        whitening: normalisation of the target.
        loss: distance, with `beta` for smooth-l1.
        layer: the teacher's layer to take the map from.
        teacher_precision: of its pass, whatever that of the student's; None: the same. In bf16 its
            weights are kept so from `to_device` on.
        resample_order: whether a map is carried to the student's grid before or after whitening.
        seed: of the projector's initial weights.

    Raises:
        ModelError: the teacher has no such layer, or no logits.
    """

    def __init__(
        self,
        *,
        teacher: Backbone,
        student: Backbone,
        target: TargetName = "map",
        whitening: WhiteningName = "layernorm",
        loss: DistanceName = "smooth-l1",
        beta: float = 2.0,
        layer: int | Literal["auto", "last"] = "auto",
        teacher_precision: Precision | None = None,
        resample_order: ResampleOrder = "before-whitening",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.teacher_precision = teacher_precision
        self.target, self.loss, self.beta = target, loss, beta
        self.resample_order = resample_order
        self.student = student
        self._teacher = (teacher.requires_grad_(False).eval(),)  # a tuple hides it from nn.Module
        self._resting = False
        self.pairing = pair(teacher, student, layer if target in ("map", "gap") else "last")
        if target == "logits" and not teacher.num_classes:
            raise ModelError(
                f"teacher '{teacher.origin.spec}' has no classifier, so no logits",
                fix="use --target map or gap",
            )
        self._taught_prefix = tuple(n for n in _PAIRABLE if n in teacher.prefix_names)
        channels = self._target_channels(teacher)
        with seeded_globals("projector", seed):
            self.projector = nn.Linear(student.width, channels)
        self.whitening = build_whitening(whitening, channels)

    @property
    def teacher(self) -> Backbone:
        """The frozen teacher."""
        return self._teacher[0]

    @property
    def taught_shape(self) -> tuple[int, int]:
        """(N, D) of what the teacher says of a view; see `taught_by`."""
        h, w = self.pairing.teacher_grid
        tokens = len(self._taught_prefix) + h * w if self.target == "map" else 1
        return tokens, self.projector.out_features

    def _target_channels(self, teacher: Backbone) -> int:
        if self.target == "logits":
            return teacher.num_classes
        if self.target == "pooled":
            return teacher.pooled_width
        if self.pairing.layer is None:
            return teacher.width
        info = teacher.model.feature_info
        entry = (
            info[self.pairing.layer] if isinstance(info, list) else info.info[self.pairing.layer]
        )
        return int(entry["num_chs"])

    def to_device(self, device: torch.device) -> None:
        """Move the teacher, which `nn.Module.to` does not see; not one that rests."""
        if not self._resting:
            self._wake(device)

    def _wake(self, device: torch.device) -> None:
        self.teacher.to(device)
        if self.teacher_precision == "bf16":
            lower_weights(self.teacher.model)

    def rest(self) -> None:
        """Keep the teacher on the CPU: all batches to come bring what it says of them."""
        self._resting = True
        self.teacher.cpu()

    @contextmanager
    def awake(self, device: torch.device) -> Iterator[None]:
        """The teacher on a device for a block, even if it rests."""
        if not self._resting:
            yield
            return
        self._wake(device)
        try:
            yield
        finally:
            self.teacher.cpu()

    def targets(self, batch: Batch) -> Tensor:
        """The teacher's whitened features: (B, N, D), or (B, 1, D) but for the map.

        A batch that knows what the teacher says (`Batch.taught`) spares its pass.
        """
        if batch.taught is not None:
            return self._whitened(batch.taught)
        return self.targets_of(self.teacher_features(batch))

    def targets_of(self, features: Features) -> Tensor:
        """Whitened targets from what `teacher_features` gives."""
        return self._whitened(self.taught_by(features))

    def _whitened(self, raw: Tensor) -> Tensor:
        """Targets on the student's grid, from what `taught_by` gives."""
        # a target of bf16 is resampled and whitened in float32, whatever the student's precision
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        target: Tensor = self.whitening(self._to_whiten(raw))
        return target if self.resample_order == "before-whitening" else self._on_grid(target)

    def _to_whiten(self, raw: Tensor) -> Tensor:
        if self.target == "map":
            # a token that this student has no partner for is still there for others'
            raw = raw[:, len(self._taught_prefix) - len(self.pairing.prefix) :]
        return self._on_grid(raw) if self.resample_order == "before-whitening" else raw

    def _on_grid(self, raw: Tensor) -> Tensor:
        """A map's tokens carried to the student's grid, beside the prefix; a vector as it is."""
        if self.target != "map" or not self.pairing.resampled:
            return raw
        p = len(self.pairing.prefix)
        map_ = raw[:, p:].transpose(1, 2).unflatten(2, self.pairing.teacher_grid)
        map_ = resample(map_, self.pairing.student_grid)
        return torch.cat([raw[:, :p], map_.flatten(2).transpose(1, 2)], dim=1)

    @torch.no_grad()
    def teacher_features(self, batch: Batch, layers: tuple[int, ...] | None = None) -> Features:
        """The teacher's features, with the layer that the target wants (or with these)."""
        images = batch.images
        if images.shape[-2:] != self.teacher.image_size:
            images = F.interpolate(images, self.teacher.image_size, mode="bilinear", antialias=True)
        if layers is None:
            layers = () if self.pairing.layer is None else (self.pairing.layer,)
        with self._teacher_autocast(images.device.type):
            features: Features = self.teacher(
                images, layers, stream=batch.stream, slot_name="teacher"
            )
        return features

    def _teacher_autocast(self, device: str) -> AbstractContextManager[object]:
        if self.teacher_precision is None:
            return nullcontext()
        return torch.autocast(device, torch.bfloat16, enabled=self.teacher_precision == "bf16")

    @torch.no_grad()
    def taught_by(self, features: Features) -> Tensor:
        """What of `teacher_features` is learned, before whitening: (B, N, D), as in `Batch.taught`.

        The teacher's CLS (if it has one) and the map's tokens, on its own grid; but for the map,
        N = 1. Nothing but the layer depends on the student, so that several may share it.
        """
        layer = self.pairing.layer
        map_, prefix = features.map, features.prefix
        if layer is not None:
            map_, prefix = features.layers[layer].map, features.layers[layer].prefix
        match self.target:
            case "logits":
                assert features.logits is not None
                return features.logits[:, None]
            case "pooled":
                return features.pooled[:, None]
            case "gap":
                return map_.mean((2, 3))[:, None]
            case "map":
                taught = self._taught_prefix
                return _tokens(map_, prefix, features.prefix_names, taught)

    def predictions(self, batch: Batch) -> Tensor:
        """The student's projected features, shaped as the targets."""
        return self.predictions_of(self.student_features(batch))

    def student_features(self, batch: Batch) -> Features:
        """The student's features."""
        images = batch.images
        if images.shape[-2:] != self.student.image_size:
            images = F.interpolate(images, self.student.image_size, mode="bilinear", antialias=True)
        features: Features = self.student(images, stream=batch.stream)
        return features

    def predictions_of(self, features: Features) -> Tensor:
        """Projected features from what `student_features` gives, shaped as the targets."""
        if self.target == "map":
            paired = self.pairing.prefix
            tokens = _tokens(features.map, features.prefix, features.prefix_names, paired)
        else:
            tokens = features.map.mean((2, 3))[:, None]
        return self.projector(tokens)

    def forward(self, batch: Batch) -> Loss:
        with torch.no_grad():
            target = self.targets(batch)
        loss = self.compare(self.predictions(batch), target)
        return replace(loss, watched={"teacher": target.sum()})

    def compare(self, prediction: Tensor, target: Tensor) -> Loss:
        """The loss, and the mean cosine over tokens; both (B, N, D)."""
        total = distance(self.loss, prediction, target, self.beta)
        with torch.no_grad():
            cosine = F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
        return Loss(total, {"cosine": cosine})

    def calibrate(self, batches: Iterable[Batch]) -> bool:
        """Learn the whitening's statistics, if it has any; whether it had."""
        if not isinstance(self.whitening, Statistics):
            return False
        self.whitening.calibrate(
            self._to_whiten(self.taught_by(self.teacher_features(batch))) for batch in batches
        )
        return True

    def end_step(self, reduce: Reduce) -> None:
        """Called by the loop once after each step."""
        if isinstance(self.whitening, Standardize):
            self.whitening.end_step(reduce)


@torch.no_grad()
def taught_together(objectives: Sequence[FeatureDistillation], batch: Batch) -> list[Tensor]:
    """What one pass of a teacher says to each of several students of it; see `taught_by`."""
    layers = {o.pairing.layer: o for o in objectives}
    wanted = tuple(sorted(layer for layer in layers if layer is not None))
    features = objectives[0].teacher_features(batch, wanted)
    said = {layer: o.taught_by(features) for layer, o in layers.items()}
    return [said[o.pairing.layer] for o in objectives]

"""A backbone becomes a segmenter: its maps, a pyramid, a head; images go in, logits come out.

B batch, K classes, H W pixels of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.seeds import SampleStream, seeded_globals
from featdistill.models.backbone import Backbone, TimmBuild
from featdistill.models.padding import fill_to
from featdistill.models.positions import SHARED_TABLE, untie_tables
from featdistill.models.pyramid import PlainPyramid, StagePyramid, levels_of
from featdistill.models.resize import resize
from featdistill.models.timm_models import create, drop_path_argument
from featdistill.models.upernet import Drop, FCNHead, LinearHead, UperHead
from featdistill.models.weights import load_exactly

SegmenterHead = Literal["upernet", "linear"]
_AUXILIARY_LEVEL = 2  # the map that the auxiliary head sees: the third of four


@dataclass(frozen=True)
class HeadShape:
    """What a head is made of.

    Attributes:
        kind: upernet or linear.
        channels: of UperNet; None: 512 for hierarchies, a plain ViT's own width (as published).
        layers: of the pyramid; None: equally spaced ones, or the stages.
        auxiliary: channels of the auxiliary head beside UperNet; 0: none.
        dropout: of whole channels before each classifier.
    """

    kind: SegmenterHead = "upernet"
    channels: int | None = None
    layers: tuple[int, ...] | None = None
    auxiliary: int = 256
    dropout: float = 0.1


@dataclass(frozen=True)
class SegmentationLogits:
    """What a segmenter says: (B, K, H, W) each; the auxiliary head's only in training."""

    main: Tensor
    auxiliary: Tensor | None = None


class Segmenter(nn.Module):
    """A backbone under a dense head.

    Attributes:
        backbone: built for `size`, or for the next one that it can see (`sees`).
        size: (height, width) of the images that it is trained on.
        class_names: K names.
        frozen: only the head learns; the backbone stays in evaluation mode.

    Raises:
        ModelError: a head that the backbone cannot feed.
    """

    auxiliary: FCNHead | None

    def __init__(
        self,
        backbone: Backbone,
        *,
        size: tuple[int, int],
        class_names: tuple[str, ...],
        shape: HeadShape,
        frozen: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone, self.size, self.class_names = backbone, size, class_names
        self.shape, self.frozen = shape, frozen
        self.auxiliary = None
        self.layers: tuple[int, ...] = ()
        self.pyramid: nn.Module = nn.Identity()
        with seeded_globals("segmenter", seed):
            if shape.kind == "linear":
                self.head: nn.Module = LinearHead(backbone.width, classes=len(class_names))
            else:
                self._add_upernet(shape)
        if frozen:
            backbone.requires_grad_(False)

    def _add_upernet(self, shape: HeadShape) -> None:
        levels = levels_of(self.backbone, shape.layers)
        widths, classes = levels.widths, len(self.class_names)
        channels = shape.channels or (widths[-1] if levels.plain else 512)
        self.layers = levels.indices
        self.pyramid = (
            PlainPyramid(widths, self.backbone.patch) if levels.plain else StagePyramid(widths)
        )
        self.head = UperHead(widths, channels=channels, classes=classes)
        if shape.auxiliary:
            width = widths[_AUXILIARY_LEVEL]
            self.auxiliary = FCNHead(width, channels=shape.auxiliary, classes=classes)

    def train(self, mode: bool = True) -> Segmenter:
        """As always, but a frozen backbone drops nothing and keeps its statistics."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @property
    def heads(self) -> list[nn.Module]:
        """Everything beside the backbone."""
        beside = [] if self.auxiliary is None else [self.auxiliary]
        return [self.pyramid, self.head, *beside]

    @property
    def trained_parts(self) -> list[tuple[str, nn.Module]]:
        """(prefix, module) of what learns, the backbone's timm model first."""
        parts = [("backbone.model.", self.backbone.model)] if not self.frozen else []
        names = ("pyramid.", "head.", "auxiliary.")
        return parts + list(zip(names, self.heads, strict=False))

    def forward(self, images: Tensor, *, stream: SampleStream | None = None) -> SegmentationLogits:
        """Logits at the images' size.

        Args:
            images: (B, 3, H, W) float RGB in [0, 1].
            stream: address of the random draws (drop path, dropout); None: there are none.
        """
        size = (images.shape[-2], images.shape[-1])
        backbone = self.backbone
        if backbone.fixed_size:
            images = fill_to(images, backbone.image_size, backbone.mean.flatten())
        sees = (images.shape[-2], images.shape[-1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = backbone(images, self.layers, stream=stream)
        taken = [features.layers[i].map for i in self.layers]
        maps: list[Tensor] = self.pyramid(taken) if taken else []
        main = self.head(maps or features.map, self._drop(stream, "main"))
        auxiliary = None
        if self.auxiliary is not None and self.training:
            auxiliary = self.auxiliary(maps[_AUXILIARY_LEVEL], self._drop(stream, "auxiliary"))
        return SegmentationLogits(
            _grown(main, sees, size), None if auxiliary is None else _grown(auxiliary, sees, size)
        )

    def logits(self, images: Tensor) -> Tensor:
        """(B, K, H, W) for images (B, 3, H, W)."""
        found: SegmentationLogits = self(images)
        return found.main

    def _drop(self, stream: SampleStream | None, name: str) -> Drop | None:
        """Dropout of whole channels, addressed like every other draw."""
        rate = self.shape.dropout
        if not self.training or not rate or stream is None:
            return None

        def drop(maps: Tensor) -> Tensor:
            draws = stream.uniforms(f"dropout {name}", rows=maps.shape[1]).T.to(maps.device)
            return maps * ((draws >= rate) / (1 - rate)).to(maps.dtype)[:, :, None, None]

        return drop


def _grown(logits: Tensor, sees: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Logits brought to what the backbone saw, and cut to the image in it."""
    grown = F.interpolate(logits, sees, mode="bilinear", align_corners=False)
    return grown[..., : size[0], : size[1]]


def build_segmenter(
    backbone: Backbone,
    *,
    size: tuple[int, int],
    class_names: tuple[str, ...],
    shape: HeadShape = HeadShape(),
    drop_path: float = 0.0,
    frozen: bool = False,
    bias_resampling: Literal["linear", "geometric"] = "linear",
    seed: int = 0,
) -> Segmenter:
    """A segmenter with a backbone's weights.

    The backbone is brought to the images' size (up to a whole number of patches), with its
    positions carried over; a shared relative position bias is copied into each layer and then
    learnt per layer, as in fine-tuning.

    Args:
        size: (height, width) of the images that it is trained on.
        drop_path: stochastic depth rate.
        frozen: only the head learns.

    Raises:
        ModelError: the backbone cannot have that size, that drop path or that head.
    """
    sees = seen_size(backbone, size)
    backbone = resize(_rebuilt(backbone, drop_path), sees, how=bias_resampling)
    return Segmenter(
        backbone, size=size, class_names=class_names, shape=shape, frozen=frozen, seed=seed
    )


def seen_size(backbone: Backbone, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size, not below `size`, that is a whole number of the coarsest map's cells."""
    if not backbone.fixed_size:
        return size
    cells = backbone.layer_grids or (backbone.grid,)
    unit = max(round(backbone.image_size[0] / rows) for rows, _ in cells)
    return unit * ceil(size[0] / unit), unit * ceil(size[1] / unit)


def _rebuilt(backbone: Backbone, drop_path: float) -> Backbone:
    """The backbone with a drop path, and with a table of its own in each layer."""
    build = backbone.build
    if build is None:
        if drop_path:
            raise ModelError(
                f"'{backbone.origin.spec}' has no drop path of timm's", fix="give --drop-path 0"
            )
        return backbone
    arguments, state = dict(build.arguments), dict(backbone.model.state_dict())
    if SHARED_TABLE in state:
        arguments |= {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}
        state = untie_tables(state, layers=len(backbone.model.blocks))
    build = TimmBuild(build.architecture, arguments)
    model = create(
        build.architecture, **arguments, **drop_path_argument(build.architecture, drop_path)
    )
    load_exactly(model, state, what=backbone.origin.spec)
    return backbone.around(
        model, build=build, class_names=backbone.class_names, projection=backbone.projection
    )


def pooled_over_batch(segmenter: Segmenter) -> bool:
    """Whether a part normalises over the batch alone, so that a batch of one is none."""
    return isinstance(segmenter.head, UperHead)


def describe(segmenter: Segmenter) -> str:
    """`UperNet, 512 channels, on layers 2, 5, 8, 11; 33,315,990 parameters beside the backbone`."""
    count = sum(p.numel() for part in segmenter.heads for p in part.parameters())
    if isinstance(segmenter.head, UperHead):
        layers = ", ".join(map(str, segmenter.layers))
        channels = segmenter.head.classifier.in_channels
        what = f"UperNet, {channels} channels, on layers {layers}"
    else:
        what = "a linear head on the last map"
    return f"{what}; {count:,} parameters beside the backbone"

"""Four maps of a backbone at about 4, 8, 16 and 32 pixels a cell, as dense heads want them.

B batch, C channels, h w a map's own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Levels:
    """Which layers of a backbone make the pyramid.

    Attributes:
        indices: of the layers, shallow to deep.
        widths: their channels.
        plain: they share one grid, from which the four sizes must be made.
    """

    indices: tuple[int, ...]
    widths: tuple[int, ...]
    plain: bool


def levels_of(backbone: Backbone, layers: Sequence[int] | None = None) -> Levels:
    """The layers of the pyramid: equally spaced blocks of a plain ViT, or a hierarchy's stages.

    Args:
        layers: take these instead.

    Raises:
        ModelError: the model shows no layers, or not such.
    """
    widths, grids = backbone.layer_widths, backbone.layer_grids
    count, spec = len(grids), backbone.origin.spec
    if not count:
        raise ModelError(
            f"'{spec}' shows no intermediate layers, which UperNet needs", fix="use --head linear"
        )
    plain = len(set(grids)) == 1
    if layers is None:
        if count < len(STRIDES):
            raise ModelError(
                f"'{spec}' has {count} layers, and UperNet needs {len(STRIDES)}",
                fix="use --head linear, or name layers more than once: --head.layers 0,1,1,2",
            )
        chosen = [count * (i + 1) // 4 - 1 for i in range(4)] if plain else range(count - 4, count)
    else:
        chosen = [i + count if i < 0 else i for i in layers]
        if len(chosen) != len(STRIDES) or any(not 0 <= i < count for i in chosen):
            raise ModelError(
                f"layers {', '.join(map(str, layers))} of '{spec}' for the pyramid",
                expected=f"{len(STRIDES)} numbers from 0 to {count - 1}, or -{count} to -1",
            )
        if sorted(chosen) != list(chosen):
            raise ModelError(
                f"layers {', '.join(map(str, layers))} for the pyramid",
                expected="them from shallow to deep",
            )
    return Levels(tuple(chosen), tuple(widths[i] for i in chosen), plain)


class PlainPyramid(nn.Module):
    """Maps of one size made finer by deconvolution and coarser by pooling.

    Source: BEiT's `beit/semantic_segmentation/backbone/beit.py` (fpn1 .. fpn4), for any patch: a
    patch of p pixels counts as the nearest power of two.
    """

    def __init__(self, widths: Sequence[int], patch: int) -> None:
        super().__init__()
        have = round(log2(patch))
        self.scales = nn.ModuleList(
            _scaled(width, have - round(log2(stride)))
            for width, stride in zip(widths, STRIDES, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [scale(map_) for scale, map_ in zip(self.scales, maps, strict=True)]


def _scaled(width: int, doublings: int) -> nn.Module:
    """A map made 2 ** `doublings` times finer (or coarser, where that is negative)."""
    if doublings == 0:
        return nn.Identity()
    if doublings < 0:
        side = 2**-doublings
        return nn.MaxPool2d(side, side, ceil_mode=True)
    layers: list[nn.Module] = []
    for step in range(doublings):
        if step:
            layers += [nn.BatchNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width, kernel_size=2, stride=2))
    return nn.Sequential(*layers)


class StagePyramid(nn.Module):
    """A hierarchy's own maps, each under a fresh norm (as Swin's and ConvNeXt's segmenters)."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [norm(map_) for norm, map_ in zip(self.norms, maps, strict=True)]

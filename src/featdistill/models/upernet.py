"""UperNet's decoder and the heads beside it (Xiao et al. 2018, arXiv 1807.10221).

transformers has these heads too; why they are not taken is in docs/decisions.md. A test holds ours
to theirs: equal output from equal weights, and the published number of parameters.

B batch, K classes, h w a map's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Drop = Callable[[Tensor], Tensor]  # before the classifier, in training
POOLS = (1, 2, 3, 6)  # cells a side of the pyramid pooling


def conv_block(inputs: int, outputs: int, side: int) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; the map keeps its size."""
    conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def classifier(inputs: int, classes: int) -> nn.Conv2d:
    """A linear map for each cell, small at first (as mmsegmentation's heads)."""
    conv = nn.Conv2d(inputs, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _to(map_: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(map_, like.shape[-2:], mode="bilinear", align_corners=False)


class UperHead(nn.Module):
    """Pyramid pooling on the deepest map, a feature pyramid over all, one prediction.

    Args:
        widths: channels of the maps, fine to coarse.
        channels: of everything inside.
        classes: K.
    """

    def __init__(self, widths: Sequence[int], *, channels: int, classes: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(conv_block(widths[-1], channels, 1) for _ in POOLS)
        self.bottleneck = conv_block(widths[-1] + len(POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv_block(width, channels, 1) for width in widths[:-1])
        self.smooth = nn.ModuleList(conv_block(channels, channels, 3) for _ in widths[:-1])
        self.join = conv_block(len(widths) * channels, channels, 3)
        self.classifier = classifier(channels, classes)

    def forward(self, maps: Sequence[Tensor], drop: Drop | None = None) -> Tensor:
        """Logits (B, K, h, w) at the finest map's size."""
        deepest = maps[-1]
        pooled = [
            _to(pool(F.adaptive_avg_pool2d(deepest, side)), deepest)
            for side, pool in zip(POOLS, self.pools, strict=True)
        ]
        paths = [lateral(m) for lateral, m in zip(self.laterals, maps[:-1], strict=True)]
        paths.append(self.bottleneck(torch.cat([deepest, *pooled], dim=1)))
        for i in range(len(paths) - 1, 0, -1):
            paths[i - 1] = paths[i - 1] + _to(paths[i], paths[i - 1])
        outs = [smooth(path) for smooth, path in zip(self.smooth, paths[:-1], strict=True)]
        outs.append(paths[-1])
        joined = self.join(torch.cat([outs[0], *(_to(out, outs[0]) for out in outs[1:])], dim=1))
        return self.classifier(joined if drop is None else drop(joined))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier: the auxiliary head (Long et al. 2015)."""

    def __init__(self, width: int, *, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = conv_block(width, channels, 3)
        self.classifier = classifier(channels, classes)

    def forward(self, map_: Tensor, drop: Drop | None = None) -> Tensor:
        """Logits (B, K, h, w) at the map's size."""
        seen = self.conv(map_)
        return self.classifier(seen if drop is None else drop(seen))


class LinearHead(nn.Module):
    """A fresh norm and a linear map for each token, as the house's classifiers have."""

    def __init__(self, width: int, *, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = classifier(width, classes)

    def forward(self, map_: Tensor, drop: Drop | None = None) -> Tensor:
        """Logits (B, K, h, w) at the map's size."""
        seen = self.norm(map_.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classifier(seen if drop is None else drop(seen))

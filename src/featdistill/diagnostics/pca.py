"""Patch features as colours: the first three principal components, shared by all images.

n images, C channels, h w the token grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TAIL = 0.01  # share of tokens that may be out of the colour range at either end


@dataclass(frozen=True)
class PcaPictures:
    """Colours for patch features.

    Attributes:
        colours: (n, h, w, 3) float64 in [0, 1]: components 1 to 3 as red, green and blue, each
            scaled over all images; white where it is background.
        foreground: (n, h, w) bool; all true unless it was asked for.
        explained: (3,) share of the (foreground) tokens' variance that each component holds.
    """

    colours: Tensor
    foreground: Tensor
    explained: Tensor


@torch.no_grad()
def pca_pictures(maps: Tensor, *, foreground: bool = False) -> PcaPictures:
    """The pictures that are customary since DINOv2 (Oquab et al. 2023, arXiv 2304.07193, figure 1).

    A component's sign is arbitrary; here its largest loading is positive, so that a model gives the
    same picture each time. Colours of two models cannot be compared, shapes can.

    Args:
        maps: (n, C, h, w), at least 4 tokens in all.
        foreground: cut the tokens in two by the sign of the first component, take the side that has
            fewer tokens on the images' borders, and find the components in it alone. Right where
            images show one thing in the middle.
    """
    n, channels, height, width = maps.shape
    rows = maps.double().permute(0, 2, 3, 1).reshape(-1, channels).cpu()
    assert len(rows) >= 4, maps.shape
    kept = torch.ones(len(rows), dtype=torch.bool)
    if foreground:
        kept = _foreground(_components(rows, 1)[0][:, 0].view(n, height, width)).flatten()
    scores, explained = _components(rows[kept], 3)
    low, high = (scores.quantile(q, dim=0) for q in (_TAIL, 1 - _TAIL))
    scaled = (scores - low) / (high - low).clamp(min=1e-12)
    colours = torch.ones(len(rows), 3, dtype=torch.float64)
    colours[kept] = scaled.clamp(0, 1)
    return PcaPictures(colours.view(n, height, width, 3), kept.view(n, height, width), explained)


def _components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores (rows, count) of the first components, and their shares of the variance; 0 past C."""
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    values, vectors = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    scores = centred @ (vectors * largest.sign())
    missing = count - scores.shape[1]
    pad = torch.nn.functional.pad
    total = centred.square().sum().clamp(min=1e-300)
    return pad(scores, (0, missing)), pad(values / total, (0, missing))


def _foreground(scores: Tensor) -> Tensor:
    """Of scores (n, h, w), the tokens on that side of zero that touches the borders less."""
    side = scores > 0
    border = torch.zeros(scores.shape[1:], dtype=torch.bool)
    border[[0, -1], :] = True
    border[:, [0, -1]] = True
    # of each side the share of its tokens that lie on a border
    shares = [float(s[:, border].sum()) / max(int(s.sum()), 1) for s in (side, ~side)]
    chosen = side if shares[0] <= shares[1] else ~side
    return chosen if int(chosen.sum()) >= 4 else torch.ones_like(chosen)

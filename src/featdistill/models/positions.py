"""Position tensors at another image size: absolute embeddings and relative bias tables.

L rows of a table, H heads, w side of a window, P prefix tokens, N = P + h w positions, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

BiasResampling = Literal["linear", "geometric"]
_TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{_TABLE}"
_CLS_ROWS = 3  # of a Beit's table: CLS to token, token to CLS, CLS to CLS
_CARRIED = (VisionTransformer, Beit, SwinTransformer, SwinTransformerV2)


def resize_absolute(positions: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """An absolute position embedding (1, P + h w, C) on another grid.

    Bicubic and antialiased, as timm and PIL do it; the prefix is kept. The old grid is a square.
    """
    kept, tokens = positions[:, :prefix], positions[:, prefix:]
    side = isqrt(tokens.shape[1])
    assert side * side == tokens.shape[1], tuple(positions.shape)
    if (side, side) == grid:
        return positions
    image = tokens.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, grid, mode="bicubic", antialias=True, align_corners=False)
    moved = image.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(positions.dtype)
    return torch.cat([kept, moved], dim=1)


def resize_bias_table(
    table: Tensor, window: tuple[int, int], *, extra: int = 0, how: BiasResampling = "linear"
) -> Tensor:
    """A relative position bias table (L, H) for another window.

    Args:
        window: (height, width) of the new window; the old one is a square.
        extra: rows at the end that belong to no offset (a Beit's CLS), which are kept.
        how: `linear` stretches the table over the new offsets (bicubic, antialiased), so that an
            offset keeps its meaning as a share of the image. `geometric` keeps near offsets in
            their places, in tokens, and stretches the far ones more and more: the old rows stand
            at 0, 1, 1 + q, 1 + q + q^2, ... of the new offsets, with q such that the last ones
            meet, and cubic splines go through them (BEiT's fine-tuning; Bao et al. 2021).
    """
    bias, kept = table[: len(table) - extra], table[len(table) - extra :]
    side = isqrt(len(bias))
    assert side * side == len(bias), tuple(table.shape)
    new = (2 * window[0] - 1, 2 * window[1] - 1)
    if (side, side) == new:
        return table
    image = bias.T.reshape(-1, side, side).float()
    if how == "linear":
        moved = F.interpolate(image[None], new, mode="bicubic", antialias=True)[0]
    else:
        moved = _geometric(image, new)
    return torch.cat([moved.flatten(1).T.to(table.dtype), kept])


def _geometric(image: Tensor, new: tuple[int, int]) -> Tensor:
    """Cubic splines through heads' tables (H, 2w-1, 2w-1) at geometrically growing offsets."""
    from scipy.interpolate import RectBivariateSpline

    side = image.shape[1]
    old = [_offsets(side // 2, size // 2) for size in new]
    wanted = [np.arange(-(size // 2), size // 2 + 1) for size in new]
    degree = min(3, side - 1)
    heads = [
        RectBivariateSpline(*old, head.cpu().numpy(), kx=degree, ky=degree)(*wanted)
        for head in image
    ]
    return torch.from_numpy(np.stack(heads)).float().to(image.device)


def _offsets(old: int, new: int) -> np.ndarray:
    """Where the old offsets -old..old stand among the new ones: sums of a geometric sequence."""
    low, high = 1.01, 1.5  # BEiT's limits of the ratio
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**old) / (1 - ratio) > new else (ratio, high)
    ratio = (low + high) / 2
    reached = np.cumsum(ratio ** np.arange(old))
    return np.concatenate([-reached[::-1], [0.0], reached])


@dataclass(frozen=True)
class Carried:
    """A state dict for a model of another size, and the names of the tensors that changed."""

    tensors: dict[str, Tensor]
    resized: tuple[str, ...]


def can_carry(model: nn.Module) -> bool:
    """Whether `carry_positions` knows the family."""
    return isinstance(model, _CARRIED)


def carry_positions(
    tensors: Mapping[str, Tensor], model: Any, *, how: BiasResampling = "linear"
) -> Carried:
    """Weights of a model of one size, for the same architecture built for another."""
    out = dict(tensors)
    resized = []
    positions = tensors.get("pos_embed")
    if positions is not None and getattr(model, "pos_embed", None) is not None:
        prefix = 0 if getattr(model, "no_embed_class", False) else _prefix(model)
        out["pos_embed"] = resize_absolute(positions, prefix, model.patch_embed.grid_size)
        if out["pos_embed"] is not positions:
            resized.append("pos_embed")
    for name, table in tensors.items():
        if name.endswith(_TABLE):
            holder = model.get_submodule(name.removesuffix(f".{_TABLE}"))
            extra = _CLS_ROWS if isinstance(model, Beit) else 0
            out[name] = resize_bias_table(table, tuple(holder.window_size), extra=extra, how=how)
            if out[name] is not table:
                resized.append(name)
    return Carried(out, tuple(resized))


def layer_table(layer: int) -> str:
    """Name of a Beit layer's own relative position bias table."""
    return f"blocks.{layer}.attn.{_TABLE}"


def untie_tables(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """One table for all layers of a Beit as a copy in each; added to a layer's own, if it has one.

    The biases that the layers see stay what they were.
    """
    out = dict(tensors)
    shared = out.pop(SHARED_TABLE, None)
    if shared is None:
        return out
    for layer in range(layers):
        own = out.get(layer_table(layer))
        out[layer_table(layer)] = shared.clone() if own is None else own + shared
    return out


def tie_tables(tensors: Mapping[str, Tensor], layers: int) -> tuple[dict[str, Tensor], float]:
    """The tables of a Beit's layers as one for all: their mean.

    Returns:
        The tensors, and how far the layers' tables are from their mean at most (0: nothing lost).
    """
    out = dict(tensors)
    own = [out.pop(layer_table(layer)) for layer in range(layers) if layer_table(layer) in out]
    if len(own) < layers:
        return dict(tensors), 0.0
    stacked = torch.stack(own)
    # equal tables are that table to the bit, which their mean would be only almost
    mean = own[0] if all(torch.equal(t, own[0]) for t in own) else stacked.mean(0)
    out[SHARED_TABLE] = mean + out[SHARED_TABLE] if SHARED_TABLE in out else mean
    return out, float((stacked - mean).abs().max())


def _prefix(model: Any) -> int:
    """Prefix tokens that have a row in the absolute positions."""
    return int(model.num_prefix_tokens)

"""What the measures of attention share: one layer's rows without prefix, and their products.

Dimensions: B images, W windows, H heads, N all tokens of a window, n its patch tokens.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from featdistill.diagnostics.attention_layout import TokenLayout

_TINY = torch.finfo(torch.float32).tiny  # what a weight of zero counts as in a logarithm


class Rows:
    """A layer's attention among patch tokens, rows renormalised; each product is made once.

    Attributes:
        values: (B * W, n, H, n) float32: image and window, query, head, key. Heads beside each
            other make every comparison of heads a small matrix product.
    """

    def __init__(self, weights: Tensor, layout: TokenLayout) -> None:
        layout.check(weights)
        self.layout, self.weights = layout, weights
        self.geometry = layout.geometry(weights.device)
        self.windows, self.heads, self.patches = layout.windows, weights.shape[1], layout.patches
        self.images = len(weights) // self.windows
        p = layout.prefix
        patches = weights[:, :, p:, p:].transpose(1, 2)
        rows = torch.empty(patches.shape, dtype=torch.float32, device=weights.device)
        if self.geometry.allowed is not None:
            rows.copy_(patches)
            by_window = rows.unflatten(0, (self.images, self.windows))
            by_window.mul_(self.geometry.allowed[None, :, :, None, :])
            rows.div_(rows.sum(-1, keepdim=True).clamp_min_(_TINY))
        elif p:  # as one pass over memory, which is what the measures take their time for
            torch.div(patches, patches.sum(-1, keepdim=True).clamp_min_(_TINY), out=rows)
        else:
            rows.copy_(patches)
        self.values = rows

    @cached_property
    def prefix_mass(self) -> Tensor:
        """(B * W, n, H): what each patch gives to the prefix tokens."""
        p = self.layout.prefix
        return self.weights[:, :, p:, :p].sum(-1).transpose(1, 2)

    @cached_property
    def keys(self) -> Tensor:
        """(B * W, n, 1): how many keys each query may see."""
        return self.geometry.keys.repeat(self.images, 1).unsqueeze(-1)

    @cached_property
    def distance(self) -> Tensor:
        """(B * W, n, H): expected distance of the key, in patches."""
        d = self.geometry.distance[None, :, :, None]
        return torch.matmul(self.values, d).squeeze(-1)

    @cached_property
    def gram(self) -> Tensor:
        """(B * W, n, H, H): inner products of the heads' rows, less uniform attention."""
        if self.geometry.allowed is None:
            centred = self.values - 1 / self.patches
        else:
            uniform = self.geometry.allowed / self.geometry.keys[:, :, None]
            by_window = self.values.unflatten(0, (self.images, self.windows))
            centred = (by_window - uniform[None, :, :, None, :]).flatten(0, 1)
        return centred @ centred.mT

    @cached_property
    def cross(self) -> Tensor:
        """(B * W, n, H, H): sum over keys of a[h] log a[g]; zero weights count as 1.2e-38."""
        return self.values @ self.values.clamp_min(_TINY).log_().mT

    @cached_property
    def entropy(self) -> Tensor:
        """(B * W, n, H): of each row, in nats."""
        return -self.cross.diagonal(dim1=-2, dim2=-1)

    @cached_property
    def whole(self) -> Tensor:
        """(B, W', n, H, n): the windows that no shift mask divides."""
        by_window = self.values.unflatten(0, (self.images, self.windows))
        if self.geometry.allowed is None:
            return by_window
        return by_window[:, self.geometry.whole]

    def per_image(self, of_rows: Tensor) -> Tensor:
        """(B, ...) float64: mean over all queries of (B * W, n, ...)."""
        by_image = of_rows.unflatten(0, (self.images, self.windows))
        return by_image.double().mean((1, 2))

    def only_whole(self, of_rows: Tensor) -> Tensor:
        """(B, W', n, ...): (B * W, n, ...) of the windows in `whole`."""
        by_image = of_rows.unflatten(0, (self.images, self.windows))
        return by_image if self.geometry.allowed is None else by_image[:, self.geometry.whole]

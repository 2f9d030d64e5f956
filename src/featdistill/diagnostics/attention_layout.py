"""Which token of an attention map stands where in the image.

Dimensions: W windows of an image, n patch tokens of a window, h w the grid of patch tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.diagnostics.capture import Window


@dataclass(frozen=True)
class TokenLayout:
    """Where a layer's tokens stand.

    Attributes:
        grid: (h, w) patch tokens of the whole map.
        prefix: tokens before the patches (CLS, registers).
        patch: pixels of the image for a step from a patch token to the next.
        window: how the map is cut into windows, if it is.
    """

    grid: tuple[int, int]
    prefix: int = 0
    patch: float = 1.0
    window: Window | None = None

    @property
    def patches(self) -> int:
        """Patch tokens that attend to each other: n."""
        h, w = self.grid if self.window is None else self.window.size
        return h * w

    @property
    def windows(self) -> int:
        """W."""
        return 1 if self.window is None else self.window.count

    def check(self, weights: Tensor) -> None:
        """Raise ModelError unless `weights` (B * W, H, N, N) are of this layout."""
        want = self.prefix + self.patches
        if weights.ndim != 4 or weights.shape[2:] != (want, want) or len(weights) % self.windows:
            raise ModelError(
                f"attention weights of shape {tuple(weights.shape)}",
                expected=f"(images * {self.windows}, heads, {want}, {want}) for {self.prefix} "
                f"prefix tokens and {self.patches} patches",
            )

    def geometry(self, device: torch.device) -> Geometry:
        """Distances, and who may see whom."""
        return _geometry(self.grid, self.window, device)


@dataclass(frozen=True)
class Geometry:
    """A layout's numbers.

    Attributes:
        distance: (n, n) Euclidean, in patches, of the tokens of a window. Between tokens that the
            shift has put beside each other it has no meaning, but there no weight is either.
        keys: (W, n) how many tokens each query may see.
        allowed: (W, n, n) which; None: all of its window.
        whole: (W,) windows that the shift mask does not divide.
        uniform: mean distance of uniform attention over what each query may see, in patches.
    """

    distance: Tensor
    keys: Tensor
    allowed: Tensor | None
    whole: Tensor
    uniform: float


@lru_cache(maxsize=64)
def _geometry(grid: tuple[int, int], window: Window | None, device: torch.device) -> Geometry:
    size = grid if window is None else window.size
    points = torch.cartesian_prod(*(torch.arange(s, dtype=torch.float64) for s in size))
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    parts = torch.zeros(1, len(points)) if window is None else _parts(window)
    allowed = parts[:, :, None] == parts[:, None, :]
    keys = allowed.sum(-1).double()
    whole = allowed.flatten(1).all(1)
    uniform = float(((allowed * distance).sum(-1) / keys).mean())
    return Geometry(
        distance=distance.float().to(device),
        keys=keys.float().to(device),
        allowed=None if whole.all() else allowed.to(device),
        whole=whole.to(device),
        uniform=uniform,
    )


def _parts(window: Window) -> Tensor:
    """(W, n): tokens of a window with the same number stand beside each other in the image.

    Swin rolls the map by `shift` and then cuts it (Liu et al. 2021, arXiv 2103.14030, figure 4);
    what was rolled over an edge sees only what was rolled over the same edge.
    """
    (h, w), (down, right) = window.grid, window.shift
    rolled_over_y = torch.arange(h) >= h - down
    rolled_over_x = torch.arange(w) >= w - right
    part = 2 * rolled_over_y[:, None].int() + rolled_over_x[None, :].int()
    wh, ww = window.size
    return (
        part.unflatten(0, (h // wh, wh))
        .unflatten(2, (w // ww, ww))
        .transpose(1, 2)
        .flatten(2)
        .flatten(0, 1)
    )


def layout_for(
    tokens: int,
    *,
    window: Window | None = None,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> TokenLayout:
    """The layout of a layer with `tokens` tokens (of a window, if there are windows).

    Args:
        grid, prefix: of the model, if they are known; otherwise the largest square grid counts
            as patches, and what is left before it as prefix (at most 8 tokens).
        image_size: (height, width) pixels, for distances in pixels.

    Raises:
        ModelError: the tokens do not make such a grid.
    """
    if window is not None:
        found, prefix = window.grid, 0
        if tokens != window.size[0] * window.size[1]:
            raise ModelError(f"{tokens} tokens in windows of {window.size[0]}x{window.size[1]}")
    elif grid is not None:
        prefix = tokens - grid[0] * grid[1] if prefix is None else prefix
        found = grid
    else:
        side = int(tokens**0.5)
        found, prefix = (side, side), tokens - side * side if prefix is None else prefix
        if prefix > 8:
            raise ModelError(
                f"{tokens} tokens make no square grid",
                expected="a square image, and at most 8 tokens before the patches",
                fix="give the token layout (TokenLayout) yourself",
            )
    if window is None and prefix + found[0] * found[1] != tokens:
        raise ModelError(
            f"a layer attends among {tokens} tokens",
            expected=f"{prefix} prefix tokens and a grid of {found[0]}x{found[1]}",
            fix="such layers (of channels, of pooled tokens) have no attention distance",
        )
    patch = 1.0 if image_size is None else image_size[0] / found[0]
    return TokenLayout(found, prefix, patch, window)

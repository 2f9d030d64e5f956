"""All measures of attention for every layer of a model, one layer in memory at a time.

Dimensions: B images, H heads, N tokens of a window, n its patch tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from featdistill.core.errors import ModelError
from featdistill.diagnostics.attention import (
    AttentionDistance,
    AttentionEntropy,
    HeadDivergence,
    HeadSimilarity,
    MeanMaps,
    Measure,
    MutualInformation,
    PrefixMass,
)
from featdistill.diagnostics.attention_layout import TokenLayout, layout_for
from featdistill.diagnostics.attention_rows import Rows
from featdistill.diagnostics.capture import CapturedAttention, capture_attention

# where timm and PyTorch keep what makes queries and keys: without it, only the bias is left
_CONTENT = frozenset(
    (
        *("qkv", "q_bias", "k_bias", "v_bias", "in_proj_weight", "in_proj_bias"),
        *("q_proj", "k_proj", "q_norm", "k_norm", "query", "key"),
    )
)


class LayerAttention:
    """One layer's measures.

    Attributes:
        similarity, divergence: None for a single head, which is like no other.
    """

    def __init__(self, layout: TokenLayout, heads: int) -> None:
        self.layout, self.heads = layout, heads
        self.distance = AttentionDistance()
        self.entropy = AttentionEntropy()
        self.information = MutualInformation()
        self.prefix_mass = PrefixMass()
        self.maps = MeanMaps()
        self.similarity = HeadSimilarity() if heads > 1 else None
        self.divergence = HeadDivergence() if heads > 1 else None

    @property
    def measures(self) -> list[Measure]:
        """Those that there are."""
        every = (
            self.distance,
            self.entropy,
            self.information,
            self.prefix_mass,
            self.maps,
            self.similarity,
            self.divergence,
        )
        return [m for m in every if m is not None]

    def add(self, rows: Rows) -> None:
        """Take in a batch's rows."""
        for measure in self.measures:
            measure.add(rows)

    def merge(self, other: Self) -> None:
        """Take in what another process has seen of the same layer."""
        for mine, theirs in zip(self.measures, other.measures, strict=True):
            mine.merge(theirs)


@dataclass(frozen=True)
class Tokens:
    """What a model's layers without windows attend among; None: found from their number.

    Attributes:
        grid: (h, w) patch tokens.
        prefix: tokens before them.
        image_size: (height, width) pixels; None: distances count patches.
    """

    grid: tuple[int, int] | None = None
    prefix: int | None = None
    image_size: tuple[int, int] | None = None


class ModelAttention:
    """The layers of a model; an instance is a sink for `capture_attention`.

    Attributes:
        layers: by the name of the module, in the order in which they run.
    """

    def __init__(self, tokens: Tokens | None = None) -> None:
        self.tokens = tokens or Tokens()
        self.layers: dict[str, LayerAttention] = {}

    def __call__(self, seen: CapturedAttention) -> None:
        rows = self.rows(seen)
        layer = self.layers.get(seen.layer)
        if layer is None:
            layer = self.layers[seen.layer] = LayerAttention(rows.layout, rows.heads)
        elif layer.layout != rows.layout or layer.heads != rows.heads:
            raise ModelError(
                f"'{seen.layer}' attends among {rows.layout.patches} patches, and among "
                f"{layer.layout.patches} before",
                expected="images of one size",
            )
        layer.add(rows)

    def rows(self, seen: CapturedAttention) -> Rows:
        """A captured layer without its prefix."""
        layout = layout_for(
            seen.weights.shape[-1],
            window=seen.window,
            grid=self.tokens.grid,
            prefix=self.tokens.prefix,
            image_size=self.tokens.image_size,
        )
        return Rows(seen.weights, layout)

    def merge(self, other: ModelAttention) -> None:
        """Take in what another process has seen of other images."""
        for name, layer in other.layers.items():
            if name in self.layers:
                self.layers[name].merge(layer)
            else:
                self.layers[name] = layer


@torch.no_grad()
def bias_alone(model: nn.Module, image: Tensor, tokens: Tokens | None = None) -> ModelAttention:
    """What the position bias of each layer attends to by itself: softmax(bias), as a control.

    Queries and keys are made zero for one pass, so that nothing but biases and masks is left; the
    model itself is not touched. Layers that are uniform then have no bias, and are left out.

    Args:
        image: (1, 3, height, width), any.
    """
    attention = ModelAttention(tokens)
    zeros = {
        name: torch.zeros_like(parameter)
        for name, parameter in (*model.named_parameters(), *model.named_buffers())
        if any(part in _CONTENT for part in name.split("."))
    }

    def sink(seen: CapturedAttention) -> None:
        rows = attention.rows(seen)
        uniform = rows.keys.reciprocal()[..., None]
        allowed = rows.values > 0
        if float(((rows.values - uniform) * allowed).abs().max()) > 1e-6 * float(uniform.max()):
            attention(seen)

    with capture_attention(model, sink):
        functional_call(model, zeros, (image,))
    return attention


def layer_results(layer: LayerAttention, unit: Any) -> dict[str, Any]:
    """A layer's numbers by name, arrays for heads; errors beside them as `NAME_error`."""
    found: dict[str, Any] = {}
    estimates = {
        "distance": layer.distance.compute(unit),
        "distance_relative": layer.distance.compute("relative"),
        "entropy": layer.entropy.compute(),
        "entropy_relative": layer.entropy.compute("relative"),
        "nmi": layer.information.compute(),
        "prefix_mass": layer.prefix_mass.compute(),
    }
    if layer.similarity is not None and layer.divergence is not None:
        alike = layer.similarity.compute()
        estimates |= {
            "similarity": alike.per_query,
            "similarity_flat": alike.flat,
            "similarity_centred": alike.per_query_centred,
            "similarity_flat_centred": alike.flat_centred,
            "divergence": layer.divergence.compute(),
        }
    for name, estimate in estimates.items():
        found |= {name: estimate.mean, f"{name}_error": estimate.error}
    whole, heads = layer.maps.layer_pattern(), layer.maps.pattern()
    return found | {
        "column_r2": whole.column,
        "relative_r2": whole.relative,
        "column_r2_heads": heads.column,
        "relative_r2_heads": heads.relative,
    }

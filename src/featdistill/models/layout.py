"""How timm's families lay out their features: prefix tokens, axes, and where the last norm is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.layers import NormMlpClassifierHead
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featdistill.core.errors import ModelError


@dataclass(frozen=True)
class Layout:
    """What has to be known of a timm model to read its features.

    Attributes:
        prefix_names: names of the tokens before the map.
        channels_last: 4-d maps are (B, h, w, C).
        head_norm: the final norm, where the family keeps it in its head and applies it after
            pooling; here it is applied token by token.
    """

    prefix_names: tuple[str, ...]
    channels_last: bool
    head_norm: nn.Module | None

    def split(self, final: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """timm's `forward_features` as (map (B, C, h, w), prefix (B, P, C)), normed."""
        batch = final.shape[0]  # len() would fix it in an exported graph
        if final.ndim == 4:
            if self.channels_last:
                final = final.permute(0, 3, 1, 2)
            if self.head_norm is not None:
                final = _norm_map(self.head_norm, final)
            return final, final.new_empty(batch, 0, final.shape[1])
        if final.ndim != 3:
            raise ModelError(
                f"the model's features have shape {tuple(final.shape)}",
                expected="tokens (B, N, C) or a map (B, C, h, w)",
            )
        if self.head_norm is not None:
            final = self.head_norm(final)
        p = len(self.prefix_names)
        tokens = final[:, p:].transpose(1, 2)
        h, w = grid if grid is not None else _square(tokens.shape[2])
        return tokens.reshape(batch, final.shape[2], h, w), final[:, :p]


def _norm_map(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm) and not _is_channels_first(norm):
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return norm(x)


def _is_channels_first(norm: nn.Module) -> bool:
    from timm.layers import LayerNorm2d

    return isinstance(norm, LayerNorm2d)


def _square(tokens: int) -> tuple[int, int]:
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ModelError(f"{tokens} map tokens make no square grid", expected="a square image")
    return side, side


def layout_of(model: nn.Module) -> Layout:
    """The layout of a timm model, from its parts (never from its name)."""
    count = int(getattr(model, "num_prefix_tokens", 0) or 0)
    return Layout(
        prefix_names=_prefix_names(model, count),
        channels_last=getattr(model, "output_fmt", None) == "NHWC",
        head_norm=_head_norm(model),
    )


def _prefix_names(model: nn.Module, count: int) -> tuple[str, ...]:
    if getattr(model, "dist_token", None) is not None:
        return ("cls", "dist")[:count]
    has_cls = getattr(model, "cls_token", None) is not None
    first = ("cls",) if has_cls and count else ()
    return first + tuple(f"reg{i + 1}" for i in range(count - len(first)))


def _head_norm(model: nn.Module) -> nn.Module | None:
    head = getattr(model, "head", None)
    if isinstance(head, NormMlpClassifierHead) and not isinstance(head.norm, nn.Identity):
        return head.norm  # ConvNeXt and its relatives
    norm, fc_norm = getattr(model, "norm", None), getattr(model, "fc_norm", None)
    if isinstance(norm, nn.Identity) and isinstance(fc_norm, nn.Module):
        return None if isinstance(fc_norm, nn.Identity) else fc_norm  # BEiT, EVA02, pooled ViTs
    return None


def projects(model: Any) -> bool:
    """Whether a timm model's head is CLIP's projection and no classifier.

    timm keeps CLIP's projection as a head of `num_classes` outputs. It is known by the pre-norm,
    which only CLIP's image towers have, and by the bias that CLIP lacks: zero throughout.
    """
    head = getattr(model, "head", None)
    before = getattr(model, "norm_pre", None)
    if not isinstance(head, nn.Linear) or before is None or isinstance(before, nn.Identity):
        return False
    return head.bias is None or head.bias.is_meta or not bool(head.bias.any())


def grid_of(model: nn.Module, height: int, width: int) -> tuple[int, int] | None:
    """The token grid of an image, where the model has a patch embedding that knows."""
    embed = getattr(model, "patch_embed", None)
    if isinstance(model, VisionTransformer) or hasattr(model, "blocks"):
        dynamic = getattr(embed, "dynamic_feat_size", None)
        if dynamic is not None:
            return tuple(dynamic((height, width)))
    return None

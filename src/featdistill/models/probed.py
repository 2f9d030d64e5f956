"""A frozen backbone and a linear classifier of its pooled features as one timm model.

It exports, loads and predicts like a fine-tuned one, and its backbone is the one that was probed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone, TimmBuild
from featdistill.models.exports.common import probe_images, settled
from featdistill.models.pooling import PoolName, pool
from featdistill.models.timm_models import create, drop_path_argument
from featdistill.models.weights import load_exactly

_CLOSE = 1e-4  # of the largest logit
_IMAGES = 4


@torch.no_grad()
def probed_classifier(
    backbone: Backbone,
    weight: Tensor,
    bias: Tensor,
    *,
    how: PoolName,
    class_names: tuple[str, ...],
) -> Backbone | None:
    """The backbone under a given linear layer, as timm builds it.

    Whether timm pools as `how` is seen from what comes out: the logits of some images are compared.

    Args:
        weight: (K, D), `bias` (K,): of the vector that `pool(features, how)` gives.

    Returns:
        A classifier of its own, in evaluation mode; None if timm has none that pools so.
    """
    weight, bias = weight.cpu(), bias.cpu()
    with settled(backbone):
        images = probe_images(backbone, _IMAGES)
        wanted = pool(backbone(images), how) @ weight.T + bias
        head = _unprojected(backbone, weight, bias) if how == "model" else (weight, bias)
        for build, state in _candidates(backbone, how, len(bias)):
            try:
                found = _assembled(backbone, build, state, head, class_names)
            except ModelError:  # timm has no such arguments, or other tensors
                continue
            logits = None if found is None else found(images).logits
            if logits is None or logits.shape != wanted.shape:
                continue
            if (logits - wanted).abs().max() <= _CLOSE * wanted.abs().max():
                return found
    return None


def _candidates(
    backbone: Backbone, how: PoolName, classes: int
) -> Iterator[tuple[TimmBuild, dict[str, Tensor]]]:
    """Builds that may pool so, with the backbone's tensors under their names."""
    build, model = backbone.build, backbone.model
    if build is None or how == "both":
        return
    state: dict[str, Tensor] = dict(model.state_dict())
    arguments: dict[str, Any] = {**build.arguments, "num_classes": classes}
    if how != "model" and isinstance(model, Beit | Eva | VisionTransformer):
        # the norm before the pooling, token by token, as the backbone's features are
        after = "fc_norm" if isinstance(model, VisionTransformer) else "use_fc_norm"
        pooling = {"global_pool": "avg" if how == "mean" else "token", after: False}
        moved = {
            f"norm.{name.removeprefix('fc_norm.')}" if name.startswith("fc_norm.") else name: value
            for name, value in state.items()
            if not name.startswith("attn_pool.")
        }
        yield TimmBuild(build.architecture, {**arguments, **pooling}), moved
    yield TimmBuild(build.architecture, arguments), state


def _unprojected(backbone: Backbone, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The layer with CLIP's projection, a linear layer before it, taken into it."""
    if not backbone.projection:
        return weight, bias
    before = backbone.model.get_classifier()
    if before.bias is not None:
        bias = bias + weight @ before.bias
    return weight @ before.weight, bias


def _assembled(
    backbone: Backbone,
    build: TimmBuild,
    state: dict[str, Tensor],
    head: tuple[Tensor, Tensor],
    class_names: tuple[str, ...],
) -> Backbone | None:
    new: Any = create(
        build.architecture, **build.arguments, **drop_path_argument(build.architecture, 0.0)
    )
    weight, bias = head
    last = new.get_classifier()
    if not isinstance(last, nn.Linear) or last.bias is None or last.weight.shape != weight.shape:
        return None
    prefix = next(name for name, module in new.named_modules() if module is last) + "."
    body = {name: value for name, value in state.items() if not name.startswith(prefix)}
    body |= {f"{prefix}weight": weight, f"{prefix}bias": bias}
    load_exactly(new, body, what=backbone.origin.spec)
    return backbone.around(new, build=build, class_names=class_names).eval()

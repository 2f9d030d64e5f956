"""A backbone becomes a classifier: pooled, a fresh norm, a linear layer; in timm's own terms.

The result is again a `Backbone` over a plain timm model, so that it exports, loads and predicts
like any other. Other architectures get a generic head.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.seeds import seeded_globals
from featdistill.models.backbone import Backbone, TimmBuild
from featdistill.models.layout import layout_of
from featdistill.models.positions import SHARED_TABLE, untie_tables
from featdistill.models.timm_models import create, drop_path_argument
from featdistill.models.weights import load_exactly

PoolName = Literal["mean", "cls"]
HeadName = Literal["auto", "keep", "fresh"]
_VITS = (Beit, Eva, VisionTransformer)
_MAPS = (SwinTransformer, SwinTransformerV2, ConvNeXt, ResNet)
_HEAD_SCALE = 1e-3  # BEiT's: a head that starts near zero leaves the backbone's features be


def build_classifier(
    backbone: Backbone,
    *,
    class_names: tuple[str, ...],
    pool: PoolName = "mean",
    drop_path: float = 0.0,
    head: HeadName = "fresh",
    seed: int = 0,
) -> Backbone:
    """A classifier with the backbone's weights.

    ViTs: the final norm is left out and a fresh one follows the pooling; a shared relative
    position bias is copied into each layer, and then learnt per layer (as the official recipe
    does). Swin, ConvNeXt and ResNet keep their norm and pooling.

    Args:
        class_names: one a class.
        pool: mean over the map, or the CLS token (ViTs).
        drop_path: stochastic depth rate.
        head: `fresh`; `keep` the model's classifier, with the norm and pooling that it was trained
            with (`pool` is then not asked); `auto` keeps one that names the same classes.
        seed: of the new head.

    Returns:
        A backbone of its own; `backbone` is left as it is.

    Raises:
        ModelError: no CLS token to pool, or no such classifier to keep.
    """
    model = backbone.model
    if keeps_head(backbone, class_names, head):
        return _kept(backbone, class_names, drop_path)
    if pool == "cls" and "cls" not in backbone.prefix_names:
        raise ModelError(
            f"'{backbone.origin.spec}' has no CLS token to pool", fix="use --pool mean"
        )
    plain = isinstance(model, (*_VITS, *_MAPS)) and not hasattr(model, "dist_token")
    with seeded_globals("head", seed):
        if backbone.build is None or not plain:
            return _headed(backbone, class_names, pool, drop_path)
        new, build = _rebuild(backbone, len(class_names), pool, drop_path)
    return backbone.around(new, build=build, class_names=class_names)


def keeps_head(backbone: Backbone, class_names: tuple[str, ...], head: HeadName) -> bool:
    """Whether a classifier for these classes keeps the model's head.

    Raises:
        ModelError: it should, and there is none, or one for other classes.
    """
    same = backbone.class_names == class_names and backbone.build is not None
    if head != "keep":
        return head == "auto" and same
    spec, own = backbone.origin.spec, backbone.class_names
    if not backbone.num_classes or backbone.build is None:
        raise ModelError(f"'{spec}' has no classifier to keep", fix="use --head fresh")
    if own is None and backbone.num_classes == len(class_names):
        return True  # nameless, as timm's are: taken at the user's word
    if not same:
        differ = sorted(set(own or ()) ^ set(class_names))
        raise ModelError(
            f"the classifier of '{spec}' has {backbone.num_classes} classes, which are not the "
            f"data's {len(class_names)}"
            + (f" (in one only: {', '.join(differ[:8])})" if own and differ else ""),
            fix="use --head fresh",
        )
    return True


def _kept(backbone: Backbone, class_names: tuple[str, ...], drop_path: float) -> Backbone:
    assert backbone.build is not None
    build = backbone.build
    rate = drop_path_argument(build.architecture, drop_path)
    new = create(build.architecture, **build.arguments, **rate)
    load_exactly(new, dict(backbone.model.state_dict()), what=backbone.origin.spec)
    return backbone.around(new, build=build, class_names=class_names)


def _rebuild(
    backbone: Backbone, classes: int, pool: PoolName, drop_path: float
) -> tuple[nn.Module, TimmBuild]:
    assert backbone.build is not None
    model = backbone.model
    arguments: dict[str, Any] = {**backbone.build.arguments, "num_classes": classes}
    state = dict(model.state_dict())
    fresh: tuple[str, ...] = ("head.fc.",)
    if isinstance(model, _VITS):
        arguments["global_pool"] = "avg" if pool == "mean" else "token"
        # Beit's norm follows mean pooling by itself, and older timm, which may load the export, has
        # no argument for it; where the CLS token is taken, a norm before that is the same as behind
        if not isinstance(model, Beit):
            arguments["fc_norm" if isinstance(model, VisionTransformer) else "use_fc_norm"] = True
        fresh = ("norm.", "fc_norm.", "head.", "attn_pool.")
        if SHARED_TABLE in state:
            arguments |= {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}
            state = untie_tables(state, layers=len(model.blocks))
    elif isinstance(model, ResNet):
        fresh = ("fc.",)
    build = TimmBuild(backbone.build.architecture, arguments)
    new = create(build.architecture, drop_path_rate=drop_path, **arguments)
    _shrink_head(new)
    kept = {k: v for k, v in state.items() if not k.startswith(fresh)}
    kept |= {k: v for k, v in new.state_dict().items() if k.startswith(fresh)}
    load_exactly(new, kept, what=backbone.origin.spec)
    return new, build


@torch.no_grad()
def _shrink_head(model: Any) -> None:
    head = model.get_classifier()
    assert isinstance(head, nn.Linear)
    trunc_normal_(head.weight, std=0.02)
    head.weight.mul_(_HEAD_SCALE)
    nn.init.zeros_(head.bias)


class _Headed(nn.Module):
    """Any module with timm's feature interface, under a norm and a linear layer of its own."""

    def __init__(self, body: Backbone, classes: int, pool: PoolName) -> None:
        super().__init__()
        self.body = body.model
        self.pool = pool
        self._layout = body.layout
        self._grid = body.grid
        self.num_classes = classes
        self.feature_info = getattr(body.model, "feature_info", None)
        self.out_norm = nn.LayerNorm(body.width, eps=1e-6)
        self.out = nn.Linear(body.width, classes)

    def get_classifier(self) -> nn.Linear:
        return self.out

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body.forward_features(x)

    def forward_intermediates(self, x: Tensor, **options: Any) -> Any:
        return self.body.forward_intermediates(x, **options)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        map_, prefix = self._layout.split(x, self._grid)
        pooled = prefix[:, 0] if self.pool == "cls" else map_.mean((2, 3))
        pooled = self.out_norm(pooled)
        return pooled if pre_logits else self.out(pooled)


def _headed(
    backbone: Backbone, class_names: tuple[str, ...], pool: PoolName, drop_path: float
) -> Backbone:
    body = copy.deepcopy(backbone)
    build = backbone.build
    if drop_path and build is None:
        raise ModelError(
            f"'{backbone.origin.spec}' has no drop path of timm's", fix="give --drop-path 0"
        )
    if build is not None:
        rate = drop_path_argument(build.architecture, drop_path)
        body.model = create(build.architecture, **build.arguments, **rate)
        body.model.load_state_dict(backbone.model.state_dict())
        body.layout = layout_of(body.model)
    model = _Headed(body, len(class_names), pool)
    _shrink_head(model)
    return backbone.around(model, build=None, class_names=class_names, layout=body.layout)

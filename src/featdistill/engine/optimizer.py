"""AdamW, SGD and LARS, and their parameter groups: what decays, and how fast each layer learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featdistill.engine.schedule import Schedule

_TABLE = "relative_position_bias_table"
_TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")


def decays(name: str, parameter: nn.Parameter, model: nn.Module) -> bool:
    """Whether weight decay acts on a parameter.

    Not on biases, norms and other 1-d parameters, tokens and absolute positions, nor on Swin V2's
    position MLP and logit scale. ViT's relative bias table does decay (official code: models/*.py,
    `no_weight_decay` and `no_weight_decay_keywords`).
    """
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return False
    last = name.rsplit(".", 1)[-1]
    if last == _TABLE:
        return isinstance(model, Beit)
    return last not in _TOKENS and "cpb_mlp" not in name and "logit_scale" not in name


@dataclass(frozen=True)
class LayerGroups:
    """The layers of a model for layer-wise decay: `layer_of` a parameter's name, 0 .. `last`."""

    layer_of: Callable[[str], int]
    last: int

    def scale(self, name: str, decay: float) -> float:
        """Factor on the peak rate: 1 for the last layer, less for each before it."""
        return decay ** (self.last - self.layer_of(name))


def layer_groups(model: nn.Module) -> LayerGroups:
    """The official grouping (optimizer.py): embedding 0, block l is l + 1, everything else last.

    A shared bias counts as the last group; Swin's downsampling belongs to the end of the stage
    before it. CLIP's pre-norm, which no official student has, goes with the embedding that it ends.
    Other families are grouped by timm's own matcher.
    """
    body = getattr(model, "body", None)
    if isinstance(body, nn.Module):  # under a generic head: the body's groups, then the head
        inner = layer_groups(body)
        return LayerGroups(
            lambda name: (
                inner.layer_of(name.removeprefix("body."))
                if name.startswith("body.")
                else inner.last
            ),
            inner.last,
        )
    if isinstance(model, Beit | Eva | VisionTransformer):
        return _vit_groups(len(model.blocks))
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        return _swin_groups([len(stage.blocks) for stage in model.layers])
    return _timm_groups(model)


def _vit_groups(depth: int) -> LayerGroups:
    def layer_of(name: str) -> int:
        first, _, rest = name.partition(".")
        if first in ("patch_embed", "norm_pre", *_TOKENS):
            return 0
        if first == "blocks":
            return int(rest.partition(".")[0]) + 1
        return depth + 1

    return LayerGroups(layer_of, depth + 1)


def _swin_groups(depths: list[int]) -> LayerGroups:
    starts = [sum(depths[:stage]) for stage in range(len(depths))]

    def layer_of(name: str) -> int:
        parts = name.split(".")
        if parts[0] in ("patch_embed", *_TOKENS):
            return 0
        if parts[0] == "layers":
            start = starts[int(parts[1])]
            # timm keeps a downsampling at the head of the stage that follows it
            return start + int(parts[3]) + 1 if parts[2] == "blocks" else start
        return sum(depths) + 1

    return LayerGroups(layer_of, sum(depths) + 1)


def _timm_groups(model: nn.Module) -> LayerGroups:
    from timm.models import group_parameters

    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        return LayerGroups(lambda _: 0, 0)
    table: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
    return LayerGroups(lambda name: table[name], max(table.values()))


def parameter_groups(
    parts: Iterable[tuple[str, nn.Module]], *, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Optimiser groups of several modules; each trainable parameter is in exactly one.

    Args:
        parts: (prefix, module); a module called `backbone` is the one that layer decay acts on.

    Returns:
        Groups with `params`, `names`, `weight_decay` and `lr_scale`.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for prefix, module in parts:
        layers = layer_groups(module) if layer_decay < 1 else None
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = layers.scale(name, layer_decay) if layers else 1.0
            decay = decays(name, parameter, module)
            group = groups.setdefault(
                (scale, decay),
                {
                    "params": [],
                    "names": [],
                    "weight_decay": weight_decay if decay else 0.0,
                    "lr_scale": scale,
                },
            )
            group["params"].append(parameter)
            group["names"].append(f"{prefix}{name}")
    return list(groups.values())


def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW; its rates are set by the loop at every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Set the learning rate of each group for a step."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step, scale=group["lr_scale"])


class _Sgd(torch.optim.SGD):
    """torch's, whose momentum would begin with whatever was in memory if the first step is none."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return super().step(closure)


def sgd(groups: list[dict[str, Any]], *, momentum: float) -> torch.optim.SGD:
    """Fused SGD with momentum; its rates are set by the loop at every step."""
    return _Sgd(groups, lr=0.0, momentum=momentum, fused=True)


class Lars(torch.optim.Optimizer):
    """SGD whose rate is scaled by weight norm over gradient norm (You et al. 2017).

    1-d parameters are not scaled, as in MoCo v3 and MAE. Where `found_inf` is 1 nothing moves, as
    in torch's fused optimisers; timm's `Lars` does not know it.

    Args:
        groups: from `parameter_groups`; rates are set by the loop at every step.
        trust: the scale's coefficient.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], *, momentum: float, trust: float = 1e-3
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self._momentum, self._trust = momentum, trust

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, unless `found_inf` is 1; decided without asking the device."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])

    def _move(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        slope = parameter.grad
        assert slope is not None
        steepness, size = slope.norm(), parameter.norm()
        slope = slope.add(parameter, alpha=weight_decay)
        if parameter.ndim > 1:
            whole = steepness + weight_decay * size
            usable = (size > 0) & (steepness > 0)
            slope = slope * torch.where(usable, self._trust * size / whole, 1.0)
        before = state["momentum_buffer"]
        after = self._momentum * before + slope
        if self.found_inf is None:
            before.copy_(after)
            parameter.sub_(after, alpha=lr)
            return
        good = self.found_inf.to(parameter.device) == 0
        before.copy_(torch.where(good, after, before))
        parameter.copy_(torch.where(good, parameter - lr * after, parameter))

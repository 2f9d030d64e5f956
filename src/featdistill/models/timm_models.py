"""timm's models by name: created with plain errors, and with weights from hub or file."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
from torch import nn

from featdistill.core.errors import ModelError, did_you_mean, nearest
from featdistill.models.extensions import extend, split_arguments
from featdistill.models.hub import check_reachable


def check_name(name: str) -> None:
    """Raise ModelError, with the nearest names, if timm knows no such model or weights."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = [f"'timm/{n}'" for n in nearest(architecture, timm.list_models())]
        raise ModelError(
            f"timm has no model '{name}'",
            fix=f"did you mean {' or '.join(close)}?"
            if close
            else "search with 'featdistill models PART_OF_NAME'",
        )
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(
            f"timm's '{architecture}' has no weights '{tag}'",
            expected=", ".join(tags) or "no tag at all",
            fix=did_you_mean(tag, tags),
        )


@cache
def accepts(name: str, argument: str) -> bool:
    """Whether a timm model's constructor takes an argument (`img_size`, `drop_path_rate`, ...)."""
    with torch.device("meta"):
        kind = type(timm.create_model(name.partition(".")[0]))
    parents = [k for k in kind.__mro__ if issubclass(k, nn.Module)]
    return any(argument in inspect.signature(k.__init__).parameters for k in parents)


def drop_path_argument(name: str, rate: float) -> dict[str, Any]:
    """timm's argument for a drop-path rate, said even at 0: some families drop 0.1 by default.

    Raises:
        ModelError: a rate for a model that has no drop path.
    """
    if accepts(name, "drop_path_rate"):
        return {"drop_path_rate": rate}
    if rate:
        raise ModelError(f"timm's '{name}' has no drop path", fix="give --drop-path 0")
    return {}


def create(name: str, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """`timm.create_model` whose failures say what to do, and which knows our `extensions`.

    Raises:
        ModelError: no such model, unreachable weights, or arguments that it refuses.
    """
    check_name(name)
    if pretrained:
        _check_hub(name)
    own, extensions = split_arguments(arguments)
    try:
        model = timm.create_model(name, pretrained=pretrained, **own)
        extend(model, extensions)
        return model
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise _refused(name, error) from None
        line = " ".join(str(error).split())[:200]
        raise ModelError(
            f"cannot get the weights of 'timm/{name}' ({line})", fix=_OFFLINE_FIX
        ) from None
    except (TypeError, AssertionError, ValueError) as error:
        raise _refused(name, error) from None


def family_filter(model: nn.Module) -> Callable[..., dict[str, Any]] | None:
    """timm's own conversion of official checkpoints for a model's family, if it has one."""
    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)


_OFFLINE_FIX = (
    "connect to the internet, or give a file that you have: --teacher-weights FILE "
    "(--weights FILE for a single model), or 'random'"
)


def _refused(name: str, error: Exception) -> ModelError:
    return ModelError(f"timm cannot build '{name}' so: {' '.join(str(error).split())[:200]}")


def _check_hub(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ModelError(
            f"timm has no pretrained weights for '{name}'",
            fix="give a checkpoint file, or 'random'",
        )
    if config.hf_hub_id:
        check_reachable(config.hf_hub_id.partition("@")[0], f"timm/{name}", fix=_OFFLINE_FIX)

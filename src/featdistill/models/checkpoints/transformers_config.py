"""transformers' `config.json`: its words in timm's, its defaults, and what tensors must have."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, isqrt
from typing import Any

from featdistill.core.errors import ModelError, did_you_mean
from featdistill.models.checkpoints.spec import Settings
from featdistill.models.checkpoints.tables import Converted

Config = Mapping[str, Any]

_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def number(config: Config, key: str, default: float) -> float:
    """A number of a config.

    Raises:
        ModelError: it is no finite number.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ModelError(f"{key} {value!r} in its config.json", expected="a number")
    return value


def positive(config: Config, key: str, default: int) -> int:
    """A positive whole number of a config.

    Raises:
        ModelError: it is something else.
    """
    return whole(key, config.get(key, default))


def whole(key: str, value: Any) -> int:
    """A positive whole number that stands in a config under a key.

    Raises:
        ModelError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{key} {value!r} in its config.json", expected="a positive number")
    return value


def whole_each(config: Config, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Positive whole numbers of a config, one for each stage.

    Raises:
        ModelError: they are something else.
    """
    values = config.get(key, default)
    if not isinstance(values, list | tuple):
        raise ModelError(f"{key} {values!r} in its config.json", expected="a list of numbers")
    return tuple(whole(key, value) for value in values)


def activation_of(config: Config, default: str) -> str:
    """timm's name of a config's activation.

    Raises:
        ModelError: it has none.
    """
    name = str(config.get("hidden_act", default))
    if name not in _ACTIVATIONS:
        raise ModelError(
            f"hidden_act '{name}' in its config.json is not known here",
            expected=", ".join(_ACTIVATIONS),
            fix=did_you_mean(name, _ACTIVATIONS),
        )
    return _ACTIVATIONS[name]


def only_gelu(config: Config, family: str) -> None:
    """Raise ModelError for an activation that timm's family has not."""
    if activation_of(config, "gelu") != "gelu":
        raise ModelError(
            f"hidden_act '{config['hidden_act']}' in its config.json: timm's {family} has GELU "
            "and nothing else"
        )


def norm_eps_of(config: Config, default: float, timms: float) -> dict[str, Any]:
    """The layer norms' epsilon, where it is another than that of timm's architecture."""
    eps = float(number(config, "layer_norm_eps", default))
    return {} if eps == timms else {"norm_eps": eps}


def side_of(key: str, value: Any) -> int:
    """A side in pixels, from a number or a pair.

    Raises:
        ModelError: the pair is no square, or it is no positive number.
    """
    if isinstance(value, list | tuple):
        if not value or any(side != value[0] for side in value):
            raise ModelError(f"{key} {value} in its config.json", expected="a square")
        value = value[0]
    return whole(key, value)


def tower_config(settings: Settings) -> Config:
    """The config.json, or the image tower's part of it."""
    config: Config = settings["transformers"]
    inner = config.get("vision_config")
    return inner if isinstance(inner, dict) else config


_REGISTERS = {"dinov2_with_registers": 4}  # by the library's default, where a config says nothing


def check_against(config: Config, converted: Converted) -> None:
    """What a config says and the tensors could lack unnoticed: layers and registers.

    Raises:
        ModelError: they disagree.
    """
    tensors = converted.tensors
    layers = {n.split(".")[1] for n in tensors if n.startswith("blocks.")}
    if "num_hidden_layers" in config:
        said = positive(config, "num_hidden_layers", 12)
        if said != len(layers):
            raise ModelError(
                f"num_hidden_layers {said} in its config.json for {len(layers)} layers of tensors"
            )
    kind = str(config.get("model_type"))
    registers = config.get("num_register_tokens", _REGISTERS.get(kind))
    if not registers:
        return
    held, positions = tensors.get("reg_token"), tensors.get("pos_embed")
    if held is None:
        raise ModelError("1 missing (reg_token)")
    if held.ndim != 3 or held.shape[1] != registers:
        raise ModelError(f"1 of another shape (reg_token {tuple(held.shape)})")
    rows = positions.shape[1] - 1 if positions is not None and positions.ndim == 3 else 0
    if positions is not None and isqrt(max(0, rows)) ** 2 != rows:
        raise ModelError(f"1 of another shape (pos_embed {tuple(positions.shape)})")

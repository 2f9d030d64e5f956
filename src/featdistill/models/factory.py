"""Models of users' own: `package.module:factory`."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from featdistill.core.errors import FeatDistillError, ModelError, did_you_mean
from featdistill.models.backbone import Backbone, CustomBackbone, Origin


def from_factory(spec: str, image_size: int | None) -> Backbone:
    """The module that a callable without arguments returns, as a backbone.

    Raises:
        ModelError: it cannot be imported or called, or returns something else.
    """
    module_name, _, name = spec.partition(":")
    factory = getattr(_module(module_name, spec), name, None)
    if not callable(factory):
        if module_name == "timm":
            raise ModelError(f"no model '{spec}'", fix=f"did you mean 'timm/{name}'?")
        names = [n for n in dir(_module(module_name, spec)) if not n.startswith("_")]
        raise ModelError(f"'{module_name}' has no callable '{name}'", fix=did_you_mean(name, names))
    model = _called(factory, spec)
    if isinstance(model, Backbone):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"'{spec}' returned a {type(model).__name__}", expected="a torch.nn.Module"
        )
    return CustomBackbone(model, image_size=image_size, origin=Origin(spec, "the factory's own"))


def _module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise ModelError(
            f"cannot import '{name}' for model '{spec}' ({error})",
            expected="package.module:factory, importable from here",
            fix=did_you_mean(name, ["hf-hub"]),
        ) from None
    except Exception as error:  # whatever the user's own code raises
        raise ModelError(f"importing '{name}' for model '{spec}' fails ({_said(error)})") from None


def _called(factory: Callable[..., Any], spec: str) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelError(
            f"'{spec}' cannot be called without arguments ({error})",
            expected="a callable without arguments that returns a torch.nn.Module",
        ) from None
    except ValueError:
        pass  # a callable whose arguments cannot be known
    try:
        return factory()
    except FeatDistillError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise ModelError(f"'{spec}' fails ({_said(error)})") from None


def _said(error: Exception) -> str:
    """An error of somebody else's code in a line: its kind, its words, and its place."""
    words = " ".join(str(error).split())[:200]
    places = traceback.extract_tb(error.__traceback__)
    place = f", {places[-1].filename}, line {places[-1].lineno}" if len(places) > 1 else ""
    return f"{type(error).__name__}: {words}{place}"

"""Walking from a model's weights along directions, and back again to the bit.

A point of a plane is w(x, y) = w + x d1 + y d2, made afresh from the stored centre w each time, so
that nothing drifts. Directions are Gaussian and filter-normalised (Li et al. 2018, section 4): the
part that leads to an output unit (a row of a matrix, an output channel of a convolution) has the
norm of that unit's own weights, so that a step of 1 is as long as they are, whatever their scale.

Only the weights of linear and convolution layers vary (attention's projections are among them).
Everything else is left where it is: biases, norms and layer scales, which have one dimension; CLS
tokens, positions, bias tables and other tensors that are no layer's weight; buffers.

Dimensions: U output units, R weights of a unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from featdistill.core.errors import ModelError
from featdistill.core.seeds import torch_generator
from featdistill.models.positions import SHARED_TABLE

_MATRICES = (nn.Linear, nn.Bilinear, _ConvNd)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NAMED = 4  # tensors to name in a message


@dataclass(frozen=True)
class Filter:
    """A weight whose output units are scaled each by itself.

    Attributes:
        groups: of a transposed convolution, whose units lie along the second dimension.
    """

    parameter: nn.Parameter
    groups: int | None = None

    def by_unit(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as (U, R)."""
        if self.groups is None:
            return tensor.flatten(1)
        return tensor.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    def spread(self, values: Tensor) -> Tensor:
        """(U,) values, one a unit, in a shape that multiplies the weight."""
        inner = self.parameter.ndim - 2
        if self.groups is None:
            return values.view(-1, *[1] * (inner + 1))
        each = values.view(self.groups, 1, -1)
        each = each.expand(-1, len(self.parameter) // self.groups, -1).flatten(0, 1)
        return each.view(*each.shape, *[1] * inner)

    def norms(self, tensor: Tensor) -> Tensor:
        """(U,) float64 norm of each unit's part."""
        return torch.linalg.vector_norm(self.by_unit(tensor), dim=1, dtype=torch.float64)


def filters(parts: Sequence[tuple[str, nn.Module]]) -> dict[str, Filter]:
    """The weights that vary, by name; a shared one once.

    Args:
        parts: prefixes of names, and modules.

    Raises:
        ModelError: there is none.
    """
    found: dict[str, Filter] = {}
    seen: set[int] = set()
    for prefix, part in parts:
        for name, parameter, groups in _weights(part):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{prefix}{name}"] = Filter(parameter, groups)
    if not found:
        raise ModelError(
            "the model has no linear and no convolution layer whose weights could vary",
            expected="layers of torch.nn, or of classes derived from them",
        )
    return found


def _weights(part: nn.Module) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    for name, module in part.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, _MATRICES):
            weight = module.weight
            if isinstance(weight, nn.Parameter):  # not one that is computed from others
                groups = module.groups if isinstance(module, _ConvTransposeNd) else None
                yield f"{dot}weight", weight, groups
        elif isinstance(module, nn.MultiheadAttention):
            for projection in _PROJECTIONS:
                weight = getattr(module, projection)
                if weight is not None:
                    yield f"{dot}{projection}", weight, None


def direction(weights: Mapping[str, Filter], *, seed: int, plane: int, axis: int) -> list[Tensor]:
    """A filter-normalised Gaussian direction, a tensor for each weight on its device.

    The raw direction of a weight depends on these numbers, the weight's name and its shape alone:
    models that share names are looked at along the same ones. A unit whose weights are all 0 stays.
    """
    found = []
    for name, weight in weights.items():
        values = weight.parameter.detach()
        raw = torch.randn(
            values.shape, generator=torch_generator(seed, "landscape", plane, axis, name)
        ).to(values.device)
        own = weight.norms(raw)
        scale = torch.where(own > 0, weight.norms(values) / own, 0.0)
        found.append(raw.mul_(weight.spread(scale)).to(values.dtype))
    return found


class _Walk:
    """Weights that move; at the end of the `with` block, however it ends, they are as before."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._centre = [t.detach().clone() for t in tensors]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self._centre)


class Plane(_Walk):
    """A plane (or, with one direction, a line) through a model's weights.

    Args:
        weights: what varies.
        directions: one or two, a tensor for each weight.
    """

    def __init__(self, weights: Mapping[str, Filter], *directions: Sequence[Tensor]) -> None:
        super().__init__([w.parameter for w in weights.values()])
        self._directions = [list(d) for d in directions]

    @torch.no_grad()
    def go(self, *steps: float) -> None:
        """Move to a point, a step along each direction; all 0 is the centre itself."""
        torch._foreach_copy_(self._tensors, self._centre)
        for step, along in zip(steps, self._directions, strict=True):
            if step:
                torch._foreach_add_(self._tensors, along, alpha=step)


class Between(_Walk):
    """The straight line from one model to another, in the first one's place.

    Parameters and floating-point buffers move; both ends are exact.

    Args:
        first, second: prefixes of names, and modules: what was learned of either.

    Raises:
        ModelError: names or shapes differ.
    """

    def __init__(
        self,
        first: Sequence[tuple[str, nn.Module]],
        second: Sequence[tuple[str, nn.Module]],
        *,
        names: tuple[str, str] = ("the first", "the second"),
    ) -> None:
        here, there = _state(first), _state(second)
        _check_same(here, there, names)
        moving = [name for name, tensor in here.items() if tensor.is_floating_point()]
        super().__init__([here[name] for name in moving])
        self._end = [there[name].detach().to(here[name].device) for name in moving]
        self._modules = [module for _, module in first]

    @torch.no_grad()
    def go(self, alpha: float) -> None:
        """Move to (1 - alpha) first + alpha second."""
        torch._foreach_copy_(self._tensors, self._centre)
        # not a + alpha (b - a), which misses b
        torch._foreach_lerp_(self._tensors, self._end, alpha)
        for module in self._modules:  # LeViT and its kind keep tables that hang on weights
            module.train()
            module.eval()


def _state(parts: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for prefix, part in parts:
        found |= {f"{prefix}{name}": p for name, p in part.named_parameters()}
        found |= {f"{prefix}{name}": b for name, b in part.named_buffers()}
    return found


def _check_same(
    here: Mapping[str, Tensor], there: Mapping[str, Tensor], names: tuple[str, str]
) -> None:
    faults = [
        f"{len(only)} tensors in '{name}' alone ({_some(only)})"
        for name, only in zip(
            names,
            (sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())),
            strict=True,
        )
        if only
    ]
    misshapen = [
        f"{name} {tuple(here[name].shape)} and {tuple(there[name].shape)}"
        for name in here
        if name in there and here[name].shape != there[name].shape
    ]
    if misshapen:
        faults.append(f"{len(misshapen)} of another shape ({_some(misshapen)})")
    if faults:
        shared = (SHARED_TABLE in here) != (SHARED_TABLE in there)
        raise ModelError(
            f"no line between '{names[0]}' and '{names[1]}': {'; '.join(faults)}",
            expected="two models of one architecture",
            fix="one of them shares its position bias among all layers: train both alike"
            if shared
            else None,
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")

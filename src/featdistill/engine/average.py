"""An exponential moving average of a model's weights, kept beside them while they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from featdistill.core.errors import RunError


class WeightAverage:
    """average <- d average + (1 - d) weights, after each step, on the weights' device.

    Step t (from 0) averages with d = min(decay, (1 + t) / (10 + t)), so that the random start is
    soon forgotten (TensorFlow's ExponentialMovingAverage with `num_updates`). Running statistics
    are averaged like weights; counters are copied.

    Args:
        module: whose parameters and buffers are averaged.
        decay: how much of the average stays at a step, 0..1.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.module, self.decay = module, decay
        self._state: dict[str, Tensor] = {}

    def start(self) -> None:
        """Begin from the weights as they are, on the device where they are."""
        self._state = {k: v.detach().clone() for k, v in self._live().items()}

    def _live(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Take in the weights after a step.

        Args:
            skipped: on the device, 1 if the step was not taken (its gradient was no number), else
                0. The average is then left as it is.
        """
        rate = (1 - skipped) * (1 - min(self.decay, (1 + step) / (10 + step)))
        live = self._live()
        names = [k for k, v in self._state.items() if v.is_floating_point()]
        averages = [self._state[k] for k in names]
        change = torch._foreach_sub([live[k] for k in names], averages)
        torch._foreach_mul_(change, rate)
        torch._foreach_add_(averages, change)
        for name in self._state.keys() - set(names):
            self._state[name].copy_(live[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged weights inside, and its own again, to the bit, outside."""
        live = self._live()
        own = {k: v.detach().clone() for k, v in live.items()}
        try:
            _copy(self._state, live)
            yield
        finally:
            _copy(own, live)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the module's names."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved averages.

        Raises:
            RunError: they are of another model.
        """
        if state.keys() != self._state.keys():
            raise RunError("the checkpoint's averaged weights are not of this model")
        _copy(state, self._state)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])

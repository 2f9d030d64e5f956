"""What a step's forward passes change beside gradients, put back if the step does not count."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Undo:
    """Keeps the buffers of a module (running statistics) and the random states as they were.

    A buffer that no pass writes to is copied once, and not looked at on the device again.

    Args:
        module: on its device.
        generators: keep the states of the random generators too, for `rewind`.
    """

    def __init__(self, module: nn.Module, *, generators: bool) -> None:
        self._buffers = [
            # torch's batch norm moves its statistics without counting it as a change
            _Buffer(owner, name, always=isinstance(owner, _BatchNorm))
            for owner in module.modules()
            for name, value in owner.named_buffers(recurse=False)
            if value is not None
        ]
        cuda = any(b.live.device.type == "cuda" for b in self._buffers)
        cuda = cuda or any(p.device.type == "cuda" for p in module.parameters())
        self._generators, self._cuda = generators, cuda
        self._states: tuple[Any, ...] = ()

    def begin(self) -> None:
        """Before a step's passes."""
        for buffer in self._buffers:
            buffer.keep()
        if self._generators:
            self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
            if self._cuda:
                self._states += (torch.cuda.get_rng_state(),)

    def rewind(self) -> None:
        """As if the passes since `begin` had not been."""
        for buffer in self._buffers:
            buffer.put_back()
        assert self._states
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        torch.set_rng_state(self._states[2])
        if self._cuda:
            torch.cuda.set_rng_state(self._states[3])

    def unless_good(self, bad: Tensor) -> None:
        """Put the buffers back if `bad`, on the device, is 1; the device is not asked."""
        for buffer in self._buffers:
            buffer.put_back(bad)


class _Buffer:
    """One buffer, which its module may replace by another tensor."""

    def __init__(self, owner: nn.Module, name: str, *, always: bool) -> None:
        self.owner, self.name, self.always = owner, name, always
        self.kept = self.live.clone()
        self._known = (id(self.live), self.live._version)

    @property
    def live(self) -> Tensor:
        value = self.owner._buffers[self.name]
        assert value is not None
        return value

    @property
    def _changed(self) -> bool:
        return self.always or self._known != (id(self.live), self.live._version)

    @torch.no_grad()
    def keep(self) -> None:
        if self._changed:
            live = self.live
            self.kept = live.clone() if live.shape != self.kept.shape else self.kept.copy_(live)
            self._known = (id(live), live._version)

    @torch.no_grad()
    def put_back(self, bad: Tensor | None = None) -> None:
        live = self.live
        if not self._changed or live.shape != self.kept.shape:
            return  # of another shape: a table for another image size, and no statistic
        live.copy_(self.kept if bad is None else torch.where(bad > 0, self.kept, live))

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

    @torch.no_grad()
    def begin(self) -> None:
        """Before a step's passes."""
        changed = [b for b in self._buffers if b.changed]
        for buffer in changed:
            buffer.follow()
        if changed:  # in one go: a batch norm has three of them, a ResNet-50 has 53
            torch._foreach_copy_([b.kept for b in changed], [b.live for b in changed])
        if self._generators:
            self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
            if self._cuda:
                self._states += (torch.cuda.get_rng_state(),)

    @torch.no_grad()
    def rewind(self) -> None:
        """As if the passes since `begin` had not been."""
        for buffer in self._buffers:
            if buffer.restorable:
                buffer.live.copy_(buffer.kept)
        assert self._states
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        torch.set_rng_state(self._states[2])
        if self._cuda:
            torch.cuda.set_rng_state(self._states[3])

    @torch.no_grad()
    def unless_good(self, bad: Tensor) -> None:
        """Put the buffers back if `bad`, on the device, is 1; the device is not asked."""
        gone = bad > 0
        for buffer in self._buffers:
            if buffer.restorable:
                live = buffer.live
                torch.where(gone, buffer.kept, live, out=live)


class _Buffer:
    """One buffer, which its module may replace by another tensor."""

    def __init__(self, owner: nn.Module, name: str, *, always: bool) -> None:
        self._owner, self._name, self._always = owner, name, always
        self._last = self.live
        self.kept = self._last.clone()
        self._version = self._last._version

    @property
    def live(self) -> Tensor:
        value = self._owner._buffers[self._name]
        assert value is not None
        return value

    @property
    def changed(self) -> bool:
        """Whether it may hold something else than what is kept."""
        live = self._owner._buffers[self._name]
        assert live is not None
        return self._always or live is not self._last or live._version != self._version

    @property
    def restorable(self) -> bool:
        """Whether there is something to put back; of another shape, it is no statistic."""
        return self.changed and self.live.shape == self.kept.shape

    def follow(self) -> None:
        """What is there from now on is what will be kept."""
        self._last = live = self.live
        self._version = live._version
        if live.shape != self.kept.shape:
            self.kept = torch.empty_like(live)

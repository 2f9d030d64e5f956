"""Randomness as a pure function of keys, never of a process's history.

Every draw in this project is addressed: the augmentation of a sample by (seed, epoch, index), a
drop-path mask by (seed, step, layer, global position of the sample). So neither the number of
workers, processes or micro-batches nor a stop and a resume changes what is drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WEYL = 0xBB67AE8584CAA73B  # the second half of Philox's key, from round to round
_PHILOX = (0xD2E7470EE14C6C93, 0xCA5A826395121157)


def key(*parts: int | str) -> int:
    """A 64-bit key of integers and names; the same on every machine and in every process."""
    return int.from_bytes(_digest(parts).digest(), "little")


def _digest(parts: Iterable[int | str]) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest


def generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator of its own for these keys (Philox, counter-based)."""
    return np.random.Generator(np.random.Philox(_Key(key(*parts))))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """Philox's key as it is: `Philox(key=...)` asks the system for entropy first, in vain."""

    def __init__(self, value: int) -> None:
        self.value = value

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.array([self.value, *[0] * (n_words - 1)], dtype)


def keys(*parts: int | str, last: Iterable[int]) -> np.ndarray:
    """`key(*parts, n)` for many n at once, (n,) uint64."""
    begun = _digest(parts)
    found = []
    for n in last:
        digest = begun.copy()
        digest.update(b"%d\0" % n)
        found.append(digest.digest())
    return np.frombuffer(b"".join(found), dtype="<u8").astype(np.uint64)


def streams(many: np.ndarray, blocks: int) -> np.ndarray:
    """The first numbers of the Philox streams that `generator` makes of these keys.

    Philox 4x64 with ten rounds (Salmon et al. 2011), as NumPy seeds and counts it, for all keys
    side by side: making NumPy's own generator costs 25 microseconds a key.

    Args:
        many: (n,) uint64, from `keys`.
        blocks: of four numbers each.

    Returns:
        (n, 4 * blocks) uint64.
    """
    shape = (len(many), blocks)
    counter = np.broadcast_to(np.arange(1, blocks + 1, dtype=np.uint64), shape)
    zero = np.zeros(shape, np.uint64)
    a, b, c, d = counter, zero, zero, zero
    one, two = np.broadcast_to(many[:, None], shape), 0
    with np.errstate(over="ignore"):
        for _ in range(10):
            (high, low), (above, below) = _product(a, _PHILOX[0]), _product(c, _PHILOX[1])
            a, b, c, d = above ^ b ^ one, below, high ^ d ^ np.uint64(two), low
            one, two = one + _GOLDEN, (two + _WEYL) & _MASK
    return np.stack([a, b, c, d], axis=-1).reshape(len(many), -1)


def _product(x: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower 64 bits of x times a 64-bit factor."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    c, d = np.uint64(factor & 0xFFFFFFFF), np.uint64(factor >> 32)
    a, b = x & low, x >> half
    middle = b * c + (a * c >> half)
    rest = a * d + (middle & low)
    return b * d + (middle >> half) + (rest >> half), x * np.uint64(factor)


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU torch generator of its own for these keys."""
    return torch.Generator().manual_seed(key(*parts) & (_MASK >> 1))


@contextmanager
def seeded_globals(*parts: int | str) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators for a block, then put them back.

    For library code that draws from the globals (timm's RandAugment, torchvision's transforms,
    weight initialisation).
    """
    states = _globals()
    seed = key(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed & (_MASK >> 1))
    try:
        yield
    finally:
        _restore_globals(states)


class Generators:
    """States of the global generators that belong to one of several runs in a process.

    Args:
        parts: keys that they begin from, as in `seeded_globals`.
    """

    def __init__(self, *parts: int | str) -> None:
        with seeded_globals(*parts):
            self._states = _globals()

    @contextmanager
    def own(self) -> Iterator[None]:
        """The global generators go on where this run's last block ended, until the end of this."""
        before = _globals()
        _restore_globals(self._states)
        try:
            yield
        finally:
            self._states = _globals()
            _restore_globals(before)


_States = tuple[Any, Any, Tensor]


def _globals() -> _States:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore_globals(states: _States) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def uniforms(base: int, *axes: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), one for each point of the (broadcast) integer axes.

    A counter-based generator: each axis is absorbed into the state by SplitMix64's finaliser
    (Steele et al. 2014), so that a number depends on its own coordinates only.

    Args:
        base: a 64-bit key, from `key`.
        axes: integer arrays that broadcast against each other.
    """
    state: np.ndarray = np.asarray(base & _MASK, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for axis in axes:
            state = _finalise(state + _GOLDEN + _finalise(np.asarray(axis).astype(np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalise(z: np.ndarray) -> np.ndarray:
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class SampleStream:
    """The address of one micro-batch's random draws.

    Attributes:
        seed: the run's seed.
        step: the optimiser step, from 0.
        positions: (B,) int64 on CPU, each sample's place in the global batch.
    """

    seed: int
    step: int
    positions: Tensor

    def uniforms(self, name: str, rows: int = 1) -> Tensor:
        """(rows, B) float32 uniforms on CPU for the draws called `name` (row = layer, say)."""
        values = uniforms(
            key(self.seed, name, self.step),
            np.arange(rows)[:, None],
            self.positions.numpy()[None, :],
        )
        return torch.from_numpy(values).float()

    def batch_generator(self, name: str) -> np.random.Generator:
        """A generator for draws that the whole global batch of this step shares."""
        return generator(self.seed, name, self.step)

    def sample_generator(self, name: str, row: int) -> np.random.Generator:
        """A generator for draws that belong to the sample in this micro-batch's row `row`."""
        return generator(self.seed, name, self.step, int(self.positions[row]))

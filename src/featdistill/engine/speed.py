"""What this machine computes quickly: measured where it can be, not assumed."""

from __future__ import annotations

import ctypes
import statistics
import time
from functools import cache

import torch
from torch import nn

_SIDE = 1024  # of the square products that are timed
_ROUNDS = 5
_WORTH = 1.3  # times as fast as float32
# weights of a model's largest product, from which on autocast's copies cost less than they bring:
# a width of 192 gains 1.7 times (docs/performance.md)
_LARGE = 192 * 576
_NEVER = 2**31 - 1
_TRIM, _MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGEST_KEPT, _OLD_LARGEST = 1 << 30, 1 << 25


@cache
def bf16_products() -> float:
    """How many times as fast as float32 this CPU multiplies matrices in bf16.

    Twice and more where it has instructions for it, and a fraction where it has none.
    """
    pairs = [_square(dtype) for dtype in (torch.float32, torch.bfloat16)]
    times: list[list[float]] = [[], []]
    for number in range(_ROUNDS + 1):  # the first warms up
        for (a, b), taken in zip(pairs, times, strict=True):
            began = time.perf_counter()
            a @ b
            if number:
                taken.append(time.perf_counter() - began)
    return statistics.median(x / y for x, y in zip(*times, strict=True))


def _square(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    ones = torch.ones(_SIDE, _SIDE, dtype=dtype)
    return ones, ones.clone()


def bf16_pays(model: nn.Module) -> bool:
    """Whether bf16 trains a model faster on this CPU: it is large, and the CPU quick at bf16."""
    products = (
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
    )
    return max(products, default=0) >= _LARGE and bf16_products() >= _WORTH


def keep_memory() -> None:
    """Let the C library keep what a step frees for the next step, which needs it again.

    Otherwise gigabytes go back to the system in every step and come again page by page. glibc's
    own environment variables do the same from outside; other libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # before 2.35, glibc refuses more than 32 MiB; to set the other one alone would keep its own
    # threshold from growing, at 128 KiB
    if mallopt is not None and (mallopt(_MAP, _LARGEST_KEPT) or mallopt(_MAP, _OLD_LARGEST)):
        mallopt(_TRIM, _NEVER)

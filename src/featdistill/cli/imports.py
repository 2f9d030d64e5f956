"""Imports without the garbage collector."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import in it: Python's collector looks for no cycles, then or later, in what is imported.

    It would walk through torch's half million objects again and again, which is a fifth of the time
    that torch and timm take to import, and pauses training for as long as they are there. Nothing
    happens where torch is imported already. For a process of our own: whatever else it holds by
    then is left alone too, until the process ends.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # extension modules that count their leaks at the end want their cycles collected before
        atexit.register(gc.unfreeze)

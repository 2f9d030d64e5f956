"""What docs/performance-cache.md was measured by: the same batches, decoded each time and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from featdistill.core.types import Batch
from featdistill.data.device_cache import device_batches, to_device
from featdistill.data.disk_cache import on_disk, stamp
from featdistill.data.loader import Share, plainly, training_batches
from featdistill.data.sources import Source
from featdistill.data.views import View
from featdistill.engine.fingerprint import fingerprint


def cache_works(
    source: Source,
    view: View,
    *,
    batch_size: int,
    batches: int,
    folder: Path,
    device: torch.device,
    workers: int = 0,
) -> dict[str, Callable[[], None]]:
    """Works for `take_turns`, each of `batches * batch_size` images: `plain`, `disk`, `device`.

    The images are decoded into both caches here, which is not timed.

    Args:
        folder: for the cache on disk.
        workers: loading processes of `plain` and `disk`; `device` has none.
    """
    kept = on_disk(
        source,
        folder=folder,
        identity={**fingerprint(source), "stamp": stamp(source)},
        short_side=None,
        workers=workers,
        tell=_quietly,
        progress=_quietly,
    )
    resident = to_device(kept, device, workers=workers, progress=_quietly)

    def loaded(images: Source) -> Iterable[Batch]:
        loader = training_batches(
            images,
            view,
            batch_size=batch_size,
            seed=0,
            start=0,
            stop=batches,
            workers=workers,
            pin_memory=device.type == "cuda",
        )
        return plainly(loader)

    def cut() -> Iterable[Batch]:
        return device_batches(
            resident, view, batch_size=batch_size, seed=0, start=0, stop=batches, share=Share()
        )

    return {
        "plain": lambda: _take(loaded(source), device),
        "disk": lambda: _take(loaded(kept), device),
        "device": lambda: _take(cut(), device),
    }


def _take(batches: Iterable[Batch], device: torch.device) -> None:
    """Bring batches to the device, as the loop does."""
    for batch in batches:
        batch.to(device)


def _quietly(*_: object) -> None:
    pass

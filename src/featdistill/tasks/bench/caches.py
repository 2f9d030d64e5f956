"""`bench caches`: the same batches, decoded each time and kept (`--data.cache`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from featdistill.config.commands import BenchConfig
from featdistill.core.errors import DataError
from featdistill.core.types import Batch
from featdistill.data.device_cache import device_batches, to_device
from featdistill.data.disk_cache import on_disk, stamp
from featdistill.data.loader import Share, plainly, training_batches
from featdistill.data.open import open_data
from featdistill.data.sources import Source, Subset
from featdistill.data.views import CropView, View
from featdistill.engine.fingerprint import fingerprint
from featdistill.engine.runtime import pick_device
from featdistill.tasks.bench.common import Times, ratio, set_up, table, take_turns

_BATCH = 256
_SIZE = 32
_ROW = {"plain": "decoded each time", "disk": "--data.cache disk", "device": "--data.cache device"}


@dataclass(frozen=True)
class CacheCost:
    """Times over rounds in which all took turns, without loading processes.

    Attributes:
        times: seconds of so many `images`, by way; `plain` decodes them.
    """

    times: Mapping[str, Times]
    images: int
    set_up: Mapping[str, Any]

    def lines(self) -> list[str]:
        at, plain = self.set_up, self.times["plain"]
        rows = [("", "images/s", "times")]
        for way, times in self.times.items():
            speed = f"{self.images / times.median:,.0f}"
            rows.append((_ROW[way], speed, f"{ratio(plain, times):.2f}"))
        head = (
            f"{at['images']} images of {at['data']} to {at['size']}, {at['device']}, "
            f"{at['rounds']} rounds in turn"
        )
        return [head, *table(rows)]

    def record(self) -> dict[str, Any]:
        plain = self.times["plain"]
        return {
            "ways": {
                way: {
                    "images_per_second": self.images / times.median,
                    "seconds": times.record(),
                    "ratio": ratio(plain, times),
                }
                for way, times in self.times.items()
            },
            "set_up": dict(self.set_up),
        }


def run(config: BenchConfig) -> CacheCost:
    """Time them; one thread, since the loader of a run has one for each process.

    Raises:
        DataError: no data is named, or its images have many sizes.
    """
    if config.data is None:
        raise DataError("bench caches needs images of one size", fix="give --data, as for distill")
    device = torch.device(pick_device(config.device))
    whole: Source = open_data(config.data).train
    count = min(config.images, len(whole))
    source = Subset(whole, np.arange(count) * len(whole) // count)
    size, batch = config.image_size or _SIZE, min(_BATCH, count)
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        try:
            works = cache_works(
                source,
                CropView(size),
                batch_size=batch,
                batches=max(1, count // batch),
                folder=Path(folder),
                device=device,
            )
            times = take_turns(works, rounds=config.rounds, device=device)
        finally:
            torch.set_num_threads(threads)
    at = set_up(device, data=config.data, images=count, size=size, rounds=config.rounds)
    return CacheCost(times, max(1, count // batch) * batch, at)


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

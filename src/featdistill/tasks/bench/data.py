"""`bench data`: reading, decoding and cropping photographs beside the official way to do it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from featdistill.config.commands import BenchConfig
from featdistill.core.errors import DataError
from featdistill.core.seeds import seeded_globals
from featdistill.data.decode import BadImage
from featdistill.data.loader import default_workers, plainly, training_batches
from featdistill.data.open import open_data
from featdistill.data.sources import FileSource, Source, scaled
from featdistill.data.views import CropView
from featdistill.tasks.bench.common import Times, set_up, table, take_turns
from featdistill.tasks.bench.photographs import write_photographs
from featdistill.tasks.bench.reference_data import OfficialImages, official_batches

AIM = 2500  # images/s that a fast GPU takes of ViT-B -> ViT-B
_SIZE = 224
_BATCH, _STEPS = 16, 40  # of the loading processes' trial, at least
_EACH = 12  # batches of each process: three times what it keeps ready
_WAYS = {"official": "official (Pillow, float)", "exact": "exact", "fast": "fast"}


@dataclass(frozen=True)
class Rate:
    """What a way of loading achieves.

    Attributes:
        images_per_second: median over rounds; of one core, or of so many loading processes.
        ratio: to the official way in the same round: median, min, max.
    """

    images_per_second: float
    ratio: Mapping[str, float]

    @property
    def spread(self) -> str:
        """The ratio as a reader wants it."""
        return f"{self.ratio['median']:.2f} ({self.ratio['min']:.2f} .. {self.ratio['max']:.2f})"


@dataclass(frozen=True)
class DataCost:
    """What loading costs.

    Attributes:
        core: by way, on one core.
        loader: likewise, of `workers` loading processes.
        difference: levels between the views of fast and exact: mean, max; and the share of `views`
            that differ.
        images: file bytes, height and width, medians.
        set_up: where and how it ran.
    """

    core: Mapping[str, Rate]
    loader: Mapping[str, Rate]
    workers: int
    difference: Mapping[str, float]
    images: Mapping[str, float]
    set_up: Mapping[str, Any]

    def lines(self) -> list[str]:
        at, of = self.set_up, self.images
        head = (
            f"{at['images']} images, {of['width']:.0f}x{of['height']:.0f} and "
            f"{of['bytes'] / 1e3:.0f} kB, to {at['size']}; {at['device']}, {at['rounds']} rounds "
            "in turn"
        )
        rows = [("", "images/s a core", "of the official", f"cores for {AIM:,}/s")]
        for way, rate in self.core.items():
            speed = f"{rate.images_per_second:,.0f}"
            rows.append((_WAYS[way], speed, rate.spread, str(self._cores(way))))
        workers = f"{self.workers} loading process{'es' if self.workers > 1 else ''}"
        more = [(workers, "images/s", "of the official")]
        for way, rate in self.loader.items():
            more.append((_WAYS[way], f"{rate.images_per_second:,.0f}", rate.spread))
        said = self.difference
        end = (
            f"fast differs from exact in {said['views']:.0%} of the views; over all views by "
            f"{said['mean']:.2f} levels of 255 on average, by {said['max']:.0f} at most"
        )
        return [head, *table(rows), *table(more), end]

    def _cores(self, way: str) -> int:
        return math.ceil(AIM / self.core[way].images_per_second)

    def record(self) -> dict[str, Any]:
        def rates(of: Mapping[str, Rate]) -> dict[str, Any]:
            return {
                way: {"images_per_second": rate.images_per_second, "ratio": dict(rate.ratio)}
                for way, rate in of.items()
            }

        exact = self.core["exact"]
        return {
            "images_per_second": exact.images_per_second,
            "reference_images_per_second": self.core["official"].images_per_second,
            "ratio": exact.ratio["median"],
            "core": rates(self.core),
            "cores_for": {"images_per_second": AIM, **{w: self._cores(w) for w in self.core}},
            "loader": {"workers": self.workers, **rates(self.loader)},
            "difference": dict(self.difference),
            "images": dict(self.images),
            "set_up": dict(self.set_up),
        }


def run(config: BenchConfig) -> DataCost:
    """Time it on one core, and from loading processes."""
    with _files(config) as source, seeded_globals("bench", "data"):
        size = config.image_size or _SIZE
        workers = max(1, default_workers())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            core = _on_a_core(source, size, config.rounds)
            loader = _from_processes(source, size, workers, config.rounds)
            difference = _difference(source, size)
            where = set_up(torch.device("cpu"), images=len(source), size=size, rounds=config.rounds)
        finally:
            torch.set_num_threads(threads)
        return DataCost(core, loader, workers, difference, _sizes(source), where)


@contextmanager
def _files(config: BenchConfig) -> Iterator[FileSource]:
    """The images, or made ones, all of which have been read once."""
    if config.data is None:
        with TemporaryDirectory() as folder:
            write_photographs(Path(folder), config.images)
            names = sorted(path.name for path in Path(folder).iterdir())
            yield FileSource("made photographs", Path(folder), names)
        return
    source = open_data(config.data).train
    if not isinstance(source, FileSource):
        raise DataError(
            f"'{config.data}' is no folder of image files",
            expected="a folder or list of files, as the official code reads them",
        )
    count = min(config.images, len(source))
    files = [source.files[i * len(source) // count] for i in range(count)]
    chosen = FileSource(source.name, source.root, files)
    for index, name in enumerate(files):
        try:
            chosen.read(index)
        except BadImage as error:
            raise DataError(
                f"cannot read '{name}' of '{source.name}': {error}", fix="mend or remove it"
            ) from None
    yield chosen


def _paths(source: FileSource) -> list[Path]:
    return [source.root / name for name in source.files]


def _on_a_core(source: FileSource, size: int, rounds: int) -> dict[str, Rate]:
    official = OfficialImages(_paths(source), size)
    epoch = iter(range(10**9))

    def ours(images: Source) -> None:
        view, number = CropView(size), next(epoch)
        for index in range(len(images)):
            view(images.look(index), (0, number, index))

    works = {
        "official": lambda: [official[index] for index in range(len(official))],
        "exact": lambda: ours(source),
        "fast": lambda: ours(scaled(source)),
    }
    # processor time: what others do on the machine takes none of it
    times = take_turns(works, rounds=rounds, device=torch.device("cpu"), clock=time.process_time)
    return _rates(times, len(source))


def _from_processes(source: FileSource, size: int, workers: int, rounds: int) -> dict[str, Rate]:
    """The steady rate: the first batches, which wait for the processes to start, are not timed."""
    batch, paths = min(_BATCH, len(source)), _paths(source)
    steps = max(_STEPS, _EACH * workers)
    view = CropView(size)

    def ours(images: Source) -> Iterable[object]:
        loader = training_batches(
            images, view, batch_size=batch, seed=0, start=0, stop=steps, workers=workers
        )
        return plainly(loader)

    ways = {
        "official": lambda: official_batches(
            paths, size, batch_size=batch, steps=steps, workers=workers
        ),
        "exact": lambda: ours(source),
        "fast": lambda: ours(scaled(source)),
    }
    first = min(4 * workers, steps // 2)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, loader in ways.items():
            batches = iter(loader())
            for _ in range(first):
                next(batches)
            began = time.perf_counter()
            for _ in batches:
                pass
            taken[way].append(time.perf_counter() - began)
    times = {way: Times(tuple(seconds)) for way, seconds in taken.items()}
    return _rates(times, (steps - first) * batch)


def _rates(times: Mapping[str, Times], images: int) -> dict[str, Rate]:
    official = times["official"].seconds
    return {
        way: Rate(
            images / found.median,
            Times(tuple(a / b for a, b in zip(official, found.seconds, strict=True))).record(),
        )
        for way, found in times.items()
    }


def _difference(source: FileSource, size: int) -> dict[str, float]:
    """Between the same views, decoded exactly and fast."""
    means, largest, differ = [], 0, 0
    for index in range(len(source)):
        address = (0, 0, index)
        exact, fast = source.look(index), scaled(source).look(index)
        (one,), (other,) = CropView(size)(exact, address), CropView(size)(fast, address)
        apart = (one.int() - other.int()).abs()
        means.append(float(apart.float().mean()))
        largest = max(largest, int(apart.max()))
        differ += bool(apart.any())
    return {"mean": statistics.mean(means), "max": largest, "views": differ / len(source)}


def _sizes(source: FileSource) -> dict[str, float]:
    shapes = np.array([source.look(index).shape for index in range(len(source))])
    return {
        "bytes": statistics.median(path.stat().st_size for path in _paths(source)),
        "height": float(np.median(shapes[:, 1])),
        "width": float(np.median(shapes[:, 2])),
    }

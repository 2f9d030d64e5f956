"""From sources and views to batches: which sample comes when, and the processes that load it.

The order of samples is a pure function of (seed, epoch); each process takes a contiguous share of
every global batch. An epoch's last, incomplete batch is left out; since every epoch has an order
of its own, no image is left out for good.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from featdistill.core.errors import DataError
from featdistill.core.seeds import generator, torch_generator
from featdistill.core.types import Batch, Replaced
from featdistill.data.decode import BadImage
from featdistill.data.joint_views import JointView
from featdistill.data.masks import PairSource
from featdistill.data.sources import Source
from featdistill.data.teacher_cache import TeacherCache
from featdistill.data.views import Address, View
from featdistill.data.workers import AtWork, processes, trouble_of

_FEW = 1024
_LARGE_BATCH = 64
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time, in so many
ATTEMPTS = 20  # substitutes to try for an unreadable image before giving up


@dataclass(frozen=True)
class Item:
    """One sample's place in a run."""

    epoch: int
    index: int
    position: int


@dataclass(frozen=True)
class Share:
    """This process among all.

    Attributes:
        rank, world: its number, and how many there are.
        here: how many of them share this machine's cores; all by default.
    """

    rank: int = 0
    world: int = 1
    here: int | None = None

    @property
    def workers(self) -> int:
        """Its loading processes, where nobody says how many."""
        return default_workers(self.here or self.world)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in a pass over the data.

    Raises:
        DataError: there is not even one.
    """
    if batch_size > images:
        raise DataError(
            f"batch of {batch_size} is larger than the {images} training images",
            fix=f"give --batch-size {images} or less",
        )
    return images // batch_size


class RunSampler(Sampler[list[Item]]):
    """This process's samples of steps `start` .. `stop`, a list for each step."""

    def __init__(
        self, images: int, *, batch_size: int, seed: int, start: int, stop: int, share: Share
    ) -> None:
        assert batch_size % share.world == 0
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.start, self.stop, self.share = start, stop, share
        self.per_epoch = steps_per_epoch(images, batch_size)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Item]]:
        for epoch, indices, places in self.steps():
            yield [Item(epoch, int(i), p) for i, p in zip(indices, places, strict=True)]

    def steps(self) -> Iterator[tuple[int, np.ndarray, range]]:
        """Each step's epoch, its images, and their places in the global batch."""
        mine = self.batch_size // self.share.world
        known, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.stop):
            epoch, within = divmod(step, self.per_epoch)
            if epoch != known:
                known, order = epoch, generator("order", self.seed, epoch).permutation(self.images)
            first = within * self.batch_size
            places = range(self.share.rank * mine, (self.share.rank + 1) * mine)
            yield epoch, order[first + places.start : first + places.stop], places


@dataclass(frozen=True)
class _Sample:
    views: tuple[Tensor, ...]
    label: int | None
    item: Item
    replaced: tuple[Replaced, ...]
    mask: Tensor | None = None
    taught: Tensor | None = None


def _look(
    source: Source, view: View | JointView, index: int, address: Address
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """An image's views, and its mask seen likewise where the source has masks."""
    if isinstance(source, PairSource):
        assert isinstance(view, JointView)
        image, mask = view(*source.read_pair(index), address)
        return (image,), mask
    assert not isinstance(view, JointView)
    return view(source.look(index), address), None


def stand_in(source: Source, seed: int, epoch: int, index: int, attempt: int) -> int:
    """The other image that is shown where image `index` cannot be read."""
    rng = generator("substitute", seed, epoch, index, attempt)
    return int(rng.integers(len(source)))


def hopeless(source: Source, failures: Sequence[Replaced]) -> DataError:
    """What to say where one image after the other cannot be read."""
    return DataError(
        f"{len(failures)} images in a row could not be read, the last: {failures[-1].reason}",
        fix=f"look at the images of '{source.name}'",
    )


class Samples(Dataset[_Sample]):
    """Views of a source by address; an unreadable image is replaced by a keyed other one.

    Args:
        cache: brings what the teacher says of each view, and says which views there are.
    """

    def __init__(
        self,
        source: Source,
        view: View | JointView,
        seed: int,
        cache: TeacherCache | None = None,
    ) -> None:
        self.source, self.view, self.seed, self.cache = source, view, seed, cache
        self.at_work = AtWork()

    def __getitem__(self, item: Item) -> _Sample:
        index, failures = item.index, list[Replaced]()
        for attempt in range(ATTEMPTS):
            try:
                self.at_work.on(index)
                views, mask = _look(self.source, self.view, index, self._address(item, index))
                taught = self._taught(item, index)
                break
            except BadImage as error:
                substitute = stand_in(self.source, self.seed, item.epoch, item.index, attempt)
                reason = f"{self.source.identify(index)}: {error}"
                failures.append(Replaced(index, reason, substitute))
                index = substitute
        else:
            raise hopeless(self.source, failures)
        labels = self.source.labels
        label = None if labels is None else int(labels[index])
        self.at_work.done()
        return _Sample(views, label, item, tuple(failures), mask, taught)

    def _address(self, item: Item, index: int) -> Address:
        if self.cache is None:
            return self.seed, item.epoch, index
        return self.cache.address(item.epoch, index)

    def _taught(self, item: Item, index: int) -> Tensor | None:
        if self.cache is None:
            return None
        return self.cache.read(self._address(item, index)[1], index)


def collate(samples: list[_Sample]) -> Batch:
    """Stack samples into a batch."""
    labels = [s.label for s in samples if s.label is not None]
    masks = [s.mask for s in samples if s.mask is not None]
    taught = [s.taught for s in samples if s.taught is not None]
    return Batch(
        views=tuple(torch.stack(same) for same in zip(*(s.views for s in samples), strict=True)),
        labels=torch.tensor(labels) if len(labels) == len(samples) else None,
        indices=torch.tensor([s.item.index for s in samples]),
        positions=torch.tensor([s.item.position for s in samples]),
        replaced=tuple(r for s in samples for r in s.replaced),
        masks=torch.stack(masks) if masks else None,
        # of a batch with a damaged entry none is taken: see `TeacherPass.complete`
        taught=torch.stack(taught) if len(taught) == len(samples) else None,
    )


def default_workers(processes: int = 1) -> int:
    """Loading processes for each training process: the cores, less one for the loop itself.

    Sixteen at most, which keep up with any one GPU (docs/performance-data.md).

    Args:
        processes: training processes that share this machine.
    """
    return max(0, min(16, cores() // processes - 1))


def cores() -> int:
    """Processors that this process may use: of the machine, of its affinity, of its container."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # another system, or no limit ("max")
        return allowed


def _ahead(images: int) -> int:
    """Batches that a loading process keeps ready: of large ones, two are gigabytes."""
    return 2 if images > _LARGE_BATCH else 4


def training_batches(
    source: Source,
    view: View | JointView,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    workers: int | None = None,
    share: Share = Share(),
    pin_memory: bool = False,
    cache: TeacherCache | None = None,
) -> DataLoader[Batch]:
    """Batches of steps `start` .. `stop`, the same whatever the number of workers.

    Args:
        batch_size: global, over all processes.
        share: this process among all.
        cache: gives each batch what the teacher says of it (`Batch.taught`).

    Raises:
        DataError: the batch is larger than the data.
    """
    sampler = RunSampler(
        len(source), batch_size=batch_size, seed=seed, start=start, stop=stop, share=share
    )
    if workers is None:  # a device computes while a process loads, be it on the loop's own core
        workers = max(share.workers, 1 if pin_memory else 0)
    workers = min(workers, stop - start)
    return DataLoader(
        Samples(source, view, seed, cache),  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=_ahead(batch_size // share.world) if workers else None,
        **processes(workers),
        # its own generator, or making an iterator would move the process's
        generator=torch_generator("loader", seed, start),
    )


class _InOrder(Dataset[_Sample]):
    """Every image of a source once; here an unreadable one is an error, scores need them all."""

    def __init__(self, source: Source, view: View | JointView) -> None:
        self.source, self.view = source, view
        self.at_work = AtWork()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _Sample:
        self.at_work.on(index)
        try:
            views, mask = _look(self.source, self.view, index, (0, 0, index))
        except BadImage as error:
            return self._unreadable(index, error)
        self.at_work.done()
        return self._sample(index, views, mask)

    def _sample(
        self,
        index: int,
        views: tuple[Tensor, ...],
        mask: Tensor | None = None,
        replaced: tuple[Replaced, ...] = (),
    ) -> _Sample:
        labels = self.source.labels
        label = None if labels is None else int(labels[index])
        return _Sample(views, label, Item(0, index, index), replaced, mask)

    def _unreadable(self, index: int, error: BadImage) -> _Sample:
        raise DataError(
            f"cannot read '{self.source.identify(index)}' of '{self.source.name}': {error}",
            fix="mend or remove it; a score needs every image",
        ) from None


class _Blackened(_InOrder):
    """Likewise, but a black image stands in for an unreadable one, and the sample says so.

    Every batch keeps its size: what a model says of an image does not depend on its neighbours.
    """

    def _unreadable(self, index: int, error: BadImage) -> _Sample:
        reason = f"{self.source.identify(index)}: {error}"
        black = torch.zeros(3, 1, 1, dtype=torch.uint8)
        assert not isinstance(self.view, JointView)
        views = self.view(black, (0, 0, index))
        return self._sample(index, views, replaced=(Replaced(index, reason, None),))


def ordered_batches(
    source: Source,
    view: View | JointView,
    *,
    batch_size: int,
    workers: int | None = None,
    share: Share = Share(),
) -> DataLoader[Batch]:
    """All images of a source in order, each once (of several processes, every world-th)."""
    mine = range(share.rank, len(source), share.world)
    if len(mine) < _FEW:  # over before a process has started
        workers = 0
    elif workers is None:
        workers = share.workers
    return DataLoader(
        _InOrder(source, view),  # type: ignore[arg-type]
        sampler=mine,
        batch_size=batch_size,
        collate_fn=collate,
        **processes(workers),
        generator=torch_generator("ordered"),
    )


def listed_batches(
    source: Source,
    view: View,
    *,
    batches: Sequence[Sequence[int]],
    workers: int | None = None,
    share: Share = Share(),
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Given batches of a source's images; the unreadable ones are black, and named in `replaced`.

    Args:
        batches: the images' numbers, batch by batch.
        workers: loading processes; None: by this process's share of the cores, and none for a few
            images.
    """
    if workers is None:
        workers = 0 if sum(map(len, batches)) < _FEW else share.workers
    return DataLoader(
        _Blackened(source, view),  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        **processes(min(workers, len(batches))),
        pin_memory=pin_memory,
        generator=torch_generator("listed"),
    )


def plainly(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches; a loading process's error comes without that process's traceback.

    Raises:
        DataError: an image could not be read where all are wanted; or a loading process was killed
            or hangs.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches, None)
        except DataError as error:
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.partition("DataError: ")[2] or last) from None
        except RuntimeError as error:
            trouble = trouble_of(error, loader.dataset)
            if trouble is None:
                raise
            raise trouble from None
        if batch is None:
            return
        yield batch

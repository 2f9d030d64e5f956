"""A distillation's teacher cache: what it is of, the pass that fills it, and what mends it.

The teacher sees a shard's images in fixed groups, whatever the batch, the processes and the
student are, so that an entry has the same bits whenever it is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featdistill.config.commands import DistillConfig
from featdistill.core.errors import DataError, FeatDistillError, RunError
from featdistill.core.types import Batch, Replaced
from featdistill.data.decode import BadImage, Picture
from featdistill.data.loader import listed_batches, plainly, steps_per_epoch
from featdistill.data.sources import Source
from featdistill.data.teacher_cache import Shard, TeacherCache
from featdistill.data.views import Address, CropView, View
from featdistill.engine.batches import is_out_of_memory
from featdistill.engine.fingerprint import fingerprint
from featdistill.engine.quarantine import Quarantine
from featdistill.engine.runtime import Runtime
from featdistill.engine.schedule import Schedule
from featdistill.engine.tracking import Countdown, say
from featdistill.models.weights import tensors_hash
from featdistill.objectives.distillation import FeatureDistillation
from featdistill.report.tables import room

_GROUP = 64  # images that the teacher sees at once; another number would change bits

# settings of the data that change no pixel, or that the images' fingerprint tells; others may
_NO_PIXEL = {
    *("path", "val", "val_fraction", "labels", "batch_size"),
    *("workers", "bad_images", "bad_image_limit", "cache", "cache_folder"),
}


@dataclass(frozen=True)
class Need:
    """What a run will add to its cache.

    Attributes:
        views: that the run sees.
        images: views of images that the teacher has yet to see.
        bytes: of their entries.
        whole: bytes of all entries that the run sees.
        free: bytes that are free there.
    """

    views: int
    images: int
    bytes: int
    whole: int
    free: int


@dataclass(frozen=True)
class Kept:
    """A run's cache, and what is missing in it."""

    cache: TeacherCache
    need: Need

    def describe(self) -> str:
        """Its size and what is still to be written, for people."""
        cache, need = self.cache, self.need
        tokens, channels = cache.shape
        state = (
            f"{room(need.bytes)} of it to be written in a pass before the first step, "
            f"{room(need.free)} free"
            if need.images
            else "it is complete"
        )
        return (
            f"{room(need.whole)} in '{cache.folder}': {need.views} fixed views of "
            f"{cache.images:,} images, {tokens} x {channels} in bf16 each; {state}"
        )


def kept_of(
    config: DistillConfig,
    objective: FeatureDistillation,
    source: Source,
    view: CropView,
    schedule: Schedule,
    runtime: Runtime,
) -> Kept | None:
    """The cache that a configuration names, if any; nothing is written.

    Raises:
        RunError: its folder holds something else, or cannot be written, or there is too little
            room.
    """
    wanted = config.teacher_cache
    if wanted.folder is None:
        return None
    assert wanted.views is not None
    cache = TeacherCache(
        Path(wanted.folder).expanduser(),
        _identity(config, objective, source, view, runtime),
        images=len(source),
        shape=objective.taught_shape,
        views=wanted.views,
        seed=config.run.seed if wanted.seed is None else wanted.seed,
    )
    epochs = -(-schedule.steps // steps_per_epoch(len(source), config.data.batch_size))

    def need() -> Need:
        cache.check()
        return need_of(cache, min(cache.views, epochs))  # a short run sees fewer

    return Kept(cache, runtime.first_does(need))


def _identity(
    config: DistillConfig,
    objective: FeatureDistillation,
    source: Source,
    view: CropView,
    runtime: Runtime,
) -> dict[str, Any]:
    """All that the bits of an entry depend on, but for the seed."""
    teacher = objective.teacher
    reading = config.data.model_dump(mode="json", exclude=_NO_PIXEL)
    data = runtime.first_does(lambda: fingerprint(source))
    return {
        "the teacher's weights": tensors_hash(teacher.model),
        "its architecture": None if teacher.build is None else repr(teacher.build),
        "its image size": teacher.image_size,
        "its mean and std": teacher.rgb,
        "its layer": objective.pairing.layer,
        "target": objective.target,
        "precision": objective.teacher_precision or runtime.precision,
        **{
            f"the images' {name}": data[name]
            for name in ("names", "sizes", "pixels")
            if name in data
        },
        **{f"data.{name}": value for name, value in reading.items()},
        **{f"the view's {name}": value for name, value in asdict(view).items()},
    }


def need_of(cache: TeacherCache, views: int) -> Need:
    """What is missing of a run's views.

    Raises:
        RunError: the disk has too little room for it.
    """
    images = sum(len(shard.images) for shard in cache.missing(views))
    need = Need(
        views,
        images,
        cache.bytes_for(images),
        views * cache.bytes_for(cache.images),
        cache.free(),
    )
    if need.bytes > need.free:
        raise RunError(
            f"the teacher cache will write {room(need.bytes)} to '{cache.folder}', where "
            f"{room(need.free)} are free",
            fix="make room, give another --teacher-cache, or fewer --teacher-cache-views",
        )
    return need


@dataclass(frozen=True)
class _Fixed:
    """One of the K views, wherever it is asked for."""

    view: View
    seed: int
    number: int

    def __call__(self, image: Tensor | Picture, address: Address) -> tuple[Tensor, ...]:
        return self.view(image, (self.seed, self.number, address[2]))


class TeacherPass:
    """Fills a cache, and mends it while a run reads it.

    Args:
        source, view: what the run's batches are made of.
        batch_size: of the run, which tells the epoch of a step.
        quarantine: makes the list of unreadable images, in the first process; too many of them
            end the pass.
        workers: loading processes.
    """

    def __init__(
        self,
        cache: TeacherCache,
        objective: FeatureDistillation,
        *,
        source: Source,
        view: CropView,
        batch_size: int,
        runtime: Runtime,
        quarantine: Callable[[], Quarantine],
        workers: int | None,
    ) -> None:
        self.cache, self.objective, self.runtime = cache, objective, runtime
        self.source, self.view, self.workers = source, view, workers
        self._per_epoch = steps_per_epoch(len(source), batch_size)
        self._bad: list[Replaced] = []
        self._quarantine: Quarantine | None = None

        def open_quarantine() -> None:
            self._quarantine = quarantine()

        runtime.first_does(open_quarantine)

    def fill(self, views: int) -> None:
        """Let the teacher see what is missing of the first so many views.

        Each process fills its share of the shards. A kill loses the shard under way.

        Raises:
            RunError: the disk refuses.
            DataError: too many images cannot be read.
        """
        runtime, mistake = self.runtime, None
        missing = runtime.first_does(lambda: self._begin(views))
        if not missing:
            return
        self.objective.to_device(runtime.device)
        try:
            self._fill(missing[runtime.share.rank :: runtime.share.world])
        except FeatDistillError as error:
            mistake = error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            mistake = _too_little_memory()
        runtime.together(mistake)
        found = [r for bad in runtime.collect(self._bad) for r in bad]
        runtime.first_does(lambda: self._enter(found))
        say(f"teacher cache: {sum(len(s.images) for s in missing):,} views written")

    def _begin(self, views: int) -> list[Shard]:
        self.cache.begin()
        need_of(self.cache, views)
        return self.cache.missing(views)

    def _fill(self, shards: Sequence[Shard]) -> None:
        total, done = sum(len(s.images) for s in shards), 0
        bar = Countdown("teacher cache", total, "images", quiet=not self.runtime.first)
        try:
            for view, same in itertools.groupby(shards, key=lambda s: s.view):
                for seen in self._make(view, list(same), self.workers):
                    self._bad += seen.replaced
                    self._enter(seen.replaced)  # those of other processes come later
                    done += len(seen)
                    bar.update(done)
        finally:
            bar.stop()

    def _enter(self, replaced: Sequence[Replaced]) -> None:
        if self._quarantine is not None:
            self._quarantine.add(replaced)

    def _make(self, view: int, shards: Sequence[Shard], workers: int | None) -> Iterator[Batch]:
        """Write shards of a view, yielding what the teacher has seen."""
        groups = [
            [shard.images[at : at + _GROUP] for at in range(0, len(shard.images), _GROUP)]
            for shard in shards
        ]
        loader = listed_batches(
            self.source,
            _Fixed(self.view, self.cache.seed, view),
            batches=[group for of_shard in groups for group in of_shard],
            workers=workers,
            share=self.runtime.share,
            pin_memory=self.runtime.device.type == "cuda",
        )
        batches = plainly(loader)
        for shard, of_shard in zip(shards, groups, strict=True):
            entries, bad = [], set[int]()
            for batch in itertools.islice(batches, len(of_shard)):
                bad |= {r.index for r in batch.replaced}
                entries.append(self._ask(batch))
                yield batch
            self.cache.write(shard, torch.cat(entries), [i not in bad for i in shard.images])

    @torch.no_grad()
    def _ask(self, batch: Batch) -> Tensor:
        """What the teacher says, (B, N, D) bf16 on the CPU."""
        with self.runtime.autocast():
            features = self.objective.teacher_features(self.runtime.batch(batch))
            return self.objective.taught_by(features).bfloat16().cpu()

    def complete(self, step: int, batch: Batch) -> Batch:
        """A batch of the run with what the teacher says; damaged shards are made again.

        Raises:
            RunError: a shard cannot be mended.
            DataError: nor can its image be read any more.
        """
        if batch.taught is not None:
            return batch
        view = step // self._per_epoch % self.cache.views
        try:
            return replace(batch, taught=torch.stack([self._entry(view, i) for i in shown(batch)]))
        except BadImage as error:
            raise DataError(
                f"an image of '{self.source.name}' was readable a moment ago: {error}",
                fix="look at its disk, then go on with the same command and --resume",
            ) from None

    def _entry(self, view: int, index: int) -> Tensor:
        found = self.cache.read(view, index)
        if found is not None:
            return found
        shard = self.cache.shard_of(view, index)
        say(f"teacher cache: '{self.cache.file(shard)}' is damaged or gone; it is made again")
        with self.objective.awake(self.runtime.device):
            for _ in self._make(view, [shard], workers=0):
                pass
        found = self.cache.read(view, index)
        if found is None:
            raise RunError(
                f"'{self.cache.file(shard)}' reads back otherwise than it was written",
                fix="give a --teacher-cache on another disk, then go on with --resume",
            )
        return found


def _too_little_memory() -> RunError:
    return RunError(
        f"there is too little memory for the teacher's pass of {_GROUP} images",
        fix="leave out --teacher-cache: without it the teacher sees no more than a micro-batch",
    )


def shown(batch: Batch) -> list[int]:
    """The images that a batch shows: where one was unreadable, that which stands for it."""
    chains, found = list(batch.replaced), []
    for index in batch.indices.tolist():
        while chains and chains[0].index == index and chains[0].substitute is not None:
            index = chains.pop(0).substitute
        found.append(index)
    return found

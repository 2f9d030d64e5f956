"""The features of a whole data set, from a backbone to files: streaming, and resumable.

A shard is a fixed range of the data, and no batch reaches over its end: so each shard's bytes are a
pure function of model and data, whichever process makes it after whatever stop.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featdistill.core.errors import Interrupted, ModelError, NonFiniteError
from featdistill.core.types import Batch, Features, Replaced
from featdistill.data.loader import listed_batches, plainly
from featdistill.data.sources import Source
from featdistill.data.views import View
from featdistill.engine.quarantine import Quarantine
from featdistill.engine.signals import StopRequest, stop_on_signals
from featdistill.engine.tracking import Bar, duration, say
from featdistill.evaluation.feature_files import (
    FormatName,
    Ledger,
    Rows,
    Shard,
    as_text,
    clear_drafts,
    disk,
    new_shard,
    write_images,
)
from featdistill.evaluation.features import Part, features_of
from featdistill.models.backbone import Backbone
from featdistill.models.weights import tensors_hash

_SHARD_BYTES = 512 << 20  # it waits in memory
_SHARD_IMAGES = 4096  # a stop costs a shard's work at most


@dataclass(frozen=True)
class Plan:
    """Which features of which images go into which files.

    Attributes:
        parts: at least one.
        dtype: float32 or float16.
        shard_images: images of a shard; see `shard_size`.
        bad_image_limit: largest share of the images that may be unreadable.
    """

    source: Source
    view: View
    parts: tuple[Part, ...]
    dtype: torch.dtype
    format: FormatName
    batch_size: int
    shard_images: int
    workers: int | None = None
    bad_image_limit: float = 0.01

    @property
    def layers(self) -> tuple[int, ...]:
        """The intermediate layers among the parts."""
        return tuple(sorted({p.layer for p in self.parts if p.layer is not None}))

    @property
    def ranges(self) -> dict[str, range]:
        """Each shard's file name and images, in order."""
        n = len(self.source)
        starts = range(0, n, self.shard_images)
        digits = max(5, len(str(len(starts) - 1)))
        return {
            f"features-{number:0{digits}d}.{self.format}": range(
                start, min(n, start + self.shard_images)
            )
            for number, start in enumerate(starts)
        }

    def batches(self, images: range) -> list[range]:
        """A shard's batches; the last may be smaller."""
        return [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]


@dataclass(frozen=True)
class Extracted:
    """What was written.

    Attributes:
        shards: in order.
        seconds: of this session.
    """

    shards: tuple[Shard, ...]
    seconds: float

    @property
    def rows(self) -> int:
        """Images with features."""
        return sum(s.rows for s in self.shards)

    @property
    def unreadable(self) -> list[Any]:
        """{index, reason} of each image without."""
        return [u for s in self.shards for u in s.unreadable]


def bytes_per_image(parts: Sequence[Part], dtype: torch.dtype) -> int:
    """What one image's features take in a file."""
    return sum(torch.Size(p.shape).numel() for p in parts) * dtype.itemsize + 16


def shard_size(parts: Sequence[Part], dtype: torch.dtype, batch_size: int) -> int:
    """Images of a shard of at most 512 MiB and 4096 images: whole batches, if one fits."""
    most = min(_SHARD_IMAGES, _SHARD_BYTES // bytes_per_image(parts, dtype))
    return max(1, most // batch_size * batch_size or most)


def fingerprint(source: Source) -> str:
    """SHA-256 over the names and labels of a source's images, 12 characters."""
    digest = hashlib.sha256()
    labels = source.labels
    for i in range(len(source)):
        label = "" if labels is None else int(labels[i])
        digest.update(f"{as_text(source.identify(i))}\0{label}\n".encode())
    return digest.hexdigest()[:12]


def extract_to_files(
    backbone: Backbone, plan: Plan, *, folder: Path, resume: bool = False
) -> Extracted:
    """Write features, shard by shard.

    Args:
        folder: exists; with `resume`, its whole shards are kept and the others made.

    Raises:
        Interrupted: asked to stop by a signal; the finished shards are there.
        DataError: too many images are unreadable.
        ModelError: a value does not fit into float16.
        NonFiniteError: a feature is no number.
        RunError: the disk refuses, or what is there was made from something else.
    """
    facts = {
        "weights": tensors_hash(backbone),
        "images": f"{len(plan.source)} ({fingerprint(plan.source)})",
        "shard_images": plan.shard_images,
    }
    ledger = Ledger(folder, facts, resume=resume)
    clear_drafts(folder)
    try:
        return _Extraction(backbone, plan, folder, ledger).run()
    finally:
        clear_drafts(folder)


class _Extraction:
    def __init__(self, backbone: Backbone, plan: Plan, folder: Path, ledger: Ledger) -> None:
        self.backbone, self.plan, self.folder, self.ledger = backbone, plan, folder, ledger
        self.total, self.done = len(plan.source), 0
        self.quarantine = Quarantine(
            folder / "quarantine.jsonl", images=self.total, limit=plan.bad_image_limit
        )

    def run(self) -> Extracted:
        began = time.monotonic()
        todo = self._remaining()
        with stop_on_signals() as request:
            self._make(todo, request)
        shards = tuple(self.ledger.shards[file] for file in self.plan.ranges)
        write_images(self.folder / "images.csv", self.plan.source, shards)
        return Extracted(shards, time.monotonic() - began)

    def _remaining(self) -> dict[str, range]:
        """Shards that are not there, or not as they were written."""
        todo = {}
        for file, images in self.plan.ranges.items():
            if self.ledger.is_whole(file):
                self.done += len(images)
                known = self.ledger.shards[file].unreadable
                self._quarantine([Replaced(u["index"], u["reason"], None) for u in known])
                continue
            if file in self.ledger.shards:
                say(f"'{self.folder / file}' is missing or damaged: it is made again")
            todo[file] = images
        if self.done:
            say(f"{self.done:,} of {self.total:,} images are done")
        return todo

    def _make(self, todo: dict[str, range], request: StopRequest) -> None:
        plan = self.plan
        batches = [batch for images in todo.values() for batch in plan.batches(images)]
        if not batches:
            return
        loader = listed_batches(
            plan.source,
            plan.view,
            batches=batches,
            workers=plan.workers,
            pin_memory=self.backbone.mean.device.type == "cuda",
        )
        meter = _Meter(self.total, self.done)
        found = features_of(self.backbone, plainly(loader), plan.layers)
        try:
            for file, images in todo.items():
                self._shard(file, images, found, meter, request)
        finally:
            meter.bar.stop()

    def _shard(
        self,
        file: str,
        images: range,
        found: Iterator[tuple[Batch, Features]],
        meter: _Meter,
        request: StopRequest,
    ) -> None:
        plan, unreadable = self.plan, []
        writer = new_shard(
            self.folder / file,
            plan.parts,
            plan.dtype,
            capacity=len(images),
            labelled=plan.source.labels is not None,
        )
        with writer:
            for _ in plan.batches(images):
                self._stop_if(request)
                batch, features = next(found)
                self._quarantine(batch.replaced)
                unreadable += [{"index": r.index, "reason": r.reason} for r in batch.replaced]
                writer.add(self._rows(batch, features))
                meter.count(len(batch))
        self.ledger.add(file, images.start, images.stop, unreadable)
        self.done += len(images)

    def _stop_if(self, request: StopRequest) -> None:
        if request.signal is not None:
            raise Interrupted(
                f"stopped: {self.done:,} of {self.total:,} images are in finished files of "
                f"'{self.folder}'",
                signal_number=request.signal,
                fix="go on with the same command and --resume",
            )

    def _quarantine(self, replaced: Sequence[Replaced]) -> None:
        with disk(self.quarantine.file):
            self.quarantine.add(replaced)

    def _rows(self, batch: Batch, features: Features) -> Rows:
        """A batch's readable images, ready to be written."""
        bad = {r.index for r in batch.replaced}
        kept = torch.tensor([i not in bad for i in batch.indices.tolist()])
        index = batch.indices[kept]
        names = tuple(as_text(self.plan.source.identify(i)) for i in index.tolist())
        stored = {}
        for part in self.plan.parts:
            values = part.of(features)
            values = values[kept.to(values.device)] if bad else values
            stored[part.name] = _stored(part, values, names, self.plan.dtype)
        return Rows(names, index, None if batch.labels is None else batch.labels[kept], stored)


def _stored(part: Part, values: Tensor, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Features in the type of the file, on the CPU; every one of them a number."""
    stored = values.to(dtype).cpu()
    finite = torch.isfinite(stored).flatten(1).all(1)
    if finite.all():
        return stored
    row = int(finite.logical_not().nonzero()[0])
    largest = float(values[row].abs().max())
    if largest < float("inf"):  # and not NaN
        raise ModelError(
            f"'{part.name}' of '{names[row]}' reaches {largest:.3g}, more than float16 can hold",
            fix="write --dtype float32 (into another --out)",
        )
    raise NonFiniteError(
        f"'{part.name}' of '{names[row]}' is not finite", fix="look at the model's weights"
    )


class _Meter:
    """Progress in images, with the time that is left."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.before, self.done = total, done, done
        self.began = time.monotonic()
        self.bar = Bar("features")
        self.bar.start(total, done)

    def count(self, images: int) -> None:
        self.done += images
        speed = (self.done - self.before) / max(1e-9, time.monotonic() - self.began)
        left = duration((self.total - self.done) / speed)
        self.bar.update(self.done, f"{speed:,.0f} images/s  left {left}")

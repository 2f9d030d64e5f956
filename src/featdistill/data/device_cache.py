"""A small set of images that lives on the training device, and its batches, cut there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.core.types import Batch, Replaced
from featdistill.data.batched_views import BatchedCrop, Cutter, batched
from featdistill.data.decode import BadImage
from featdistill.data.joint_views import JointView
from featdistill.data.kept import ALONE, Block, Estimate, Kept, decoded, estimate, in_words
from featdistill.data.loader import ATTEMPTS, RunSampler, Share, hopeless, stand_in
from featdistill.data.sources import Source
from featdistill.data.views import View

# side of the images times side of the views, above which a CPU is slower at matrix products
_PRODUCTS = 64 * 96
_WASTE = 2.0  # memory over what the images have, at most
_GROUP = Path("/sys/fs/cgroup")  # a container's limit
_FILES = ("active_file", "inactive_file")
_FIX = "give --data.cache disk, or --data.cache_short_side N for smaller images"


class DeviceImages(Kept):
    """Decoded images on a device.

    Args:
        source: what they are the images of.
        pixels: (n, H, 3, W) uint8, H and W of the largest image; smaller ones in the upper left
            corner.
        sizes: (n, 2) int64 heights and widths; 0, 0 where an image cannot be read.
        reasons: why, by the image's number.
    """

    def __init__(
        self, source: Source, *, pixels: Tensor, sizes: np.ndarray, reasons: dict[int, str]
    ) -> None:
        super().__init__(source)
        self.pixels, self.sizes, self.reasons = pixels, sizes, reasons
        labels = source.labels
        self.device_labels = None if labels is None else torch.tensor(labels, device=pixels.device)

    def read(self, index: int) -> Tensor:
        if index in self.reasons:
            raise BadImage(self.reasons[index])
        height, width = self.sizes[index]
        return self.pixels[index, :height, :, :width].transpose(0, 1).contiguous().cpu()


def to_device(
    source: Source,
    device: torch.device,
    *,
    short_side: int | None = None,
    workers: int | None = None,
    share: Share = ALONE,
    copies: int = 1,
    progress: Callable[[int], None],
) -> DeviceImages:
    """Decode a source's images, and keep them on a device.

    Args:
        short_side: of larger images, which become smaller; None: all stay as they are.
        workers: loading processes; None: by the cores.
        share: this process among all, which decode at once.
        copies: processes that each keep the images in the same memory.
        progress: is told how many images are decoded.

    Raises:
        DataError: the device has too little room, or the sizes differ so much that much of it
            would be padding; seen from a sample, before the images are decoded.
    """
    guess, free = estimate(source, short_side), free_memory(device)
    _check(source, guess, device, copies, free, "of a sample of 64")
    blocks, done = list[Block](), 0
    for block in decoded(
        source,
        short_side=short_side,
        mean_bytes=guess.pixels // max(1, len(source)),
        workers=workers,
        share=share,
    ):
        # out of the memory that processes share, each piece of which is an open file
        blocks.append(Block(block.pixels.clone(), block.sizes.clone(), block.reasons))
        done += len(block.sizes)
        progress(done)
    sizes = torch.cat([b.sizes for b in blocks])
    height, width = (max(1, int(side)) for side in sizes.max(dim=0).values)
    exact = Estimate(
        pixels=int(3 * sizes.prod(dim=1).sum()),
        padded=3 * height * width * len(sizes),
        height=height,
        width=width,
        sizes=len(sizes[sizes[:, 0] > 0].unique(dim=0)),
    )
    # of the memory that was free before: what the blocks take is given up as they are put in place
    _check(source, exact, device, copies, free, "")
    reasons = {index: why for b in blocks for index, why in b.reasons.items()}
    try:
        pixels = torch.zeros(len(sizes), height, 3, width, dtype=torch.uint8, device=device)
        _fill(pixels, blocks)
    except torch.OutOfMemoryError:
        raise _too_large(source, exact, device, copies, free) from None
    return DeviceImages(source, pixels=pixels, sizes=sizes.numpy(), reasons=reasons)


def _fill(pixels: Tensor, blocks: list[Block]) -> None:
    """Put decoded images in their places; the blocks are taken out of their list one by one."""
    first = 0
    blocks.reverse()
    while blocks:
        block = blocks.pop()
        count, start = len(block.sizes), 0
        whole = torch.zeros(count, *pixels.shape[1:], dtype=torch.uint8)
        for row, (height, width) in enumerate(block.sizes.tolist()):
            end = start + 3 * height * width
            image = block.pixels[start:end].view(3, height, width)
            whole[row, :height, :, :width] = image.transpose(0, 1)
            start = end
        pixels[first : first + count] = whole.to(pixels.device)
        first += count


def _check(
    source: Source,
    found: Estimate,
    device: torch.device,
    copies: int,
    free: int | None,
    sample: str,
) -> None:
    """Raise DataError if images do not fit, or not well."""
    if found.padded > _WASTE * found.pixels:
        which = f"{found.sizes} sizes {sample}".strip()
        raise DataError(
            f"the images of '{source.name}' have many sizes ({which}): padded to "
            f"{found.width} x {found.height} they take {in_words(found.padded)} instead of "
            f"{in_words(found.pixels)}",
            expected=f"at most {_WASTE:g} times their own size (--data.cache device)",
            fix="give --data.cache disk",
        )
    if free is not None and copies * found.padded > free:
        raise _too_large(source, found, device, copies, free)


def _too_large(
    source: Source, found: Estimate, device: torch.device, copies: int, free: int | None
) -> DataError:
    where = "the GPU" if device.type == "cuda" else "this machine"
    times = f" in each of {copies} processes" if copies > 1 else ""
    has = "" if free is None else f", and {where} has {in_words(free)} free"
    return DataError(
        f"the {len(source):,} images of '{source.name}' take about {in_words(found.padded)} decoded"
        f"{times}{has}",
        expected="a set that fits into its memory (--data.cache device)",
        fix=_FIX,
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has free; None if it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(li.split()[1]) for li in lines if li.startswith("MemAvailable:")]
        limit, used, parts = (
            (_GROUP / name).read_text(encoding="ascii").strip()
            for name in ("memory.max", "memory.current", "memory.stat")
        )
        if limit != "max":
            # files that were read count as used, and go when memory is wanted
            files = [int(li.split()[1]) for li in parts.splitlines() if li.split()[0] in _FILES]
            found.append(int(limit) - int(used) + sum(files))
    except (OSError, ValueError, IndexError):
        pass
    return max(0, min(found)) if found else None


def device_batches(
    images: DeviceImages,
    view: View | JointView,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    share: Share,
) -> Iterator[Batch]:
    """What `training_batches` gives, to the bit, from images on the device, and on it.

    Raises:
        DataError: the batch is larger than the data, or no image can be read.
    """
    crop = batched(view)
    assert crop is not None, "refused with the configuration"
    cut = _cut_with(images, crop, view)
    sampler = RunSampler(
        len(images), batch_size=batch_size, seed=seed, start=start, stop=stop, share=share
    )
    for epoch, wanted, places in sampler.steps():
        shown, replaced = _shown(images, seed, epoch, wanted)
        labels = images.device_labels
        rows = torch.from_numpy(shown)
        yield Batch(
            views=(cut(seed, epoch, shown),),
            labels=None if labels is None else labels[rows.to(labels.device, non_blocking=True)],
            indices=torch.from_numpy(wanted.copy()),
            positions=torch.arange(places.start, places.stop),
            replaced=replaced,
        )


def _cut_with(
    images: DeviceImages, crop: BatchedCrop, view: View | JointView
) -> Callable[[int, int, np.ndarray], Tensor]:
    """What makes the views (B, 3, S, S) of images at the addresses (seed, epoch, image)."""
    _, height, _, width = images.pixels.shape
    device = images.pixels.device

    def one_by_one(seed: int, epoch: int, shown: np.ndarray) -> Tensor:
        assert not isinstance(view, JointView)
        return torch.stack([view(images.read(i), (seed, epoch, i))[0] for i in shown.tolist()])

    if device.type == "cpu" and crop.size * max(height, width) > _PRODUCTS:
        return one_by_one
    cutter = Cutter(crop, height=height, width=width, device=device)

    def at_once(seed: int, epoch: int, shown: np.ndarray) -> Tensor:
        boxes = crop.boxes(seed, epoch, shown, *images.sizes[shown].T)
        return cutter(images.pixels, shown, boxes)

    return at_once


def _shown(
    images: DeviceImages, seed: int, epoch: int, wanted: np.ndarray
) -> tuple[np.ndarray, tuple[Replaced, ...]]:
    """The images of a step, others in the place of those that cannot be read."""
    shown, replaced = wanted.copy(), list[Replaced]()
    for row in np.flatnonzero(images.sizes[wanted, 0] == 0) if images.reasons else ():
        index, failures = int(wanted[row]), list[Replaced]()
        while index in images.reasons:
            substitute = stand_in(images, seed, epoch, int(wanted[row]), len(failures))
            reason = f"{images.identify(index)}: {images.reasons[index]}"
            failures.append(Replaced(index, reason, substitute))
            if len(failures) == ATTEMPTS:
                raise hopeless(images, failures)
            index = substitute
        shown[row] = index
        replaced += failures
    return shown, tuple(replaced)

"""Images decoded once, to be kept: how large they are, and how they are decoded side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from featdistill.core.errors import DataError
from featdistill.core.seeds import generator, torch_generator
from featdistill.data.decode import BadImage
from featdistill.data.loader import Share
from featdistill.data.sources import Source, Wrapped
from featdistill.data.workers import AtWork, processes, trouble_of

_SAMPLE = 64
_BLOCK = 1 << 22  # bytes of images that travel together between processes
_FEW = 1024
ALONE = Share()


class Kept(Wrapped, ABC):
    """A source whose images were decoded before."""

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Image `index`, (3, height, width) uint8. Raises BadImage."""

    def look(self, index: int) -> Tensor:
        """The same for a view."""
        return self.read(index)


def read_shrunk(source: Source, index: int, short_side: int | None) -> Tensor:
    """An image, whose short side becomes `short_side` if it is longer. Raises BadImage."""
    image = source.read(index)
    height, width = image.shape[1:]
    if short_side is None or min(height, width) <= short_side:
        return image
    scale = short_side / min(height, width)
    return F.resize(image, [round(height * scale), round(width * scale)], antialias=True)


@dataclass(frozen=True)
class Estimate:
    """What a sample says of a source's decoded images.

    Attributes:
        pixels: bytes of all images.
        padded: bytes of all, were each as high and wide as the largest of the sample.
        height, width: of the largest.
        sizes: how many different ones the sample has.
    """

    pixels: int
    padded: int
    height: int
    width: int
    sizes: int


def estimate(source: Source, short_side: int | None) -> Estimate:
    """How large a source's images are when decoded, from a fixed sample of 64.

    Raises:
        DataError: none of the sample can be read.
    """
    count = len(source)
    chosen = generator("estimate", count).permutation(count)[:_SAMPLE]
    sizes, reason = [], ""
    for index in chosen.tolist():
        try:
            sizes.append(tuple(read_shrunk(source, index, short_side).shape[1:]))
        except BadImage as error:
            reason = f"{source.identify(index)}: {error}"
    if not sizes:
        raise DataError(
            f"none of {len(chosen)} images of '{source.name}' could be read, the last: {reason}",
            fix="look at the images",
        )
    heights, widths = (np.array(side, np.int64) for side in zip(*sizes, strict=True))
    high, wide = int(heights.max()), int(widths.max())
    mean = float((heights * widths).mean())
    return Estimate(round(3 * mean * count), 3 * high * wide * count, high, wide, len(set(sizes)))


@dataclass(frozen=True)
class Block:
    """Decoded images that follow each other.

    Attributes:
        pixels: (bytes,) uint8, each image (3, height, width), one after the other.
        sizes: (n, 2) int64 heights and widths; 0, 0 where an image cannot be read.
        reasons: why, by the image's number in the source.
    """

    pixels: Tensor
    sizes: Tensor
    reasons: dict[int, str] = field(default_factory=dict)


class _Blocks(Dataset[Block]):
    """A source's images, decoded by the block."""

    def __init__(self, source: Source, short_side: int | None, start: int, size: int) -> None:
        self.source, self.short_side = source, short_side
        self.start, self.size = start, size
        self.at_work = AtWork()

    def __len__(self) -> int:
        return -(-(len(self.source) - self.start) // self.size)

    def __getitem__(self, number: int) -> Block:
        first = self.start + number * self.size
        images, sizes, reasons = [], [], {}
        for index in range(first, min(first + self.size, len(self.source))):
            self.at_work.on(index)
            try:
                image = read_shrunk(self.source, index, self.short_side)
                images.append(image.reshape(-1))
                sizes.append(tuple(image.shape[1:]))
            except BadImage as error:
                sizes.append((0, 0))
                reasons[index] = str(error)
        self.at_work.done()
        pixels = torch.cat(images) if images else torch.empty(0, dtype=torch.uint8)
        return Block(pixels, torch.tensor(sizes, dtype=torch.int64), reasons)


def decoded(
    source: Source,
    *,
    short_side: int | None,
    mean_bytes: int,
    workers: int | None,
    share: Share = ALONE,
    start: int = 0,
) -> Iterator[Block]:
    """A source's images from `start` on, decoded by loading processes, in order.

    Args:
        short_side: see `read_shrunk`.
        mean_bytes: of a decoded image, about.
        workers: loading processes; None: by this process's share of the cores, and none for a few
            images.

    Raises:
        DataError: a loading process was killed or hangs.
    """
    size = max(1, min(512, _BLOCK // max(1, mean_bytes)))
    blocks = _Blocks(source, short_side, start, size)
    if workers is None:
        workers = 0 if len(source) - start < _FEW else share.workers
    loader: DataLoader[Block] = DataLoader(
        blocks,
        batch_size=None,
        sampler=range(len(blocks)),
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        **processes(min(workers, len(blocks))),
        generator=torch_generator("decoded"),
    )
    try:
        yield from loader
    except RuntimeError as error:
        trouble = trouble_of(error, blocks)
        if trouble is None:
            raise
        raise trouble from None


def _as_it_is(block: Block) -> Block:
    return block


def in_words(count: int) -> str:
    """Bytes as a person would say them."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 2**30 / 10 else f"{count / 2**30:.2f} GiB"

"""A process that reads mutated image files through the sample reader: `fuzz_images.py FIRST LAST`.

It prints the number of each file before it reads it, so that a crash names its file, and at the end
a line of JSON. File n is a pure function of n.
"""

from __future__ import annotations

import io
import json
import resource
import signal
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from featdistill.core.errors import DataError
from featdistill.data.decode import BadImage, Box, Picture, _decode_with_pillow
from featdistill.data.jpeg import frame_of
from featdistill.data.loader import Item, Samples
from featdistill.data.masks import MaskFiles, Numbering, PairSource
from featdistill.data.sources import FileSource, scaled
from featdistill.data.views import EvalView

SECONDS = 20  # for one file
MEMORY = 3 << 30  # bytes of addresses beyond what the libraries take
_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "TGA", "ICO", "AVIF")
_EXTREMES = (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xff\xff")


def originals() -> list[bytes]:
    """A small file of every kind and colour mode."""
    Image.init()
    found = []
    ramp = Image.linear_gradient("L").resize((24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in _KINDS:
        for mode in ("L", "RGB", "P", "RGBA", "CMYK", "I;16", "1"):
            image = ramp.convert("RGB").convert(mode) if mode != "I;16" else ramp.convert("I;16")
            for options in ({}, {"exif": exif.tobytes()}):
                out = io.BytesIO()
                try:
                    image.save(out, kind, **options)
                except (OSError, KeyError, ValueError):
                    continue  # no such mode, or no such library here
                found.append(out.getvalue())
    return found


def mutated(files: list[bytes], number: int) -> bytes:
    """File `number`: one of the originals, damaged in one to eight places, and perhaps cut."""
    rng = np.random.default_rng([7, number])
    data = bytearray(files[number % len(files)])
    for _ in range(int(rng.integers(1, 9))):
        # most of what a parser reads lies at the front
        place = int(rng.integers(min(len(data), 128 if rng.random() < 0.7 else len(data))))
        match int(rng.integers(5)):
            case 0:
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data[place] = int(rng.integers(256))
            case 2:
                data[place : place + 4] = _EXTREMES[int(rng.integers(len(_EXTREMES)))]
            case 3:
                data[place:place] = rng.bytes(int(rng.integers(1, 9)))
            case _:
                other = files[int(rng.integers(len(files)))]
                data[place : place + 16] = other[place : place + 16]
    if rng.random() < 0.2:
        del data[int(rng.integers(len(data) + 1)) :]
    return bytes(data)


def read(folder: Path, data: bytes) -> list[str]:
    """What became of a file as an image, as a sample of a batch, and as a mask."""
    (folder / "0.jpg").write_bytes(data)
    source, outcomes = FileSource("made", folder, ["0.jpg", "1.jpg"]), []
    try:
        image = source.read(0)
        assert image.shape[0] == 3
        outcomes.append("image")
    except BadImage:
        outcomes.append("bad image")
    plain = frame_of(data) is not None
    for way in (source, scaled(source)) if plain else (source,):
        sample = Samples(way, EvalView(8), 0)[Item(0, 0, 0)]
        assert sample.views[0].shape == (3, 8, 8)
        assert bool(sample.replaced) == (outcomes[0] == "bad image")
        assert all(r.index == 0 and r.reason.startswith("0.jpg: ") for r in sample.replaced)
    if plain:
        check_beside_pillow(source, data)
    pairs = PairSource(
        "made", source, MaskFiles(folder, ("0.jpg",)), ("a", "b"), Numbering((0, 1), ())
    )
    try:
        pairs.read_mask(0)
        outcomes.append("mask")
    except (BadImage, DataError) as error:
        outcomes.append(type(error).__name__)
    return outcomes


def check_beside_pillow(source: FileSource, data: bytes) -> None:
    """That a JPEG file is what Pillow alone finds it to be."""
    try:
        want = _decode_with_pillow(data)
    except BadImage:
        want = None
    try:
        found = source.look(0)
        whole = found.pixels() if isinstance(found, Picture) else found
    except BadImage:
        assert want is None
        return
    assert want is not None
    assert torch.equal(whole, want)
    if isinstance(found, Picture):
        box = Box(0, 0, max(1, want.shape[1] // 3), want.shape[2])
        assert torch.equal(found.cut(box), box.of(want))


def main(first: int, last: int) -> None:
    """Read the files, with a watchdog and a limit of memory."""
    files, seen = originals(), Counter[str]()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (4, 4)).save(folder / "1.jpg")
        for number in range(first, last):
            print(number, flush=True)
            signal.alarm(SECONDS)  # its default action ends the process
            seen.update(read(folder, mutated(files, number)))
        signal.alarm(0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seen": seen, "kilobytes": after - before, "kinds": len(files)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

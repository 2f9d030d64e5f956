"""Every kind of file becomes upright RGB, or says why not."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import nullcontext as nothing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.io import decode_image

from featdistill.data.decode import BadImage, decode, from_pil
from featdistill.data.sources import FileSource

Encode = Callable[..., bytes]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def picture() -> Image.Image:
    """A smooth 24 x 40 gradient, which JPEG keeps well."""
    y, x = np.mgrid[:24, :40]
    return Image.fromarray(np.stack([6 * x, 10 * y, 240 - 5 * x], -1).astype(np.uint8))


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def distance(one: Tensor, other: Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def test_png_is_exact(picture: Image.Image, encode: Encode) -> None:
    found = decode(encode(picture))
    assert found.dtype == torch.uint8
    assert found.stride() == (1, 3 * 40, 3), "a pixel's colours side by side"
    assert torch.equal(found, pixels(picture))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_is_as_pil_reads_it(
    picture: Image.Image, encode: Encode, mode: str, options: dict[str, object]
) -> None:
    data = encode(picture.convert(mode), "JPEG", quality=95, **options)
    assert distance(decode(data), pixels(Image.open(io.BytesIO(data)))) <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_modes_of_png(encode: Encode, mode: str) -> None:
    """White left, black right, whatever the mode."""
    half = Image.new("L", (4, 2), 0)
    half.paste(255, (0, 0, 2, 2))
    if mode == "I;16":
        image = Image.fromarray(np.array(half).astype(np.uint16) * 257)
    else:
        image = half.convert("RGB").convert(mode) if mode == "P" else half.convert(mode)
    found = decode(encode(image))
    assert found.shape == (3, 2, 4)
    assert (found[:, :, :2] == 255).all()
    assert (found[:, :, 2:] == 0).all()


def test_sixteen_bits_keep_their_high_byte(encode: Encode) -> None:
    levels = np.array([[0, 257, 128 * 257, 255 * 257]], np.uint16)
    for kind in ("PNG", "TIFF"):
        found = decode(encode(levels, kind))
        assert found[:, 0].tolist() == [[0, 1, 128, 255]] * 3


def test_transparency_is_dropped(encode: Encode) -> None:
    found = decode(encode(Image.new("RGBA", (1, 1), (10, 20, 30, 0))))
    assert found.flatten().tolist() == [10, 20, 30]


def test_palette_with_transparent_bytes(encode: Encode) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    found = decode(encode(image, transparency=b"\x00\x80"))
    assert found[:, 0].T.tolist() == [list(RED), list(BLUE)]


def test_cmyk_tiff(encode: Encode) -> None:
    found = decode(encode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"))
    assert found.flatten().tolist() == list(RED)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(encode: Encode, kind: str, orientation: int) -> None:
    """An upright image of four coloured quarters, stored as each orientation stores it."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16], upright[8:, 16:] = RED, GREEN, BLUE, WHITE
    store = {  # EXIF 2.32, tag 0x0112: the inverse of what the reader has to do
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = encode(
        np.ascontiguousarray(store(upright)), kind, exif=exif.tobytes(), **options.get(kind, {})
    )
    assert distance(decode(data), torch.from_numpy(upright).permute(2, 0, 1)) <= 8


def test_animation_gives_its_first_frame(encode: Encode) -> None:
    frames = [Image.new("RGB", (3, 2), colour) for colour in (RED, BLUE)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[:, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "cannot identify image file"),
        (b"\xff\xd8\xff\xe0 and nothing more", None),
        (b"\x89PNG\r\n\x1a\n", None),
        (b"GIF89a", None),
    ],
)
def test_what_is_no_image(data: bytes, reason: str | None) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data)
    assert str(caught.value)
    assert "0x" not in str(caught.value), "no memory address in a message"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_truncated_image(picture: Image.Image, encode: Encode, kind: str) -> None:
    data = encode(picture, kind)
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_an_unknown_colour_mode(encode: Encode, mode: str) -> None:
    with pytest.raises(BadImage, match=f"colour mode {mode} is not supported"):
        decode(encode(Image.new(mode, (2, 2)), "TIFF"))


def test_a_bomb(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadImage, match="exceeds limit"):
        decode(encode(Image.new("RGB", (100, 100))))


@cache
def small_file(kind: str) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((16, 12)).convert("RGB").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000"])
@given(
    cut=st.floats(0, 1),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
@settings(derandomize=True, deadline=None)
def test_damage_is_a_bad_image_or_an_image(
    kind: str, cut: float, places: list[tuple[float, int]]
) -> None:
    """Nothing but BadImage ever comes out: anything else would end a run of many hours."""
    data = bytearray(small_file(kind))
    for place, value in places:
        data[int(place * min(len(data), 200))] = value
    try:
        found = decode(bytes(data[: 4 + int(cut * len(data))]))
    except BadImage:
        return
    assert found.dtype == torch.uint8
    assert found.shape[0] == 3


@pytest.mark.parametrize(
    "error", [OSError, ValueError, TypeError, KeyError, EOFError, OverflowError, struct.error]
)
def test_whatever_pil_raises_of_a_damaged_file(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's plugins let their parsers' errors through: ValueError and TypeError were seen."""

    def fail(file: object, formats: object) -> None:
        raise error("odd header")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadImage, match="odd header"):
        decode(b"BM")


def test_from_pil_of_an_odd_mode() -> None:
    with pytest.raises(BadImage, match="colour mode F"):
        from_pil(Image.new("F", (1, 1)))


def test_what_would_start_a_program_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow draws PostScript with Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(data)) as image, pytest.raises(AssertionError, match="started"):
        image.load()
    with pytest.raises(BadImage, match="cannot identify"):
        decode(data)


def header(width: int, height: int, kind: str) -> bytes:
    """A file that says it has so many pixels, and has none."""
    if kind == "PNG":
        body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
        return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"
    if kind == "BMP":
        info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info
    return b"P6 %d %d 255\n" % (width, height)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM"])
@pytest.mark.parametrize(("width", "height"), [(16_000, 12_000), (12_000, 12_000), (65_500, 9_000)])
def test_a_bomb_is_refused_from_its_header(
    kind: str, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("pixels were asked for")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    warned = pytest.warns(Image.DecompressionBombWarning) if width * height < 178e6 else nothing()
    with warned, pytest.raises(BadImage, match=r"exceeds limit|are more than the 134,217,728"):
        decode(header(width, height, kind))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (65_500, 1), (1, 65_500)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_extreme_shapes(encode: Encode, width: int, height: int, kind: str) -> None:
    found = decode(encode(Image.new("RGB", (width, height), WHITE), kind))
    assert found.shape == (3, height, width)
    assert (found == 255).all()


def test_the_name_decides_nothing(encode: Encode, tmp_path: Path, picture: Image.Image) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(picture))
    (tmp_path / "b.png").write_bytes(encode(picture, "JPEG", quality=95))
    source = FileSource("made", tmp_path, ["a.jpg", "b.png"])
    assert torch.equal(source.read(0), pixels(picture))
    assert distance(source.read(1), pixels(picture)) <= 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_torchvisions_decoder_sees_the_same(
    picture: Image.Image, encode: Encode, kind: str, mode: str
) -> None:
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    data = encode(picture.convert(mode), kind, **options)
    reference = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), "RGB")
    assert distance(decode(data), reference) <= 3


def test_a_pipe_a_device_and_a_folder_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    names = ["pipe.jpg", "endless.jpg", "folder.jpg", "absent.jpg", "nul\0.jpg"]
    source = FileSource("made", tmp_path, names)
    for index, reason in enumerate(["not a file"] * 3 + ["No such file", "null"]):
        with pytest.raises(BadImage, match=reason):
            source.read(index)

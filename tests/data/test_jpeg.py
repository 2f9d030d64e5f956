"""Plain JPEG files, decoded in part, beside Pillow, which decodes all of them."""

from __future__ import annotations

import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from featdistill.config.sections import DataConfig
from featdistill.data import jpeg as module
from featdistill.data.decode import BadImage, Box, Picture, decode, open_picture
from featdistill.data.jpeg import Frame, decode_rows, frame_of
from featdistill.data.loader import training_batches
from featdistill.data.sources import FileSource, Relabelled, Subset, scaled
from featdistill.data.views import CropView, EvalView, View, crop
from featdistill.engine.fingerprint import fingerprint
from featdistill.tasks.bench.photographs import photograph
from featdistill.tasks.common import data_of, images_of
from tests.data.jpeg_files import as_pillow_reads, jpeg

quick = settings(derandomize=True, deadline=None, max_examples=150)
FRACTION = st.floats(0, 1, exclude_max=True)

kinds = st.fixed_dictionaries(
    {
        "height": st.integers(1, 90),
        "width": st.integers(1, 90),
        "seed": st.integers(0, 9),
        "mode": st.sampled_from(["RGB", "RGB", "RGB", "L"]),
        "orientation": st.sampled_from([1, 1, 1, 2, 3, 4, 5, 6, 7, 8]),
        "quality": st.sampled_from([5, 50, 75, 96, 100]),
        "subsampling": st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    },
    optional={
        "progressive": st.just(True),
        "optimize": st.just(True),
        "restart_marker_rows": st.integers(1, 3),
        "restart_marker_blocks": st.integers(1, 5),
        "comment": st.just(b"MPF\0 said nobody"),
        "icc_profile": st.just(bytes(range(256)) * 3),
    },
)
corners = st.tuples(FRACTION, FRACTION, FRACTION, FRACTION)


def box_in(height: int, width: int, corner: tuple[float, float, float, float]) -> Box:
    top, left = int(corner[0] * height), int(corner[1] * width)
    return Box(top, left, 1 + int(corner[2] * (height - top)), 1 + int(corner[3] * (width - left)))


@given(kind=kinds, corner=corners)
@quick
def test_every_crop_is_to_the_bit_as_pillow_reads_it(
    kind: dict[str, Any], corner: tuple[float, float, float, float]
) -> None:
    data = jpeg(**kind)
    want = as_pillow_reads(data)
    assert torch.equal(decode(data), want)
    picture = open_picture(data)
    assert isinstance(picture, Picture), "plain: not Pillow's work"
    assert picture.shape == want.shape
    box = box_in(want.shape[1], want.shape[2], corner)
    assert torch.equal(picture.cut(box), box.of(want))


@pytest.mark.parametrize("factors", ["11", "21", "12", "22", "41", "14", "42", "24"])
def test_every_subsampling(factors: str) -> None:
    """Also those that no encoder here writes; what was coded for another one is noise in them."""
    data = bytearray(jpeg(64, 64, quality=90, subsampling="4:4:4"))
    frame = frame_of(bytes(data))
    assert frame is not None
    data[frame.height_at + 6] = int(factors, 16)
    want = as_pillow_reads(bytes(data))
    assert torch.equal(decode(bytes(data)), want)
    for bottom in (1, 7, 20, 33, 50):
        box = Box(bottom - 1, 3, 1, 40)
        assert torch.equal(picture_of(bytes(data)).cut(box), box.of(want)), bottom


def decodes_alike(data: bytes) -> bool:
    """Whether Pillow and this project find the same: pixels, or a reason why not."""
    try:
        want: Any = as_pillow_reads(data)
    except Exception:
        want = None
    try:
        found: Any = decode(data)
    except BadImage:
        found = None
    if want is None or found is None:
        return want is found
    return torch.equal(found, want)


def outcome(data: bytes, corner: tuple[float, float, float, float] | None) -> Tensor | str:
    """All pixels or those of a crop; or why there are none."""
    try:
        found = open_picture(data)
        if corner is None:
            return found.pixels() if isinstance(found, Picture) else found
        box = box_in(found.shape[1], found.shape[2], corner)
        return found.cut(box) if isinstance(found, Picture) else box.of(found)
    except BadImage as error:
        return str(error)


class Spy:
    """Notes what the decoder was given, and what it made of it."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, data: bytes, **options: Any) -> np.ndarray:
        frame = frame_of(bytes(data))
        assert frame is not None
        self.rows.append(frame.height)
        return simplejpeg.decode_jpeg(data, **options)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """The decoder, watched; Pillow, forbidden."""
    watched = Spy()

    class Watched:
        decode_jpeg = watched

    def forbidden(*_: object) -> None:
        raise AssertionError("Pillow had to decode")

    monkeypatch.setattr(module, "simplejpeg", Watched)
    monkeypatch.setattr("featdistill.data.decode._decode_with_pillow", forbidden)
    return watched


def picture_of(data: bytes, **changes: Any) -> Picture:
    found = open_picture(data)
    assert isinstance(found, Picture)
    return Picture(found.data, found.frame, found.turn, **changes)


@pytest.mark.parametrize("options", [{}, {"subsampling": "4:2:0"}, {"mode": "L"}])
def test_rows_below_a_crop_are_not_decoded(spy: Spy, options: dict[str, Any]) -> None:
    data = jpeg(300, 40, **options)
    found = picture_of(data).cut(Box(10, 5, 20, 30))
    assert spy.rows == [38]
    assert torch.equal(found, as_pillow_reads(data)[:, 10:30, 5:35])


def test_nor_those_above_of_a_picture_on_its_head(spy: Spy) -> None:
    data = jpeg(300, 40, orientation=3)
    found = picture_of(data).cut(Box(270, 5, 20, 30))
    assert spy.rows == [38]
    assert torch.equal(found, as_pillow_reads(data)[:, 270:290, 5:35])


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}])
def test_what_does_not_stand_from_top_to_bottom_is_decoded_whole(
    spy: Spy, options: dict[str, Any]
) -> None:
    picture_of(jpeg(300, 40, **options)).cut(Box(0, 0, 9, 9))
    assert spy.rows == [300]


@pytest.mark.parametrize("end", [-400, -2], ids=["rows", "mark of the end"])
@pytest.mark.parametrize("more", [b"", b"\xff\xda\0\2", b"\xff\xc0\0\2"])
def test_damage_below_a_crop_counts_as_it_does_to_pillow(end: int, more: bytes) -> None:
    damaged = jpeg(300, 40)[:end] + more
    box = Box(0, 0, 9, 9)
    try:
        want = box.of(as_pillow_reads(damaged))
    except OSError as error:
        with pytest.raises(BadImage, match=re.escape(str(error))):
            picture_of(damaged).cut(box)
    else:
        assert torch.equal(picture_of(damaged).cut(box), want)


def test_a_picture_whose_last_rows_are_missing_is_refused_for_its_first() -> None:
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}, {"mode": "L"}):
        with pytest.raises(BadImage, match="truncated"):
            picture_of(jpeg(300, 40, **options)[:-400]).cut(Box(0, 0, 9, 9))


def test_an_error_after_a_warning_is_no_picture() -> None:
    """libjpeg warns of odd parameters, then fails for want of a table, with nothing decoded."""
    data = bytearray(jpeg(97, 131, mode="L"))
    scan = data.find(b"\xff\xda")
    data[scan + 6 : scan + 10] = b"\xfa\xff\xda\x00"
    with pytest.raises(OSError, match="broken data stream"):
        as_pillow_reads(bytes(data))
    with pytest.raises(BadImage, match="broken data stream"):
        picture_of(bytes(data)).cut(Box(3, 10, 30, 15))


@cache
def originals() -> list[bytes]:
    options: list[dict[str, Any]] = [
        {},
        {"progressive": True},
        {"subsampling": "4:2:0"},
        {"orientation": 6},
        {"restart_marker_rows": 1},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"icc_profile": b"x" * 100},
    ]
    return [jpeg(57, 71, **o) for o in options]


@given(
    kind=st.integers(0, 7),
    places=st.lists(st.tuples(FRACTION, st.booleans(), st.integers(0, 255)), max_size=5),
    cut=st.none() | FRACTION,
    corner=corners,
)
@settings(derandomize=True, deadline=None, max_examples=400)
def test_damage_is_to_a_crop_what_it_is_to_pillow(
    kind: int,
    places: list[tuple[float, bool, int]],
    cut: float | None,
    corner: tuple[float, float, float, float],
) -> None:
    """The same files are refused, in the same words, and the others have the same pixels."""
    data = bytearray(originals()[kind])
    for place, ahead, value in places:
        data[int(place * (700 if ahead else len(data)))] = value
    damaged = bytes(data if cut is None else data[: 2 + int(cut * len(data))])
    assert decodes_alike(damaged)
    whole, crop = outcome(damaged, None), outcome(damaged, corner)
    if isinstance(whole, str) or isinstance(crop, str):
        assert whole == crop
    else:
        assert torch.equal(crop, box_in(whole.shape[1], whole.shape[2], corner).of(whole))


def test_a_jpeg_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("pixels were asked for")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decoded)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    data = bytearray(jpeg(16, 16))
    frame = frame_of(bytes(data))
    assert frame is not None
    data[frame.height_at : frame.height_at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(BadImage, match=r"exceeds limit|are more than the 134,217,728"):
        open_picture(bytes(data))


def test_several_pictures_in_a_file_give_the_first(encode: Any) -> None:
    first, second = (Image.new("RGB", (24, 16), c) for c in ((255, 0, 0), (0, 0, 255)))
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert torch.equal(decode(data), as_pillow_reads(data))
    assert decode(data)[0].min() > 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xc0\0",
        b"\xff\xd8\xff\xc0\0\2\0\0\0\0",
        b"\xff\xd8\xff\xda\0\2" * 9,
    ],
)
def test_what_has_no_frame(data: bytes) -> None:
    assert frame_of(data) is None


def test_another_decoders_frame_is_not_trusted() -> None:
    """Rows are only taken where the decoder made as many as the header was read to have."""
    data = jpeg(40, 30)
    frame = frame_of(data)
    assert frame is not None
    wrong = Frame(48, 30, False, frame.height_at, True, True)
    assert decode_rows(data, wrong, bottom=48) is None


# fast


def fast(data: bytes) -> Picture:
    return picture_of(data, scaled=True)


@pytest.mark.parametrize(("side", "size"), [(63, 32), (300, 301)])
def test_a_crop_is_decoded_no_smaller_than_its_result(side: int, size: int) -> None:
    assert fast(jpeg(300, 300)).smaller(Box(0, 0, side, side), size) is None


@pytest.mark.parametrize(
    ("side", "shrink"), [(64, 2), (127, 2), (128, 4), (255, 4), (256, 8), (281, 8)]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_smaller_crop_lies_where_the_box_does(side: int, shrink: int, orientation: int) -> None:
    """Of slopes, of which a smaller picture is the same slopes: no half pixel may be lost."""
    y, x = np.mgrid[:289, :301].astype(float)
    slopes = np.stack([60 + 0.4 * x, 60 + 0.4 * y, 100 + 0.2 * (x + y)], -1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(slopes).save(
        file, "JPEG", quality=100, subsampling="4:4:4", exif=exif.tobytes()
    )
    picture = fast(file.getvalue())
    for top, left in ((0, 0), (3, 7), (8, 1)):
        box = Box(top, left, side, min(side + 5, 281))
        part = picture.smaller(box, 32)
        assert part is not None
        assert abs(part.rows[1] - part.rows[0] - box.height / shrink) < 1e-9
        assert abs(part.columns[1] - part.columns[0] - box.width / shrink) < 1e-9
        exact = crop(picture_of(file.getvalue()), box, 32)
        assert (exact.int() - crop(picture, box, 32).int()).abs().max() <= 2


@given(kind=kinds, corner=corners)
@quick
def test_small_pictures_are_exact_in_either_way(
    kind: dict[str, Any], corner: tuple[float, float, float, float]
) -> None:
    data = jpeg(**kind)
    want = as_pillow_reads(data)
    box = box_in(want.shape[1], want.shape[2], corner)
    assert torch.equal(crop(fast(data), box, 46), crop(want, box, 46))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [32, 48, 96])
def test_how_far_a_fast_view_is_from_the_exact_one(size: int, progressive: bool) -> None:
    """About a level on average, as of photographs (docs/performance-data.md)."""
    data = photograph(3, height=600, width=800)
    if progressive:
        out = io.BytesIO()
        Image.open(io.BytesIO(data)).save(out, "JPEG", quality=96, progressive=True)
        data = out.getvalue()
    exact, quick_one = picture_of(data), fast(data)
    apart = []
    for index in range(12):
        views = [CropView(size)(p, (0, 0, index))[0].float() for p in (exact, quick_one)]
        apart.append((views[0] - views[1]).abs().mean())
    assert max(apart) > 0, "some were decoded at a smaller size"
    assert torch.stack(apart).mean() < 1.5
    assert max(apart) < 3


def files(folder: Path) -> FileSource:
    """One of every kind that is read in a way of its own."""
    made = {
        "plain.jpg": jpeg(90, 120),
        "turned.jpg": jpeg(90, 120, orientation=6),
        "progressive.jpg": jpeg(90, 120, progressive=True),
        "grey.jpg": jpeg(90, 120, mode="L"),
        "cmyk.jpg": jpeg(90, 120, mode="CMYK"),
        "cut.jpg": jpeg(90, 120)[:2000],
        "html.jpg": b"<html></html>",
        "small.jpg": jpeg(9, 7),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    png = io.BytesIO()
    Image.open(io.BytesIO(made["plain.jpg"])).save(png, "PNG")
    (folder / "plain.png").write_bytes(png.getvalue())
    return FileSource("made", folder, [*made, "plain.png"])


@pytest.mark.parametrize("way", [lambda s: s, scaled], ids=["exact", "fast"])
@pytest.mark.parametrize("view", [CropView(16), EvalView(16)], ids=["random", "central"])
def test_the_same_batches_whatever_the_workers(way: Any, view: View, tmp_path: Path) -> None:
    source = way(files(tmp_path))
    plan = {"batch_size": 3, "seed": 5, "start": 0, "stop": 12}
    alone = list(training_batches(source, view, workers=0, **plan))
    for workers in (1, 2):
        together = list(training_batches(source, view, workers=workers, **plan))
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one.images, other.images)
            assert one.replaced == other.replaced
    assert {r.index for batch in alone for r in batch.replaced} == {5, 6}


def test_either_way_sees_the_same_files(tmp_path: Path) -> None:
    """What is refused, and why; and the pixels of all that is no larger than a view."""
    source = files(tmp_path)
    for index in range(len(source)):
        found = []
        for way in (source, scaled(source)):
            try:
                found.append(EvalView(120)(way.look(index))[0].tolist())
            except BadImage as error:
                found.append(str(error))
        assert found[0] == found[1]


def test_scaled_goes_below_parts_and_other_labels(tmp_path: Path) -> None:
    source = files(tmp_path)
    part = Subset(Relabelled(source, np.arange(9), tuple("abcdefghi")), np.array([2, 0]))
    found = scaled(part)
    assert isinstance(found, Subset)
    assert found.labels is not None
    assert found.labels.tolist() == [2, 0]
    picture = found.look(1)
    assert isinstance(picture, Picture)
    assert picture.scaled
    assert torch.equal(found.read(1), source.read(0))
    assert found.identify(0) == "progressive.jpg"


def test_all_parts_of_the_data_are_read_fast(tmp_path: Path) -> None:
    for name in ("train/a/0.jpg", "train/b/1.jpg", "val/a/2.jpg", "val/b/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(64, 64))
    for way in ("exact", "fast"):
        data = data_of(DataConfig(path=str(tmp_path), decode=way), seed=0)
        single = images_of(DataConfig(path=str(tmp_path / "val/a/2.jpg"), decode=way))
        assert data.val is not None
        for source in (data.train, data.val, single):
            picture = source.look(0)
            assert isinstance(picture, Picture)
            assert picture.scaled == (way == "fast")
            assert torch.equal(source.read(0), as_pillow_reads(jpeg(64, 64)))
        assert fingerprint(data.train) == fingerprint(
            data_of(DataConfig(path=str(tmp_path)), 0).train
        )

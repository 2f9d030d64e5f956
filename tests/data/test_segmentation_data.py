"""Layouts of segmentation data, and masks that are wrong: the error names the file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featdistill.core.errors import DataError
from featdistill.data.decode import BadImage
from featdistill.data.mask_checks import check_headers
from featdistill.data.masks import UNLABELLED, Numbering, decode_mask
from featdistill.data.segmentation import open_segmentation
from featdistill.data.segmentation_classes import Scheme, known_classes
from tests.data.segmentation_folders import NAMES, ade20k, save, scene

RNG = np.random.default_rng(0)


def test_ade20k(tmp_path: Path) -> None:
    data = open_segmentation(str(ade20k(tmp_path)))
    assert data.classes == NAMES
    assert (len(data.train), len(data.val or ())) == (8, 4)
    image, mask = data.train.read_pair(1)
    stored = np.asarray(Image.open(tmp_path / "annotations/training/001.png")).astype(int)
    assert torch.equal(mask, torch.from_numpy(stored - 1).to(torch.int16))
    assert (mask[0] == UNLABELLED).all()
    assert image.shape == (3, *mask.shape) == (3, 24, 34)
    assert data.train.identify(1) == "001.png"


def test_objectinfo_means_the_150_classes(tmp_path: Path) -> None:
    (ade20k(tmp_path, names=None) / "objectInfo150.txt").write_text("Idx\tRatio\n")
    data = open_segmentation(str(tmp_path))
    assert len(data.classes) == 150
    assert (data.classes[0], data.classes[149]) == ("wall", "flag")
    assert data.numbering.values == tuple(range(1, 151))


def test_known_classes() -> None:
    assert {k: len(set(v)) for k, v in known_classes().items()} == {
        "ade20k": 150,
        "cityscapes": 19,
        "voc": 21,
    }
    from torchvision.datasets import Cityscapes

    scored = sorted((c.train_id, c.name) for c in Cityscapes.classes if 0 <= c.train_id < 255)
    assert tuple(name for _, name in scored) == known_classes()["cityscapes"]


@pytest.mark.parametrize("prepared", [False, True])
def test_cityscapes(tmp_path: Path, prepared: bool) -> None:
    """labelTrainIds where they have been made, else the labelIds of the 19 scored classes."""
    kind, values = ("labelTrainIds", [0, 18, 255]) if prepared else ("labelIds", [7, 33, 4])
    for part, city in (("train", "aachen"), ("val", "bonn")):
        name = f"{part}/{city}/{city}_000"
        save(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", scene(RNG, 16, 20)[0])
        mask = np.resize(np.array(values, dtype=np.uint8), (16, 20))
        save(tmp_path / f"gtFine/{name}_gtFine_{kind}.png", mask)
        save(tmp_path / f"gtFine/{name}_gtFine_instanceIds.png", mask)
    data = open_segmentation(str(tmp_path))
    assert data.classes == known_classes()["cityscapes"]
    assert data.val is not None
    assert data.val.read_mask(0).unique().tolist() == [UNLABELLED, 0, 18]
    assert data.numbering.values_of(np.array([0, 18])).tolist() == values[:2]


def test_voc(tmp_path: Path) -> None:
    """Palette PNGs, 255 around the objects, and lists that name the parts."""
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for i in range(4):
        pixels, classes = scene(RNG, 16, 20)
        classes[classes == 2] = 255
        save(tmp_path / f"JPEGImages/{i}.jpg", pixels)
        mask = Image.fromarray(classes).convert("P")
        mask.putpalette([v for i in range(256) for v in (i, 255 - i, 50)])
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(tmp_path / f"SegmentationClass/{i}.png")
    (lists / "train.txt").write_text("0\n2\n3\n")
    (lists / "val.txt").write_text("1\n")
    data = open_segmentation(str(tmp_path))
    assert (len(data.train), len(data.val or ())) == (3, 1)
    assert data.train.identify(1) == "2.jpg"
    assert data.train.read_mask(1).unique().tolist() == [UNLABELLED, 0, 1]
    (lists / "val.txt").write_text("9\n")
    with pytest.raises(DataError, match=r"val\.txt' lists '9'"):
        open_segmentation(str(tmp_path))


def test_patterns(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("a/1", "b/1"):
            pixels, classes = scene(RNG, 16, 20)
            save(tmp_path / f"photos/{part}/{name}.png", pixels)
            save(tmp_path / f"labels/{part}/{name}_mask.png", classes)
    said = {"images": "photos/{part}/*/*.png", "masks": "labels/{part}/*/*_mask.png"}
    data = open_segmentation(str(tmp_path), **said, scheme=Scheme(classes="3"))
    assert (len(data.train), len(data.val or ())) == (2, 2)
    assert data.classes == ("0", "1", "2")
    for index in range(2):
        image, mask = data.train.read_pair(index)
        # the pair belongs together: the strongest colour is the class's own
        assert (image.argmax(0) == mask).float().mean() > 0.95
    with pytest.raises(DataError, match="--images and --masks"):
        open_segmentation(str(tmp_path), images="photos/*", scheme=Scheme(classes="3"))
    with pytest.raises(DataError, match=r"nothing in .* matches"):
        open_segmentation(str(tmp_path), images="x/*", masks="y/*", scheme=Scheme(classes="3"))


def encoded(pixels: np.ndarray) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("how", ["saved", "parquet"])
def test_tables(tmp_path: Path, how: str) -> None:
    import datasets

    rows = [scene(RNG, 16, 20) for _ in range(3)]
    table = datasets.Dataset.from_dict(
        {"image": [encoded(p) for p, _ in rows], "annotation": [encoded(c) for _, c in rows]}
    )
    if how == "saved":
        datasets.DatasetDict(train=table, validation=table.select([2])).save_to_disk(tmp_path)
    else:
        table.to_parquet(tmp_path / "train-0.parquet")
        table.select([2]).to_parquet(tmp_path / "validation-0.parquet")
    data = open_segmentation(str(tmp_path), scheme=Scheme(classes="3"))
    assert data.val is not None
    for source, index, row in ((data.train, 1, rows[1]), (data.val, 0, rows[2])):
        image, mask = source.read_pair(index)
        assert torch.equal(image, torch.from_numpy(row[0]).permute(2, 0, 1))
        assert torch.equal(mask, torch.from_numpy(row[1].astype(np.int16)))
    check_headers(data.train)
    table.remove_columns("annotation").to_parquet(tmp_path / "alone.parquet")
    with pytest.raises(DataError, match="no mask column"):
        open_segmentation(str(tmp_path / "alone.parquet"), scheme=Scheme(classes="3"))


def test_a_held_out_share_is_seeded_and_disjoint(tmp_path: Path) -> None:
    path = str(ade20k(tmp_path, train=10, val=0))
    parts = []
    for seed in (0, 0, 1):
        data = open_segmentation(path, val_fraction=0.3, seed=seed)
        assert data.val is not None
        names = [[s.identify(i) for i in range(len(s))] for s in (data.train, data.val)]
        assert (len(names[0]), len(names[1])) == (7, 3)
        assert not set(names[0]) & set(names[1])
        parts.append(names)
    assert parts[0] == parts[1] != parts[2]
    with pytest.raises(DataError, match="leaves a part empty"):
        open_segmentation(path, val_fraction=0.01)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Scheme(classes="adek20"), "did you mean 'ade20k'"),
        (Scheme(classes="2"), "001.png' holds 3, which is no class"),
        (Scheme(first_class=0), "value 0 would be the class|holds 3"),
        (Scheme(unlabelled=()), "holds 0, which is no class"),
        (Scheme(first_class=0, unlabelled=(0,)), "value 0 would be the class 'left'"),
    ],
)
def test_wrong_classes(tmp_path: Path, said: Scheme, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_segmentation(str(ade20k(tmp_path)), scheme=said).train.read_pair(1)


def test_nothing_says_how_many_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--classes"):
        open_segmentation(str(ade20k(tmp_path, names=None)))
    (tmp_path / "classes.txt").write_text("sky\nsky\n")
    with pytest.raises(DataError, match="2 names, 1 of them distinct"):
        open_segmentation(str(tmp_path))


def test_an_image_without_a_mask(tmp_path: Path) -> None:
    (ade20k(tmp_path) / "annotations/training/003.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 8 images .* 003\.png"):
        open_segmentation(str(tmp_path))


def test_no_such_folder_and_no_such_layout(tmp_path: Path) -> None:
    ade20k(tmp_path / "scenes")
    with pytest.raises(DataError, match="did you mean 'scenes'"):
        open_segmentation(str(tmp_path / "scene"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no layout"):
        open_segmentation(str(tmp_path / "empty"))


WRONG = {
    "colour": (np.zeros((24, 34, 3), dtype=np.uint8), r"001\.png' is a colour image \(RGB\)"),
    "size": (np.ones((24, 33), dtype=np.uint8), r"001\.png' is 33x24 pixels, its image .* 34x24"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_masks_are_named_when_read_and_before(tmp_path: Path, fault: str) -> None:
    pixels, message = WRONG[fault]
    save(ade20k(tmp_path) / "annotations/training/001.png", pixels)
    source = open_segmentation(str(tmp_path)).train
    with pytest.raises(DataError, match=message):
        source.read_pair(1)
    with pytest.raises(DataError, match=message):
        check_headers(source)


def test_an_image_that_is_rotated_by_its_exif_tag_fits_its_upright_mask(tmp_path: Path) -> None:
    pixels, classes = scene(RNG, 20, 16)
    save(ade20k(tmp_path, train=1) / "annotations/training/000.png", classes + 1)
    (tmp_path / "images/training/000.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    sideways = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    sideways.save(tmp_path / "images/training/000.jpg", exif=exif)
    source = open_segmentation(str(tmp_path)).train
    image, mask = source.read_pair(0)
    assert image.shape[1:] == mask.shape == (20, 16)
    check_headers(source)


def test_a_damaged_mask_is_a_bad_image(tmp_path: Path) -> None:
    """As a damaged image it is counted and replaced; the check before leaves it to the loader."""
    (ade20k(tmp_path) / "annotations/training/001.png").write_bytes(b"\x89PNG nothing")
    source = open_segmentation(str(tmp_path)).train
    check_headers(source)
    with pytest.raises(BadImage, match=r"001\.png"):
        source.read_pair(1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_modes_of_masks(mode: str) -> None:
    values = np.array([[0, 1], [1, 0]], dtype=np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(values * 255).convert("1") if mode == "1" else Image.fromarray(values)
    if mode == "P":
        image = image.convert("P")
        image.putpalette([9, 9, 9, 7, 7, 7])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    assert decode_mask(buffer.getvalue(), "m").tolist() == [[0, 1], [1, 0]]


def test_numbers_go_both_ways() -> None:
    numbering = Numbering((300, 5, 7), (0, 255))
    values = np.array([[5, 0], [300, 255]])
    classes = numbering.classes_of(values, "m")
    assert classes.tolist() == [[1, UNLABELLED], [0, UNLABELLED]]
    back = numbering.values_of(np.array([1, 0, 2]))
    assert (back.tolist(), back.dtype) == ([5, 300, 7], np.uint16)
    for strange in (-1, 6, 70_000):
        with pytest.raises(DataError, match=f"'m' holds {strange}, which is no class"):
            numbering.classes_of(np.array([[5, strange]]), "m")

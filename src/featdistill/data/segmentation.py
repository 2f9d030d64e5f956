"""From what a user writes after `segment --data` to pairs of images and masks, with their parts.

Layouts: ADE20K's (`images/training`, `annotations/training`, ...), Cityscapes', VOC's, patterns of
file names, and tables (parquet, saved `datasets`, the hub) with an image and a mask column.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from featdistill.core.errors import DataError, did_you_mean
from featdistill.core.seeds import generator
from featdistill.data.index import EXTENSIONS, index_folder
from featdistill.data.masks import MaskFiles, Numbering, PairSource
from featdistill.data.parts import TRAIN, VAL, first, some
from featdistill.data.segmentation_classes import Scheme
from featdistill.data.segmentation_tables import pair_tables
from featdistill.data.sources import FileSource

LayoutName = Literal["auto", "ade20k", "cityscapes", "voc", "pattern", "table"]
_ADE20K = "images", "annotations"
_CITYSCAPES = "leftImg8bit", "gtFine"
_VOC = "JPEGImages", "SegmentationClass"
# labelIds of Cityscapes' 19 classes in the order of their trainIds; the others are not scored
_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class SegmentationData:
    """Pairs with their parts.

    Attributes:
        train, val: None where there is no such part.
        classes: K names.
        numbering: of the masks.
    """

    train: PairSource
    val: PairSource | None
    classes: tuple[str, ...]
    numbering: Numbering


def open_segmentation(
    path: str,
    *,
    layout: LayoutName = "auto",
    images: str | None = None,
    masks: str | None = None,
    scheme: Scheme = Scheme(),  # noqa: B008 - immutable
    val_fraction: float | None = None,
    seed: int = 0,
) -> SegmentationData:
    """Open a segmentation data set.

    Args:
        path: a folder, a parquet file or folder, a saved data set, or `hf:NAME`.
        images, masks: patterns below the folder (`photos/{part}/*.jpg`, `masks/{part}/*.png`):
            what the stars stand for pairs them, and `{part}` stands for train, val and their like.
        val_fraction: hold out this share of the training pairs.
        seed: of the held-out share.

    Raises:
        DataError: no such data, an image without a mask, or unknown classes.
    """
    data = _open(path, layout, images, masks, scheme)
    if val_fraction is None:
        return data
    order = generator(seed, "split").permutation(len(data.train))
    held = round(val_fraction * len(order))
    if not 0 < held < len(order):
        raise DataError(
            f"a share of {val_fraction} of the {len(order)} images of '{data.train.name}' leaves a "
            "part empty",
            fix="change --val-fraction",
        )
    return replace(
        data,
        train=data.train.subset(sorted(order[held:])),
        val=data.train.subset(sorted(order[:held])),
    )


def _open(
    path: str, layout: LayoutName, images: str | None, masks: str | None, scheme: Scheme
) -> SegmentationData:
    if (images is None) != (masks is None):
        raise DataError("one pattern of file names", expected="both, --images and --masks")
    root = Path(path).expanduser()
    if path.startswith("hf:") or root.suffix == ".parquet":
        return _table(path, scheme)
    if not root.is_dir():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(
            f"no segmentation data at '{path}'",
            expected="a folder of images and masks, a parquet file, or hf:NAME",
            fix=did_you_mean(root.name, siblings),
        )
    if images is not None and masks is not None:
        return _pattern(root, images, masks, scheme)
    match _layout_of(root) if layout == "auto" else layout:
        case "ade20k":
            return _ade20k(root, scheme)
        case "cityscapes":
            return _cityscapes(root, scheme)
        case "voc":
            return _voc(root, scheme)
        case "pattern":
            raise DataError("the layout 'pattern'", fix="give --images and --masks")
        case _:
            return _table(path, scheme)


def _layout_of(root: Path) -> LayoutName:
    named: dict[LayoutName, tuple[str, str]] = {
        "ade20k": _ADE20K,
        "cityscapes": _CITYSCAPES,
        "voc": _VOC,
    }
    for name, folders in named.items():
        if all((root / folder).is_dir() for folder in folders):
            return name
    saved = ("dataset_info.json", "dataset_dict.json")
    if any((root / f).is_file() for f in saved) or next(root.glob("**/*.parquet"), None):
        return "table"
    raise DataError(
        f"'{root}' has no layout of segmentation data known here",
        expected="; ".join(f"{k}: {a}/ and {b}/" for k, (a, b) in named.items()),
        fix="give patterns: --images 'photos/{part}/*.jpg' --masks 'masks/{part}/*.png'",
    )


def _table(path: str, scheme: Scheme) -> SegmentationData:
    root = Path(path) if Path(path).is_dir() else None
    names, numbering = scheme.numbering(root, known=None, first_class=0, unlabelled=(255,))
    parts = {
        part: PairSource(images.name, images, masks, names, numbering)
        for part, (images, masks) in pair_tables(path).items()
    }
    return SegmentationData(parts["train"], parts.get("val"), names, numbering)


def _ade20k(root: Path, scheme: Scheme) -> SegmentationData:
    names, numbering = scheme.numbering(root, known=None, first_class=1, unlabelled=(0,))

    def part(wanted: Sequence[str]) -> PairSource | None:
        folders = {p.name.lower(): p for p in (root / _ADE20K[0]).iterdir() if p.is_dir()}
        images = first(folders, wanted)
        if images is None:
            return None
        below = root / _ADE20K[1] / images.name
        if not below.is_dir():
            raise DataError(f"no masks for '{images}'", expected=f"a folder '{below}'")
        photos = {_stem(f): f for f in index_folder(images).files}
        annotations = {_stem(f): f for f in index_folder(below).files}
        return _paired(
            str(images), photos, annotations, (images, below), names=names, numbering=numbering
        )

    return _with_parts(root, part(TRAIN), part(VAL), names, numbering)


def _stem(name: str) -> str:
    return name[: -len(Path(name).suffix)]


def _cityscapes(root: Path, scheme: Scheme) -> SegmentationData:
    images, masks = (f"{folder}/{{part}}/*/*" for folder in _CITYSCAPES)
    prepared = next(root.glob("gtFine/*/*/*_gtFine_labelTrainIds.png"), None) is not None
    if prepared:
        first_class, unlabelled, values = 0, (255,), None
    else:
        others = tuple(v for v in (*range(34), 255) if v not in _LABEL_IDS)
        first_class, unlabelled, values = 0, others, _LABEL_IDS
    names, numbering = scheme.numbering(
        root, known="cityscapes", first_class=first_class, unlabelled=unlabelled, values=values
    )
    kind = "labelTrainIds" if prepared else "labelIds"
    return _by_pattern(
        root, f"{images}_leftImg8bit.png", f"{masks}_gtFine_{kind}.png", names, numbering
    )


def _voc(root: Path, scheme: Scheme) -> SegmentationData:
    names, numbering = scheme.numbering(root, known="voc", first_class=0, unlabelled=(255,))
    photos = {_stem(f): f for f in index_folder(root / _VOC[0]).files}
    annotations = {_stem(f): f for f in index_folder(root / _VOC[1]).files}
    lists = root / "ImageSets" / "Segmentation"

    def part(wanted: str) -> PairSource | None:
        file = lists / f"{wanted}.txt"
        if not file.is_file():
            return None
        chosen = file.read_text(encoding="utf-8").split()
        absent = next((name for name in chosen if name not in photos), None)
        if absent is not None:
            raise DataError(f"'{file}' lists '{absent}', which is not in '{root / _VOC[0]}'")
        return _paired(
            f"{root} ({wanted})",
            {name: photos[name] for name in chosen},
            annotations,
            (root / _VOC[0], root / _VOC[1]),
            names=names,
            numbering=numbering,
        )

    return _with_parts(root, part("train"), part("val"), names, numbering)


def _pattern(root: Path, images: str, masks: str, scheme: Scheme) -> SegmentationData:
    names, numbering = scheme.numbering(root, known=None, first_class=0, unlabelled=(255,))
    return _by_pattern(root, images, masks, names, numbering)


def _by_pattern(
    root: Path, images: str, masks: str, names: tuple[str, ...], numbering: Numbering
) -> SegmentationData:
    def part(wanted: Sequence[str]) -> PairSource | None:
        for name in wanted if "{part}" in images else ("",):
            photos = _matches(root, images.replace("{part}", name))
            if photos:
                annotations = _matches(root, masks.replace("{part}", name))
                return _paired(
                    f"{root}/{name}".rstrip("/"),
                    photos,
                    annotations,
                    (root, root),
                    names=names,
                    numbering=numbering,
                )
        return None

    val = part(VAL) if "{part}" in images else None
    train = part(TRAIN)
    if train is None and val is None:
        raise DataError(
            f"nothing in '{root}' matches '{images}'",
            expected="a pattern below the data's folder, as photos/{part}/*.jpg",
        )
    return _with_parts(root, train, val, names, numbering)


def _matches(root: Path, pattern: str) -> dict[str, str]:
    """Files that match a pattern, by what its stars stand for."""
    text = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "([^/]*)")
    found = {}
    for path in sorted(root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        match = re.fullmatch(text, name)
        if match and path.suffix.lower() in EXTENSIONS:
            found["/".join(g or "" for g in match.groups())] = name
    return found


def _paired(
    name: str,
    photos: Mapping[str, str],
    annotations: Mapping[str, str],
    roots: tuple[Path, Path],
    *,
    names: tuple[str, ...],
    numbering: Numbering,
) -> PairSource:
    """Images and masks of one name.

    Raises:
        DataError: there is no image, or one has no mask.
    """
    if not photos:
        raise DataError(f"no image in '{name}'")
    lacking = [photos[key] for key in photos if key not in annotations]
    if lacking:
        raise DataError(
            f"{len(lacking)} of the {len(photos)} images of '{name}' have no mask in '{roots[1]}': "
            f"{some(lacking, 3)}",
            expected="a mask of the same name for every image",
        )
    return PairSource(
        name,
        FileSource(name, roots[0], tuple(photos.values())),
        MaskFiles(roots[1], tuple(annotations[key] for key in photos)),
        names,
        numbering,
    )


def _with_parts(
    root: Path,
    train: PairSource | None,
    val: PairSource | None,
    names: tuple[str, ...],
    numbering: Numbering,
) -> SegmentationData:
    if train is None:
        raise DataError(f"no training part in '{root}'", expected=f"one called {_or(TRAIN)}")
    return SegmentationData(train, val, names, numbering)


def _or(names: Iterable[Any]) -> str:
    return " or ".join(map(str, names))

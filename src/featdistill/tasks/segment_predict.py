"""`featdistill segment --predict`: a mask and a picture of it for every image of a folder.

    OUT/index/NAME.png      the class of each pixel, by the values of the training masks
    OUT/overlay/NAME.jpg    its colours over the image
    OUT/legend.png          which colour is which class
    OUT/segment-predict.json

Every file appears whole or not at all, so that a run that was killed goes on with --resume.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from featdistill.config.commands import SegmentConfig
from featdistill.config.sections import DataConfig
from featdistill.core.errors import DataError, RunError
from featdistill.core.records import read_record, write_record
from featdistill.data.decode import BadImage
from featdistill.data.joint_views import fitted, shown
from featdistill.data.masks import Numbering
from featdistill.data.palette import overlay, palette
from featdistill.data.sources import Source
from featdistill.engine.rundir import check_out
from featdistill.engine.runtime import Runtime
from featdistill.engine.tracking import say
from featdistill.evaluation.sliding import Looks, predict_mask
from featdistill.models.segmenter_files import Trained, load_segmenter, moved
from featdistill.tasks.common import images_of, plain, runtime_of
from featdistill.tasks.segment_parts import counting, looks_of, short_of

_RECORD = "segment-predict.json"
_STARTED = "segment-predict.started.json"


@dataclass(frozen=True)
class SegmentPredictResult:
    """What was written.

    Attributes:
        images: masks there are now.
        unreadable: names of images that could not be read.
    """

    out: Path
    images: int
    unreadable: tuple[str, ...]
    record: Path


def run(config: SegmentConfig) -> SegmentPredictResult:
    """Predict masks for images."""
    assert config.predict is not None
    out = Path(config.run.out).expanduser()
    if config.run.devices * config.run.nodes > 1:
        raise RunError("several processes for --predict", fix="start one for each part of images")
    _check_out(config, out)
    source = images_of(DataConfig(path=config.predict), seed=config.run.seed)
    names = _names(source)
    trained = load_segmenter(config.model.spec)
    runtime = runtime_of(config.run)
    runtime.settle(moved(trained, runtime.device))
    looks = looks_of(config, trained.segmenter)
    _begin(config, out, trained)
    unreadable = []
    with counting("predicting", len(source), quiet=False) as progress:
        for index, name in enumerate(names):
            places = out / "index" / f"{name}.png", out / "overlay" / f"{name}.jpg"
            if not all(place.is_file() for place in places):
                try:
                    image = source.read(index)
                except BadImage as error:
                    unreadable.append(f"{source.identify(index)}: {error}")
                    continue
                found = _predict(image, trained, config, looks, runtime)
                _write(image, found, trained, places)
            progress(index + 1)
    return _finish(config, out, len(source), unreadable, trained)


def _check_out(config: SegmentConfig, out: Path) -> None:
    started = out / _STARTED
    if config.run.resume and not started.is_file():
        raise RunError(
            f"there are no predictions to go on with in '{out}'",
            fix="leave --resume out to begin",
        )
    if not config.run.resume:
        check_out(config.run.out, resume=False)


def _begin(config: SegmentConfig, out: Path, trained: Trained) -> None:
    """Note what predicts, or see that it is the same as before."""
    facts = {"weights": trained.weights, "test": plain(config.test), "images": config.predict}
    if config.run.resume:
        before = read_record(out / _STARTED, "segment-predict-started")["results"]
        if before != facts:
            differ = [key for key in facts if before.get(key) != facts[key]]
            raise RunError(
                f"the predictions in '{out}' were made with other {', '.join(differ)}",
                fix="give the same options, or another --out",
            )
        return
    write_record(out / _STARTED, "segment-predict-started", config=plain(config), results=facts)
    _write_whole(out / "legend.png", _legend(trained.segmenter.class_names))


def _names(source: Source) -> list[str]:
    """Where each image's files go: its name below the folder, without its suffix.

    Raises:
        DataError: two images would go to one place.
    """
    names = []
    for index in range(len(source)):
        given = PurePosixPath(source.identify(index))
        parts = [p for p in given.parts if p not in ("/", "..", ".")]
        names.append(str(PurePosixPath(*parts).with_suffix("")))
    doubled = (
        sorted({name for name in names if names.count(name) > 1})
        if (len(set(names)) < len(names))
        else []
    )
    if doubled:
        raise DataError(
            f"two images of '{source.name}' are called '{doubled[0]}' without their suffix",
            fix="rename one of them",
        )
    return names


def _predict(
    image: Tensor, trained: Trained, config: SegmentConfig, looks: Looks, runtime: Runtime
) -> np.ndarray:
    size = (image.shape[1], image.shape[2])
    seen = shown(image, fitted(*size, short_of(config, trained))).to(runtime.device)
    with torch.no_grad(), runtime.autocast():
        found = predict_mask(trained.segmenter.logits, seen.float() / 255, size, looks)
    return found.cpu().numpy()


def _write(image: Tensor, found: np.ndarray, trained: Trained, places: tuple[Path, Path]) -> None:
    values = Numbering(trained.values, trained.unlabelled).values_of(found)
    mask = Image.fromarray(values)
    if values.dtype == np.uint8:  # a viewer shows its colours, a program reads its numbers
        mask = mask.convert("P")
        mask.putpalette(_colours(trained).flatten().tolist())
    over = Image.fromarray(overlay(image.permute(1, 2, 0).numpy(), found))
    for place, picture in zip(places, (mask, over), strict=True):
        _write_whole(place, picture)


def _colours(trained: Trained) -> np.ndarray:
    table = np.zeros((256, 3), dtype=np.uint8)
    table[list(trained.values)] = palette(len(trained.values))
    return table


def _write_whole(place: Path, picture: Image.Image) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}{place.suffix}")
    picture.save(temporary, quality=90)
    os.replace(temporary, place)


def _legend(names: tuple[str, ...]) -> Image.Image:
    columns = -(-len(names) // 40)
    rows = -(-len(names) // columns)
    picture = Image.new("RGB", (220 * columns, 20 * rows + 8), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, colour) in enumerate(zip(names, palette(len(names)), strict=True)):
        left, top = 220 * (i // rows) + 6, 20 * (i % rows) + 4
        draw.rectangle((left, top + 2, left + 24, top + 16), fill=tuple(map(int, colour)))
        draw.text((left + 32, top + 3), name[:30], fill="black")
    return picture


def _finish(
    config: SegmentConfig, out: Path, images: int, unreadable: list[str], trained: Trained
) -> SegmentPredictResult:
    results: dict[str, Any] = {
        "images": images - len(unreadable),
        "unreadable": unreadable,
        "weights": trained.weights,
        "classes": [
            {"class": name, "value": value, "colour": colour.tolist()}
            for name, value, colour in zip(
                trained.segmenter.class_names,
                trained.values,
                palette(len(trained.values)),
                strict=True,
            )
        ],
    }
    record = write_record(out / _RECORD, "segment-predict", config=plain(config), results=results)
    say(f"written: {images - len(unreadable):,} masks in {out / 'index'}, {out / 'overlay'}")
    if unreadable:
        say(f"{len(unreadable)} images could not be read, the first: {unreadable[0]}")
    return SegmentPredictResult(out, images - len(unreadable), tuple(unreadable), record)

"""What a segmentation leaves behind: the segmenter, its record, and pictures for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featdistill.config.commands import SegmentConfig
from featdistill.core.records import write_record
from featdistill.data.joint_views import fitted, resize_pair, shown
from featdistill.data.masks import PairSource
from featdistill.data.segmentation import SegmentationData
from featdistill.engine.average import WeightAverage
from featdistill.engine.plan import FitResult
from featdistill.engine.tracking import duration, say
from featdistill.evaluation.position_prior import PositionPrior, score_prior
from featdistill.evaluation.segmentation import SegmentationScores
from featdistill.evaluation.sliding import predict_mask
from featdistill.models.segmenter import Segmenter, describe
from featdistill.models.segmenter_files import FOLDER, Trained, save_segmenter
from featdistill.tasks.common import plain
from featdistill.tasks.provenance import origin_record
from featdistill.tasks.segment_parts import looks_of, short_of

_PICTURES = 3  # of the best images, and as many of the worst
_SIDE = 320  # of a picture's longer side, pixels


@dataclass(frozen=True)
class Outcome:
    """Everything that came of a run.

    Attributes:
        scores: of one look at each image.
        looks: of the several that the configuration asks for, if it does.
        average, average_scores: of averaged weights, if there are any.
        fit: None if nothing was trained.
        trained: the segmenter that was only scored.
    """

    config: SegmentConfig
    segmenter: Segmenter
    data: SegmentationData
    held: PairSource
    prior: PositionPrior
    scores: SegmentationScores
    looks: SegmentationScores | None
    average: WeightAverage | None
    average_scores: SegmentationScores | None
    fit: FitResult | None
    trained: Trained | None

    @cached_property
    def prior_scores(self) -> SegmentationScores:
        """Of the best prediction that ignores the image."""
        return score_prior(self.prior, self.held)


def finish(outcome: Outcome, folder: Path) -> Path | None:
    """Write everything and say how good it is; the segmenter's folder, if one was written."""
    exported = None
    if outcome.trained is None:
        exported = _save(outcome, folder / FOLDER, outcome.scores)
        if outcome.average is not None and outcome.average_scores is not None:
            with outcome.average.applied():
                _save(outcome, folder / f"{FOLDER}-ema", outcome.average_scores)
    pictures, drawn = _pictures(outcome)
    scores = outcome.scores
    write_record(
        folder / "segment.json",
        "segment",
        config=plain(outcome.config),
        results={
            **_numbers(scores),
            "by_class": by_class(scores, outcome.data.classes),
            "images": len(outcome.held),
            "data": {"name": outcome.held.name, "training_images": len(outcome.data.train)},
            "prior": {
                **_numbers(outcome.prior_scores),
                "masks": outcome.prior.images,
                "what": "each position's most frequent training class",
            },
            "looks": None if outcome.looks is None else _numbers(outcome.looks),
            "ema": None
            if outcome.average_scores is None
            else {"decay": outcome.config.ema, **_numbers(outcome.average_scores)},
            "steps": outcome.fit.step if outcome.fit else 0,
            "seconds": outcome.fit.seconds if outcome.fit else 0.0,
            "schedules": outcome.fit.schedules if outcome.fit else (),
            "head": describe(outcome.segmenter),
            "model": _model(outcome),
            "pictures": pictures,
        },
        arrays={
            "confusion": scores.confusion.numpy(),
            "counts": scores.counts.numpy().astype(np.int32),
            "prior_confusion": outcome.prior_scores.confusion.numpy(),
            **drawn,
        },
    )
    _tell(outcome, folder, exported)
    return exported


def _model(outcome: Outcome) -> dict[str, Any]:
    if outcome.trained is not None:
        return {"spec": outcome.config.model.spec, "weights": outcome.trained.weights}
    return dict(origin_record(outcome.segmenter.backbone.origin))


def _numbers(scores: SegmentationScores) -> dict[str, float]:
    return {
        "miou": scores.miou,
        "miou_error": scores.miou_error(),
        "macc": scores.macc,
        "aacc": scores.aacc,
    }


def by_class(scores: SegmentationScores, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """IoU, accuracy and labelled pixels of each class; no value where there is no pixel."""
    table = zip(
        names,
        scores.iou.tolist(),
        scores.accuracy.tolist(),
        scores.confusion.sum(1).tolist(),
        strict=True,
    )
    return [
        {"class": name, "iou": _number(iou), "accuracy": _number(accuracy), "pixels": pixels}
        for name, iou, accuracy, pixels in table
    ]


def _number(value: float) -> float | None:
    return None if value != value else value


def _save(outcome: Outcome, folder: Path, scores: SegmentationScores) -> Path | None:
    numbering = outcome.data.numbering
    return save_segmenter(
        outcome.segmenter,
        folder,
        values=numbering.values,
        unlabelled=numbering.unlabelled,
        short=outcome.config.view.short,
        about={
            "backbone_from": _model(outcome),
            "miou": scores.miou,
            "images": len(outcome.held),
        },
    )


def _pictures(outcome: Outcome) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The best and the worst held-out images: small, with label and prediction."""
    each = outcome.scores.by_image
    order = [i for i in each.argsort(descending=True).tolist() if not each[i].isnan()]
    few = min(_PICTURES, (len(order) + 1) // 2)
    chosen = [("best", i) for i in order[:few]]
    chosen += [("worst", i) for i in order[::-1][:few] if i not in order[:few]]
    outcome.segmenter.eval()
    told, arrays = [], {}
    for number, (which, index) in enumerate(chosen):
        image, label, found = _picture(outcome, index)
        told.append(
            {
                "which": which,
                "image": outcome.held.identify(index),
                "miou": float(each[index]),
            }
        )
        arrays[f"picture{number}_image"] = image
        arrays[f"picture{number}_label"] = label
        arrays[f"picture{number}_prediction"] = found
    return told, arrays


def _picture(outcome: Outcome, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    segmenter, short = outcome.segmenter, short_of(outcome.config, outcome.trained)
    image, mask = outcome.held.read_pair(index)
    size = (mask.shape[0], mask.shape[1])
    device = segmenter.backbone.mean.device
    seen = shown(image, fitted(*size, short)).to(device).float() / 255
    looks = looks_of(outcome.config, segmenter, once=True)
    found = predict_mask(segmenter.logits, seen, size, looks).cpu().to(torch.int16)
    scale = min(1.0, _SIDE / max(size))
    small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    picture, label = resize_pair(image, mask, small)
    _, prediction = resize_pair(image, found, small)
    return picture.permute(1, 2, 0).numpy(), _plain(label), _plain(prediction)


def _plain(classes: Tensor) -> np.ndarray:
    return classes.numpy().astype(np.int16)


def _tell(outcome: Outcome, folder: Path, exported: Path | None) -> None:
    scores, prior = outcome.scores, outcome.prior_scores
    took = f", in {duration(outcome.fit.seconds)}" if outcome.fit else ""
    say(
        f"mIoU {scores.miou:.2%} +- {scores.miou_error():.2%}, mean accuracy {scores.macc:.2%}, "
        f"pixel accuracy {scores.aacc:.2%} on {len(outcome.held):,} held-out images{took}\n"
        f"a guess by position alone has mIoU {prior.miou:.2%}, pixel accuracy {prior.aacc:.2%}"
    )
    say(f"weakest classes: {_weakest(by_class(scores, outcome.data.classes))}")
    if outcome.average_scores is not None:
        say(f"averaged weights: mIoU {outcome.average_scores.miou:.2%}")
    if outcome.looks is not None:
        test = outcome.config.test
        mirrored = ", mirrored too" if test.flip else ""
        sizes = ", ".join(f"{scale:g}" for scale in test.scales)
        say(f"at sizes {sizes}{mirrored}: mIoU {outcome.looks.miou:.2%}")
    if outcome.trained is None and exported is None:
        say(
            "plain timm cannot build this backbone again, so no segmenter was written; weights: "
            f"{folder / 'checkpoints'}"
        )
    if exported is not None:
        say(f"\nnext: featdistill segment --model {folder} --predict IMAGES --out MASKS")


def _weakest(rows: list[Mapping[str, Any]] | list[dict[str, Any]], limit: int = 3) -> str:
    seen = sorted((row for row in rows if row["iou"] is not None), key=lambda row: row["iou"])
    return ", ".join(f"{row['class']} {row['iou']:.1%}" for row in seen[:limit])

"""What training, scoring and predicting with a segmenter have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from featdistill.config.commands import SegmentConfig
from featdistill.core.errors import DataError, ModelError
from featdistill.data.decode import BadImage
from featdistill.data.joint_views import TrainingCrop
from featdistill.data.mask_checks import check_headers
from featdistill.data.masks import UNLABELLED, PairSource
from featdistill.data.segmentation import SegmentationData, open_segmentation
from featdistill.data.segmentation_classes import Scheme
from featdistill.engine.tracking import Bar, duration
from featdistill.evaluation.position_prior import PositionPrior, learn_prior
from featdistill.evaluation.sliding import Looks, Sliding
from featdistill.models.segmenter import HeadShape, Segmenter
from featdistill.models.segmenter_files import Trained

_PRIOR_IMAGES = 2000


def pairs_of(config: SegmentConfig) -> tuple[SegmentationData, PairSource]:
    """The data that a configuration names, and their held-out part.

    Raises:
        DataError: no such data, or nothing is held out.
    """
    said = config.data
    assert said.path is not None
    data = open_segmentation(
        said.path,
        layout=said.layout,
        images=said.images,
        masks=said.masks,
        scheme=Scheme(said.classes, said.first_class, said.unlabelled),
        val_fraction=said.val_fraction,
        seed=config.run.seed,
    )
    if data.val is None:
        raise DataError(
            f"'{data.train.name}' has no held-out part to score on",
            expected="a validation part beside the training part",
            fix="add one, or give --val-fraction 0.1",
        )
    return data, data.val


def survey(data: SegmentationData, held: PairSource, *, quiet: bool) -> PositionPrior:
    """Look at every pair's headers and read (up to 2000) training masks, before long work begins.

    Raises:
        DataError: a mask in colour, of another size than its image, or with a strange value; or
            no labelled pixel at all.
    """
    for source in (data.train, held):
        with counting("looking at files", len(source), quiet=quiet) as progress:
            check_headers(source, progress)
    _check_labelled(held)
    images = min(_PRIOR_IMAGES, len(data.train))
    with counting("reading masks", images, quiet=quiet) as progress:
        return learn_prior(data.train, images=images, progress=progress)


def _check_labelled(held: PairSource) -> None:
    """Raise DataError if nothing held out is labelled: a score would be no number."""
    for index in range(len(held)):
        try:
            if bool((held.read_mask(index) != UNLABELLED).any()):
                return  # nearly always the first
        except BadImage:
            continue  # named when it is scored
    raise DataError(
        f"no mask of '{held.name}' has a labelled pixel to score on",
        fix="look at the masks, and at --data.unlabelled",
    )


@contextmanager
def counting(title: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar over `total` things, with the time left; gives what to call with the number done."""
    bar, began = Bar(title, quiet=quiet), time.monotonic()
    bar.start(total, 0)

    def progress(done: int) -> None:
        left = (time.monotonic() - began) / max(1, done) * (total - done)
        bar.update(done, f"left {duration(left)}")

    try:
        yield progress
    finally:
        bar.stop()


def shape_of(config: SegmentConfig) -> HeadShape:
    """The head that a configuration names."""
    head = config.head
    return HeadShape(head.kind, head.channels, head.layers, head.auxiliary, head.dropout)


def looks_of(config: SegmentConfig, segmenter: Segmenter, *, once: bool = False) -> Looks:
    """How images are looked at.

    Args:
        once: at one size and not mirrored, whatever the configuration says.

    Raises:
        ModelError: the whole image at once, for a model that sees one size only.
    """
    test, backbone = config.test, segmenter.backbone
    scales, flip = ((1.0,), False) if once else (test.scales, test.flip)
    if test.mode == "whole":
        if backbone.fixed_size:
            raise ModelError(
                f"'{backbone.origin.spec}' sees images of {segmenter.size[0]}x{segmenter.size[1]} "
                "pixels only, no whole images of other sizes",
                fix="use --test.mode sliding",
            )
        return Looks(None, scales, flip)
    height, width = segmenter.size
    stride = max(1, int(height * test.stride)), max(1, int(width * test.stride))
    sliding = Sliding(segmenter.size, stride, backbone.rgb[0], test.windows)
    return Looks(sliding, scales, flip)


def short_of(config: SegmentConfig, trained: Trained | None) -> int:
    """The images' short side: as said, or as the segmenter was trained."""
    if trained is None or config.view.short_side is not None:
        return config.view.short
    return trained.short


def many_looks(config: SegmentConfig) -> bool:
    """Whether the final score averages several looks at an image."""
    return config.test.flip or config.test.scales != (1.0,)


def crop_of(config: SegmentConfig, segmenter: Segmenter) -> TrainingCrop:
    """The training view of a configuration."""
    view = config.view
    red, green, blue = (round(255 * value) for value in segmenter.backbone.rgb[0])
    return TrainingCrop(
        size=view.size,
        short=view.short,
        scale=view.scale,
        largest=view.largest,
        flip=view.flip,
        colour=view.colour,
        fill=(red, green, blue),
    )

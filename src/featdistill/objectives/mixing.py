"""Mixup, cutmix and random erasing, on the device, from addressed draws.

The formulas are timm's (`timm.data.Mixup` in batch mode, `timm.data.RandomErasing` in pixel mode);
what differs is who draws. Sample 2i is mixed with sample 2i + 1 of the global batch (the batch is
shuffled, so that this is a random partner), because timm's partner, the mirrored place in the
process's own batch, changes with the number of processes and micro-batches.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featdistill.core.seeds import SampleStream


def mix(
    images: Tensor,
    labels: Tensor,
    stream: SampleStream,
    *,
    classes: int,
    mixup: float,
    cutmix: float,
    probability: float,
    switch: float,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Mix pairs of images and their labels.

    Args:
        images: (B, 3, h, w); B even where mixing is on.
        labels: (B,) int64.
        classes: K.
        mixup, cutmix: alpha of the Beta distribution; 0 is off.
        probability: that a batch is mixed at all.
        switch: probability of cutmix where both are on.
        smoothing: label smoothing.

    Returns:
        Images (B, 3, h, w) and soft labels (B, K).
    """
    soft = F.one_hot(labels, classes).to(images.dtype) * (1 - smoothing) + smoothing / classes
    rng = stream.batch_generator("mix")
    use = rng.random() < probability and (mixup > 0 or cutmix > 0)
    if not use:
        return images, soft
    cut = cutmix > 0 and (mixup == 0 or rng.random() < switch)
    alpha = cutmix if cut else mixup
    share = float(rng.beta(alpha, alpha))
    partner = _partners(images)
    if cut:
        height, width = images.shape[-2:]
        top, bottom, left, right = _cut_box(rng, share, height, width)
        images = images.clone()
        images[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = share * images + (1 - share) * partner
    return images, share * soft + (1 - share) * _partners(soft)


def _partners(x: Tensor) -> Tensor:
    assert len(x) % 2 == 0, "mixing needs an even (micro-)batch"
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _cut_box(
    rng: np.random.Generator, share: float, height: int, width: int
) -> tuple[int, int, int, int]:
    """CutMix's box of area 1 - share around a uniform centre, clipped (Yun et al. 2019)."""
    side = math.sqrt(1 - share)
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return (
        max(0, y - half_h),
        min(height, y + half_h),
        max(0, x - half_w),
        min(width, x + half_w),
    )


def erase(images: Tensor, stream: SampleStream, *, probability: float) -> Tensor:
    """Random erasing with pixel noise (Zhong et al. 2017), area 0.02-1/3, aspect 0.3-3.3.

    Args:
        images: (B, 3, h, w), normalised to about zero mean and unit variance.
        probability: for each image.
    """
    if not probability:
        return images
    chosen = (stream.uniforms("erase")[0] < probability).nonzero().flatten().tolist()
    if not chosen:
        return images
    images = images.clone()
    height, width = images.shape[-2:]
    for row in chosen:
        rng = stream.sample_generator("erase", row)
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                noise = torch.from_numpy(rng.standard_normal((3, h, w), dtype=np.float32))
                images[row, :, top : top + h, left : left + w] = noise.to(
                    images.device, images.dtype, non_blocking=True
                )
                break
    return images

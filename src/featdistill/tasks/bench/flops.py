"""Floating-point operations of a distillation step, by counting products.

An image costs 2 M_T + 6 (M_S + N d_S d_T) - 2 M_patch operations for M multiply-adds of a forward
pass: once through the teacher; through student and projector, and twice as much backwards, without
the gradient of the images. Of a plain ViT, M = (N - 1) d 3 p^2 + L N (4 + 2 r) d^2 + 2 L N^2 d.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from featdistill.models.backbone import Backbone
from featdistill.objectives.distillation import FeatureDistillation


@torch.no_grad()
def flops_per_image(objective: FeatureDistillation, *, cached: bool = False) -> int:
    """Operations of a training step for each image, at drop path 0.

    Counted by torch in products and convolutions of a forward pass, in plain attention; what is
    proportional to the tokens alone (norms, activations) counts nothing, as is usual.

    Args:
        cached: the teacher is not run.
    """
    student = objective.student
    tokens = 1
    if objective.target == "map":
        tokens = student.grid[0] * student.grid[1] + len(objective.pairing.prefix)
    head = 2 * tokens * sum(p.numel() for p in objective.projector.parameters() if p.ndim > 1)
    teacher = 0 if cached else _forward(objective.teacher)
    return teacher + 3 * (_forward(student) + head) - _embedding(student)


def _embedding(student: Backbone) -> int:
    """Operations of the first convolution, whose gradient in the images nobody wants."""
    first = next((m for m in student.model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return 0
    places = 1
    for size, stride in zip(student.image_size, first.stride, strict=True):
        places *= size // stride
    return 2 * places * first.weight.numel()


def _forward(backbone: Backbone) -> int:
    """Operations of a forward pass for one image."""
    blank = torch.zeros(1, 3, *backbone.image_size, device=backbone.mean.device)
    training = backbone.training
    backbone.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            backbone(blank)
    finally:
        backbone.train(training)
    return int(counter.get_total_flops())

"""The training step as the official code takes it, for the benchmark to stand beside.

Plain mathematics in plain torch: attention from two products and a softmax, a 1x1 convolution as
projector, an optimiser that is not fused, and after every step the host waits for the device and
reads the loss. On CUDA in float16 with a gradient scaler, as the official code does; on a CPU,
which is slow at float16, in float32.
Source: SwinTransformer/Feature-Distillation, main_fd.py (`train_one_epoch`), optimizer.py and
models/feature_distillation.py (`FD.forward`). How its time was held against the official step's
own stands in docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featdistill.core.types import Batch
from featdistill.objectives.distillation import FeatureDistillation


class ReferenceStep:
    """One whole step: both models, loss, backward pass, clipping, AdamW, and the waits.

    Args:
        objective: whose models and projector are taken over, and changed.
        rate: AdamW's.
        clip: largest gradient norm.
    """

    def __init__(
        self, objective: FeatureDistillation, *, device: torch.device, rate: float, clip: float
    ) -> None:
        self.objective, self.device, self.clip = objective, device, clip
        objective.projector = _Convolution(objective.projector)  # type: ignore[assignment]
        objective.to(device).to_device(device)
        objective.train()
        for model in (objective.student, objective.teacher):
            _unfuse(model)
        self.loss = nn.SmoothL1Loss(beta=2.0)
        self.half = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)
        self.parameters = list(objective.parameters())
        decay = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), weight_decay=0.05)

    def __call__(self, batch: Batch) -> float:
        """Train on a batch of float images; the loss."""
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            prediction = self.objective.predictions(batch)
            with torch.no_grad():
                target = self.objective.targets(batch)
            loss = self.loss(prediction, target)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        value: float = loss.item()
        return value


class _Convolution(nn.Module):
    """A projector (C to D for each token) as the official code's convolution over tokens."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(linear.in_features, linear.out_features, kernel_size=1)
        with torch.no_grad():
            self.convolution.weight.copy_(linear.weight[..., None])
            assert self.convolution.bias is not None
            self.convolution.bias.copy_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.convolution(tokens.transpose(1, 2)).transpose(1, 2)
        return projected


def _unfuse(model: nn.Module) -> None:
    """Attention by two products and a softmax."""
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = False  # type: ignore[assignment]

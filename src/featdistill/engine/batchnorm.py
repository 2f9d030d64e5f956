"""Batch norm over the whole batch, wherever its images are.

torch's `SyncBatchNorm` does this for CUDA only, so that no test on a CPU can hold it to anything.
This one sums through differentiable collectives of any backend.

B images of this process, C channels, h w a map's size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class JointBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of all processes together.

    Its parameters, buffers and numbers are `nn.BatchNorm2d`'s on the joined batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) normalised by channel."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        wide = x.float()
        here = wide.new_tensor([float(x.numel() // x.shape[1])])
        sums = all_reduce(torch.cat([wide.sum((0, 2, 3)), here]))
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        # from deviations, not from squares, whose difference loses digits
        away = wide - mean[:, None, None]
        variance = all_reduce(away.square().sum((0, 2, 3))) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        normed = away * scale[:, None, None]
        return (normed if self.bias is None else normed + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as `nn.BatchNorm2d` does."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def join_batch_norms(module: nn.Module) -> None:
    """Replace every `nn.BatchNorm2d` within by one over all processes; its tensors stay."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            joint = JointBatchNorm2d(
                child.num_features,
                child.eps,
                child.momentum,
                child.affine,
                child.track_running_stats,
            )
            joint.train(child.training)
            for kind in ("weight", "bias"):
                setattr(joint, kind, getattr(child, kind))  # the very parameters
            for kind in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(joint, kind, getattr(child, kind))
            setattr(module, name, joint)
        else:
            join_batch_norms(child)

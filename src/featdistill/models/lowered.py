"""A frozen model's weights in bf16: what autocast would make of them in every pass, made once.

The numbers are autocast's own, to the bit. On a CPU the weights are also laid out beforehand as
oneDNN's products read them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_HINT = 1024  # rows that the layout is made for; other numbers are as right, and hardly slower


def lower_weights(model: nn.Module) -> None:
    """Keep the weights of a frozen model's products and convolutions in bf16; in place.

    Norms, tables and whatever autocast leaves in float32 stay so. The model is then to be run under
    autocast. A second call does nothing.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                assert not parameter.requires_grad, "only a frozen model"
                parameter.data = parameter.data.to(torch.bfloat16)
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and _can_lay_out():
            module.__class__ = _LaidOutLinear
            module.laid_out = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), _HINT)


def _can_lay_out() -> bool:
    """Whether this torch has the operators that its own compiler uses for that."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


class _LaidOutLinear(nn.Linear):
    """A frozen linear layer in bf16 on a CPU."""

    laid_out: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0 or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(torch.bfloat16), self.laid_out, self.bias, "none", [], ""
        )
        return found

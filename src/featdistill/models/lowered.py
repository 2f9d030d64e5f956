"""A frozen model's weights as its passes want them: in bf16, and laid out for the device.

In bf16 they are what autocast would make of them in every pass, made once: the numbers are
autocast's own, to the bit. On a CPU they are also laid out beforehand as oneDNN's products read
them.
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


def lay_out_convolutions(model: nn.Module) -> None:
    """Lay out a frozen convolutional network's weights channels-last, and with them its maps.

    Only where dense convolutions are most of it: elsewhere there is nothing to win.
    """
    dense = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    whole = sum(p.numel() for p in model.parameters())
    if 2 * sum(m.weight.numel() for m in dense) > whole:
        model.to(memory_format=torch.channels_last)


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

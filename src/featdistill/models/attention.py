"""Attention of the model that is trained: which of several equal ways, and the bias they add.

Letters: B batch, H heads, N tokens, d channels a head, C = H d.

`naive` is timm's own: two products and a softmax. `fused` is torch's; a GPU takes a bias that
learns only in storage whose rows begin at multiples of 8 numbers. `lean` is naive without the
copies that autocast adds: the scores stay in the type of the products, and the bias comes to them,
not they to the bias; its gradient is summed in float32 over samples and layers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, RelativePositionBias
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Kind = Literal["naive", "fused", "lean"]
_ROW = 8  # numbers that a row's stride is a multiple of, for the memory-efficient kernel


def suit_attention(model: nn.Module, kind: Kind) -> None:
    """Set a timm model's attention; where a family has no lean way, naive stands for it."""
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = kind == "fused"  # type: ignore[assignment]
        if type(module) in (Attention, _LeanAttention):
            module.__class__ = _LeanAttention if kind == "lean" else Attention
        elif type(module) in (RelativePositionBias, _AlignedBias):
            module.__class__ = _AlignedBias if kind == "fused" else RelativePositionBias


class _AlignedBias(RelativePositionBias):  # type: ignore[misc]
    """The bias (H, N, N) once for all layers, as a GPU's kernel wants it in type and storage."""

    def forward(self) -> Tensor:
        bias: Tensor = super().forward()
        if bias.device.type != "cuda":
            return bias
        if torch.is_autocast_enabled("cuda"):
            bias = bias.to(torch.get_autocast_dtype("cuda"))
        n = bias.shape[-1]
        return F.pad(bias, (0, -n % _ROW))[..., :n]


class _LeanAttention(Attention):  # type: ignore[misc]
    """BEiT's attention for training on a CPU.

    Where nothing learns, or attention drops, it is timm's.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        plain = (
            not torch.is_grad_enabled()
            or self.q_bias is None
            or self.qkv_bias_separate
            or (self.training and (self.attn_drop.p or self.proj_drop.p))
        )
        if plain:
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()[0]
            bias = own if bias is None else own + bias
        # CUDA's autocast would make the softmax float32, and its gradient has no autocast
        with torch.autocast(x.device.type, enabled=False):
            found: Any = _Attend.apply(qkv, bias, self.num_heads, self.scale)
        projected: Tensor = self.proj(found)
        return projected


class _Attend(torch.autograd.Function):
    """softmax(scale q k' + bias) v of (B, N, 3C), all in its type, sums in float32 as ever."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, heads: int, scale: float) -> Tensor:
        b, n, c = qkv.shape
        d = c // 3 // heads
        parts = qkv.view(b, n, 3, heads, d).permute(2, 0, 3, 1, 4).reshape(3, b * heads, n, d)
        q, k, v = parts.unbind(0)
        if bias is None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        else:
            every = bias.to(q.dtype).expand(b, heads, n, n).reshape(b * heads, n, n)
            scores = torch.baddbmm(every, q, k.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.batch, ctx.scale = b, scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.bmm(weights, v).view(b, heads, n, d).transpose(1, 2).reshape(b, n, heads * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        b, (bh, n, d) = ctx.batch, q.shape
        heads = bh // b
        grad = grads[0].view(b, n, heads, d).transpose(1, 2).reshape(bh, n, d)
        found = q.new_empty(3, bh, n, d)
        of_weights = torch.bmm(grad, v.transpose(1, 2))
        scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        torch.bmm(scores, k, out=found[0]).mul_(ctx.scale)
        torch.bmm(scores.transpose(1, 2), q, out=found[1]).mul_(ctx.scale)
        torch.bmm(weights.transpose(1, 2), grad, out=found[2])
        bias = None
        if ctx.needs_input_grad[1]:
            whole = scores.view(b, heads, n, n).sum(0, dtype=torch.float32)
            bias = whole.to(ctx.bias_dtype)
        qkv = found.view(3, b, heads, n, d).permute(1, 3, 0, 2, 4).reshape(b, n, 3 * heads * d)
        return qkv, bias, None, None

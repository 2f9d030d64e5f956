"""Attention weights of any model, while it runs: `with capture_attention(model, sink): model(x)`.

Fused kernels never form the weights, and hooks on them return nothing. So a `TorchFunctionMode`
watches the functions that attention goes through (`scaled_dot_product_attention`,
`multi_head_attention_forward`, and `softmax` where a model forms the weights itself), and the
weights are computed a second time from what they were given. The model computes what it always
computes.

Dimensions: B images, W windows of an image (1: no windows), H heads, N tokens of a window, D
channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featdistill.core.errors import ModelError

_SOFTMAX = (F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax)
_MHA = inspect.signature(nn.MultiheadAttention.forward)
_MHA_FUNCTION = inspect.signature(F.multi_head_attention_forward)
# a row of float32 weights sums to 1 within rounding; a bfloat16 one has eight bits for each weight
_ROW_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_COARSE_ROW_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Window:
    """How a layer divides its tokens into windows, as Swin does.

    Attributes:
        grid: (h, w) tokens of the whole map.
        size: (h, w) tokens of a window.
        shift: by how many tokens (down, right) the map was rolled before it was cut.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int]

    @property
    def count(self) -> int:
        """Windows of an image."""
        return (self.grid[0] // self.size[0]) * (self.grid[1] // self.size[1])


@dataclass(frozen=True)
class CapturedAttention:
    """The weights of one attention call, for its consumer to reduce and forget.

    Attributes:
        layer: the name of the module that made the call, as in `named_modules`; a second call in
            the same forward pass gets `#2`.
        weights: (B * W, H, N, N) float32, without gradient; rows (the last axis) sum to 1; the
            windows of an image follow each other.
        images: B.
        window: how the tokens were cut into windows; None: every token sees every other.
    """

    layer: str
    weights: Tensor
    images: int
    window: Window | None


Sink = Callable[[CapturedAttention], None]


@contextmanager
def capture_attention(module: nn.Module, sink: Sink) -> Iterator[None]:
    """Hand the attention weights of every layer to `sink`, one layer at a time, as `module` runs.

    The module's output is bit for bit what it is without this. (An `nn.TransformerEncoderLayer` is
    the exception: PyTorch's own fast path for it stands back whenever anybody looks.) Nothing is
    kept: when `sink` returns, a layer's weights are gone, unless it kept them. Gradients flow
    through the module as ever; the weights carry none, and dropout does not reach them. Attention
    that is not square (pooling heads, attention to other tokens) is left out.

    Args:
        module: any module, run as a whole or by its methods (`forward_features`).
        sink: called with each layer's `CapturedAttention`.

    Raises:
        ModelError: at the end, if no attention was seen; or if a row does not sum to 1.
    """
    watcher = _Watcher(sink)
    handles = [
        handle
        for name, part in module.named_modules(remove_duplicate=True)
        for handle in watcher.watch(name, part)
    ]
    try:
        with _Mode(watcher):
            yield
    finally:
        for handle in handles:
            handle.remove()
    watcher.check_seen(module)


@dataclass
class _Call:
    """A module that is running.

    Attributes:
        shape: of its first tensor argument.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...] | None
    blind: Any = None


class _Watcher:
    """Knows which modules are running, and makes `CapturedAttention` of what the mode sees."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.stack: list[_Call] = []
        self.calls: dict[str, int] = {}
        self.errors: dict[str, Tensor] = {}
        self.seen = self.not_square = 0

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Hooks that tell when `module` runs."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            first = next(tensors, None)
            if not self.stack:  # a new forward pass
                self.calls.clear()
            call = _Call(name, module, None if first is None else tuple(first.shape))
            if _is_plain_mha(module):  # it chooses among its kernels as if nobody looked
                call.blind = torch._C.DisableTorchFunction()
                call.blind.__enter__()
            self.stack.append(call)

        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            try:
                if self.stack[-1].blind is not None and output is not None:
                    self.take(_weights_of_mha(module, args, kwargs))
            finally:
                call = self.stack.pop()
                if call.blind is not None:
                    call.blind.__exit__(None, None, None)
            if not self.stack and output is not None:
                self.check_rows()

        return [
            module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            module.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]

    def take(self, weights: Tensor) -> None:
        """Hand weights (..., N, N) of the running module on."""
        if weights.shape[-1] != weights.shape[-2] or weights.shape[-1] < 2:
            self.not_square += 1
            return
        layer, window = self._layer(), self._window()
        images = self._images() or len(weights)
        weights = _four_dimensional(weights, images)
        self.errors[layer] = _row_error(weights)
        if window is not None and len(weights) != images * window.count:
            raise ModelError(
                f"the windows of '{layer}' are padded: {window.size[0]}x{window.size[1]} on "
                f"{window.grid[0]}x{window.grid[1]} tokens",
                expected="windows that divide the map",
                fix="choose another image size",
            )
        self.seen += 1
        self.sink(CapturedAttention(layer, weights.float(), images, window))

    def check_rows(self) -> None:
        """Raise ModelError if rows of the last pass did not sum to 1.

        Once a pass: to ask a GPU layer by layer would make it wait for the next one's work.
        """
        layers, errors = list(self.errors), list(self.errors.values())
        self.errors.clear()
        for layer, excess in zip(
            layers, torch.stack(errors).tolist() if errors else (), strict=True
        ):
            if not excess <= 1:  # and not NaN
                raise ModelError(
                    f"the attention weights of '{layer}' do not sum to 1 over the keys (off by "
                    f"{excess:.3g} times what rounding explains)",
                    fix="look at the model's weights and at its masks",
                )

    def check_seen(self, module: nn.Module) -> None:
        """Raise ModelError if there was nothing to see, or something wrong."""
        self.check_rows()
        if self.seen:
            return
        what = f"no attention was seen in {type(module).__name__}"
        if self.not_square:
            what = f"only attention to other tokens (pooling) was seen in {type(module).__name__}"
        raise ModelError(
            what,
            expected="a vision transformer that ran, not compiled, in this block",
            fix="attention is found by scaled_dot_product_attention, nn.MultiheadAttention "
            "and softmax",
        )

    def _layer(self) -> str:
        named = [c.name for c in self.stack if not isinstance(c.module, nn.Softmax | nn.Dropout)]
        name = named[-1] if named else ""
        self.calls[name] = self.calls.get(name, 0) + 1
        return name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"

    def _images(self) -> int | None:
        shape = self.stack[0].shape if self.stack else None
        return shape[0] if shape else None

    def _window(self) -> Window | None:
        for call in reversed(self.stack):
            size, shift = (getattr(call.module, n, None) for n in ("window_size", "shift_size"))
            if size is not None and shift is not None and call.shape is not None:
                return _window_of(call, _pair(size), _pair(shift))
        return None


class _Mode(TorchFunctionMode):
    """Lets every function do what it does, and looks at three of them."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.watcher.take(sdpa_weights(*args, **kwargs))
        elif func in _SOFTMAX:
            if _is_attention(output, args, kwargs):
                self.watcher.take(output.detach())
        elif func is F.multi_head_attention_forward:
            self.watcher.take(_weights_of_function(args, kwargs))
        return output


@torch.no_grad()
def sdpa_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights that `scaled_dot_product_attention` uses, before dropout.

    Args:
        query, key, value: (..., N, D); of value nothing is used, of dropout neither.
        attn_mask: added to the logits, or True where a key may be seen.

    Returns:
        (..., N, N): softmax(scale * query key^T + mask), in float32 or better.
    """
    del value, dropout_p
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        ahead = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill_(ahead, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _is_attention(output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a softmax is over keys: the last axis of maps (..., queries, keys)."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return isinstance(dim, int) and output.ndim >= 3 and dim in (-1, output.ndim - 1)


def _is_plain_mha(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
    )


@torch.no_grad()
def _weights_of_mha(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """(B, H, N, N) of an `nn.MultiheadAttention` that was called with these arguments."""
    bound = _MHA.bind(module, *args, **kwargs).arguments
    bound |= {"need_weights": True, "average_attn_weights": False}
    training, module.training = module.training, False  # no dropout, no draw of its generator
    try:
        weights = nn.MultiheadAttention.forward(**bound)[1]
    finally:
        module.training = training
    assert weights is not None
    return weights if weights.ndim == 4 else weights[None]  # an unbatched call


@torch.no_grad()
def _weights_of_function(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """(B, H, N, N) of a `multi_head_attention_forward` that was called with these arguments."""
    bound = _MHA_FUNCTION.bind(*args, **kwargs).arguments
    bound |= {"need_weights": True, "average_attn_weights": False, "training": False}
    weights = F.multi_head_attention_forward(**bound)[1]
    assert weights is not None
    return weights if weights.ndim == 4 else weights[None]


def _four_dimensional(weights: Tensor, images: int) -> Tensor:
    """Maps of any layout as (B * W, H, N, N)."""
    n = weights.shape[-1]
    if weights.ndim == 3:  # (B, N, N), or heads beside the images: (B * H, N, N)
        heads = len(weights) // images if len(weights) % images == 0 else 1
        return weights.reshape(-1, heads, n, n)
    return weights.reshape(-1, weights.shape[-3], n, n)


def _row_error(weights: Tensor) -> Tensor:
    """How far a row's sum is from 1 at the most, in units of what rounding explains; a scalar."""
    tolerance = _ROW_TOLERANCE.get(weights.dtype, _COARSE_ROW_TOLERANCE)
    sums = weights.sum(-1, dtype=torch.promote_types(weights.dtype, torch.float32))
    return (sums - 1).abs().max().float() / tolerance


def _window_of(call: _Call, size: tuple[int, int], shift: tuple[int, int]) -> Window | None:
    assert call.shape is not None
    if len(call.shape) == 4:
        grid = (call.shape[1], call.shape[2])
    else:
        grid = _pair(getattr(call.module, "input_resolution", (0, 0)))
        if len(call.shape) != 3 or grid[0] * grid[1] != call.shape[1]:
            return None
    # a window as large as the map is not shifted
    size = (min(size[0], grid[0]), min(size[1], grid[1]))
    return Window(
        grid,
        size,
        (shift[0] if size[0] < grid[0] else 0, shift[1] if size[1] < grid[1] else 0),
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))

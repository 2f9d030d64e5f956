"""Strict loading that says what it did, and what weights are known by."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featdistill.core.errors import ModelError
from featdistill.core.parsing import parse_json


def file_hash(path: Path) -> str:
    """SHA-256 of a file, 12 characters."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


class HashMeanwhile:
    """SHA-256 of a file, 12 characters, in a thread of its own: half the time that loading takes.

    If nobody asks for it, because the file is refused, nobody waits for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: str | OSError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._found = file_hash(self._path)
        except OSError as error:
            self._found = error

    def result(self) -> str:
        """Raise OSError if the file cannot be read."""
        self._thread.join()
        assert self._found is not None
        if isinstance(self._found, OSError):
            raise self._found
        return self._found


class Unfilled(TorchFunctionMode):
    """Leaves parameters as they are allocated: for a model that is built to be loaded strictly.

    Random numbers that are overwritten a moment later take longer than reading a file. Only
    parameters are left out, every one of which `load_exactly` demands; buffers that a constructor
    computes are computed.
    """

    _FILLS = frozenset(
        (
            *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.zero_, Tensor.fill_),
            *(Tensor.mul_, Tensor.add_, Tensor.clamp_),
        )
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, nn.Parameter):
                return filled
        return func(*args, **kwargs)


def tensors_hash(module: nn.Module) -> str:
    """SHA-256 over names and bytes of a module's weights and buffers, 12 characters."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:12]


def load_exactly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    what: str,
    left_out: Callable[[str], bool] = lambda _: False,
    say: Callable[[str], str] = str,
    missing: Sequence[str] = (),
    strangers: Sequence[str] = (),
    numbers: Literal["check", "checked"] = "check",
) -> str:
    """Load tensors into a module; anything missing, unexpected or misshapen is an error.

    So is a weight of another kind (whole numbers for a real parameter, as quantised files have
    them), and one that is not finite.

    Args:
        what: the tensors' source, for messages.
        left_out: tensors of the source that are left out on purpose.
        say: a tensor's name in the source's words, for messages.
        missing, strangers: what is known to be missing and unexpected already.
        numbers: whether `odd_numbers` has still to look at them.

    Returns:
        One line that says what was loaded.
    """
    wanted = module.state_dict()
    taken = {k: v for k, v in tensors.items() if k in wanted or not left_out(k)}
    misshapen = [
        f"{say(k)} {tuple(taken[k].shape)} for {tuple(wanted[k].shape)}"
        for k in sorted(wanted.keys() & taken.keys())
        if taken[k].shape != wanted[k].shape
    ]
    found = {
        "missing": [*missing, *map(say, sorted(wanted.keys() - taken.keys()))],
        "unexpected": [*strangers, *map(say, sorted(taken.keys() - wanted.keys()))],
        "of another shape": misshapen,
    }
    if numbers == "check":
        found |= odd_numbers({say(k): v for k, v in taken.items() if _real(wanted.get(k))})
    faults = {word: names for word, names in found.items() if names}
    if faults:
        raise ModelError(
            f"'{what}' does not fit the model: {listed(faults)}", fix=likely_cause(faults)
        )
    module.load_state_dict(dict(taken))
    dropped = len(tensors) - len(taken)
    return f"loaded {len(taken)} of {len(tensors)} tensors, left out {dropped}, missing 0"


def _real(value: Tensor | None) -> bool:
    return value is not None and value.is_floating_point()


def odd_numbers(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What is wrong with the numbers of tensors that should be real weights, and of which.

    Whole or complex numbers (as in quantised files) would be cast in silence; NaN and infinity are
    what a run that diverged leaves behind.
    """
    real = {k: v for k, v in sorted(tensors.items()) if v.is_floating_point()}
    found = {
        "of another kind": [
            f"{k}: {str(tensors[k].dtype).removeprefix('torch.')}"
            for k in sorted(tensors.keys() - real.keys())
        ],
        "not finite": [k for k, v in real.items() if not v.is_meta and not _finite(v)],
    }
    return {word: names for word, names in found.items() if names}


def listed(faults: Mapping[str, Sequence[str]]) -> str:
    """`2 missing (a, b); 1 not finite (c)`, the first four of each."""
    return "; ".join(
        f"{len(names)} {word} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for word, names in faults.items()
    )


def _finite(value: Tensor) -> bool:
    wide = value if value.itemsize > 1 else value.float()  # torch adds up no eight-bit numbers
    # the sum takes no memory, and is finite almost always if all are
    return bool(wide.sum(dtype=torch.float32).isfinite()) or bool(wide.isfinite().all())


def likely_cause(faults: Collection[str]) -> str:
    """What may have happened to weights with such faults."""
    if set(faults) == {"not finite"}:
        return "did the run that wrote it diverge? Take an earlier checkpoint of it"
    if set(faults) == {"of another kind"}:
        return "was it quantised? Take the weights in floating point"
    if len(faults) == 1:
        return "was the file cut or edited, or is it of another (version of this) architecture?"
    return "is it a checkpoint of this very architecture?"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: absent or not a JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read '{path}' ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' does not hold a JSON object")
    return value

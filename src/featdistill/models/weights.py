"""Tensors from files: only tensors, never code; and strict loading that says what it did."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from featdistill.core.errors import ModelError

_WRAPPERS = ("state_dict", "model", "module", "model_state", "net")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or `.pt`/`.pth`/`.bin` file, on the CPU.

    A pickle is opened with `weights_only=True`, so that none of its code runs; `state_dict`,
    `model` and the like are unwrapped.

    Raises:
        ModelError: absent, damaged, refused, or without tensors.
    """
    if not path.is_file():
        raise ModelError(f"no checkpoint file at '{path}'")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _not_a_checkpoint(path, error) from None
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged or hostile file provokes
        raise _not_a_checkpoint(path, error) from None
    for _ in range(3):
        inner = next(
            (value[w] for w in _WRAPPERS if isinstance(value, Mapping) and w in value), None
        )
        if not isinstance(inner, Mapping):
            break
        value = inner
    if isinstance(value, Mapping):
        tensors = {str(k): v for k, v in value.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    raise ModelError(f"'{path}' is not a checkpoint: it holds no named tensors")


def _not_a_checkpoint(path: Path, error: Exception) -> ModelError:
    line = " ".join(str(error).split())
    reason = line.split(". ")[0][:160] or type(error).__name__
    return ModelError(
        f"'{path}' is not a checkpoint that can be read safely ({reason})",
        expected=".safetensors, or a .pt/.pth/.bin of plain tensors",
    )


def file_hash(path: Path) -> str:
    """SHA-256 of a file, 12 characters."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


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
) -> str:
    """Load tensors into a module; anything missing, unexpected or misshapen is an error.

    Args:
        what: the tensors' source, for messages.
        left_out: tensors of the source that are left out on purpose.

    Returns:
        One line that says what was loaded.
    """
    wanted = module.state_dict()
    taken = {k: v for k, v in tensors.items() if k in wanted or not left_out(k)}
    missing = sorted(wanted.keys() - taken.keys())
    strangers = sorted(taken.keys() - wanted.keys())
    misshapen = sorted(
        f"{k} {tuple(taken[k].shape)} for {tuple(wanted[k].shape)}"
        for k in wanted.keys() & taken.keys()
        if taken[k].shape != wanted[k].shape
    )
    faults = [
        f"{len(names)} {word} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for word, names in (
            ("missing", missing),
            ("unexpected", strangers),
            ("of another shape", misshapen),
        )
        if names
    ]
    if faults:
        raise ModelError(
            f"'{what}' does not fit the model: {'; '.join(faults)}",
            fix="is it a checkpoint of this very architecture?",
        )
    module.load_state_dict(dict(taken))
    dropped = len(tensors) - len(taken)
    return f"loaded {len(taken)} of {len(tensors)} tensors, left out {dropped}, missing 0"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: absent or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read '{path}' ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' does not hold a JSON object")
    return value

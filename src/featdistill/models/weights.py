"""Strict loading that says what it did, and what weights are known by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featdistill.core.errors import ModelError


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
    say: Callable[[str], str] = str,
    missing: Sequence[str] = (),
    strangers: Sequence[str] = (),
) -> str:
    """Load tensors into a module; anything missing, unexpected or misshapen is an error.

    Args:
        what: the tensors' source, for messages.
        left_out: tensors of the source that are left out on purpose.
        say: a tensor's name in the source's words, for messages.
        missing, strangers: what is known to be missing and unexpected already.

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
    faults = [
        f"{len(names)} {word} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for word, names in (
            ("missing", [*missing, *map(say, sorted(wanted.keys() - taken.keys()))]),
            ("unexpected", [*strangers, *map(say, sorted(taken.keys() - wanted.keys()))]),
            ("of another shape", misshapen),
        )
        if names
    ]
    if faults:
        raise ModelError(
            f"'{what}' does not fit the model: {'; '.join(faults)}", fix=_likely_cause(len(faults))
        )
    module.load_state_dict(dict(taken))
    dropped = len(tensors) - len(taken)
    return f"loaded {len(taken)} of {len(tensors)} tensors, left out {dropped}, missing 0"


def _likely_cause(kinds: int) -> str:
    if kinds == 1:
        return "was the file cut or edited, or is it of another (version of this) architecture?"
    return "is it a checkpoint of this very architecture?"


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

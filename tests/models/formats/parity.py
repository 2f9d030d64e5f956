"""Small checkpoints whose right answers are known, from the original projects' own modules.

A case is `cases/NAME.json` (the checkpoint's keys, shapes and wrapping; where the answers come
from) and `cases/NAME.npz` (the answers, and the few tensors that are not random). The weights
themselves are not stored: `fill` makes them again from their names, here and in `generate_vit.py`
and `generate_swin_clip.py`, which compute the answers with the original code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SCALES = ("weight", "gamma_1", "gamma_2", "ls1.gamma", "ls2.gamma")
CASES = Path(__file__).parent / "cases"


def fill(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
    """Weights that depend on nothing but name and shape, of a size that lets signals through.

    `name` is the tensor's full path in the checkpoint, wrappers joined by '/':
    `teacher/backbone.norm.weight`.
    """
    # RandomState's stream is frozen by numpy's compatibility policy, unlike Generator's
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) in (2, 4):
        values /= np.sqrt(np.prod(shape[1:]))
    elif len(shape) == 1 and name.endswith(_SCALES):
        values = 1 + 0.2 * values
    else:
        values *= 0.5 if len(shape) == 3 else 0.2
    return torch.from_numpy(np.asarray(values)).to(getattr(torch, dtype))


def shapes_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and shapes of tensors, in the names' order."""
    lines = (f"{name} {tuple(tensors[name].shape)}\n" for name in sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def images(size: int) -> Tensor:
    """Two RGB images in [0, 1], (2, 3, size, size) float32."""
    return torch.from_numpy(np.random.RandomState(size).rand(2, 3, size, size)).float()


@dataclass(frozen=True)
class Answer:
    """What the original module says of `images(size)`, float32.

    Attributes:
        map: (2, C, h, w) after the final norm.
        prefix: (2, P, C) after the final norm.
        pooled: (2, D), the model's own, or None.
        logits: (2, K), or None.
    """

    map: np.ndarray
    prefix: np.ndarray
    pooled: np.ndarray | None
    logits: np.ndarray | None


@dataclass(frozen=True)
class Case:
    """A checkpoint and its answers."""

    name: str
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, name: str) -> Case:
        facts = json.loads((CASES / f"{name}.json").read_text())
        with np.load(CASES / f"{name}.npz") as file:
            return cls(name, facts, dict(file))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Image sizes with answers; the first is the checkpoint's own."""
        return tuple(self.facts["sizes"])

    def answer(self, size: int) -> Answer:
        get = self.arrays.get
        return Answer(
            get(f"{size}/map"), get(f"{size}/prefix"), get(f"{size}/pooled"), get(f"{size}/logits")
        )

    def tree(self) -> dict[str, Any]:
        """The checkpoint as the original project would have saved it."""
        return _grow(self.facts["checkpoint"], self.arrays, ())

    def write(self, folder: Path) -> Path:
        """Save the checkpoint under its usual file name."""
        path = folder / self.facts["file"]
        stored = CASES / f"{self.name}{path.suffix}"
        if stored.is_file():  # an archive that cannot be made again without the original code
            path.write_bytes(stored.read_bytes())
        elif path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(self.tree(), path)
        else:
            torch.save(self.tree(), path)
        return path


def _grow(node: dict[str, Any], arrays: dict[str, np.ndarray], path: tuple[str, ...]) -> Any:
    """A JSON description as Python objects.

    `"float16[4,8]"` is a filled tensor, `"exact"` one stored in the npz as `tensor/PATH`,
    `{"!value": v}` a plain value, `{"!namespace": {...}}` an argparse.Namespace, and any other
    object a dictionary.
    """
    if "!value" in node:
        return node["!value"]
    if "!namespace" in node:
        return argparse.Namespace(**node["!namespace"])
    out = {}
    for key, value in node.items():
        here = (*path, key)
        if value == "exact":
            out[key] = torch.from_numpy(arrays["tensor/" + "/".join(here)])
        elif isinstance(value, str):
            dtype, _, rest = value.partition("[")
            shape = tuple(int(n) for n in rest.rstrip("]").split(",") if n)
            out[key] = fill("/".join(here), shape, dtype)
        else:
            out[key] = _grow(value, arrays, here)
    return out

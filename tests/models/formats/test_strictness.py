"""Whatever happens to one tensor of a checkpoint, the error names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.models.checkpoints import load as loading
from featdistill.models.checkpoints import recognised
from tests.models.formats.parity import CASES, Case
from tests.models.formats.test_parity import write

NAMES = sorted(path.stem for path in CASES.glob("*.json"))

# A part that is one tensor alone: without it, or longer, the file is another whole model.
WHOLE_ALL_THE_SAME = {
    ("dinov2-registers", "register_tokens", "drop"),  # a DINOv2 without registers
    ("open-clip-timm-linear", "visual.head.proj.weight", "drop"),  # a trunk without projection
    ("open-clip-timm-linear", "visual.head.proj.weight", "lengthen"),  # a wider projection
}


def spots(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the tensors of a checkpoint are."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield (*path, key)
        elif isinstance(value, dict):
            yield from spots(value, (*path, key))


def with_change(
    tree: dict[str, Any], spot: tuple[str, ...], change: Callable[[dict[str, Any], str], None]
) -> dict[str, Any]:
    """A copy of the tree in which the dictionary at a spot was changed."""
    if len(spot) == 1:
        copy = dict(tree)
        change(copy, spot[0])
        return copy
    return {**tree, spot[0]: with_change(tree[spot[0]], spot[1:], change)}


def drop(tree: dict[str, Any], key: str) -> None:
    del tree[key]


def rename(tree: dict[str, Any], key: str) -> None:
    head, _, tail = key.rpartition(".")
    tree[f"{head}.{tail}_old" if head else f"{tail}_old"] = tree.pop(key)


def flatten(tree: dict[str, Any], key: str) -> None:
    value = tree[key]
    tree[key] = value.reshape(-1) if value.ndim != 1 else value.reshape(-1, 1)


def lengthen(tree: dict[str, Any], key: str) -> None:
    value = tree[key]
    tree[key] = torch.cat([value, value[:1]]) if value.ndim else value.reshape(1)


def shorten(tree: dict[str, Any], key: str) -> None:
    """By a row of the second dimension, where positions, tokens and channels lie."""
    value = tree[key]
    tree[key] = value[:, 1:] if value.ndim > 1 else value[1:] if value.ndim else value.reshape(1)


def empty(tree: dict[str, Any], key: str) -> None:
    tree[key] = tree[key].reshape(-1)[:0]


def scalar(tree: dict[str, Any], key: str) -> None:
    tree[key] = tree[key].reshape(-1)[0]


def poison(tree: dict[str, Any], key: str) -> None:
    """One number that is none, as in the weights of a run that diverged."""
    value = tree[key].clone()
    value.view(-1)[-1] = float("nan")
    tree[key] = value


def quantise(tree: dict[str, Any], key: str) -> None:
    tree[key] = (100 * tree[key]).to(torch.int8)


CHANGES = {
    change.__name__: change
    for change in (drop, rename, flatten, lengthen, shorten, empty, scalar, poison, quantise)
}


class Reader:
    """Loads a case's tree, changed, without writing it to disk each time."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.case = Case.read(name)
        self.path = write(self.case, folder)
        self.tree = recognised.read_tree(self.path)
        self.now: dict[str, Any] = self.tree
        monkeypatch.setattr(recognised, "read_tree", lambda _: self.now)
        whole = loading.load_checkpoint(self.path)
        prefix = whole.report.path.rpartition("/")[2]
        left_out = {
            f"{before}{name}"
            for names in whole.report.left_out.values()
            for name in names
            for before in ("", "module." if prefix.startswith("module.") else "", prefix)
        }
        self.model_spots = [
            spot
            for spot in spots(self.tree)
            if self._in_branch(spot, whole.report.path) and spot[-1] not in left_out
        ]
        self.left_out_spots = [
            spot
            for spot in spots(self.tree)
            if self._in_branch(spot, whole.report.path) and spot[-1] in left_out
        ]

    @staticmethod
    def _in_branch(spot: tuple[str, ...], path: str) -> bool:
        branch = tuple(path.split("/")[:-1])
        return spot[: len(branch)] == branch and len(spot) == len(branch) + 1

    def load(self, spot: tuple[str, ...], how: str) -> None:
        self.now = with_change(self.tree, spot, CHANGES[how])
        loading.load_checkpoint(self.path)


def check(reader: Reader, spot: tuple[str, ...], how: str) -> None:
    name = spot[-1]
    if (reader.case.name, name, how) in WHOLE_ALL_THE_SAME:
        reader.load(spot, how)
        return
    with pytest.raises(ModelError) as caught:
        reader.load(spot, how)
    short = name  # without the prefixes of processes and parts
    for prefix in ("module.", "backbone.", "encoder.", "visual.trunk."):
        short = short.removeprefix(prefix)
    assert short in str(caught.value) or f"{short}_old" in str(caught.value), (name, how)
    assert str(reader.path) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_some_tensors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(name, tmp_path, monkeypatch)
    draw = np.random.RandomState(0)
    # those that are one of a kind are always among them
    few = [s for s in reader.model_spots if not any(c.isdigit() for c in s[-1])]
    many = [s for s in reader.model_spots if s not in few]
    chosen = [*few, *(many[i] for i in draw.choice(len(many), size=6, replace=False))]
    for spot in chosen:
        for how in CHANGES:
            check(reader, spot, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor(name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(name, tmp_path, monkeypatch)
    assert len(reader.model_spots) > 25
    for spot in reader.model_spots:
        check(reader, spot, how)


@pytest.mark.parametrize("name", ["dino-full", "mae-pretrain", "clip-state", "fd-vit-pretrain"])
def test_a_stranger_beside_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(name, tmp_path, monkeypatch)
    for spot in reader.left_out_spots[:3]:
        reader.load(spot, "drop")  # what is left out need not be there
        stranger = (*spot[:-1], "unheard_of.weight")
        reader.now = with_change(
            reader.tree, stranger, lambda tree, key: tree.update({key: torch.ones(1)})
        )
        with pytest.raises(ModelError, match=r"1 unexpected \(unheard_of\.weight\)"):
            loading.load_checkpoint(reader.path)


def test_two_names_for_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader("dinov2-swiglu", tmp_path, monkeypatch)
    twin = {"blocks.0.mlp.fc1.weight": reader.tree["blocks.0.mlp.w12.weight"]}
    reader.now = {**reader.tree, **twin}
    with pytest.raises(ModelError, match=r"1 unexpected \(blocks\.0\.mlp\.fc1\.weight\)"):
        loading.load_checkpoint(reader.path)

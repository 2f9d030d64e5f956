"""The known students and teachers, and what is known of them: data, read without torch or timm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

_HUB = "https://huggingface.co/"
_OF_A_FAMILY = ("data", "licence", "link", "paper", "mean_std", "prefix", "note")


@dataclass(frozen=True)
class Entry:
    """A teacher that people use, or would like to.

    Attributes:
        name: `timm/NAME`, which is what to write after `--teacher`; or a name of this list for a
            model whose weights are a file to download.
        method: how it was trained.
        data: on what, and how much of it.
        licence: of the weights; an SPDX name where there is one.
        link: its project.
        parameters: of the whole model, head included.
        image_size: side in pixels that it is made for; None if that is not known.
        patch: side in pixels of one token of the last layer.
        prefix: names of the tokens before the map.
        width: channels of the last layer.
        mean, std: the normalisation of RGB in [0, 1]; () if they are not known.
        mean_std: what these two are called here.
        file: what the weights' file is called, where it has a name.
        url: where the weights are; None if they were never published.
        architecture: timm's name of the architecture of a file; its `arguments` beside it.
        student: the student (`vit-b`, ...) whose architecture a file has.
    """

    name: str
    family: str
    method: str
    data: str
    licence: str
    link: str
    paper: str
    parameters: int
    image_size: int | None = None
    patch: int | None = None
    prefix: tuple[str, ...] = ()
    width: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    mean_std: str | None = None
    note: str | None = None
    file: str | None = None
    url: str | None = None
    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    student: str | None = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) tokens of the map at `image_size`."""
        if self.image_size is None or self.patch is None:
            return None
        return (self.image_size // self.patch,) * 2

    @property
    def in_timm(self) -> bool:
        """Whether timm downloads it by its name."""
        return self.name.startswith("timm/")


@dataclass(frozen=True)
class StudentEntry:
    """A student by short name, at 224 pixels; the attributes are those of `Entry`."""

    name: str
    parameters: int
    patch: int
    prefix: tuple[str, ...]
    width: int
    depth: int
    position: str
    image_size: int = 224

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) tokens of the map."""
        return (self.image_size // self.patch,) * 2


def teachers() -> tuple[Entry, ...]:
    """All known teachers, family by family."""
    found = []
    for tree in _tree()["families"]:
        common = {key: tree[key] for key in _OF_A_FAMILY if key in tree}
        for model in tree["models"]:
            found.append(_entry({**common, **model}, tree["family"], tree["method"]))
    return tuple(found)


def students() -> tuple[StudentEntry, ...]:
    """The named students."""
    return tuple(
        StudentEntry(**{**row, "prefix": tuple(row["prefix"])}) for row in _tree()["students"]
    )


def find(name: str) -> Entry | None:
    """The teacher of exactly this name (`timm/` may be left out); None if it is not known."""
    wanted = name.lower()
    return next((e for e in teachers() if wanted in (e.name, e.name.removeprefix("timm/"))), None)


def search(words: str) -> tuple[Entry, ...]:
    """The teachers with every one of the words in their name, family or data."""
    wanted = words.lower().split()
    return tuple(
        entry
        for entry in teachers()
        if all(word in f"{entry.name} {entry.family} {entry.data}".lower() for word in wanted)
    )


def _entry(row: dict[str, Any], family: str, method: str) -> Entry:
    row = dict(row)
    numbers = _tree()["mean_std"].get(row["mean_std"], {})
    url = row.pop("url", None)
    if url is None and row["name"].startswith("timm/"):
        url = _HUB + row["name"]
    return Entry(
        family=family,
        method=method,
        url=url,
        architecture=row.pop("timm", None),
        mean=tuple(numbers.get("mean", ())),
        std=tuple(numbers.get("std", ())),
        prefix=tuple(row.pop("prefix")),
        **row,
    )


@cache
def _tree() -> dict[str, Any]:
    text = resources.files("featdistill.models").joinpath("catalogue.yaml").read_text("utf-8")
    tree: dict[str, Any] = yaml.safe_load(text)
    return tree

"""The figures of a page: numbered, written in every format, and described."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featdistill.report import svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Shown:
    """A figure of the page: its SVG and the words around it."""

    number: int
    title: str
    drawing: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """Figures that belong together, and one sentence on how to read them."""

    title: str
    sentence: str
    figures: tuple[Shown, ...]


class Gallery:
    """Numbers the figures, and writes each in its formats; no two under one name.

    Args:
        out: an existing folder.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._names: list[str] = []

    def add(self, figure: Figure, name: str, title: str, caption: str, description: str) -> Shown:
        """Write a figure; what the page shows of it."""
        from markupsafe import Markup

        again = self._names.count(name)
        self._names.append(name)
        name = f"{name}-{again + 1}" if again else name
        text = svg.save(figure, self._out, name)
        drawing = svg.inline(text, name=name, title=title, description=description)
        # safe: made by an XML writer, which escaped every text and attribute
        return Shown(len(self._names), title, Markup(drawing), caption)

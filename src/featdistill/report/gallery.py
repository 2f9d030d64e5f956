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
    scripted: bool = False


@dataclass(frozen=True)
class Table:
    """Numbers of a section: a header of columns, and rows that begin with what they are of."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str


@dataclass(frozen=True)
class Section:
    """Figures that belong together, and one sentence on how to read them."""

    title: str
    sentence: str
    figures: tuple[Shown, ...]
    table: Table | None = None


class Gallery:
    """Numbers the figures, and writes each in its formats; no two under one name.

    Attributes:
        scripted: drawings so far that bring a script.

    Args:
        out: an existing folder.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._names: list[str] = []
        self._shown = 0
        self.scripted = 0

    def add(self, figure: Figure, name: str, title: str, caption: str, description: str) -> Shown:
        """Write a figure; what the page shows of it."""
        from markupsafe import Markup

        number, name = self._next(name)
        text = svg.save(figure, self._out, name)
        drawing = svg.inline(text, name=name, title=title, description=description)
        # safe: made by an XML writer, which escaped every text and attribute
        return Shown(number, title, Markup(drawing), caption)

    def add_scripted(self, drawing: Markup, name: str, title: str, caption: str) -> Shown:
        """A drawing that brings a script of its own, and that only the page can show."""
        number, _ = self._next(name)
        self.scripted += 1
        return Shown(number, title, drawing, caption, scripted=True)

    def keep(self, figure: Figure, name: str) -> None:
        """Write a figure that the page does not show."""
        svg.save(figure, self._out, self._next(name, shown=False)[1])

    def _next(self, name: str, *, shown: bool = True) -> tuple[int, str]:
        """The next figure's number, and its name, told from earlier ones of the same name."""
        again = self._names.count(name)
        self._names.append(name)
        self._shown += shown
        return self._shown, f"{name}-{again + 1}" if again else name

"""The house style of figures: colours that the colour-blind can tell apart, and little ink.

Figures are drawn in the light theme. In the page each colour becomes a CSS variable of the same
meaning (see `svg`), so that one drawing is right in both themes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Hues after Okabe and Ito (2008), darkened or lightened until text in them has a contrast of at
# least 4.5 on `paper`. Every value of LIGHT must be unique: the SVG is recoloured by it.
LIGHT = {
    "paper": "#fdfdfb",
    "ink": "#1d2126",
    "muted": "#5b636b",
    "grid": "#e2e4e6",
    "teacher": "#0b68a8",
    "student": "#bd4b00",
    "scratch": "#6f6a78",
    "other": "#8a3f7f",
    "fifth": "#0c7a5b",
    "sixth": "#7d6608",
}
DARK = {
    "paper": "#15181b",
    "ink": "#e7e7e3",
    "muted": "#a0a7ae",
    "grid": "#2d3237",
    "teacher": "#5fb4ea",
    "student": "#f59a4c",
    "scratch": "#aaa4b5",
    "other": "#d895cd",
    "fifth": "#4fc79f",
    "sixth": "#cfb53b",
}

# those of them that mark a row or a model, in the order in which further models take them
OWN_ROLES = ("teacher", "student", "scratch")
FURTHER_ROLES = ("other", "fifth", "sixth")
ROLES = (*OWN_ROLES, *FURTHER_ROLES)

_MARKERS = {"teacher": "s", "student": "o", "scratch": "^", "fifth": "v", "sixth": "P"}
_DASHES: dict[str, Any] = {
    "scratch": (0, (4, 2)),
    "other": (0, (1, 1.2)),
    "fifth": (0, (6, 1.5, 1, 1.5)),
    "sixth": (0, (2, 1)),
}

SEQUENTIAL = "cividis"  # made for the colour-blind; equal steps look equal, in grey too
DIVERGING = "PuOr"  # around zero; safe for the three common kinds of colour blindness

WIDTH = 4.2  # inches: about a phone's width at 72 per inch, so text never shrinks below its size

RC: Any = {  # Any: how matplotlib types its settings differs by version
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same layout everywhere
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.6,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a $ in a name is a $
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "pdf.fonttype": 42,  # likewise; most journals refuse type 3
    "image.cmap": SEQUENTIAL,
    "image.interpolation": "nearest",  # a token is a square, not a blur
}

_lock = threading.RLock()


@contextmanager
def house() -> Iterator[None]:
    """matplotlib under the house style; draw and save figures inside.

    Its settings are global to the process, hence one thread at a time.
    """
    import matplotlib

    with _lock, matplotlib.rc_context(RC):
        yield


def role(name: str) -> str:
    """The colour role of a row or a model: its own name, or `other` for an unknown one."""
    return name if name in ROLES else "other"


def colour(name: str) -> str:
    """A row's colour in the light theme."""
    return LIGHT[role(name)]


def marker(name: str) -> str:
    """A row's marker, so that rows differ without colour too."""
    return _MARKERS.get(name, "D")


def dashes(name: str) -> Any:
    """A row's line style, as matplotlib takes it."""
    return _DASHES.get(name, "-")


def new_figure(
    rows: int = 1,
    *,
    height: float = 2.9,
    share_x: bool = False,
    ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure of one column and `rows` panels; without pyplot, so no global state and no backend.

    Args:
        height: of the whole, in inches.
        share_x: whether panels have one horizontal axis.
        ratios: of the panels' heights; equal by default.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=share_x, squeeze=False, height_ratios=ratios)
    return figure, list(axes[:, 0])


def css() -> str:
    """The palette as CSS custom properties, light first and dark where the reader prefers it."""
    light, dark = (
        " ".join(f"--{name}: {value};" for name, value in palette.items())
        for palette in (LIGHT, DARK)
    )
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )

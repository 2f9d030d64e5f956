"""Figures as files, and as SVG that takes its colours and font from the page around it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from featdistill.report.style import LIGHT, house

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_PNG_DPI = 200
_COLOURS = {value: f"var(--{name})" for name, value in LIGHT.items()}
_FONT = re.compile(r"font: ([\d.]+px) [^;]+")


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write `name`.png (200 dpi), `name`.pdf and `name`.svg, for paper; return the SVG's text."""
    # fixed identifiers and no date: the same record gives the same bytes
    import matplotlib

    undated = {"CreationDate": None, "Creator": None, "Producer": None}
    with house(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.png", dpi=_PNG_DPI, facecolor=LIGHT["paper"])
        figure.savefig(folder / f"{name}.pdf", metadata=undated)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    (folder / f"{name}.svg").write_text(text.getvalue(), encoding="utf-8")
    return text.getvalue()


def inline(text: str, *, name: str, title: str, description: str) -> str:
    """An SVG to stand in a page: themed, described for those who cannot see it, unique ids.

    Args:
        text: what `save` returned.
        name: put before every id, since several drawings share the page.
        title: what it shows, in a few words.
        description: what is to be seen in it.
    """
    root = ElementTree.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set("href" if key == _HREF else key, _themed(key, value, name))
    for old in root.findall("metadata"):
        root.remove(old)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib.update(
        {"role": "img", "aria-labelledby": f"{name}-title {name}-desc", "class": "figure"}
    )
    for tag, value in (("desc", description), ("title", title)):
        label = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        label.text = value
        root.insert(0, label)
    return ElementTree.tostring(root, encoding="unicode")


def _themed(key: str, value: str, name: str) -> str:
    """One attribute, with the page's colours and font, and ids of its own."""
    if key == "id":
        return f"{name}-{value}"
    if key in (_HREF, "href"):  # else an image inside the drawing
        return f"#{name}-{value[1:]}" if value.startswith("#") else value
    value = value.replace("url(#", f"url(#{name}-")
    if key in ("style", "fill", "stroke"):
        for colour, variable in _COLOURS.items():
            value = value.replace(colour, variable)
        value = _FONT.sub(r"font-size: \1", value)
    return value

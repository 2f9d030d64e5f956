"""The palette: legible in both themes, and matplotlib left as it was."""

from __future__ import annotations

import matplotlib
import pytest

from featdistill.report import style


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [style.LIGHT, style.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("role", ["ink", "muted", *style.ROLES])
def test_text_is_legible(palette: dict[str, str], role: str) -> None:
    one, two = sorted((_luminance(palette[role]), _luminance(palette["paper"])))
    assert (two + 0.05) / (one + 0.05) >= 4.5


def test_colours_can_be_told_apart_by_value() -> None:
    """The SVG is recoloured by value, so two roles must not share one."""
    assert len(set(style.LIGHT.values())) == len(style.LIGHT) == len(style.DARK)


def test_house_leaves_no_trace() -> None:
    before = dict(matplotlib.rcParams)
    with style.house():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert dict(matplotlib.rcParams) == before


def test_unknown_rows_have_a_look_too() -> None:
    assert style.colour("teacher") == style.LIGHT["teacher"]
    assert style.colour("ema") == style.LIGHT["other"]
    assert style.marker("ema") not in {style.marker(n) for n in ("teacher", "student", "scratch")}

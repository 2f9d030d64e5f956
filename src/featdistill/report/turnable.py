"""Landscapes that the mouse turns: plotly, if it is installed (the extra `interactive`)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from featdistill.report import plotstyle
from featdistill.report.feature_figures import names
from featdistill.report.landscape_figures import drawn, heights

if TYPE_CHECKING:
    from markupsafe import Markup

_GREY = "#8a9097"  # readable on light and on dark paper; a drawing on a canvas cannot follow both
_HEIGHT = 380  # pixels


def available() -> bool:
    """Whether plotly is installed."""
    return find_spec("plotly") is not None


def surfaces(
    results: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, before: int
) -> list[tuple[str, Markup]]:
    """(model's name, HTML) of each model's first plane, all on one scale.

    Args:
        before: such drawings earlier on the page; the very first brings plotly itself (5 MB).
    """
    import plotly.graph_objects as go
    import plotly.io
    from markupsafe import Markup

    planes, label = heights(results, arrays)
    steps = drawn(results, arrays).tolist()
    scale = plotstyle.limits(planes, margin=0)
    found = []
    for place, (name, plane) in enumerate(zip(names(results), planes, strict=True)):
        surface = go.Surface(
            # plain lists: plotly would pack arrays in a form that its script must decode
            x=steps,
            y=steps,
            z=[[v if np.isfinite(v) else None for v in row] for row in plane.tolist()],
            cmin=scale[0],
            cmax=scale[1],
            colorscale="Cividis",
            showscale=False,
        )
        axis = {
            "color": _GREY,
            "gridcolor": _GREY,
            "title": {"text": ""},
            "showbackground": False,
            "nticks": 5,
        }
        figure = go.Figure(
            surface,
            {
                "scene": {
                    "aspectmode": "cube",  # else each box takes its own model's shape
                    "camera": {"eye": {"x": 1.5, "y": -1.5, "z": 0.9}},
                    "xaxis": axis,
                    "yaxis": axis,
                    "zaxis": {**axis, "title": {"text": label}, "range": list(scale)},
                },
                "height": _HEIGHT,
                "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
                "paper_bgcolor": "rgba(0,0,0,0)",
                "font": {"color": _GREY},
            },
        )
        text = plotly.io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=before + place == 0,
            div_id=f"turn-{before + place}",  # else a random one, and no two pages the same
            config={"displayModeBar": False, "responsive": True, "scrollZoom": False},
        )
        # safe: plotly escapes what it writes into its script, and no name is in it
        found.append((name, Markup(text)))
    return found

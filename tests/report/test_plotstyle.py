"""Looks, common scales, and files that are the same each time."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from featdistill.report import plotstyle, style, svg


def test_models_differ_in_colour_and_shape() -> None:
    found = plotstyle.looks(["a", "student", "b", "c", "teacher", "d"])
    assert found["teacher"].colour == style.colour("teacher")
    assert found["student"].colour == style.colour("student")
    assert len({look.colour for look in found.values()}) == 6
    assert len({look.marker for look in found.values()}) == 6


def test_a_model_keeps_its_look_beside_fewer_others() -> None:
    assert plotstyle.looks(["teacher"])["teacher"] == plotstyle.looks(["x", "teacher"])["teacher"]
    assert len(plotstyle.looks([f"m{i}" for i in range(20)])) == 20


@pytest.mark.parametrize(
    ("arrays", "options", "expected"),
    [
        ([[0.0, 10.0], [5.0, 20.0]], {}, (-1.0, 21.0)),
        ([[0.0, 10.0]], {"floor": 0.0, "ceiling": 10.0}, (0.0, 10.0)),
        ([[1.0, np.nan, np.inf, 3.0]], {"margin": 0.0}, (1.0, 3.0)),
        ([], {}, (0.0, 1.0)),
        ([[np.nan]], {"floor": 2.0}, (2.0, 3.0)),
        ([[4.0, 4.0]], {}, (3.8, 4.2)),
    ],
)
def test_limits(
    arrays: list[list[float]], options: dict[str, float], expected: tuple[float, float]
) -> None:
    assert plotstyle.limits(arrays, **options) == pytest.approx(expected)


def _drawing() -> str:
    with style.house():
        figure, axes = plotstyle.panels(1, 2, height=2.0)
        values = np.arange(12).reshape(3, 4)
        for one in axes.flat:
            image = plotstyle.picture(one, values, scale=(0, 11), cmap=style.SEQUENTIAL)
            plotstyle.title(one, "a\nb $x$")
        plotstyle.colour_bar(figure, image, axes, "mass")
        return svg.save(figure, Path(), "drawing")


def test_files_are_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        _drawing()
        found.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert set(found[0]) == {"drawing.png", "drawing.svg", "drawing.pdf"}
    assert found[0] == found[1]


def test_a_picture_survives_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images inside a drawing keep their data; what is referred to by id is renamed."""
    monkeypatch.chdir(tmp_path)
    text = svg.inline(_drawing(), name="n", title="t", description="d")
    images = [e.get("href") for e in ElementTree.parse(io.StringIO(text)).iter("image")]
    assert len(images) >= 2
    assert all(href is not None and href.startswith("data:image/png;base64,") for href in images)


def test_layers_are_counted_from_one() -> None:
    with style.house():
        _, axes = plotstyle.panels(1, 1, height=2.0)
        plotstyle.layer_ticks(axes[0, 0], 12)
        assert [t.get_text() for t in axes[0, 0].get_xticklabels()] == [
            "1",
            "3",
            "5",
            "7",
            "9",
            "11",
        ]

"""Figures of attention, landscape and curvature records: true to them, and on one scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featdistill.core.records import write_record
from featdistill.report import attention_figures, landscape_figures, style, turnable
from featdistill.report.page import write_report
from tests.report.test_report_page import Page

NAMES = ("teacher", "student")
DATA = {"name": "/data/photographs", "images": 64}


def _models(**extra: Any) -> list[dict[str, Any]]:
    return [{"name": name, "spec": f"runs/{name}", "weights": "hub", **extra} for name in NAMES]


def attention(depth: int = 6, heads: int = 4) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Made results: distances rise with the head, similarity with the layer."""
    layers = [
        {
            "distance": [20.0 + 10 * h + 5 * j for h in range(heads)],
            "distance_error": [0.5] * heads,
            "similarity": None if heads == 1 else 0.1 * j,
            "similarity_error": None if heads == 1 else 0.01,
            "column_r2": 0.8 - 0.1 * j,
            "relative_r2": 0.1 * j,
        }
        for j in range(depth)
    ]
    results = {"data": DATA, "unit": "pixels", "models": _models(layers=layers)}
    grid = np.stack(np.meshgrid(np.arange(7), np.arange(7), indexing="ij"), -1).reshape(-1, 2)
    far = ((grid[:, None] - grid[None]) ** 2).sum(-1)
    arrays = {}
    for i in range(len(NAMES)):
        for j in range(depth):
            map_ = np.exp(-far / (1 + (1 + i) * (depth - j)))
            arrays[f"{i}.map.{j}"] = map_ / map_.sum(1, keepdims=True)
    return results, arrays


def landscape(steepness: float = 1.0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Made results: two bowls."""
    steps = np.linspace(-1, 1, 21)
    bowl = steps[:, None] ** 2 + 0.5 * steps[None] ** 2
    arrays = {"coordinates": steps}
    for i in range(len(NAMES)):
        arrays[f"{i}.loss"] = (0.2 + steepness * (3 - i) * bowl)[None]
    results = {"data": DATA, "objective": "Cross-entropy, nats", "models": _models()}
    return results, arrays


def curvature() -> dict[str, Any]:
    models = _models(residuals=[0.1] * 3, trace=None, trace_error=None)
    for model, top in zip(models, (40.0, 25.0), strict=True):
        model["eigenvalues"] = [top, top / 2, -1.0]
    return {"data": DATA, "objective": "Cross-entropy, nats", "models": models}


def test_dots_are_the_heads() -> None:
    results, _ = attention()
    with style.house():
        figure = attention_figures.distances(results)
    for axis in figure.axes:
        drawn = np.concatenate([np.asarray(c.get_offsets())[:, 1] for c in axis.collections])
        assert sorted(drawn) == sorted(
            d for m in [results["models"][0]] for x in m["layers"] for d in x["distance"]
        )
    assert len({axis.get_ylim() for axis in figure.axes}) == 1


def test_maps_share_a_scale() -> None:
    results, arrays = attention()
    with style.house():
        figure = attention_figures.maps(results, arrays)
    assert figure is not None
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(images) == 10
    assert len({image.get_clim() for image in images}) == 1
    np.testing.assert_allclose(images[0].get_array(), 49 * arrays["0.map.0"])
    low, high = images[0].get_clim()
    shown = [np.asarray(image.get_array()) for image in images]
    assert low == pytest.approx(min(np.quantile(m, 0.01) for m in shown), rel=1e-4)
    assert high == pytest.approx(max(np.quantile(m, 0.99) for m in shown), rel=1e-4)


def test_uniform_maps_look_uniform() -> None:
    """And not like their rounding, blown up."""
    results, arrays = attention()
    noise = np.random.default_rng(0)
    flat = {k: (1 + 1e-6 * noise.standard_normal(v.shape)) / 49 for k, v in arrays.items()}
    with style.house():
        figure = attention_figures.maps(results, flat)
    assert figure is not None
    low, high = figure.axes[0].images[0].get_clim()
    assert low == 0
    assert high == pytest.approx(1.05, rel=1e-4)


@pytest.mark.parametrize(("steepness", "label"), [(1.0, "loss"), (100.0, "log10 of the loss")])
def test_landscapes_share_a_scale(steepness: float, label: str) -> None:
    results, arrays = landscape(steepness)
    planes, said = landscape_figures.heights(results, arrays)
    assert said == label
    back = planes[1] if label == "loss" else 10 ** planes[1]
    np.testing.assert_allclose(back, arrays["1.loss"][0])
    with style.house():
        figure = landscape_figures.surfaces(results, arrays)
    assert len({axis.get_zlim() for axis in figure.axes}) == 1  # type: ignore[attr-defined]


def flatness(results: dict[str, Any]) -> dict[str, Any]:
    """Made scalars."""
    for i, model in enumerate(results["models"]):
        model |= {"loss": 0.2, "accuracy": 0.9}
        model["rise"] = [
            {"radius": r, "mean": r / (1 + i), "error": 0.01, "lowest": 0.0, "highest": 2 * r}
            for r in (0.5, 1.0)
        ]
        model["low_area"] = [{"rise": 0.1, "mean": 0.25, "error": None}]
    return results


def test_an_unfinished_landscape_is_drawn_as_far_as_it_goes() -> None:
    results, arrays = landscape()
    for i in range(2):
        whole = arrays[f"{i}.loss"]
        arrays[f"{i}.loss"] = np.full_like(whole, np.nan)
        arrays[f"{i}.loss"][:, ::5, ::5] = whole[:, ::5, ::5]
    arrays["0.loss"][0, 1, :7] = 3.0  # more of one of them changes nothing
    steps = landscape_figures.drawn(results, arrays)
    np.testing.assert_allclose(steps, [-1, -0.5, 0, 0.5, 1])
    planes, _ = landscape_figures.heights(results, arrays)
    assert [p.shape for p in planes] == [(5, 5), (5, 5)]
    arrays["1.loss"][0, 10, 10] = np.nan
    assert landscape_figures.drawn(results, arrays).size == 0


def test_what_is_infinite_is_a_hole_and_not_a_scale() -> None:
    results, arrays = landscape()
    arrays["0.loss"][0, 0, 0] = np.inf
    assert len(landscape_figures.drawn(results, arrays)) == 21
    planes, label = landscape_figures.heights(results, arrays)
    assert np.isnan(planes[0][0, 0])
    assert label == "loss"
    with style.house():
        figure = landscape_figures.surfaces(results, arrays)
        landscape_figures.contours(results, arrays)
    assert np.isfinite([axis.get_zlim() for axis in figure.axes]).all()  # type: ignore[attr-defined]


def test_accuracies_share_a_scale() -> None:
    results, arrays = landscape()
    for i in range(2):
        rise = arrays[f"{i}.loss"] - 0.2
        arrays[f"{i}.accuracy"] = 1 - 0.4 * rise / rise.max() / (1 + i)
    with style.house():
        figure = landscape_figures.contours(results, arrays, "accuracy")
    scales = {tuple(s.levels) for a in figure.axes[:2] for s in a.collections}  # type: ignore[attr-defined]
    [levels] = scales
    assert (levels[0], levels[-1]) == (pytest.approx(0.6), pytest.approx(1))


def test_rises_are_the_records() -> None:
    results, _ = landscape()
    assert landscape_figures.rises(results) is None
    with style.house():
        figure = landscape_figures.rises(flatness(results))
    assert figure is not None
    drawn = [line.get_ydata() for line in figure.axes[0].lines[:2]]
    np.testing.assert_allclose(drawn, [[0.5, 1.0], [0.25, 0.5]])


def test_lines_have_their_mean_and_their_band() -> None:
    results, arrays = landscape()
    steps = arrays["coordinates"]
    lines = np.stack([steps**2, 3 * steps**2])
    arrays |= {f"{i}.loss": (1 + i) * lines for i in range(2)}
    results = {**results, "kind": "line"}
    with style.house():
        figure = landscape_figures.profiles(results, arrays)
    [axis] = figure.axes
    np.testing.assert_allclose(axis.lines[0].get_ydata(), 2 * steps**2)
    np.testing.assert_allclose(axis.lines[1].get_ydata(), 4 * steps**2)


def test_scalars_are_a_table_and_a_sentence(tmp_path: Path) -> None:
    results, arrays = landscape()
    write_record(
        tmp_path / "landscape.json",
        "landscape",
        config={},
        results={**flatness(results), "points": {"done": 914, "of": 914}},
        arrays=arrays,
    )
    page = Page(write_report(tmp_path))
    assert "Mean rise of the loss: teacher 1 at radius 1, student 0.5 at radius 1." in page.text
    for said in ("rise at 0.5", "area below +0.1", "90.0%", "0.25 ± 0.01", "Not finished"):
        assert (said in page.text) == (said != "Not finished"), said


def test_bars_are_the_eigenvalues() -> None:
    with style.house():
        (axis,) = landscape_figures.eigenvalues(curvature()).axes
    heights = [patch.get_height() for patch in axis.patches]  # type: ignore[attr-defined]
    assert heights == [40, 20, -1, 25, 12.5, -1]


def test_one_head_and_no_maps(tmp_path: Path) -> None:
    results, _ = attention(depth=1, heads=1)
    write_record(
        tmp_path / "diagnose-attention.json", "diagnose-attention", config={}, results=results
    )
    page = Page(write_report(tmp_path))
    assert "similarity unknown" in page.text or "teacher unknown" in page.text
    assert len(page.all("figure")) == 2


def write_all(folder: Path) -> Path:
    """A folder with every diagnosis of these."""
    for kind, (results, arrays) in {
        "diagnose-attention": attention(),
        "landscape": landscape(),
        "curvature": (curvature(), {}),
    }.items():
        write_record(folder / f"{kind}.json", kind, config={}, results=results, arrays=arrays)
    return folder


def test_without_plotly_there_is_no_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnable, "available", lambda: False)
    page = Page(write_report(write_all(tmp_path)))
    assert not page.all("script")
    assert "script-src" not in page.source
    assert "The landscape as a surface" in page.text
    assert len(page.source) < 2_000_000


def test_with_plotly_it_is_in_the_page_once(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    write_all(tmp_path / "one")
    write_all(tmp_path / "two")
    for kind in ("diagnose-attention", "curvature"):
        (tmp_path / "two" / f"{kind}.json").unlink()
    file = write_report(tmp_path / "one", tmp_path / "two")
    page = Page(file)
    assert not any("src" in script for script in page.all("script"))
    assert 4_000_000 < len(page.source) < 9_000_000
    ids = [a["id"] for _, a in page.elements if (a.get("id") or "").startswith("turn-")]
    assert ids == ["turn-0", "turn-1", "turn-2", "turn-3"]
    assert (file.parent / "landscape-surface.pdf").is_file()
    first = file.read_bytes()
    assert write_report(tmp_path / "one", tmp_path / "two").read_bytes() == first


def test_landscape_names_cannot_leave_their_place(tmp_path: Path) -> None:
    results, arrays = landscape()
    results["models"][0]["name"] = "</script><img src=x onerror=alert(1)>"
    results["objective"] = "<b>loss</b>"
    write_record(
        tmp_path / "landscape.json", "landscape", config={}, results=results, arrays=arrays
    )
    page = Page(write_report(tmp_path))
    assert not page.all("img")
    assert not page.all("b")


def test_all_of_them_on_one_page(tmp_path: Path) -> None:
    page = Page(write_report(write_all(tmp_path)))
    for said in (
        "Attention, head by head",
        "Loss landscape",
        "Curvature",
        "64 images of photographs",
        "At the last layer: teacher mean distance 60, student mean distance 60.",
        "teacher largest 40, student largest 25.",
    ):
        assert said in page.text, said
    assert len(page.all("figure")) == (7 if turnable.available() else 6)

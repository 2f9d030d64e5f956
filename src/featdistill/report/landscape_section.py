"""A landscape as a section of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from featdistill.report import landscape_figures, turnable
from featdistill.report.feature_figures import names, short
from featdistill.report.folders import Found
from featdistill.report.gallery import Gallery, Section, Shown, Table
from featdistill.report.words import images_of, listed

Results = Mapping[str, Any]
_HOW = {
    "plane": "The wider and flatter the valley around the middle, the less a change of the weights "
    "hurts.",
    "line": "The flatter the curve around the middle, the less a change of the weights hurts; the "
    "band spans all random directions.",
    "between": "Without a hill between two models, they lie in one valley; a hill means that they "
    "found different ones.",
}


def landscape(gallery: Gallery, found: Found) -> Iterator[Section]:
    """Surfaces, contours, curves and scalars of a landscape's record, finished or not."""
    results, arrays = found.results, found.arrays
    kind = landscape_figures.kind_of(results)
    table = None if kind == "between" else _scalars(results)
    shown: list[Shown] = []
    if landscape_figures.drawn(results, arrays).size:
        show = _planes if kind == "plane" else _lines
        shown = [*show(gallery, results, arrays), *_rises(gallery, results)]
    yield Section(
        "Between two models" if kind == "between" else "Loss landscape",
        " ".join(filter(None, (_HOW[kind], _verdict(results), _unfinished(results)))),
        tuple(shown),
        table,
    )


def _planes(
    gallery: Gallery, results: Results, arrays: Mapping[str, np.ndarray]
) -> Iterator[Shown]:
    caption = (
        f"{results['objective']}, {images_of(results)}, along two Gaussian directions scaled to "
        "each filter's norm (so steps have no unit), the same raw directions and one scale for all "
        "models; the first plane."
    )
    surfaces = landscape_figures.surfaces(results, arrays)
    told = f"Landscapes of {', '.join(names(results))}."
    if turnable.available():
        gallery.keep(surfaces, "landscape-surface")
        for name, drawing in turnable.surfaces(results, arrays, before=gallery.scripted):
            yield gallery.add_scripted(drawing, "turnable", f"{name}: turn it", caption)
    else:
        title = "The landscape as a surface"
        yield gallery.add(surfaces, "landscape-surface", title, caption, told)
    above = landscape_figures.contours(results, arrays)
    yield gallery.add(above, "landscape-contours", "The landscape from above", caption, told)
    if "0.accuracy" in arrays:
        yield gallery.add(
            landscape_figures.contours(results, arrays, "accuracy"),
            "landscape-accuracy",
            "The accuracy from above",
            f"Share of {images_of(results)} that is named right, in the same plane, one scale for "
            "all models.",
            f"Accuracies of {', '.join(names(results))} around their weights.",
        )


def _lines(gallery: Gallery, results: Results, arrays: Mapping[str, np.ndarray]) -> Iterator[Shown]:
    between = landscape_figures.kind_of(results) == "between"
    count = len(arrays["0.loss"])
    along = (
        "on the straight line from one model to the other, and half as far beyond both"
        if between
        else f"along {count} Gaussian directions scaled to each filter's norm, the same raw "
        "directions for all models; lines: mean, bands: lowest to highest"
    )
    called = listed(names(results))
    yield gallery.add(
        landscape_figures.profiles(results, arrays),
        "landscape-between" if between else "landscape-lines",
        f"From {names(results)[0]} to {names(results)[1]}" if between else "Along random lines",
        f"{results['objective']}, {images_of(results)}, {along}.",
        f"The loss between {called}." if between else f"The loss around {called}.",
    )


def _rises(gallery: Gallery, results: Results) -> Iterator[Shown]:
    figure = landscape_figures.rises(results)
    if figure is None:
        return
    around = "8 points of a circle in each plane"
    if landscape_figures.kind_of(results) == "line":
        around = "both sides of each line"
    yield gallery.add(
        figure,
        "landscape-rise",
        "How steeply it rises",
        f"{results['objective']}: its mean rise above the middle at a radius, measured at "
        f"{around}; thin lines: lowest to highest; bands: one standard error, where there are "
        "several.",
        _rise_words(results),
    )


def _rise_words(results: Results) -> str:
    said = [
        f"{model['name']} {model['rise'][-1]['mean']:.3g} at radius {model['rise'][-1]['radius']:g}"
        for model in results["models"]
        if model.get("rise") and model["rise"][-1]["mean"] is not None
    ]
    return f"Mean rise of the loss: {', '.join(said) or 'unknown'}."


def _verdict(results: Results) -> str:
    """The scalars in a sentence."""
    if landscape_figures.kind_of(results) != "between":
        return _rise_words(results) if any(m.get("rise") for m in results["models"]) else ""
    height = results.get("barrier")
    if height is None:
        return ""
    return f"The loss rises {max(height, 0):.3g} above the straight line between its two ends."


def _unfinished(results: Results) -> str:
    points = results.get("points")
    if points is None or points["done"] >= points["of"]:
        return ""
    return f"Not finished: {points['done']:,} of {points['of']:,} points."


def _scalars(results: Results) -> Table | None:
    """Models as columns: the loss in the middle, rises and areas."""
    models = results["models"]
    if not all(model.get("rise") for model in models):
        return None
    rows = [("loss", *(_number(m["loss"]) for m in models))]
    if all(m.get("accuracy") is not None for m in models):
        rows.append(("accuracy", *(f"{m['accuracy']:.1%}" for m in models)))
    for key, at, label in (("rise", "radius", "rise at "), ("low_area", "rise", "area below +")):
        for together in zip(*(m.get(key) or [] for m in models), strict=True):
            cells = (_number(one["mean"], one["error"]) for one in together)
            rows.append((f"{label}{together[0][at]:g}", *cells))
    caption = (
        f"{results['objective']}. Rise: mean of the loss at a radius (in norms of the weights) "
        "less the loss in the middle. Area: share of the landscape (0 to 1) whose loss is less "
        "than so much above the middle's. ±: standard error over planes or lines, where there are "
        "several."
    )
    return Table(tuple(short(name) for name in names(results)), tuple(rows), caption)


def _number(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.3g}" + ("" if error is None else f" ± {error:.1g}")

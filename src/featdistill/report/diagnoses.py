"""Diagnoses as sections of the page: one plain sentence on how to read them, then the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from featdistill.core.errors import RunError
from featdistill.report import attention_figures, feature_figures, landscape_figures
from featdistill.report.folders import Found
from featdistill.report.gallery import Gallery, Section
from featdistill.report.landscape_section import landscape
from featdistill.report.probes import probe
from featdistill.report.segmentation_section import segmentation
from featdistill.report.words import images_of

_READ: dict[str, Callable[[Gallery, Found], Iterator[Section]]] = {}


def sections(gallery: Gallery, found: Found) -> list[Section]:
    """A diagnosis's sections.

    Raises:
        RunError: the record lacks what a figure reads.
    """
    try:
        return list(_READ[found.kind](gallery, found))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RunError(
            f"'{found.file}' is not complete ({type(error).__name__}: {error})",
            fix=f"run `featdistill {found.kind.replace('-', ' ')}` again",
        ) from None


def _features(gallery: Gallery, found: Found) -> Iterator[Section]:
    results, arrays = found.results, found.arrays
    images = images_of(results)
    names = feature_figures.names(results)
    last = {model["name"]: model["layers"][-1] for model in results["models"]}
    shown = [
        gallery.add(
            feature_figures.cka(results, arrays),
            "cka",
            "Which layers say the same",
            f"Linear CKA (no unit) of the layers' mean tokens, {images}, unbiased, in blocks of "
            f"{results['cka']['block']}. The scale is 0 to 1 for every pair.",
            f"CKA between all layers of {', '.join(names)}.",
        ),
        gallery.add(
            feature_figures.spectrum(results),
            "spectrum",
            "What is kept of fine detail",
            f"Log amplitude of the feature maps' Fourier transform relative to its constant part, "
            f"nats, mean over channels and {images}, along the diagonal; bands: standard error.",
            _per_model(last, lambda layer: layer["relative_log_amplitude"][-1], "{:+.2f} nats"),
        ),
        gallery.add(
            feature_figures.curves(results),
            "feature-curves",
            "How rich the features are",
            f"Effective rank of the mean tokens (no unit; at most {_most(results)}), variance, "
            f"share of tokens whose norm is beyond 3 times their image's median, largest norm by "
            f"median; before any norm, {images}. Bands: one standard error over images.",
            _per_model(last, lambda layer: layer["rank"], "effective rank {:.1f}"),
        ),
    ]
    drawn = feature_figures.pictures(results, arrays)
    if drawn is not None:
        shown.append(
            gallery.add(
                drawn,
                "pictures",
                "What it sees",
                "First three principal components of the last layer's patch tokens as red, green "
                "and blue, shared by the images of a model; colours of two models cannot be "
                "compared, shapes can.",
                f"Images, and the patch features that {', '.join(names)} give them.",
            )
        )
    yield Section(
        "Features, layer by layer",
        "Bright squares of CKA are layers that order images alike; a curve that falls loses that "
        "quality with depth. They say how the models differ, not which is better.",
        tuple(shown),
    )


def _attention(gallery: Gallery, found: Found) -> Iterator[Section]:
    results, arrays = found.results, found.arrays
    images, names = images_of(results), feature_figures.names(results)
    last = {model["name"]: model["layers"][-1] for model in results["models"]}
    shown = [
        gallery.add(
            attention_figures.distances(results),
            "attention-distance",
            "How far heads look",
            f"Mean attention distance of each head ({attention_figures.UNITS[results['unit']]}), a "
            f"dot for each head, the line their mean; {images}. Prefix tokens are left out and "
            "rows divided by their sum; one scale for all models.",
            _per_model(last, lambda layer: fmean(layer["distance"]), "mean distance {:.3g}"),
        ),
        gallery.add(
            attention_figures.similarity(results),
            "head-similarity",
            "How alike heads are, and what pattern they follow",
            f"Mean cosine of two heads' attention rows; share of the layer's mean map that depends "
            f"on the offset alone, or on the key alone (R²); no unit, {images}. Bands: standard "
            "error over images.",
            _per_model(last, lambda layer: layer["similarity"], "similarity {:.3f}"),
        ),
    ]
    wall = attention_figures.maps(results, arrays)
    if wall is not None:
        shown.append(
            gallery.add(
                wall,
                "mean-maps",
                "Mean attention maps",
                "Attention from each token (row) to each token (column), mean over heads and "
                f"{images}, as multiples of uniform attention; one scale, cut at the first "
                "and last percentile. A bright diagonal: tokens look near themselves; bright "
                "columns: all look at the same ones.",
                f"Mean maps of {', '.join(names)}.",
            )
        )
    yield Section(
        "Attention, head by head",
        "Heads that spread over many distances and differ from each other share the work; a layer "
        "whose dots lie together, with a similarity near 1, does the same thing in every head.",
        tuple(shown),
    )


def _curvature(gallery: Gallery, found: Found) -> Iterator[Section]:
    results = found.results
    top = {model["name"]: model for model in results["models"]}
    shown = gallery.add(
        landscape_figures.eigenvalues(results),
        "eigenvalues",
        "The steepest directions",
        f"Largest eigenvalues of the Hessian of {results['objective']} (loss for each squared unit "
        f"of the weights), {images_of(results)}; whiskers: residuals of the eigenvectors."
        + _traces(results["models"]),
        _per_model(top, lambda model: model["eigenvalues"][0], "largest {:.4g}", ""),
    )
    yield Section(
        "Curvature",
        "Large eigenvalues are directions in which the loss bends sharply; smaller is flatter.",
        (shown,),
    )


def _traces(models: Sequence[Mapping[str, Any]]) -> str:
    """The sum of all eigenvalues, where it was estimated."""
    said = [
        f"{m['name']} {m['trace']:.4g} \N{PLUS-MINUS SIGN} {m['trace_error']:.2g}"
        for m in models
        if m["trace"] is not None and m["trace_error"] is not None
    ]
    return (
        f" Sum of all eigenvalues (trace, with standard error): {', '.join(said)}." if said else ""
    )


def _most(results: Mapping[str, Any]) -> int:
    return max(layer["rank_limit"] for m in results["models"] for layer in m["layers"])


def _per_model(
    last: Mapping[str, Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float | None],
    how: str,
    where: str = "At the last layer: ",
) -> str:
    """One value of each model, for those who cannot see the figure."""
    said = [
        f"{name} {'unknown' if (v := value(layer)) is None else how.format(v)}"
        for name, layer in last.items()
    ]
    return f"{where}{', '.join(said)}."


_READ |= {
    "probe": probe,
    "diagnose-attention": _attention,
    "diagnose-features": _features,
    "landscape": landscape,
    "curvature": _curvature,
    "segment": segmentation,
}

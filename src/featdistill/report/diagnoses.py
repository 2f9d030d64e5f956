"""Diagnoses as sections of the page: one plain sentence on how to read them, then the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from featdistill.core.errors import RunError
from featdistill.report import feature_figures
from featdistill.report.folders import Found
from featdistill.report.gallery import Gallery, Section

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
    images = f"{results['data']['images']:,} images of {results['data']['name']}"
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


def _most(results: Mapping[str, Any]) -> int:
    return max(layer["rank_limit"] for m in results["models"] for layer in m["layers"])


def _per_model(
    last: Mapping[str, Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float | None],
    how: str,
) -> str:
    """The last layer's value of each model, for those who cannot see the figure."""
    said = [
        f"{name} {'unknown' if (v := value(layer)) is None else how.format(v)}"
        for name, layer in last.items()
    ]
    return f"At the last layer: {', '.join(said)}."


_READ["diagnose-features"] = _features

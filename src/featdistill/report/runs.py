"""Runs on the page: what came of each, its curves, and what it was run with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featdistill.report import figures, probes, tables
from featdistill.report.comparison import Making
from featdistill.report.folders import Found, Material
from featdistill.report.gallery import Gallery, Shown
from featdistill.report.words import environment_facts, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Fact = tuple[str, str, bool]
_TITLES = {
    "pretrain": "Pre-training",
    "distill": "Distillation",
    "finetune": "Fine-tuning",
    "segment": "Segmentation",
    "probe": "Linear probe",
    "diagnose-attention": "Attention",
    "diagnose-features": "Features",
    "landscape": "Landscape",
    "curvature": "Curvature",
}
# whose colour a run's curves have
_ROLES = {"pretrain": "teacher", "distill": "student", "finetune": "other", "segment": "other"}
_CAPTIONS = {
    "pretrain": "Contrastive loss (nats), and the share of views whose own partner is the nearest, "
    "on training views; no labels.",
    "distill": "Loss against the teacher's features (no unit), and the cosine of prediction and "
    "target, on training views; where it was measured, the same on held-out images.",
    "finetune": "Cross-entropy on training views (nats), and the share of held-out images that are "
    "classified rightly.",
    "segment": "Cross-entropy of the main head on training crops (nats), and the mean IoU on "
    "held-out images at their own size.",
}


@dataclass(frozen=True)
class Account:
    """What one record was made with."""

    title: str
    facts: tuple[Fact, ...]
    config: str


def title(found: Found) -> str:
    """`Distillation: distilled`."""
    return f"{_TITLES[found.kind]}: {found.name}"


def verdict(material: Material) -> str:
    """What can be said first where there is no comparison; never more than was measured."""
    scored = [run for run in material.runs if isinstance(run.results.get("top1"), float)]
    if len(scored) > 1:
        return _ranked(scored)
    segmented = [run for run in material.runs if run.kind == "segment"]
    if segmented and not scored:
        return _segmented(segmented)
    if scored:
        (run,) = scored
        return (
            f"{run.name} classifies {tables.percent(run.results['top1'])} of "
            f"{_held(run):,} held-out images rightly; whether that is better than another model, "
            "a comparison can say (featdistill compare)."
        )
    trained = [run for run in material.runs if run.kind == "distill"] or list(material.runs)
    if trained:
        what = listed([f"{_TITLES[run.kind].lower()} {run.name}" for run in trained])
        return (
            f"{what[0].upper()}{what[1:]} went to the end; whether the model got better, "
            "a comparison can say (featdistill compare)."
        )
    probed = [one for one in material.diagnoses if one.kind == "probe"]
    if probed:
        return probes.verdict(probed)
    models = dict.fromkeys(
        model["name"] for one in material.diagnoses for model in one.results.get("models", ())
    )
    return f"How {listed(list(models))} look inside: this says how, not which is better."


def _ranked(scored: Sequence[Found]) -> str:
    """The best and the next, and whether sampling alone could explain the difference."""
    best, second = sorted(scored, key=lambda run: -run.results["top1"])[:2]
    one, two = best.results["top1"], second.results["top1"]
    said = (
        f"{best.name} scores {tables.percent(one)} top-1, {second.name} {tables.percent(two)}: "
        f"{100 * (one - two):.1f} points apart"
    )
    images = [_held(best), _held(second)]
    if min(images) == 0:
        return f"{said}, from one run each."
    error = sum(tables.sampling_error(p, n) ** 2 for p, n in zip((one, two), images, strict=True))
    sure = "more" if one - two > 2 * error**0.5 else "not more"
    return (
        f"{said}, {sure} than two standard errors of {images[0]:,} test images "
        f"({200 * error**0.5:.1f} points). One run each: how far seeds spread is not known."
    )


def _segmented(runs: Sequence[Found]) -> str:
    """The best segmenter and the next, and whether the images drawn could explain it."""
    best, *others = sorted(runs, key=lambda run: -run.results["miou"])
    results = best.results
    said = (
        f"{best.name} segments held-out images with mIoU {tables.percent(results['miou'])}; "
        f"a guess by position alone has {tables.percent(results['prior']['miou'])}."
    )
    if not others:
        return said
    second = others[0].results
    difference = results["miou"] - second["miou"]
    error = (results["miou_error"] ** 2 + second["miou_error"] ** 2) ** 0.5
    sure = "more" if difference > 2 * error else "not more"
    return (
        f"{said} {others[0].name} has {tables.percent(second['miou'])}: {100 * difference:.1f} "
        f"points apart, {sure} than two standard errors of {results['images']:,} images "
        f"({200 * error:.1f} points). One run each: how far seeds spread is not known."
    )


def _held(run: Found) -> int:
    """Images that a fine-tuning was scored on; 0 if its record does not say."""
    for key in ("images", "held_out_images", "val_images", "test_images"):
        if isinstance(run.results.get(key), int):
            return int(run.results[key])
    return 0


def table(material: Material) -> list[tuple[str, tuple[str, ...]]]:
    """Lines (label, one cell for each run); those that at least one run has."""
    lines: dict[str, list[str]] = {}
    for place, run in enumerate(material.runs):
        for label, cell in _cells(run):
            lines.setdefault(label, [tables.NOTHING] * len(material.runs))[place] = cell
    return [(label, tuple(cells)) for label, cells in lines.items()]


def _cells(run: Found) -> list[tuple[str, str]]:
    results = run.results
    cells = [("Kind", _TITLES[run.kind])]
    scores = {"top1": "Top-1", "top5": "Top-5", "miou": "mIoU", "macc": "Mean accuracy"}
    for key, label in (*scores.items(), ("aacc", "Pixel accuracy")):
        if isinstance(results.get(key), float):
            cells.append((label, tables.percent(results[key])))
    if isinstance(results.get("prior"), dict):
        cells.append(("mIoU by position alone", tables.percent(results["prior"]["miou"])))
    if _held(run):
        cells.append(("Scored on, images", f"{_held(run):,}"))
    for label, curve in run.curves.items():
        if not label.startswith(("top-1", "mIoU")):
            cells.append((f"Last {label}", f"{curve.values[-1]:.4g}"))
    if isinstance(results.get("steps"), int):
        cells.append(("Steps", f"{results['steps']:,}"))
    if isinstance(results.get("seconds"), float | int):
        cells.append(("Time", tables.seconds(results["seconds"])))
    return cells


def curves(gallery: Gallery, material: Material) -> list[Shown]:
    """Each run's curves, of those that were logged."""
    return [_curves(gallery, run) for run in material.runs if run.curves]


def _curves(gallery: Gallery, run: Found) -> Shown:
    drawn: Figure = figures.making(Making(_ROLES[run.kind], run.kind, run.curves, run.results))
    changes = [f"{k} from {c.values[0]:.3g} to {c.values[-1]:.3g}" for k, c in run.curves.items()]
    many = any(len(c.steps) > 60 for c in run.curves.values())
    caption = f"{_CAPTIONS[run.kind]}{' Faint: as logged; strong: moving mean.' if many else ''}"
    return gallery.add(drawn, f"run-{run.kind}", title(run), caption, f"{listed(changes)}.")


def account(found: Found, config: str) -> Account:
    """What a record was made with."""
    results: Mapping[str, Any] = found.results
    facts: list[Fact] = []
    data = results.get("data")
    if isinstance(data, dict) and "images" in data:
        facts.append(("Images", f"{data['images']:,} of {data.get('name', 'unnamed data')}", False))
    models = results.get("models")
    for model in models if isinstance(models, list) else ():
        facts.append((str(model["name"]), f"{model.get('spec')} ({model.get('weights')})", False))
    return Account(title(found), (*facts, *environment_facts(found.record)), config)

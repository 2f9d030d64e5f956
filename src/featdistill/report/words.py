"""What the page says: captions, descriptions for those who cannot see the figures, and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from featdistill.report import tables
from featdistill.report.comparison import Comparison, Making
from featdistill.report.tables import of_seeds, percent, rate

_INPUTS = {"distill": "Distillation", "pretrain": "Pre-training"}
_PARTS = ("train", "val", "test")


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def images_of(results: Mapping[str, Any]) -> str:
    """`1,000 images of NAME`; of a path its end, since the whole stands further below."""
    name = str(results["data"]["name"])
    parts = Path(name).parts
    few = 2 if parts and parts[-1] in _PARTS else 1  # `digits/train`
    return f"{results['data']['images']:,} images of {'/'.join(parts[-few:]) or name}"


def _per_row(found: Comparison) -> str:
    return listed([f"{row.title} {percent(row.top1.mean, row.top1.std)}" for row in found.rows])


def _several(found: Comparison) -> bool:
    return any(row.top1.n > 1 for row in found.rows)


def accuracy(found: Comparison) -> tuple[str, str]:
    """(caption, description) of the accuracy figure."""
    runs = f"{found.data.test_images:,} test images, {of_seeds(len(found.seeds))}"
    bar = (
        "the bar below them is their mean, its whisker one standard deviation over seeds. "
        if _several(found)
        else "with one seed there is no spread to show. "
    )
    caption = (
        f"Top-1 in percent on {runs}. Each mark is one fine-tuning; thin lines join equal seeds; "
        f"{bar}The axis does not begin at zero."
    )
    return caption, f"Top-1 accuracy by row: {_per_row(found)}."


def differences(found: Comparison) -> tuple[str, str]:
    """(caption, description) of the figure of differences to the teacher."""
    shown = found.against_teacher
    parts = [
        f"{found.title(d.of)} minus {found.title(d.minus)}: {tables.difference(d)} points, "
        f"higher under {d.wins} of {of_seeds(d.n)}"
        for d in shown
    ]
    fresh = {d.of == "scratch" for d in shown}
    scales = " The panels have scales of their own." if len(fresh) > 1 else ""
    caption = (
        "Top-1 of each row minus the teacher's, percentage points, on the same images; right of "
        f"zero is better than the teacher. Large mark: mean; small ones: single seeds. "
        f"{_bars(found)}{scales}"
    )
    return caption, f"{'. '.join(parts)}."


def _bars(found: Comparison) -> str:
    """What the bars of the differences are."""
    shown = found.against_teacher
    if any(d.interval for d in shown):
        return (
            "Thick bar: 95% interval from the test images alone, for these very runs; thin: other "
            "seeds counted too."
        )
    if any(d.images_interval for d in shown):
        return "Bar: 95% interval from the test images alone; of other seeds one run tells nothing."
    return "Line: one standard deviation over seeds." if _several(found) else ""


def finetuning(found: Comparison) -> tuple[str, str]:
    """(caption, description) of the fine-tuning curves."""
    lines = "Thick: mean over seeds; thin: single seeds. " if _several(found) else "One seed. "
    caption = (
        f"Top-1 in percent on the {found.data.test_images:,} test images while fine-tuning, at "
        f"each row's chosen learning rate. {lines}The last "
        "point is the result: no step was picked by its score."
    )
    return caption, f"Accuracy against optimiser steps; it ends at {_per_row(found)}."


def sweep(found: Comparison) -> tuple[str, str]:
    """(caption, description) of the learning-rate sweep."""
    caption = (
        "Top-1 in percent on a held-out part of the training labels, one run for each rate, so "
        "without a spread. The ring marks the rate that the scored runs used. "
        f"{edge_warning(found)}"
    )
    chosen = listed([f"{row.title} {rate(row.lr)}" for row in found.rows])
    return caption.strip(), f"Accuracy by learning rate; chosen: {chosen}."


def edge_warning(found: Comparison) -> str:
    """That a better learning rate may lie outside of those tried; empty where none is at an end."""
    rows = [row.title for row in found.rows if row.at_edge]
    if not rows:
        return ""
    return (
        f"{listed(rows)} chose the outermost rate tried, so a better one may lie beyond: "
        "repeat with more values for --lrs, or a larger --extend-lrs."
    )


def making(made: Making, found: Comparison) -> tuple[str, str, str]:
    """(title, caption, description) of how a model came to be."""
    title = f"{_INPUTS[made.kind]}: {found.title(made.name)}"
    first, last = ({k: c.values[i] for k, c in made.curves.items()} for i in (0, -1))
    what = {
        "distill": "Loss against the teacher's features (no unit), and the cosine of prediction "
        "and target, on training views; no labels.",
        "pretrain": "Contrastive loss (nats), and the share of views whose own partner is the "
        "nearest, on training views; no labels.",
    }[made.kind]
    faint = " Faint: as logged; strong: moving mean." if len(made.curves["loss"].steps) > 60 else ""
    changes = [f"{label} from {first[label]:.3g} to {last[label]:.3g}" for label in made.curves]
    return title, f"{what} {_size(made)}{faint}".strip(), f"{title}: {listed(changes)}."


def _size(made: Making) -> str:
    """Steps, images and time, as far as the record says."""
    results = made.results
    parts = []
    for key, unit in (("steps", "steps"), ("images_seen", "images seen")):
        if isinstance(results.get(key), int):
            parts.append(f"{results[key]:,} {unit}")
    if isinstance(results.get("seconds"), int | float):
        parts.append(tables.seconds(results["seconds"]))
    return f"{', '.join(parts)}." if parts else ""


def table(found: Comparison) -> str:
    """The caption of the table."""
    spread = "± is the standard deviation over seeds. " if _several(found) else ""
    knn = (
        "kNN classifies frozen features without any training: it says what a model knows, not how "
        "well it fine-tunes. "
        if found.shown_k is not None
        else ""
    )
    interval = "in brackets: 95% interval. " if any(d.shown for d in found.differences) else ""
    if spread and interval:
        spread = spread.replace(". ", "; ")
    return (
        f"Accuracies on {found.data.test_images:,} test images. {spread}{interval}{knn}"
        f"{_costs(found)}"
    ).strip()


def _costs(found: Comparison) -> str:
    """What the lines of costs count."""
    if not any(row.cost for row in found.rows):
        return ""
    return (
        "Images seen: how often a model was shown one, an epoch counting each again. Fine-tuning: "
        "all runs of a row, those that chose its learning rate among them."
    )


def price(found: Comparison) -> str:
    """What distilling took, in a sentence; empty where nothing was recorded of it."""
    student = found.row("student")
    if student is None or student.cost is None:
        return ""
    making = student.cost.making
    if making is None or not making.images_seen:
        return "What it took to make the student is not recorded."
    took = [f"{making.images_seen:,} images seen"]
    if making.seconds is not None:
        took.append(tables.seconds(making.seconds))
    if making.joules is not None:
        took.append(tables.energy(making.joules))
    before = student.cost.images_before
    if before is None:
        past = "; what its teacher had taken is not recorded"
    else:
        past = f", besides the {before:,} that its teacher had seen" if before else ""
    return f"The price of the student: {listed(took)}{past}."


def reading(found: Comparison) -> list[str]:
    """How to read the page: what the numbers are, and what they are not."""
    parts = [_seeds(found), _rates(found), _pairs(found), _intervals(found), _sample(found)]
    return [part for part in (*parts, _limits(found)) if part]


def _seeds(found: Comparison) -> str:
    subset = ", and which images may show their labels" if found.data.labels is not None else ""
    start = (
        "All rows were fine-tuned alike and differ in the weights they began with. A seed sets the "
        f"order of the images, their augmentation and the new classifier{subset}. "
    )
    n = max(row.top1.n for row in found.rows)
    if n == 1:
        return (
            f"{start}With a single seed the spread is unknown, and a small difference may be luck: "
            "repeat with --seeds 1,2,3."
        )
    rough = ", and from so few seeds a rough one" if n < 5 else ""
    return (
        f"{start}± is the standard deviation over {n} seeds: how far one run lies from the "
        f"next{rough}. It is not a confidence interval."
    )


def _rates(found: Comparison) -> str:
    if not any(row.sweep for row in found.rows):
        return (
            "All rows used one learning rate, which was not tuned; a row that wants another is at "
            "a disadvantage. Try several with --lrs 0.25,1,4."
        )
    return (
        "Each row chose its learning rate by itself, on a held-out part of the training labels; "
        f"the test images took no part in it. {edge_warning(found)}"
    ).strip()


def _pairs(found: Comparison) -> str:
    shapes = {
        (row.model.architecture, row.model.parameters)
        for row in found.rows
        if row.name in ("teacher", "student")
    }
    other = (
        " Teacher and student also differ in architecture, so not all of a difference need come "
        "from distillation."
        if len(shapes) > 1
        else ""
    )
    return (
        "A difference pairs the runs of one seed, which saw the same labels: what they share "
        f"cancels out.{other}"
    )


def _intervals(found: Comparison) -> str:
    shown = [d for d in found.against_teacher if d.shown]
    if not shown:
        return ""
    resamples = next((f"{d.resamples:,} resamples" for d in shown if d.resamples), "resamples")
    said = (
        f"The 95% intervals are of a paired bootstrap: {resamples} of the same test images for "
        "both models"
    )
    if any(d.interval for d in shown):
        said += (
            ", to which the differences between seeds add by Student's t, since a few seeds are "
            "too few to resample. An interval with zero in it means that the two cannot be told "
            "apart by this, not that they are equal"
        )
    else:
        said += ". With a single seed they say nothing of other seeds"
    many = (
        f". Of {len(shown)} such intervals, about one in twenty misses the truth by chance"
        if len(shown) > 2
        else ""
    )
    return f"{said}{many}."


def _sample(found: Comparison) -> str:
    images, best = found.data.test_images, max(row.top1.mean for row in found.rows)
    error = tables.sampling_error(best, images)
    return (
        f"The test images are a sample as well: one of {images:,} is {100 / max(images, 1):.2g} "
        f"points, and an accuracy of {percent(best)} has a standard error of {100 * error:.1f} "
        "points from that alone, which more seeds do not lessen. Differences on the same images "
        "suffer less from it."
    )


def _limits(found: Comparison) -> str:
    labels = (
        "with another number of labels"
        if found.data.labels is not None
        else "with fewer or more labels"
    )
    return (
        f"What this does not say: how it comes out on other data, {labels}, under a longer recipe, "
        f"or for another task such as segmentation. {_price_of_it(found)}"
    )


def _price_of_it(found: Comparison) -> str:
    if any(row.cost for row in found.rows):
        return (
            "The student has seen more images than its teacher by then, if without labels: the "
            "table counts them, and whether more pre-training would have done as much is not said."
        )
    return (
        "Nor does it count what distilling cost, or that the student has seen more images by then, "
        "if without labels."
    )


def facts(
    found: Comparison, record: Mapping[str, Any], made: Sequence[Making]
) -> list[tuple[str, str, bool]]:
    """What was run, as (term, value, whether it is code)."""
    data, recipe = found.data, found.recipe
    budget = "all" if data.labels is None else f"a budget of {data.labels} a class"
    if isinstance(data.labels, str) and data.labels.endswith("%"):
        budget = f"a budget of {data.labels}"
    decay = "" if recipe.layer_decay is None else f", layer decay {recipe.layer_decay:g}"
    tried = sorted({trial.lr for row in found.rows for trial in row.sweep})
    rates = listed([rate(one) for one in tried]) if tried else rate(recipe.lr)
    entries = [
        ("Data", f"{data.name}: {data.train_images:,} training images of {data.classes} classes"),
        ("Labels", f"{budget}: {data.labelled_images:,} images for each fine-tuning"),
        ("Scored on", f"{data.test_images:,} test images"),
        (
            "Recipe",
            f"{recipe.steps:,} steps ({recipe.epochs:.4g} epochs) of {recipe.batch_size} images "
            f"at {recipe.image_size} pixels{decay}",
        ),
        ("Learning rates", f"{rates}{' tried for each row' if len(tried) > 1 else ''}"),
        ("Seeds", ", ".join(map(str, found.seeds))),
        *((f"{_INPUTS[one.kind]}", _made(one, found)) for one in made),
        ("Time", _time(found)),
        ("Energy", _energy(found)),
    ]
    own = [(term, text, False) for term, text in entries if text]
    return [*own, *environment_facts(record)]


def environment_facts(record: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """What a record was made on, as (term, value, whether it is code); what is known of it."""
    environment = record.get("environment") or {}
    versions = environment.get("versions") or {}
    python = environment.get("python")
    entries = [
        ("Device", listed([str(d) for d in environment.get("devices") or []])),
        ("Threads", str(environment.get("threads") or "")),
        ("System", str(environment.get("platform") or "")),
        (
            "Versions",
            ", ".join(
                [f"python {python}"] * bool(python) + [f"{k} {v}" for k, v in versions.items()]
            ),
        ),
        ("Date", str(record.get("created") or "")),
        ("Commit", str(environment.get("commit") or "")),
        ("Command", str(environment.get("command") or "")),
    ]
    return [(term, text, term in ("Command", "Commit")) for term, text in entries if text]


def _made(made: Making, found: Comparison) -> str:
    notes = made.results.get("notes")
    said = " ".join(f"{note}." for note in notes) if isinstance(notes, list) else ""
    return f"{found.title(made.name)}: {_size(made) or 'no record was kept.'} {said}".strip()


def _energy(found: Comparison) -> str:
    costs = [row.cost.finetuning.joules for row in found.rows if row.cost]
    known = [joules for joules in costs if joules is not None]
    if not costs:
        return ""
    if len(known) < len(costs):
        return "not available: this machine does not count it, or not for every fine-tuning"
    return (
        f"{tables.energy(sum(known))} for fine-tuning, as the processor's or the GPU's own counter "
        "says; other work on it included"
    )


def _time(found: Comparison) -> str:
    runs = [run.seconds for row in found.rows for run in row.runs if run.seconds is not None]
    each = f", {tables.seconds(fmean(runs))} for each scored fine-tuning" if runs else ""
    all_fits = [row.cost.finetuning.seconds for row in found.rows if row.cost]
    known = [seconds for seconds in all_fits if seconds is not None]
    if len(known) == len(found.rows):  # over all sessions, unlike the record's own seconds
        return f"{tables.seconds(sum(known))} for all fine-tunings{each}"
    return f"{tables.seconds(found.seconds)}{each}"

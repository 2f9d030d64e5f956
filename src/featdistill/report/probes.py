"""Linear probes as a section of the page: a table, and how each model's setting was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from featdistill.report import plotstyle, tables
from featdistill.report.folders import Found
from featdistill.report.gallery import Gallery, Section, Table
from featdistill.report.words import listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
_SETTINGS = {"weight_decay": "Weight decay", "lr": "Learning rate"}


def probe(gallery: Gallery, found: Found) -> Iterator[Section]:
    """A probe's section.

    Raises:
        KeyError: the record lacks what is shown.
    """
    results = found.results
    models, data = results["models"], results["data"]
    count = models[0]["top1"]["n"]
    over = tables.of_seeds(count)
    rates = any(run["lr"] is not None for model in models for run in model["runs"])
    drawn = None if results["style"] == "online" else choice(results)
    shown = []
    if drawn is not None:
        best = ", each at its best learning rate" if rates else ""
        caption = (
            "Top-1 in percent on the training labels that were held out to choose by, mean over "
            f"{over}, by weight decay{best}. Features have mean 0, and vectors a squared length "
            "of 1 on average."
        )
        told = listed([f"{m['name']} {tables.percent(m['top1']['mean'])}" for m in models])
        title = "Choosing the weight decay"
        shown.append(gallery.add(drawn, "probe", title, caption, f"Test top-1: {told}."))
    settings = tuple(_SETTINGS) if rates else ("weight_decay",)
    columns = ("Top-1", "Top-5", "Mean by class", "Calibration error")
    spread = "; ± is the standard deviation over them" if count > 1 else ""
    name = str(data["test_name"])
    yield Section(
        f"Linear probe: {found.name}",
        f"How well a linear classifier reads the classes from frozen features "
        f"({_vector(results)}): what a model says plainly, not how well it fine-tunes.",
        tuple(shown),
        Table(
            (*columns, *(_SETTINGS[name] for name in settings)),
            tuple((str(model["name"]), *_cells(model, settings)) for model in models),
            f"On {data['test_images']:,} held-out images of "
            f"{Path(name).name if Path(name).is_absolute() else name}, after "
            f"{data['labelled_images']:,} labels, {over}{spread}. The held-out images chose "
            "nothing.",
        ),
    )


def _vector(results: Results) -> str:
    pooled = {"mean": "mean of the map", "cls": "CLS", "both": "CLS and mean of the map"}
    how = pooled.get(results["pool"], "as each model pools")
    return how if results["layers"] == 1 else f"{how}, of the last {results['layers']} layers"


def _cells(model: Results, settings: Sequence[str]) -> tuple[str, ...]:
    runs: Sequence[Results] = model["runs"]
    by_class = tables.percent(fmean(run["mean_by_class"] for run in runs))
    top1, top5, error = (
        tables.percent(model[name]["mean"], model[name]["std"])
        for name in ("top1", "top5", "calibration_error")
    )
    chosen = []
    for name in settings:
        edge = any(side.startswith(name) for run in runs for side in run["edge"])
        chosen.append(_range([run[name] for run in runs]) + (" (edge)" if edge else ""))
    return (top1, top5, by_class, error, *chosen)


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return tables.NOTHING
    low, high = min(known), max(known)
    return tables.rate(low) if low == high else f"{tables.rate(low)} to {tables.rate(high)}"


def choice(results: Results) -> Figure | None:
    """Accuracy on held-out training labels by weight decay; None where there was no choice."""
    models = results["models"]
    decays = sorted({t["weight_decay"] for m in models for r in m["runs"] for t in r["grid"]})
    if len(decays) < 2:
        return None
    figure, axes = plotstyle.panels(1, 1, height=3.0)
    axis = axes[0, 0]
    looks = plotstyle.looks([model["name"] for model in models])
    positive = [decay for decay in decays if decay > 0]
    at = {decay: decay or positive[0] / 10 for decay in decays}  # 0 has no place on a log axis
    for model in models:
        values = [100 * fmean(_best(run, decay) for run in model["runs"]) for decay in decays]
        look = looks[model["name"]]
        axis.plot(
            [at[decay] for decay in decays],
            values,
            color=look.colour,
            marker=look.marker,
            linestyle=look.dashes,
            markersize=4,
            label=str(model["name"]),
        )
    axis.set_xscale("log")
    whole = [decay for decay in positive if f"{decay:e}".startswith("1.000000e")] or positive
    ticks = [*whole[:: -(-len(whole) // 6)], *(decay for decay in decays if decay == 0)]
    axis.set_xticks([at[decay] for decay in ticks], [tables.rate(decay) for decay in ticks])
    axis.minorticks_off()
    axis.set_xlabel("weight decay (log)")
    axis.legend(frameon=False, fontsize=8.5)
    plotstyle.title(axis, "Top-1 on held-out training labels, %")
    return figure


def _best(run: Results, decay: float) -> float:
    return max(float(t["val_top1"]) for t in run["grid"] if t["weight_decay"] == decay)


def verdict(probes: Sequence[Found]) -> str:
    """What can be said first; never more than was measured."""
    rows = [(m["name"], m["top1"]) for one in probes for m in one.results["models"]]
    said = [f"{name} {tables.percent(top1['mean'], top1['std'])}" for name, top1 in rows]
    return (
        f"Linear probes of frozen features: {listed(said)} top-1; how well the models fine-tune, "
        "a comparison can say (featdistill compare)."
    )

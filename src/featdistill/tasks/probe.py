"""`featdistill probe`: how good frozen features are for a linear classifier."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from featdistill.config.commands import ProbeCommandConfig
from featdistill.config.sections import ModelConfig
from featdistill.core.records import write_record
from featdistill.data.sources import Source
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.runtime import Runtime, limit_threads, pick_device
from featdistill.engine.tracking import console, duration, say
from featdistill.models.backbone import Backbone
from featdistill.models.export import export_timm
from featdistill.models.exports.card import Story, public_name
from featdistill.models.pooling import vector_of
from featdistill.models.probed import probed_classifier
from featdistill.models.weights import tensors_hash
from featdistill.report.tables import of_seeds
from featdistill.tasks.caches import kept_images
from featdistill.tasks.common import data_of, model_of, plain, runtime_of
from featdistill.tasks.finetune import check_labels
from featdistill.tasks.finetune_record import by_class
from featdistill.tasks.probe_checks import check_options, check_sizes
from featdistill.tasks.probe_grid import probe_of, settings_of
from featdistill.tasks.probe_online import probe_online
from featdistill.tasks.probe_record import ModelProbe, arrays_of
from featdistill.tasks.provenance import keep_story, licences_of, origin_record

__all__ = ["ProbeResult", "probe_of", "run"]


@dataclass(frozen=True)
class ProbeResult:
    """Linear probes of one or several models.

    Attributes:
        out: the run's folder.
        results: what `probe.json` holds under `results`.
        top1: model -> mean over the seeds, 0..1.
        exports: model -> the folder of its classifier (first seed), None where timm has none.
        record: the file.
    """

    out: Path
    results: Mapping[str, Any]
    top1: Mapping[str, float]
    exports: Mapping[str, Path | None]
    record: Path


@dataclass(frozen=True)
class _Subject:
    """A model to probe, and where what is found of it lies."""

    name: str
    backbone: Backbone
    folder: Path


def run(config: ProbeCommandConfig) -> ProbeResult:
    """Probe each model."""
    began = time.monotonic()
    names = check_options(config)
    check_out(config.run.out, resume=config.run.resume)
    data = data_of(config.data, config.run.seed)
    train, held, classes = check_labels(data, budget=None, seed=config.run.seed, what="a probe")
    check_sizes(config, train)
    online = config.probe.style == "online"
    runtime = runtime_of(config.run) if online else None
    if runtime is None:
        limit_threads(config.run.threads)
    device = torch.device(pick_device(config.run.device)) if runtime is None else runtime.device
    models = _models(config, names)
    first = runtime is None or runtime.first
    train, held = kept_images(config.data, train, held, runtime=runtime)
    folder = open_run(
        config.run.out,
        config,
        resume=config.run.resume,
        first=first,
        weights={name: model.origin.weights for name, model in models.items()},
    )
    subjects = [
        _Subject(name, model, place)
        for (name, model), place in zip(models.items(), _places(folder, names), strict=True)
    ]
    say(
        f"{len(train):,} training images of {len(classes)} classes"
        + (f", {config.data.labels} of the labels" if config.data.labels else "")
        + f", {len(held):,} to score on; {_described(config)}"
    )
    probes = [_probe(config, one, train, held, runtime, device) for one in subjects]
    if not first:
        results = _results(config, subjects, probes, train, held, {}, began)
        return _result(folder, results, subjects, {})
    exports = {
        one.name: _export(config, one, probe, classes, held)
        for one, probe in zip(subjects, probes, strict=True)
    }
    results = _results(config, subjects, probes, train, held, exports, began)
    arrays = arrays_of(probes)
    write_record(
        folder / "probe.json", "probe", config=plain(config), results=results, arrays=arrays
    )
    for one in subjects:
        shutil.rmtree(one.folder / "features", ignore_errors=True)
    _say_end(config, results, exports)
    return _result(folder, results, subjects, exports)


def _result(
    folder: Path,
    results: Mapping[str, Any],
    subjects: list[_Subject],
    exports: Mapping[str, Path | None],
) -> ProbeResult:
    top1 = {row["name"]: row["top1"]["mean"] for row in results["models"]}
    places = {one.name: exports.get(one.name) for one in subjects}
    return ProbeResult(folder, results, top1, places, folder / "probe.json")


def _models(config: ProbeCommandConfig, names: list[str]) -> dict[str, Backbone]:
    weights = config.weights * (len(names) if len(config.weights) == 1 else 1)
    models = {
        name: model_of(
            ModelConfig(spec=spec, weights=w),
            image_size=config.view.image_size,
            seed=config.run.seed,
        )
        for name, spec, w in zip(names, config.models, weights, strict=True)
    }
    for model in models.values():
        vector_of(model, config.probe.pool.value, config.probe.layers)
    return models


def _places(folder: Path, names: list[str]) -> list[Path]:
    """The run's folder for a single model; of several, one folder each, by the name's last part."""
    if len(names) == 1:
        return [folder]
    found: list[Path] = []
    for name in names:
        part = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name).strip(".")
        part, count = part or "model", 1
        while (place := folder / (part if count == 1 else f"{part}-{count}")) in found:
            count += 1
        found.append(place)
    return found


def _described(config: ProbeCommandConfig) -> str:
    probe = config.probe
    pooled = (
        f"{probe.pool.value} of the last {probe.layers} layers"
        if probe.layers > 1
        else (f"pooled: {probe.pool.value}")
    )
    if probe.style == "online":
        return f"{pooled}; {probe.online.optimizer} on random crops"
    return f"{pooled}; {len(settings_of(probe.grid))} settings to choose from"


def _probe(
    config: ProbeCommandConfig,
    subject: _Subject,
    train: Source,
    held: Source,
    runtime: Runtime | None,
    device: torch.device,
) -> ModelProbe:
    backbone = subject.backbone.to(device)
    before = tensors_hash(backbone)
    if runtime is not None:
        found = probe_online(
            backbone,
            config,
            train=train,
            held=held,
            runtime=runtime,
            folder=subject.folder,
            title=subject.name,
        )
    else:
        found = probe_of(
            backbone,
            config.probe,
            train=train,
            held=held,
            seeds=config.seeds,
            folder=subject.folder,
            batch_size=config.data.batch_size,
            view=config.view,
            budget=config.data.labels,
            workers=config.data.workers,
            bad_image_limit=config.data.tolerated,
            seed=config.run.seed,
            title=subject.name,
        )
    assert tensors_hash(backbone) == before, "a probe must leave the backbone as it was"
    backbone.cpu()
    top1 = found.spread("top1")
    spread = "" if top1["std"] is None else f" +- {top1['std']:.2%}"
    seeds = of_seeds(top1["n"])
    say(f"{subject.name}: top-1 {top1['mean']:.2%}{spread} over {seeds}")
    return found


def _export(
    config: ProbeCommandConfig,
    subject: _Subject,
    probe: ModelProbe,
    classes: tuple[str, ...],
    held: Source,
) -> Path | None:
    """The first seed's classifier; None where timm has none that pools so."""
    run, backbone, layers = probe.runs[0], subject.backbone, config.probe.layers
    if layers > 1:
        return None
    classifier = probed_classifier(
        backbone,
        run.head.weight,
        run.head.bias,
        how=config.probe.pool.value,
        class_names=classes,
    )
    if classifier is None:
        return None
    spec, origin = backbone.origin.spec, backbone.origin
    made = {
        "probed": f"{public_name(spec)} ({origin.weights}), frozen; a linear classifier on top",
        "data": Path(config.data.path).name,
        "top-1": f"{run.scores.top1:.2%} of {len(held):,} held-out images (seed {run.seed})",
    }
    licences = licences_of([(spec, origin_record(origin))])
    exported = export_timm(classifier, subject.folder / "export", card=made, licences=licences)
    keep_story(exported.folder, Story(made, (), licences))
    return exported.folder


def _results(
    config: ProbeCommandConfig,
    subjects: list[_Subject],
    probes: list[ModelProbe],
    train: Source,
    held: Source,
    exports: Mapping[str, Path | None],
    began: float,
) -> dict[str, Any]:
    rows = []
    for one, probe in zip(subjects, probes, strict=True):
        exported = exports.get(one.name)
        found = probe.results
        for run, fitted in zip(found["runs"], probe.runs, strict=True):
            run["by_class"] = by_class(fitted.scores, train.classes or ())
        rows.append(
            {
                "name": one.name,
                **origin_record(one.backbone.origin),
                "tensors_sha256": tensors_hash(one.backbone),
                "image_size": one.backbone.image_size,
                "export": None if exported is None else exported.name,
                **found,
            }
        )
    return {
        "data": {
            "name": train.name,
            "train_images": len(train),
            "labels": config.data.labels,
            "labelled_images": probes[0].runs[0].facts["labels"],
            "test_images": len(held),
            "test_name": held.name,
            "classes": len(train.classes or ()),
        },
        "style": config.probe.style,
        "pool": config.probe.pool.value,
        "layers": config.probe.layers,
        "models": rows,
        "seconds": time.monotonic() - began,
    }


def _say_end(
    config: ProbeCommandConfig, results: Mapping[str, Any], exports: Mapping[str, Path | None]
) -> None:
    console.print(_table(results))
    say(f"in {duration(results['seconds'])}; record: {Path(config.run.out) / 'probe.json'}")
    done = [place for place in exports.values() if place is not None]
    if len(done) < len(exports):
        how = f"--pool {config.probe.pool.value}"
        how += f" --layers {config.probe.layers}" if config.probe.layers > 1 else ""
        others = ", ".join(name for name, place in exports.items() if place is None)
        say(
            f"plain timm has no classifier that pools so ({how}), so nothing was exported of "
            f"{others}; the linear layers are in seed-*/probe-fit.npz"
        )
    for place in done:
        say(f"next: featdistill predict --model {place.parent} --data IMAGES")


def _table(results: Mapping[str, Any]) -> Table:
    rates = any(run["lr"] is not None for row in results["models"] for run in row["runs"])
    chosen = {**({"lr": "learning rate"} if rates else {}), "weight_decay": "weight decay"}
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for name in ("top-1", "top-5", "calibration error", *chosen.values()):
        table.add_column(name, justify="right")
    for row in results["models"]:
        scores = [_spread(row[name]) for name in ("top1", "top5", "calibration_error")]
        settings = [_range([run[name] for run in row["runs"]]) for name in chosen]
        table.add_row(Text(row["name"]), *scores, *settings)
    return table


def _spread(found: Mapping[str, Any]) -> str:
    mean = f"{100 * found['mean']:.2f}"
    return f"{mean}%" if found["std"] is None else f"{mean} ± {100 * found['std']:.2f}%"


def _range(values: list[float]) -> str:
    """What the seeds chose: `10`, or `3 to 10`."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"

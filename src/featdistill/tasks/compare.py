"""`featdistill compare`: is the distilled model better for you than what you had?

Teacher, student and (if wanted) the student's shape from nothing are fine-tuned by one recipe, on
the same labels, under the same seeds. Each row's learning rate is chosen on a part of the training
labels, never on the images that are scored.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featdistill.config.commands import CompareConfig
from featdistill.config.sections import ModelConfig
from featdistill.core.errors import ConfigError
from featdistill.core.records import read_record, write_record
from featdistill.data.loader import steps_per_epoch
from featdistill.data.sources import Source
from featdistill.data.splits import label_budget, split
from featdistill.engine.loop import check_batch
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.runtime import Runtime
from featdistill.engine.schedule import scaled_rate
from featdistill.engine.tracking import console, duration, say
from featdistill.evaluation.paired import differences, verdict
from featdistill.models.backbone import Backbone
from featdistill.models.students import build_fresh
from featdistill.models.weights import tensors_hash
from featdistill.tasks.common import data_of, model_of, plain, runtime_of, schedule_of
from featdistill.tasks.finetune import check_labels, classification, tune
from featdistill.tasks.finetune_record import score_arrays
from featdistill.tasks.knn import knn_of


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    Attributes:
        make: builds it; from a seed, where its weights are random.
    """

    name: str
    title: str
    make: Callable[[int], Backbone]


@dataclass(frozen=True)
class CompareResult:
    """The answer.

    Attributes:
        results: what `compare.json` holds under `results`.
        verdict: it in a sentence.
        record, report: the files.
    """

    results: Mapping[str, Any]
    verdict: str
    record: Path
    report: Path


@dataclass(frozen=True)
class _Setting:
    """What all rows share."""

    config: CompareConfig
    train: Source
    held: Source
    classes: tuple[str, ...]
    runtime: Runtime
    folder: Path
    fits: int

    def rate(self, factor: float) -> float:
        optimizer = self.config.optimizer
        return factor * scaled_rate(optimizer.lr, optimizer.lr_per_512, self.config.data.batch_size)

    def labels(self, seed: int) -> Source:
        """The training images whose labels a seed may use."""
        budget = self.config.data.labels
        return self.train if budget is None else label_budget(self.train, budget, seed)


def run(config: CompareConfig) -> CompareResult:
    """Fine-tune every row under every seed, score, and write the record and the page."""
    began = time.monotonic()
    check_out(config.run.out, resume=config.run.resume)
    data = data_of(config.data, config.run.seed)
    train, held, classes = check_labels(data, budget=None, seed=config.run.seed)
    _check_sizes(config, train)
    runtime = runtime_of(config.run)
    size = config.view.image_size or _own_size(config)
    rows = _rows(config, size)
    folder = open_run(config.run.out, config, resume=config.run.resume, first=runtime.first)
    sweeps = len(config.lrs) if len(config.lrs) > 1 else 0
    fits = len(rows) * (sweeps + len(config.seeds))
    setting = _Setting(config, train, held, classes, runtime, folder, fits)
    if runtime.first:
        _keep_inputs(config, folder)
    say(
        f"{len(rows)} models x ({sweeps} learning rates + {len(config.seeds)} seeds) = {fits} "
        f"fine-tunings on {runtime.describe()}"
    )
    done = [_row(setting, row, number) for number, row in enumerate(rows)]
    results: dict[str, Any] = {
        "data": {
            "name": train.name,
            "train_images": len(train),
            "labels": config.data.labels,
            "labelled_images": len(setting.labels(config.seeds[0])),
            "test_images": len(held),
            "classes": len(classes),
        },
        "recipe": _recipe(setting, size),
        "rows": done,
        "differences": differences(done),
        "verdict": verdict(done),
        "seconds": time.monotonic() - began,
    }
    file = folder / "compare.json"
    if not runtime.first:
        return CompareResult(results, results["verdict"], file, folder / "report" / "index.html")
    return _report(write_record(file, "compare", config=plain(config), results=results), results)


def _report(record: Path, results: Mapping[str, Any]) -> CompareResult:
    from featdistill.report.page import write_report
    from featdistill.report.tables import comparison_table

    page = write_report(record.parent)
    console.print(comparison_table(results))
    say(f"\n{results['verdict']}")
    say(f"in {duration(results['seconds'])}; report: {page}")
    return CompareResult(results, results["verdict"], record, page)


def _own_size(config: CompareConfig) -> int:
    """The student's own image size, at which all rows are compared unless told otherwise."""
    return model_of(config.student, quiet=True).image_size[0]


def _check_sizes(config: CompareConfig, train: Source) -> None:
    """Refuse what cannot be, before any model is loaded."""
    if config.schedule.stop_at is not None:
        raise ConfigError(["--schedule.stop_at is not for compare, which resumes by itself"])
    budget = config.data.labels
    smallest = train if budget is None else label_budget(train, budget, config.run.seed)
    if len(config.lrs) > 1:
        smallest, _ = split(smallest, config.sweep_fraction, config.run.seed)
    steps_per_epoch(len(smallest), config.data.batch_size)
    mixes = config.mix.probability > 0 and (config.mix.mixup > 0 or config.mix.cutmix > 0)
    check_batch(
        config.data.batch_size,
        processes=config.run.devices * config.run.nodes,
        micro_batches=config.run.micro_batches,
        even=mixes,
    )


def _rows(config: CompareConfig, size: int) -> list[Row]:
    def loaded(model: ModelConfig) -> Callable[[int], Backbone]:
        return lambda _: model_of(model, image_size=size, seed=config.run.seed, quiet=True)

    student = loaded(config.student)
    rows = [
        Row("teacher", "Teacher", loaded(config.teacher)),
        Row("student", "Distilled student", student),
    ]
    shape = student(0)
    # a model that cannot be loaded is said so now, and what became of its tensors
    model_of(config.teacher, image_size=size, seed=config.run.seed)
    if config.scratch and shape.build is not None:
        mean, std = shape.rgb
        build = shape.build

        def scratch(seed: int) -> Backbone:
            return build_fresh(
                build, spec=config.student.spec, seed=seed, mean=mean, std=std, image_size=size
            )

        rows.append(Row("scratch", "From scratch", scratch))
    elif config.scratch:
        say("note: no row from scratch, since the student's shape is not one of timm's")
    return rows


def _keep_inputs(config: CompareConfig, folder: Path) -> None:
    """Copy how teacher and student came to be, so that the page can be made again from here."""
    for name, spec in (("teacher", config.teacher.spec), ("student", config.student.spec)):
        source = Path(spec).expanduser()
        for file in ("metrics.jsonl", "config.yaml", "distill.json", "pretrain.json"):
            if (source / file).is_file():
                (folder / "inputs" / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, folder / "inputs" / name / file)


def _row(setting: _Setting, row: Row, number: int) -> dict[str, Any]:
    config = setting.config
    sweep = _sweep(setting, row)
    factor = max(sweep, key=lambda s: s["val_top1"])["factor"] if sweep else config.lrs[0]
    runs = []
    for seed in config.seeds:
        name = f"seed-{seed}"
        result = _fit(
            setting,
            row,
            name,
            seed=seed,
            factor=factor,
            train=setting.labels(seed),
            held=setting.held,
        )
        runs.append({"seed": seed, **result})
    model = row.make(config.seeds[0])
    scores = _knn(setting, row, model)
    values = [r["top1"] for r in runs]
    spread = statistics.stdev(values) if len(values) > 1 else None
    mean = statistics.fmean(values)
    say(
        f"{row.title}: top-1 {mean:.2%}"
        + (f" +- {spread:.2%}" if spread is not None else "")
        + f" over {len(values)} seeds, learning rate {setting.rate(factor):.2g}"
        + (f", kNN {max(scores.values()):.2%}" if scores else "")
        + f" ({number + 1} of the models done)"
    )
    return {
        "name": row.name,
        "title": row.title,
        "model": _model(model, row),
        "sweep": sweep,
        "lr": setting.rate(factor),
        "layer_decay": _layer_decay(config, row),
        "runs": runs,
        "top1": {"mean": mean, "std": spread, "n": len(values)},
        "knn": scores,
    }


def _model(model: Backbone, row: Row) -> dict[str, Any]:
    return {
        "spec": model.origin.spec,
        "architecture": model.build.architecture if model.build else type(model.model).__name__,
        "parameters": model.parameters_count,
        "image_size": model.image_size[0],
        "width": model.width,
        "grid": list(model.grid),
        "weights": "random, by seed" if row.name == "scratch" else model.origin.weights,
        "sha256": tensors_hash(model.model),
    }


def _sweep(setting: _Setting, row: Row) -> list[dict[str, Any]]:
    """Each learning rate's accuracy on a held-out part of the training labels."""
    config = setting.config
    if len(config.lrs) == 1:
        return []
    seed = config.run.seed
    rest, chosen_on = split(setting.labels(seed), config.sweep_fraction, seed)
    found = []
    for factor in config.lrs:
        name = f"lr-{setting.rate(factor):.2g}"
        result = _fit(setting, row, name, seed=seed, factor=factor, train=rest, held=chosen_on)
        found.append(
            {
                "factor": factor,
                "lr": setting.rate(factor),
                "val_top1": result["top1"],
                "folder": result["folder"],
            }
        )
    return found


def _fit(
    setting: _Setting,
    row: Row,
    name: str,
    *,
    seed: int,
    factor: float,
    train: Source,
    held: Source,
) -> dict[str, Any]:
    """One fine-tuning, unless its result is already there."""
    config = setting.config
    folder = setting.folder / "rows" / row.name / name
    relative = str(folder.relative_to(setting.folder))
    file = folder / "result.json"
    if config.run.resume and file.is_file():
        return {**read_record(file, "compare-fit")["results"], "folder": relative}
    folder.mkdir(parents=True, exist_ok=True)
    job = config.model_copy(
        update={
            "run": config.run.model_copy(update={"seed": seed, "tensorboard": False}),
            "optimizer": config.optimizer.model_copy(
                update={"lr": setting.rate(factor), "layer_decay": _layer_decay(config, row)}
            ),
        }
    )
    tuned = tune(
        classification(row.make(seed), job, classes=setting.classes, runtime=setting.runtime),
        job,
        train=train,
        held=held,
        runtime=setting.runtime,
        folder=folder,
        title=f"{row.title}, {name}",
    )
    assert tuned.scores is not None, "compare has no stop_at"
    result = {
        "top1": tuned.scores.top1,
        "top5": tuned.scores.top5,
        "loss": tuned.scores.loss,
        "seconds": tuned.fit.seconds,
    }
    if not setting.runtime.first:
        return {**result, "folder": relative}
    write_record(
        file,
        "compare-fit",
        config={"row": row.name, "seed": seed, "lr": setting.rate(factor)},
        results=result,
        arrays=score_arrays(tuned.scores),
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of many models, the scores stay
    return {**result, "folder": relative}


def _layer_decay(config: CompareConfig, row: Row) -> float:
    """The recipe's; but layers without knowledge to keep all learn at the full rate."""
    return 1.0 if row.name == "scratch" else config.optimizer.layer_decay


def _knn(setting: _Setting, row: Row, model: Backbone) -> dict[str, float] | None:
    """kNN accuracy by k, as text keys; None for a model that has learnt nothing."""
    config = setting.config
    if config.knn is None or row.name == "scratch":
        return None
    model.to(setting.runtime.device)
    found = knn_of(
        model,
        config.knn,
        train=setting.labels(config.run.seed),
        held=setting.held,
        batch_size=max(1, min(1024, config.data.batch_size)),
        crop=config.view.eval_crop,
        workers=config.data.workers,
    )
    return {str(k): v for k, v in found.items()}


def _recipe(setting: _Setting, size: int) -> dict[str, Any]:
    config = setting.config
    images = len(setting.labels(config.seeds[0]))
    batch = config.data.batch_size
    steps = schedule_of(config.schedule, config.optimizer, images=images, batch_size=batch).steps
    return {
        "steps": steps,
        "epochs": steps / steps_per_epoch(images, batch),
        "batch_size": batch,
        "image_size": size,
        "layer_decay": config.optimizer.layer_decay,
        "lr": setting.rate(1.0),
    }

"""`featdistill predict`: the most likely classes of images."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from featdistill.config.commands import PredictConfig
from featdistill.core.errors import ModelError
from featdistill.core.records import write_record
from featdistill.data.loader import ordered_batches, plainly
from featdistill.data.views import EvalView
from featdistill.engine.rundir import check_out
from featdistill.engine.runtime import limit_threads, pick_device
from featdistill.engine.tracking import say
from featdistill.tasks.common import images_of, model_of, plain


@dataclass(frozen=True)
class Prediction:
    """An image's most likely classes with their probabilities, best first."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class PredictResult:
    """All predictions, and the files they were written to, if any."""

    predictions: tuple[Prediction, ...]
    csv: Path | None
    json: Path | None


def run(config: PredictConfig) -> PredictResult:
    """Classify images."""
    if config.run.out is not None:
        check_out(config.run.out, resume=False)
    limit_threads()
    source = images_of(config.data)
    model = model_of(config.model, image_size=config.view.image_size)
    if not model.num_classes:
        raise ModelError(
            f"'{config.model.spec}' is no classifier",
            fix="fine-tune it first: featdistill finetune --model "
            f"{config.model.spec} --data LABELLED --out RUN",
        )
    device = torch.device(pick_device(config.run.device))
    model.to(device)
    names = model.class_names or tuple(str(i) for i in range(model.num_classes))
    view = EvalView(model.image_size[0], config.view.eval_crop)
    found = []
    loader = ordered_batches(
        source, view, batch_size=config.data.batch_size, workers=config.data.workers
    )
    with torch.no_grad():
        for batch in plainly(loader):
            logits = model(batch.to(device).as_float().images).logits
            assert logits is not None
            best = logits.float().softmax(1).topk(min(config.top, model.num_classes), dim=1)
            for i, values, places in zip(
                batch.indices.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
            ):
                chosen = tuple(names[place] for place in places)
                found.append(Prediction(source.identify(i), chosen, tuple(values)))
    Console().print(_table(found[:50]))
    if len(found) > 50:
        say(f"... and {len(found) - 50:,} more" + ("" if config.run.out else "; see --out"))
    if config.run.out is None:
        return PredictResult(tuple(found), None, None)
    files = _write(config, found)
    say(f"written: {files[0]}, {files[1]}")
    return PredictResult(tuple(found), *files)


def _table(predictions: list[Prediction]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("most likely")
    for p in predictions:
        pairs = zip(p.classes, p.probabilities, strict=True)
        table.add_row(escape(p.image), escape("  ".join(f"{c} {v:.1%}" for c, v in pairs)))
    return table


def _write(config: PredictConfig, predictions: list[Prediction]) -> tuple[Path, Path]:
    assert config.run.out is not None
    out = Path(config.run.out)
    out.mkdir(parents=True, exist_ok=True)
    table = out / "predictions.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "rank", "class", "probability"])
        for p in predictions:
            for rank, (name, value) in enumerate(zip(p.classes, p.probabilities, strict=True), 1):
                writer.writerow([p.image, rank, name, f"{value:.6f}"])
    rows = [
        {"image": p.image, "classes": p.classes, "probabilities": p.probabilities}
        for p in predictions
    ]
    record = write_record(
        out / "predictions.json", "predict", config=plain(config), results={"predictions": rows}
    )
    return table, record

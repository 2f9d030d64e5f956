"""Made comparisons: the files that `featdistill compare` writes, without any training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featdistill.core.records import write_record

TOP1 = {
    "teacher": {1: 0.950, 2: 0.954, 3: 0.958},
    "student": {1: 0.964, 2: 0.964, 3: 0.970},
    "scratch": {1: 0.842, 2: 0.836, 3: 0.861},
    "second-round": {1: 0.966, 2: 0.961, 3: 0.972},
    "on-logits": {1: 0.955, 2: 0.949, 3: 0.951},
    "mine": {1: 0.951, 2: 0.950, 3: 0.958},
}
_TITLES = {
    "teacher": "Teacher",
    "student": "Distilled student",
    "scratch": "From scratch",
    "second-round": "Second round",
    "on-logits": "Distilled on logits",
    "mine": "My own model",
}
ALL = ("teacher", "student", "second-round", "on-logits", "mine", "scratch")
_PRETRAINED = {"kind": "pretrain", "name": "t", "images_seen": 25_600, "seconds": 675.0}
_DISTILLED = {"kind": "distill", "name": "s", "images_seen": 19_200, "seconds": 190.0}
_MADE: dict[str, list[dict[str, Any]]] = {
    "teacher": [_PRETRAINED],
    "student": [_DISTILLED, _PRETRAINED],
    "second-round": [{**_DISTILLED, "images_seen": 12_800}, _DISTILLED, _PRETRAINED],
    "on-logits": [_DISTILLED],
}
_RATES = (0.00025, 0.001, 0.004)


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and n, as the record has them."""
    n, mean = len(values), sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return {"mean": mean, "std": std, "n": n}


def _write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def _row(folder: Path, name: str, seeds: tuple[int, ...], spec: str) -> dict[str, Any]:
    runs = []
    for seed in seeds:
        top1 = TOP1[name][seed]
        relative = f"rows/{name}/seed-{seed}"
        curve = [
            {"step": s, "val_top1": top1 * (1 - math.exp(-s / 60 - seed / 9)), "val_loss": 0.2}
            for s in range(40, 400, 40)
        ]
        _write_metrics(
            folder / relative,
            [{"step": 10, "loss": 2.0, "lr": 1e-3}, *curve, {"step": 400, "val_top1": top1}],
        )
        run = {"seed": seed, "top1": top1, "top5": 0.999, "loss": 0.2, "seconds": 63.0}
        runs.append({**run, "folder": relative})
    scores = (0.90, 0.95, 0.93) if name != "scratch" else (0.70, 0.80, 0.84)
    rates = list(zip(_RATES, scores, strict=True))
    return {
        "name": name,
        "title": _TITLES[name],
        "model": {
            "spec": spec,
            "architecture": "vit_base_patch16_224",
            "parameters": 85_800_000,
            "image_size": 224,
            "width": 768,
            "grid": [14, 14],
            "weights": "hub",
        },
        "sweep": [{"lr": r, "val_top1": v, "folder": f"rows/{name}/lr-{r}"} for r, v in rates],
        "lr": max(rates, key=lambda pair: pair[1])[0],
        "runs": runs,
        "top1": spread([run["top1"] for run in runs]),
        "knn": None
        if name == "scratch"
        else {"1": 0.92, "20": 0.931 if name == "teacher" else 0.9},
    }


def _inputs(folder: Path) -> None:
    for name, kind, other in (
        ("teacher", "pretrain", "agreement"),
        ("student", "distill", "cosine"),
    ):
        lines = [
            {
                "step": s,
                "loss": 2 * math.exp(-s / 300) + 0.1 * math.sin(s),
                other: 1 - 90 / (s + 100),
            }
            for s in range(10, 1500, 10)
        ]
        _write_metrics(folder / "inputs" / name, lines)
        results = {"steps": 1500, "images_seen": 384_000, "seconds": 725.0, "notes": ["a note"]}
        write_record(folder / "inputs" / name / f"{kind}.json", kind, config={}, results=results)


@pytest.fixture
def make_comparison(tmp_path: Path) -> Callable[..., Path]:
    """Write a comparison's folder; which parts it has is for the test to say."""

    def make(
        *,
        names: tuple[str, ...] = ("teacher", "student", "scratch"),
        seeds: tuple[int, ...] = (1, 2, 3),
        spec: str = "timm/vit_base_patch16_224.dino",
        inputs: bool = True,
        whole: bool = False,
        joules: float | None = None,
        **changes: Any,
    ) -> Path:
        folder = tmp_path / "compared"
        rows = [_row(folder, name, seeds, spec) for name in names]
        if whole:  # what records have since there are intervals and costs
            rows = [{**row, "cost": _cost(row["name"], joules)} for row in rows]
        results = {
            "data": {
                "name": "digits",
                "train_images": 1297,
                "labels": "20",
                "labelled_images": 200,
                "test_images": 500,
                "classes": 10,
            },
            "recipe": {
                "steps": 400,
                "epochs": 66.667,
                "batch_size": 32,
                "image_size": 224,
                "layer_decay": 0.65,
                "lr": 0.001,
            },
            "rows": rows,
            "differences": [_against_teacher(name, seeds) for name in names if name != "teacher"]
            if whole
            else [_difference(minus, seeds) for minus in names if minus != "student"],
            "verdict": "Fine-tuned, the distilled student is better than its teacher by 1.2 points "
            "of top-1 (better under 3 of 3 seeds).",
            "seconds": 1834.0,
        }
        if inputs:
            _inputs(folder)
        config = {"teacher": {"spec": spec}, "data": {"path": "digits"}, "seeds": list(seeds)}
        write_record(
            folder / "compare.json", "compare", config=config, results={**results, **changes}
        )
        return folder

    return make


def _difference(minus: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    each = [TOP1["student"][seed] - TOP1[minus][seed] for seed in seeds]
    return {"of": "student", "minus": minus, "per_seed": each, **spread(each)}


def _against_teacher(name: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    each = [TOP1[name][seed] - TOP1["teacher"][seed] for seed in seeds]
    found = {"of": name, "minus": "teacher", "per_seed": each, **spread(each)}
    mean = found["mean"]
    found["images_interval"] = [mean - 0.008, mean + 0.008]
    found["interval"] = [mean - 0.02, mean + 0.02] if len(seeds) > 1 else None
    return {**found, "level": 0.95, "resamples": 10_000}


def _cost(name: str, joules: float | None) -> dict[str, Any]:
    tuned = {"fits": 6, "images_seen": 76_800, "seconds": 400.0, "joules": joules}
    unknown = {"mine": ["mine"], "on-logits": ["timm/resnet50"]}.get(name, [])
    return {"made": _MADE.get(name, []), "unknown": unknown, "finetuning": tuned}

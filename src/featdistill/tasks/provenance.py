"""What is known of how a model was made: from its run's records, its card, and the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featdistill.core.errors import RunError
from featdistill.core.records import read_record
from featdistill.models.backbone import Backbone
from featdistill.models.catalogue import find
from featdistill.models.exports.card import FRESH, Story, read_made

_ANCESTORS = 4  # a classifier, its student, its teacher, the teacher's teacher
_FROM = "exported from"
_MADE_BY = ("pretrain", "distill", "finetune")


def story_of(spec: str, backbone: Backbone) -> Story:
    """The story of a model: of its run's folder if it has one, else of where its weights are from.

    Args:
        spec: what the user wrote.
        backbone: the loaded model.
    """
    run = _run_of(spec)
    origin = f"{backbone.origin.spec} ({backbone.origin.weights})"
    if run is None:
        folder = Path(spec).expanduser()
        made = read_made(folder / "README.md") if folder.is_dir() else {}
        if _FROM in made:  # an export of an export
            made[f"which was {_FROM}"] = made.pop(_FROM)
        licence = backbone.origin.licence or _catalogued(spec)
        return Story({_FROM: origin, **made}, (), {spec: licence})
    made = {_FROM: origin, **_facts(run, _ANCESTORS)}
    return Story(made, tuple(_results(run)), _licences(spec, None, _ANCESTORS))


def _run_of(spec: str) -> Path | None:
    """The run's folder that a spec means (or whose export it is)."""
    folder = Path(spec).expanduser()
    for candidate in (folder, folder.parent if folder.name == "export" else folder):
        if _records(candidate):
            return candidate
    return None


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records in a run's folder, by kind; unreadable ones are left out."""
    found = {}
    for kind in (*_MADE_BY, "knn", "compare"):
        try:
            found[kind] = read_record(folder / f"{kind}.json", kind)
        except RunError:
            continue
    return found


def _facts(run: Path, depth: int) -> dict[str, Any]:
    """How a run's model was made, and the models before it."""
    facts: dict[str, Any] = dict(read_made(run / "export" / "README.md"))
    records = _records(run)
    for kind in _MADE_BY:
        if kind in records:
            facts["configuration"] = _configuration(records[kind]["config"])
            facts["made"] = f"{records[kind]['created']}, featdistill {_version(records[kind])}"
    before = _before(records)
    ancestor = _run_of(before) if before and depth else None
    if ancestor is not None:
        for key, value in _facts(ancestor, depth - 1).items():
            facts.setdefault(f"{key} ({ancestor.name})", value)
    return facts


def _before(records: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The model that a run began from: the teacher, or the one that was fine-tuned."""
    if "finetune" in records:
        return str(records["finetune"]["config"]["model"]["spec"])
    if "distill" in records:
        return str(records["distill"]["config"]["teacher"]["spec"])
    return None


def _version(record: Mapping[str, Any]) -> str:
    return str(record["environment"]["versions"].get("featdistill", "?"))


def _configuration(config: Mapping[str, Any]) -> str:
    """The settings that people ask for first, in one line; config.yaml has them all."""
    wanted = {
        "image": ("view", "image_size"),
        "batch": ("data", "batch_size"),
        "epochs": ("schedule", "epochs"),
        "steps": ("schedule", "steps"),
        "learning rate": ("optimizer", "lr"),
        "weight decay": ("optimizer", "weight_decay"),
        "drop path": ("student", "drop_path"),
        "seed": ("run", "seed"),
    }
    parts = []
    for name, (section, key) in wanted.items():
        value = (config.get(section) or {}).get(key)
        if value is None and key == "lr":
            name, value = "learning rate per 512 images", config["optimizer"].get("lr_per_512")
        if value is not None:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _results(run: Path) -> list[str]:
    """What a run's records say of the model's quality, one line each."""
    lines = []
    for kind, record in _records(run).items():
        results = record["results"]
        if kind == "finetune":
            lines.append(
                f"fine-tuned: top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%} of "
                f"{results['images']:,} held-out images"
            )
        elif kind in ("distill", "pretrain"):
            last = ", ".join(f"{name} {value:.4g}" for name, value in results["last"].items())
            lines.append(f"{kind}: after {results['steps']:,} steps {last}")
        elif kind == "knn":
            for model, scores in results["top1"].items():
                found = ", ".join(f"k={k} {top1:.2%}" for k, top1 in scores.items())
                lines.append(f"nearest neighbours, {model}: {found}")
        else:
            lines.append(f"compared: {results['verdict']}")
    return lines


def _licences(spec: str, known: str | None, depth: int) -> dict[str, str | None]:
    """Whose weights went into a model, and their licences."""
    run = _run_of(spec)
    records = _records(run) if run is not None else {}
    before = _before(records)
    if run is None or not depth:
        return {spec: known or _catalogued(spec)}
    if before is None:
        return {spec: FRESH if "pretrain" in records else known}
    teacher = records["distill"]["results"].get("teacher", {}) if "distill" in records else {}
    return _licences(before, teacher.get("licence"), depth - 1)


def _catalogued(spec: str) -> str | None:
    """The licence of a model of the catalogue."""
    entry = find(spec)
    return entry.licence if entry is not None else None

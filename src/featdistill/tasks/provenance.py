"""What is known of how a model was made: from its run's records, its card, and the catalogue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featdistill.core.errors import ModelError, RunError
from featdistill.core.records import read_record, write_json
from featdistill.models.backbone import Backbone, Origin
from featdistill.models.catalogue import find
from featdistill.models.exports.card import FRESH, Story, public_name, read_made
from featdistill.models.weights import file_hash, read_json

_ANCESTORS = 4  # a classifier, its student, its teacher, the teacher's teacher
_FROM, _WAS = "exported from", "which was exported from"
_STORY = "story.json"
_MADE_BY = ("pretrain", "distill", "finetune")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_RANDOM, _HUB = "random (seed", "timm hub: "


@dataclass(frozen=True)
class Before:
    """A model that another one was made from.

    Attributes:
        role: what it was for the other one.
        spec: what the user wrote.
        weights: what they were when they were loaded; None if the record does not say.
        licence: as it was known then.
    """

    role: str
    spec: str
    weights: str | None = None
    licence: str | None = None


def story_of(spec: str, backbone: Backbone) -> Story:
    """The story of a model: of its run's folder if it has one, else of where its weights are from.

    Args:
        spec: what the user wrote.
        backbone: the loaded model.
    """
    model = Before("model", spec, backbone.origin.weights, backbone.origin.licence)
    run = run_of(model)
    origin = f"{public_name(spec)} ({backbone.origin.weights})"
    licences = _licences(model, _ANCESTORS)
    if run is None:
        kept = _kept(model) or Story()
        made = dict(kept.made)
        if _FROM in made:  # an export of an export
            earlier = [made.pop(key) for key in (_FROM, _WAS) if key in made]
            made[_WAS] = ", before that ".join(earlier)
        return Story({_FROM: origin, **_file(backbone.origin), **made}, kept.results, licences)
    return Story({_FROM: origin, **_facts(run, _ANCESTORS)}, tuple(_results(run)), licences)


def _file(origin: Origin) -> dict[str, str]:
    """How a checkpoint file was read, and what it did not say."""
    report = origin.report
    if report is None:
        return {}
    facts = {"read as": f"{report.title}; {report.counts}"}
    return {**facts, "assumed": "; ".join(report.assumed)} if report.assumed else facts


def origin_record(origin: Origin) -> dict[str, str | None]:
    """What a run's record keeps of a model that it began from."""
    return {"spec": origin.spec, "weights": origin.weights, "licence": origin.licence}


def run_of(model: Before) -> Path | None:
    """The run's folder that made a model, if it is still there with these very weights."""
    place = _place(model)
    if place is None:
        return None
    folder, known = place
    for run in (folder, folder.parent if folder.resolve().name == "export" else folder):
        if records_of(run) and known in _hashes(run / "export"):
            return run
    return None


def is_random(model: Before) -> bool:
    """Whether a model was never trained."""
    return (model.weights or "").startswith(_RANDOM)


def _hashes(folder: Path) -> list[str]:
    """The hashes of the weights in an export."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file_hash(file) for file in files if file.suffix in _SUFFIXES]


def _place(model: Before) -> tuple[Path, str] | None:
    """The folder that a model was loaded from, and its weights' hash; None if it has none."""
    known = re.search(r"sha256 ([0-9a-f]{12})", model.weights or "")
    if known is None or model.spec.startswith(("timm/", "hf-hub:")):
        return None
    folder = Path(model.spec).expanduser()
    return (folder.parent if folder.is_file() else folder), known[1]


def keep_story(folder: Path, story: Story) -> None:
    """Lay a story beside the card of an export, for an export of it."""
    kept = {"weights": _hashes(folder), "made": dict(story.made), "results": list(story.results)}
    write_json(folder / _STORY, {**kept, "licences": dict(story.licences)})


def _kept(model: Before) -> Story | None:
    """The story that lies beside a model's weights, if it is theirs."""
    place = _place(model)
    if place is None:
        return None
    try:
        beside = place[0] / _STORY
        kept = read_json(beside if beside.is_file() else place[0] / "export" / _STORY)
        if place[1] not in kept["weights"]:
            return None
        return Story(dict(kept["made"]), tuple(kept["results"]), dict(kept["licences"]))
    except (ModelError, KeyError, TypeError, ValueError):
        return None


def records_of(folder: Path) -> dict[str, dict[str, Any]]:
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
    records = records_of(run)
    for kind in _MADE_BY:
        if kind in records:
            facts["configuration"] = _configuration(records[kind]["config"])
            facts["made"] = f"{records[kind]['created']}, featdistill {_version(records[kind])}"
    befores = befores_of(records) if depth else []
    names = [public_name(before.spec) for before in befores]
    for before, name in zip(befores, names, strict=True):
        label = name if names.count(name) == 1 else f"{name}, {before.role}"
        if before.role == "continued from":
            facts.setdefault(before.role, f"{name} ({before.weights or 'weights not recorded'})")
        ancestor = run_of(before)
        if ancestor is not None:
            for key, value in _facts(ancestor, depth - 1).items():
                facts.setdefault(f"{key} ({label})", value)
        elif (kept := _kept(before)) is not None:  # an export of another run
            for key, value in kept.made.items():
                facts.setdefault(f"{key} ({label})", value)
        elif _place(before) is not None and not Path(before.spec).expanduser().is_file():
            facts.setdefault(f"records of {label}", "no longer there")
    return facts


def befores_of(records: Mapping[str, Mapping[str, Any]]) -> list[Before]:
    """The models that a run began from: teacher and student, or the one that was fine-tuned."""

    def before(role: str, spec: str, origin: Mapping[str, Any] | None) -> Before:
        origin = origin or {}
        return Before(role, spec, origin.get("weights"), origin.get("licence"))

    if "finetune" in records:
        record = records["finetune"]
        return [before("model", record["config"]["model"]["spec"], record["results"].get("model"))]
    if "distill" in records:
        config, results = records["distill"]["config"], records["distill"]["results"]
        found = [before("teacher", config["teacher"]["spec"], results.get("teacher"))]
        init = config["student"]["init"]
        if init not in ("random", "teacher"):
            found.append(before("continued from", init, results.get("student_init")))
        return found
    return []


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
    for kind, record in records_of(run).items():
        results = record["results"]
        if kind == "finetune":
            lines.append(
                f"fine-tuned: top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%} of "
                f"{results['images']:,} held-out images"
            )
        elif kind in ("distill", "pretrain"):
            last = ", ".join(
                f"{name} {value:.4g}"
                for name, value in results["last"].items()
                if name in ("loss", "cosine") or "top1" in name or "top-1" in name
            )
            lines.append(f"{kind}: after {results['steps']:,} steps {last}")
        elif kind == "knn":
            for model, scores in results["top1"].items():
                found = ", ".join(f"k={k} {top1:.2%}" for k, top1 in scores.items())
                lines.append(f"nearest neighbours, {public_name(model)}: {found}")
        else:
            lines.append(f"compared: {results['verdict']}")
    return lines


def licences_of(models: Iterable[tuple[str, Mapping[str, str | None]]]) -> dict[str, str | None]:
    """Whose weights went into a model that was made from these, and their licences.

    Args:
        models: what the user wrote, and the `origin_record` of what was loaded.
    """
    found: dict[str, str | None] = {}
    for spec, origin in models:
        before = Before("model", spec, origin["weights"], origin["licence"])
        _join(found, _licences(before, _ANCESTORS))
    return found


def _licences(model: Before, depth: int) -> dict[str, str | None]:
    """Whose weights went into a model, and their licences."""
    run = run_of(model)
    records = records_of(run) if run is not None else {}
    befores = befores_of(records)
    if befores and depth:
        found: dict[str, str | None] = {}
        for before in befores:
            _join(found, _licences(before, depth - 1))
        return found
    kept = _kept(model) if run is None else None
    if kept is not None and kept.licences:
        return dict(kept.licences)
    fresh = "pretrain" in records and not befores
    return {public_name(model.spec): FRESH if fresh else _licence(model)}


def _join(found: dict[str, str | None], more: Mapping[str, str | None]) -> None:
    """Add licences; others of the same name get a number."""
    for name, licence in more.items():
        free, count = name, 1
        while free in found and found[free] != licence:
            count += 1
            free = f"{name} ({count})"
        found[free] = licence


def _licence(model: Before) -> str | None:
    """The licence of weights that no run here made; the catalogue knows those of the hub."""
    weights = model.weights or ""
    if is_random(model):
        return FRESH
    if model.licence is not None or not weights.startswith((_HUB, "hf-hub:")):
        return model.licence
    entry = find(weights.removeprefix(_HUB).removeprefix("hf-hub:"))
    return entry.licence if entry is not None else None

"""The runs that a model came out of: what kind they were, and what they had cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featdistill.config.sections import Target
from featdistill.core.errors import RunError
from featdistill.core.records import read_record
from featdistill.models.backbone import Origin
from featdistill.models.exports.card import public_name
from featdistill.tasks.provenance import Before, befores_of, is_random, records_of, run_of

_KINDS = ("finetune", "distill", "pretrain")  # the last that was done to a model comes first
_ROUNDS = {2: "Second round", 3: "Third round"}
_TARGETS = {
    Target.GAP: "pooled features",
    Target.POOLED: "features as the teacher pools them",
    Target.LOGITS: "logits",
}


@dataclass(frozen=True)
class Stage:
    """One run.

    Attributes:
        name: its folder's.
        images_seen, seconds, joules: None where its record does not say.
    """

    kind: str
    name: str
    images_seen: int | None
    seconds: float | None
    joules: float | None


@dataclass(frozen=True)
class Lineage:
    """How a model came to be.

    Attributes:
        stages: the run that made it first, then those of its teachers, each once; empty for
            fresh weights.
        unknown: models of which no run's record is there.
        title: of a distilled student; None where its record is nothing special.
    """

    stages: tuple[Stage, ...] = ()
    unknown: tuple[str, ...] = ()
    title: str | None = None


def lineage(origin: Origin, spec: str) -> Lineage:
    """What the records say of a model's making, and of its teachers'.

    Args:
        origin: of the loaded model.
        spec: what the user wrote.
    """
    model = Before("model", spec, origin.weights, origin.licence)
    stages: dict[Path, Stage] = {}
    unknown: dict[str, None] = {}
    todo = [model]
    while todo:
        before = todo.pop(0)
        run = run_of(before)
        kind, record = _made_by(run)
        if run is None or record is None:
            if not is_random(before):
                unknown[public_name(before.spec)] = None
            continue
        if run.resolve() not in stages:
            stages[run.resolve()] = _stage(run, kind, record)
            todo += befores_of({kind: record})
    return Lineage(tuple(stages.values()), tuple(unknown), _title(model))


def _made_by(run: Path | None) -> tuple[str, dict[str, Any] | None]:
    records = records_of(run) if run is not None else {}
    return next(((kind, records[kind]) for kind in _KINDS if kind in records), ("", None))


def _stage(run: Path, kind: str, record: Mapping[str, Any]) -> Stage:
    folder = run.resolve()
    if folder.name == "best":  # kept from within a run, which went on to its end
        folder, record = folder.parent, _whole(folder.parent, kind) or record
    results = record["results"]
    images = results.get("images_seen")
    if images is None and kind == "finetune" and "steps" in results:  # of an earlier version
        images = results["steps"] * record["config"]["data"]["batch_size"]
    return Stage(kind, folder.name, images, results.get("seconds"), results.get("joules"))


def _whole(folder: Path, kind: str) -> dict[str, Any] | None:
    try:
        return read_record(folder / f"{kind}.json", kind)
    except RunError:
        return None


def _title(model: Before) -> str | None:
    """What a distillation is called after the round and the target; None for the plain one."""
    rounds, target = 0, None
    found: Before | None = model
    while found is not None:
        kind, record = _made_by(run_of(found))
        if kind != "distill" or record is None:
            break
        rounds += 1
        if target is None:
            target = _TARGETS.get(Target(record["config"]["objective"]["target"]), "")
        found = next((b for b in befores_of({kind: record}) if b.role == "teacher"), None)
    if rounds > 1:
        again = _ROUNDS.get(rounds, f"Round {rounds}")
        return f"{again}, on {target}" if target else again
    return f"Distilled on {target}" if target else None

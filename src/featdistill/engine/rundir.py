"""A run's folder: made, claimed, resumed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from featdistill.core.errors import RunError
from featdistill.core.parsing import parse_json, parse_yaml
from featdistill.core.records import computing, environment, write_json
from featdistill.engine.lock import LOCK, check_free, claim
from featdistill.engine.replan import check_reach

log = logging.getLogger("featdistill")

_WEIGHTS = "weights.json"

# what may differ between a run and its continuation, because it changes no weight
_HARMLESS = frozenset(
    (
        "run.resume",
        "run.out",
        "run.extend",
        "run.log_every",
        "run.checkpoint_every",
        "run.checkpoint_keep",
        "run.tensorboard",
        "run.preflight",
        "run.eval_every",
        "run.best",
        "run.nonfinite",
        "run.nonfinite_limit",
        "signal.knn_data",
        "signal.knn_labels",
        "signal.knn_k",
        "signal.rank_alarm",
        "schedule.stop_at",
        "teacher_cache.folder",  # what it holds is checked; with it or without, the views tell
        "data.workers",
        "data.cache",  # views are the same to the bit
        "data.cache_folder",
        "data.bad_images",
        "data.bad_image_limit",
    )
)

# what may differ too, but costs the last bit: over how many parts a batch is summed
_ROUNDING = frozenset(("run.devices", "run.nodes", "run.micro_batches"))


# of them, what is said otherwise, or is of one session alone
_UNSAID = frozenset(("run.resume", "run.out", "run.extend", "run.preflight", "schedule.stop_at"))

# what `--extend` changes
_LENGTH = frozenset(("schedule.epochs", "schedule.steps"))


def check_out(out: str, *, resume: bool) -> None:
    """Raise RunError if a run cannot live in `out`; before any long work, writing nothing."""
    path = Path(out).expanduser()
    if path.exists() and not path.is_dir():
        raise RunError(f"output '{out}' is a file", expected="a folder", fix="give another --out")
    if path.is_symlink() and not path.exists():
        raise RunError(f"output '{out}' is a link to nothing", fix="give another --out")
    check_free(path)
    if resume:
        if not (path / "config.yaml").is_file():
            raise RunError(
                f"there is no run to resume in '{out}'", fix="leave --resume out to begin one"
            )
        return
    if path.is_dir() and any(entry.name != LOCK for entry in path.iterdir()):
        done = (path / "config.yaml").is_file()
        raise RunError(
            f"output folder '{out}' is not empty",
            fix="continue that run with --resume, or give another --out"
            if done
            else "give another --out",
        )
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(
            f"cannot write to output '{out}' ('{parent}' is not a writable folder)",
            fix="give another --out",
        )


def open_run(
    out: str,
    config: BaseModel,
    *,
    resume: bool,
    first: bool = True,
    weights: Mapping[str, str] | None = None,
    may_change: frozenset[str] = frozenset(),
    log_here: bool = True,
    steps: int | None = None,
) -> Path:
    """Make a run's folder, or open it again; of several processes, only the first touches it.

    Args:
        weights: which weights the run begins from, by the model's part in it; a file of the same
            name may hold others when the run is resumed.
        may_change: settings by dotted path that a resumed run may have otherwise, since what was
            done so far holds whatever they are.
        log_here: write log.txt here from now on.
        steps: of the schedule, if it may be extended (`run.extend`).

    Raises:
        RunError: see `check_out`; another process has the folder; the resumed run had another
            configuration or other weights; or it is beyond the end of its new schedule.
    """
    path = Path(out).expanduser()
    if not first:
        return path
    check_out(out, resume=resume)
    _claim(path, out, resume)
    values = config.model_dump(mode="json")
    changed, known, notes = False, dict[str, str](), list[str]()
    if resume:
        if steps is not None and values["run"].get("extend"):
            may_change |= _LENGTH
            check_reach(steps, max(saved_steps(path / "checkpoints"), default=0))
        changed, notes = _check_same(path, config, may_change)
        known = _check_weights(path, weights or {})
    try:
        if not resume or changed:
            if weights:
                write_json(path / _WEIGHTS, {**known, **weights})
            if changed:
                # as a first session would have written it
                values["run"] |= {"resume": False} | ({"extend": None} if steps is not None else {})
            _write_config(path, values)  # the last: with it a folder is a run that can be resumed
        here = environment()
        notes += _elsewhere(path, here) if resume else []
        write_json(path / "environment.json", here)
    except OSError as error:
        raise RunError(
            f"cannot write to output '{out}' ({error.strerror or error})", fix="give another --out"
        ) from None
    if log_here:
        _log_to(path / "log.txt")
    _tell(notes)
    return path


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        log.warning(note)
        print(note, file=sys.stderr)


def _write_config(path: Path, values: Mapping[str, Any]) -> None:
    begun = path / f".config.{os.getpid()}.yaml"
    begun.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    os.replace(begun, path / "config.yaml")


def _claim(path: Path, out: str, resume: bool) -> None:
    """Lock a run's folder for this process."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        note = claim(path)
    except OSError as error:
        raise RunError(
            f"cannot write to output '{out}' ({error.strerror or error})", fix="give another --out"
        ) from None
    check_out(out, resume=resume)  # once more: another launch may have begun, and ended, since
    if note is not None:
        print(f"note: {note}", file=sys.stderr)


def _elsewhere(path: Path, here: Mapping[str, Any]) -> list[str]:
    """What differs from the machine of the session before, and may cost the last bit."""
    try:
        before = parse_json((path / "environment.json").read_text(encoding="utf-8"))
        old, new = _bits(before), _bits(here)
    except (OSError, ValueError, AttributeError, TypeError):
        return []  # unknown: it is written anew
    differ = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        # an earlier version did not write all of them
        if old.get(key) != new.get(key) and key.partition(".")[0] in before
    ]
    if not differ:
        return []
    return [
        f"WARNING: this session computes elsewhere than the last one ({'; '.join(differ)}): the "
        "run goes on, but not to the very same bits"
    ]


def _bits(known: Mapping[str, Any]) -> dict[str, Any]:
    """What an environment computes by, by dotted path."""
    found = computing(known)
    features = dict.fromkeys(found.pop("cpu_features", ()), "yes")
    return flatten({**found, "cpu_features": features} if features else found)


def _check_same(
    path: Path, config: BaseModel, may_change: frozenset[str]
) -> tuple[bool, list[str]]:
    """Refuse what cannot go on.

    Returns:
        Whether something of `may_change` changed; and what else did, to be told.
    """
    try:
        before = parse_yaml((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"cannot read '{path}/config.yaml' ({error})") from None
    with suppress(ValidationError):  # what does not fit is named below
        # a run of an earlier version lacks the newer options: they had their defaults
        before = type(config).model_validate(before).model_dump(mode="json")
    old, new = flatten(before), flatten(config.model_dump(mode="json"))
    differ = {
        key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    rounding = _ROUNDING
    if new.get("student.drop_path_way") == "skip":
        rounding = frozenset()  # each part drops a number of its own images
    wrong = [key for key in differ if key not in _HARMLESS | rounding | may_change]
    if wrong:
        extend = "give another length with --extend, " if _extendable(wrong, new) else ""
        raise RunError(
            f"the run in '{path}' had another configuration "
            f"({'; '.join(differ[key] for key in wrong)})",
            fix=f"resume with the same options, {extend}or begin a new run in another --out",
        )
    told = [said for key, said in differ.items() if key in _HARMLESS - _UNSAID]
    parts = [said for key, said in differ.items() if key in _ROUNDING]
    notes = []
    if told:
        notes.append(
            "note: other settings than the run began with, none of which changes a weight: "
            f"{'; '.join(told)}"
        )
    if parts:
        notes.append(
            f"WARNING: this session cuts a batch otherwise than the first ({'; '.join(parts)}): "
            "the run goes on, but not to the very same bits"
        )
    return any(key in may_change for key in differ), notes


def _extendable(wrong: Collection[str], values: Mapping[str, Any]) -> bool:
    """Whether `--extend` is what somebody meant."""
    return "run.extend" in values and set(wrong) <= _LENGTH


def _check_weights(path: Path, weights: Mapping[str, str]) -> dict[str, str]:
    """Refuse other weights; those that the run began from."""
    try:
        before: dict[str, str] = parse_json((path / _WEIGHTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}  # a run of an earlier version
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read '{path / _WEIGHTS}' ({error})") from None
    differ = [
        f"{part}: {before[part]} -> {now}"
        for part, now in weights.items()
        if part in before and before[part] != now
    ]
    if differ:
        raise RunError(
            f"the run in '{path}' began from other weights ({'; '.join(differ)})",
            fix="put the file back, or begin a new run in another --out",
        )
    return before


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dictionary by dotted paths."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {
        k: v for name, value in tree.items() for k, v in flatten(value, f"{prefix}{name}.").items()
    }


def _log_to(file: Path) -> None:
    for handler in list(log.handlers):
        if isinstance(handler, logging.FileHandler):
            log.removeHandler(handler)
            handler.close()
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def saved_steps(folder: Path) -> list[int]:
    """Steps of which there is a checkpoint in `checkpoints/`, oldest first."""
    if not folder.is_dir():
        return []
    names = (p.name for p in folder.iterdir())
    numbers = (n.removeprefix("step-") for n in names if n.startswith("step-"))
    return sorted(int(n) for n in numbers if n.isdecimal())


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a line cut off by a crash is left out."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(parse_json(line))
        except ValueError:
            continue
    return rows

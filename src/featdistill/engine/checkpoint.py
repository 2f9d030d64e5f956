"""Checkpoints: a folder with a manifest and safetensors files; no teacher, no pickled object.

    checkpoints/step-00001000/
        manifest.json       format, step, checksums of the files, anything small
        model.safetensors   the objective's state
        optimizer.safetensors  AdamW's averages by parameter name
        random.safetensors  states of the generators
        average.safetensors  averaged weights, if the run keeps them
        meter.safetensors   sums since the last logged line
    checkpoints/damaged-step-*/  set aside on a resume, for people to look at
    checkpoints/best/       see `best.py`

A checkpoint is written under a temporary name, compared with what was to be written, synced, and
renamed; it is complete if it is there under its own name and its checksums agree.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featdistill.core.errors import RunError
from featdistill.core.parsing import parse_json
from featdistill.core.records import sync, write_json
from featdistill.engine.average import WeightAverage
from featdistill.engine.rundir import saved_steps
from featdistill.engine.tracking import say
from featdistill.engine.writer import Abandoned, Writer
from featdistill.models.weights import file_hash

FORMAT = 2
_UNSEALED = 1  # the format before: its manifest has no checksum of its own
_SEAL = "manifest_sha256"
_TEMPORARY, _REPLACED, _DELETED = ".writing-", ".replaced-", ".deleted-"
_DAMAGED = "damaged-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        step: optimiser steps done.
        files: name -> tensors, on the CPU.
        manifest: everything small.
    """

    path: Path
    step: int
    files: Mapping[str, Mapping[str, Tensor]]
    manifest: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they are.
        keep: how many of the newest to keep.
        writer: in whose thread `save` is called, if it is.
    """

    def __init__(self, folder: Path, *, keep: int = 2, writer: Writer | None = None) -> None:
        self.folder, self.keep, self._writer = folder, keep, writer

    def save(
        self, step: int, files: Mapping[str, Mapping[str, Tensor]], extra: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint durably, then delete those that are too many.

        Raises:
            RunError: the disk refuses, or keeps other bytes; older checkpoints are as they were.
            Abandoned: the writer is to stop; likewise.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        try:
            self.sweep()
            temporary.mkdir(parents=True)
            checksums = {}
            for name, tensors in files.items():
                if self._writer is not None:
                    self._writer.go_on()
                file = temporary / f"{name}.safetensors"
                checksums[file.name] = _write(file, tensors)
            write_json(
                temporary / "manifest.json",
                _sealed({"format": FORMAT, "step": step, "sha256": checksums, **extra}),
            )
            sync(temporary)
            if final.exists():
                os.rename(final, self.folder / f"{_REPLACED}{final.name}")
            os.rename(temporary, final)
            sync(self.folder)
            sync(self.folder.parent)
            self.sweep()
            for old in self.steps()[: -self.keep]:
                self.delete(old)
        except Abandoned:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                self.sweep()
            reason = getattr(error, "strerror", None) or error
            raise RunError(
                f"cannot write the checkpoint '{final}' ({reason})",
                fix="make room or choose another --out; earlier checkpoints are intact",
            ) from None
        return final

    def delete(self, step: int) -> None:
        """Delete a checkpoint; a kill meanwhile leaves no half of it under its name."""
        name = f"step-{step:08d}"
        doomed = self.folder / f"{_DELETED}{name}"
        with suppress(OSError):  # one too many is no reason to end a run
            os.rename(self.folder / name, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        """Clear up after a process that was killed while it wrote, replaced or deleted."""
        for path in self.folder.glob(".*step-*"):
            own = self.folder / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_REPLACED) and not own.exists():
                os.rename(path, own)  # the new one had not come
            elif path.name.startswith((_TEMPORARY, _REPLACED, _DELETED)):
                shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, oldest first."""
        return saved_steps(self.folder)

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step, verified. Raises RunError."""
        return read_checkpoint(self.folder / f"step-{step:08d}")

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there never was one.

        Raises:
            RunError: there are checkpoints, and all are damaged.
        """
        return self._newest()[0]

    def recover(self) -> Checkpoint | None:
        """Likewise, for the process that goes on to write here: leftovers are swept, and damaged
        checkpoints newer than the one that is found are reported and set aside.

        Raises:
            RunError: all are damaged (they then stay where they are), or the disk refuses.
        """
        try:
            self.sweep()
            found, problems = self._newest()
            for step, problem in problems.items():
                where = self._set_aside(step)
                assert found is not None
                say(
                    f"WARNING: {problem}; it is kept as '{where}', and the run goes on from step "
                    f"{found.step}"
                )
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"cannot write to '{self.folder}' ({reason})", fix="make it writable"
            ) from None
        return found

    def _newest(self) -> tuple[Checkpoint | None, dict[int, str]]:
        """The newest whole checkpoint, and what is wrong with those after it."""
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                return self.read(step), problems
            except RunError as error:
                problems[step] = str(error)
        aside = [f"'{path}' is damaged" for path in sorted(self.folder.glob(f"{_DAMAGED}*"))]
        if problems or aside:
            raise RunError(
                "; ".join([*problems.values(), *aside]),
                fix="there is no whole checkpoint to go on from: put one back, or begin a new run "
                "in another --out",
            )
        return None, {}

    def _set_aside(self, step: int) -> Path:
        name = f"{_DAMAGED}step-{step:08d}"
        free = (self.folder / (f"{name}.{n}" if n else name) for n in range(1_000_000))
        where = next(path for path in free if not path.exists())
        os.rename(self.folder / f"step-{step:08d}", where)
        return where


def _write(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors durably and compare what can be read back; the file's SHA-256."""
    given = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(given, file)
    sync(file)
    # one at a time; and not mapped, which in safetensors 0.8 loses 60 bytes of memory a tensor
    with safe_open(file, framework="pt", backend="pread") as found:
        for name, value in given.items():
            if not torch.equal(_bytes(value), _bytes(found.get_tensor(name))):
                raise OSError(errno.EIO, f"'{file.name}' reads back otherwise than it was written")
    return file_hash(file)


def _bytes(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, _SEAL: _seal(manifest)}


def _seal(manifest: Mapping[str, Any]) -> str:
    """A checksum of what a manifest says, however it is spaced."""
    rest = {k: v for k, v in manifest.items() if k != _SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        RunError: a file is absent, damaged or of another format.
    """
    try:
        manifest = parse_json((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] not in (FORMAT, _UNSEALED):
            raise RunError(f"checkpoint '{path}' has format {manifest['format']}, not {FORMAT}")
        sealed = manifest["format"] != _UNSEALED or _SEAL in manifest
        if sealed and manifest[_SEAL] != _seal(manifest):
            raise RunError(
                f"checkpoint file '{path / 'manifest.json'}' is damaged (checksum differs)"
            )
        if path.name != f"step-{manifest['step']:08d}":
            raise RunError(f"checkpoint '{path}' says that it is of step {manifest['step']}")
        files = {}
        for name, checksum in manifest["sha256"].items():
            if file_hash(path / name) != checksum:
                raise RunError(f"checkpoint file '{path / name}' is damaged (checksum differs)")
            files[name.removesuffix(".safetensors")] = load_file(path / name)
        return Checkpoint(path, int(manifest["step"]), files, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"checkpoint '{path}' is damaged ({error})") from None


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which training on does not change.

    Each has memory of its own: safetensors refuses tensors that share it (tied weights).
    """
    return {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()}


def model_state(objective: nn.Module) -> dict[str, Tensor]:
    """A copy of the objective's own tensors."""
    return copied(objective.state_dict())


def training_state(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> dict[str, dict[str, Tensor]]:
    """A copy of everything that a run needs to go on, as named tensors."""
    state = {
        "model": model_state(objective),
        "optimizer": _optimizer_tensors(optimizer),
        "random": _random_tensors(),
    }
    if average is not None:
        state["average"] = copied(average.state_dict())
    return state


def restore(
    checkpoint: Checkpoint,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> None:
    """Put a checkpoint's state back.

    Raises:
        RunError: it is of another model.
    """
    try:
        objective.load_state_dict(dict(checkpoint.files["model"]))
        _restore_optimizer(checkpoint.files["optimizer"], optimizer)
        if average is not None:
            average.load_state_dict(checkpoint.files["average"])
    except (KeyError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise RunError(f"checkpoint '{checkpoint.path}' is not of this model ({line})") from None
    restore_random(checkpoint.files["random"])


def _named(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return copied(
        {
            f"{name}/{part}": value
            for name, parameter in _named(optimizer).items()
            for part, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
    )


def _restore_optimizer(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    parameters = _named(optimizer)
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        parameter = parameters[name]
        # AdamW wants its step counter as float32 where the parameter is, its averages alike
        optimizer.state[parameter][part] = value.to(parameter.device)


def _random_tensors() -> dict[str, Tensor]:
    """The global generators' states: torch's, NumPy's and Python's."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    assert isinstance(keys, np.ndarray)
    _, words, spare = random.getstate()
    states = {
        "cpu": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss]),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor(words),
    }
    if spare is not None:
        states["python_gauss"] = torch.tensor(spare, dtype=torch.float64)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: Mapping[str, Tensor]) -> None:
    """Put the global generators back; a checkpoint of an earlier version has torch's alone."""
    torch.set_rng_state(states["cpu"])
    if "numpy" in states:
        *keys, place, has_gauss = states["numpy"].tolist()
        gauss = states["numpy_gauss"].item()
        np.random.set_state(("MT19937", np.array(keys, np.uint32), place, has_gauss, gauss))
    if "python" in states:
        spare = states["python_gauss"].item() if "python_gauss" in states else None
        random.setstate((3, tuple(states["python"].tolist()), spare))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

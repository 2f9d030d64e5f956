"""Checkpoints: a folder with a manifest and safetensors files; no teacher, no pickled object.

    checkpoints/step-00001000/
        manifest.json       format, step, checksums of the files, anything small
        model.safetensors   the objective's state
        optimizer.safetensors  AdamW's averages by parameter name
        random.safetensors  states of the generators
        average.safetensors  averaged weights, if the run keeps them
    checkpoints/best/       see `best.py`

A checkpoint is written under a temporary name, synced, and renamed; it is complete if it is there
under its own name and its checksums agree.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featdistill.core.errors import RunError
from featdistill.core.records import sync, write_json
from featdistill.engine.average import WeightAverage
from featdistill.models.weights import file_hash

FORMAT = 1
_TEMPORARY = ".writing-"


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
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(
        self, step: int, files: Mapping[str, Mapping[str, Tensor]], extra: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint durably, then delete those that are too many.

        Raises:
            RunError: the disk refuses; older checkpoints are as they were.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            checksums = {}
            for name, tensors in files.items():
                file = temporary / f"{name}.safetensors"
                save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file)
                sync(file)
                checksums[file.name] = file_hash(file)
            manifest = {"format": FORMAT, "step": step, "sha256": checksums, **extra}
            write_json(temporary / "manifest.json", manifest)
            sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise RunError(
                f"cannot write the checkpoint '{final}' ({reason})",
                fix="make room or choose another --out; earlier checkpoints are intact",
            ) from None
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{old:08d}")
        return final

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        names = (p.name for p in self.folder.iterdir())
        numbers = (n.removeprefix("step-") for n in names if n.startswith("step-"))
        return sorted(int(n) for n in numbers if n.isdecimal())

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step, verified. Raises RunError."""
        return read_checkpoint(self.folder / f"step-{step:08d}")

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there never was one.

        Raises:
            RunError: there are checkpoints, and all are damaged.
        """
        steps = self.steps()
        problems = []
        for step in reversed(steps):
            try:
                return self.read(step)
            except RunError as error:
                problems.append(str(error))
        if problems:
            raise RunError("; ".join(problems), fix="there is no whole checkpoint to go on from")
        return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        RunError: a file is absent, damaged or of another format.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise RunError(f"checkpoint '{path}' has format {manifest['format']}, not {FORMAT}")
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


def model_state(objective: nn.Module) -> dict[str, Tensor]:
    """The objective's own tensors."""
    # clones: safetensors refuses tensors that share memory (tied weights)
    return {k: v.clone() for k, v in objective.state_dict().items()}


def training_state(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Everything that a run needs to go on, as named tensors."""
    state = {
        "model": model_state(objective),
        "optimizer": _optimizer_tensors(optimizer),
        "random": _random_tensors(),
    }
    if average is not None:
        state["average"] = {k: v.clone() for k, v in average.state_dict().items()}
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
    random = checkpoint.files["random"]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def _named(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{part}": value.clone()
        for name, parameter in _named(optimizer).items()
        for part, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    parameters = _named(optimizer)
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        parameter = parameters[name]
        # AdamW wants its step counter as float32 where the parameter is, its averages alike
        optimizer.state[parameter][part] = value.to(parameter.device)


def _random_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states

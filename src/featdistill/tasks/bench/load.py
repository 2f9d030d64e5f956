"""`bench load`: how long until something happens, beside what torch and timm take by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import featdistill
from featdistill.config.commands import BenchConfig
from featdistill.core.errors import ModelError, RunError
from featdistill.engine.runtime import pick_device
from featdistill.engine.tracking import Countdown
from featdistill.models.load import load_backbone
from featdistill.models.timm_models import create
from featdistill.tasks.bench.common import Times, in_turn, ratio, seconds_of, set_up, table

_IMPORTS = "import torch, timm"
_HELP = "featdistill --help"
_PACKAGE = "import featdistill"
_STEP = "command to first step"
_PROCESSES = {_IMPORTS: "imports", _HELP: "help", _PACKAGE: "package", _STEP: "first_step"}
_SUFFIXES = (".safetensors", ".pth")
_TINY = (
    *("--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "random"),
    *("--teacher-image-size", "64", "--student", "vit-t", "--data", "digits"),
    # a few steps more than one: what outlives a benchmark that was killed ends by itself
    *("--image-size", "64", "--batch-size", "32", "--steps", "20", "--run.log_every", "1"),
)


@dataclass(frozen=True)
class LoadCost:
    """Seconds, over rounds in which all took their turns.

    Attributes:
        processes: whole processes, by what they do: the imports of torch and timm alone, the help,
            the import of this package, and a small distillation up to its first step.
        files: checkpoint files by suffix: loaded plainly, and as a `Backbone`.
        size: bytes of such a file.
        set_up: where and how it ran.
    """

    processes: Mapping[str, Times]
    files: Mapping[str, tuple[Times, Times]]
    size: int
    set_up: Mapping[str, Any]

    def lines(self) -> list[str]:
        at, imports = self.set_up, self.processes[_IMPORTS]
        rows: list[Sequence[str]] = [("", "median", "from", "to", "ratio")]
        rows += [
            _row(f"python, {name}" if name in (_IMPORTS, _PACKAGE) else name, times, imports)
            for name, times in self.processes.items()
        ]
        for suffix, (plain, ours) in self.files.items():
            rows.append(_row(f"{suffix}, plainly", plain, plain))
            rows.append(_row(f"{suffix}, load_backbone", ours, plain))
        head = (
            f"{at['model']} ({self.size / 2**20:,.0f} MiB a file), {at['device']}, "
            f"{at['rounds']} rounds in turn"
        )
        return [head, *table(rows)]

    def record(self) -> dict[str, Any]:
        imports = self.processes[_IMPORTS]
        return {
            "processes": {
                _PROCESSES[name]: {**times.record(), "ratio": ratio(times, imports)}
                for name, times in self.processes.items()
            },
            "files": {
                suffix.removeprefix("."): {
                    "plain": plain.record(),
                    "load_backbone": ours.record(),
                    "ratio": ratio(ours, plain),
                }
                for suffix, (plain, ours) in self.files.items()
            },
            "bytes": self.size,
            "set_up": dict(self.set_up),
        }


def _row(name: str, times: Times, reference: Times) -> tuple[str, ...]:
    seconds = (times.median, min(times.seconds), max(times.seconds))
    return (name, *(f"{s:.3f} s" for s in seconds), f"{ratio(times, reference):.2f}")


def run(config: BenchConfig) -> LoadCost:
    """Time processes, then files."""
    name = config.model.removeprefix("timm/")
    if name == config.model:
        raise ModelError(f"bench load writes files of '{config.model}'", expected="timm/NAME")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = _write(name, folder)
        processes = _timed("start-up", _commands(config, folder), config.rounds)
        cpu = torch.device("cpu")
        works = {
            f"{way} {suffix}": partial(seconds_of, partial(load, name, file), cpu)
            for suffix, file in files.items()
            for way, load in (("plain", load_plainly), ("ours", _load))
        }
        times = _timed("files", works, config.rounds)
        size = files[_SUFFIXES[0]].stat().st_size
    return LoadCost(
        processes=processes,
        files={s: (times[f"plain {s}"], times[f"ours {s}"]) for s in _SUFFIXES},
        size=size,
        set_up=set_up(cpu, model=config.model, rounds=config.rounds),
    )


def _timed(title: str, works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Times]:
    bar = Countdown(title, len(works) * (rounds + 1), "runs")
    try:
        return in_turn(works, rounds=rounds, told=bar.update)
    finally:
        bar.stop()


def load_plainly(name: str, file: Path) -> nn.Module:
    """The reference: what the documentation of timm and torch says, and no check at all."""
    model = timm.create_model(name)
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    else:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(tensors)
    return model.eval()


def _load(name: str, file: Path) -> nn.Module:
    return load_backbone(f"timm/{name}", weights=str(file))


def _write(name: str, folder: Path) -> dict[str, Path]:
    tensors = create(name).state_dict()
    files = {suffix: folder / f"model{suffix}" for suffix in _SUFFIXES}
    save_file(tensors, files[".safetensors"])
    torch.save(tensors, files[".pth"])
    return files


def _commands(config: BenchConfig, folder: Path) -> dict[str, Callable[[], float]]:
    options = ["--device", pick_device(config.device)]
    if config.threads is not None:
        options += ["--run.threads", str(config.threads)]
    return {
        _IMPORTS: partial(_whole, ["-c", _IMPORTS]),
        _HELP: partial(_whole, ["-m", "featdistill", "--help"]),
        _PACKAGE: partial(_whole, ["-c", _PACKAGE]),
        _STEP: partial(_first_step, [*_TINY, *options], folder),
    }


def _whole(words: Sequence[str]) -> float:
    """Seconds of a process from its start to its end."""
    began = time.perf_counter()
    with _python(words) as process:
        _, said = process.communicate()
        seconds = time.perf_counter() - began
    if process.returncode:
        raise _failed(words, said)
    return seconds


def _first_step(options: Sequence[str], folder: Path) -> float:
    """Seconds from the start of a distillation until it has written its first step's line."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        words = ["-m", "featdistill", "distill", *options, "--out", str(Path(place) / "run")]
        metrics = Path(place) / "run" / "metrics.jsonl"
        began = time.perf_counter()
        with _python(words, to=Path(place) / "said.txt") as process:
            while not _stepped(metrics):
                if process.poll() is not None:
                    raise _failed(words, (Path(place) / "said.txt").read_text("utf-8"))
                time.sleep(0.005)
            return time.perf_counter() - began


def _stepped(metrics: Path) -> bool:
    """Whether a run's metrics tell of a training step (its first line may be a score before it)."""
    try:
        return b'"loss"' in metrics.read_bytes()
    except FileNotFoundError:
        return False


@contextmanager
def _python(words: Sequence[str], to: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A fresh Python with this package, which is gone at the end, and its children with it."""
    home = str(Path(featdistill.__file__).parent.parent)
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    with open(to or os.devnull, "w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said if to else subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _failed(words: Sequence[str], said: str) -> RunError:
    last = next(iter(reversed(said.strip().splitlines())), "it said nothing")
    return RunError(f"'python {' '.join(words)}', which was to be timed, failed: {last}")

"""A distillation in a process of its own, which writes down at each evaluation how large it is.

    python -m tests.soak.session FOLDER STEPS EVERY [leaking]

With `leaking` it loses a little at each evaluation of everything that is measured: the negative
control.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import featdistill
from featdistill.data import loader
from featdistill.data.loader import collate
from featdistill.engine.loop import _Loop

KIB = 1024
# what the control loses from one evaluation to the next; whole handles and threads now and then
LEAK = {
    "memory_kib": 64,
    "worker_kib": 32,
    "disk_kib": 2,
    "files": 1,
    "handles": 0.1,
    "threads": 0.1,
}

_SHAPE = {"width": 32, "depth": 2, "heads": 2, "patch": 4}
_SETTINGS: dict[str, Any] = {
    "data": "digits",
    "image_size": 8,
    "batch_size": 8,
    "device": "cpu",
    "lr": 1e-3,
}


def anonymous(pid: int | str) -> float:
    """A process's own memory, KiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0.0)


def children() -> list[int]:
    """Of the main thread and all others."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def sample(folder: Path, step: int) -> dict[str, float]:
    """How large the process, its loading processes and its folder are."""
    kept = [p for p in (folder / "checkpoints").rglob("*") if p.is_file()]
    others = [p for p in folder.iterdir() if p.is_file()]
    logs = [p for p in others if p.name.startswith(("metrics.jsonl", "events.", "log.txt"))]
    rest = [p for p in others if p not in logs]
    workers = children()
    return {
        "step": step,
        "memory_kib": anonymous("self"),
        "worker_kib": sum(map(anonymous, workers)),
        "workers": len(workers),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(kept) + len(rest),
        "disk_kib": sum(p.stat().st_size for p in kept + rest) / KIB,
        "log_kib": sum(p.stat().st_size for p in logs) / KIB,
    }


class _Leak:
    """Loses a little of everything at each evaluation, and in loading processes at each batch."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.count = 0
        self.memory: list[bytes] = []
        self.handles: list[Any] = []

    def collate(self, samples: Any) -> Any:
        self.memory.append(os.urandom(int(LEAK["worker_kib"] * KIB / self.every)))
        return collate(samples)

    def at_evaluation(self) -> None:
        self.count += 1
        self.memory.append(os.urandom(int(LEAK["memory_kib"]) * KIB))
        (self.folder / f"checkpoints/forgotten-{self.count}").write_bytes(
            bytes(int(LEAK["disk_kib"]) * KIB)
        )
        if self.count % 10 == 0:
            self.handles.append(open("/dev/null", "rb"))  # noqa: SIM115 - that is the point
            threading.Thread(target=threading.Event().wait, daemon=True).start()


def main(folder: Path, steps: int, every: int, leaking: bool) -> None:
    """Pretrain a teacher, and distil it for long."""
    teacher, out = folder / "teacher", folder / "run"
    shape = {"name": "vit-t", **_SHAPE}
    featdistill.pretrain(model=shape, steps=2, out=teacher, run={"tensorboard": False}, **_SETTINGS)
    leak, real = _Leak(out, every), _Loop._evaluate
    samples = open(folder / "samples.jsonl", "w", buffering=1)  # noqa: SIM115 - open to the end

    def evaluate(self: _Loop, done: int, *more: Any) -> None:
        self.writer.room_for(done)  # its copy is no part of what the run keeps
        if done:
            samples.write(json.dumps(sample(out, done)) + "\n")
            if leaking:
                leak.at_evaluation()
        real(self, done, *more)

    with (
        patch.object(_Loop, "_evaluate", evaluate),
        patch.object(loader, "collate", leak.collate if leaking else collate),
    ):
        featdistill.distill(
            teacher=teacher,
            student={**shape, "drop_path": 0.3},
            out=out,
            steps=steps,
            workers=2,
            run={"threads": 1, "eval_every": every, "checkpoint_every": every},
            best="holdout_loss",
            holdout="64",
            **_SETTINGS,
        )
    os._exit(0)  # the control's threads would not end


if __name__ == "__main__":
    words = sys.argv[1:]
    main(Path(words[0]), int(words[1]), int(words[2]), "leaking" in words[3:])

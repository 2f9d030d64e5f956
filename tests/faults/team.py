"""Starts several processes of one run from the server that has imported everything (gloo)."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import calm
from tests.faults.harness import CONTEXT, PATIENCE


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def together(
    folder: Path,
    world: int,
    *,
    target: Callable[[Path, dict[str, Any]], None] = calm.member,
    **options: Any,
) -> list[int]:
    """A session of so many processes; their exit statuses, negative: the signal that ended it."""
    folder.mkdir(exist_ok=True)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world),
    }
    processes = []
    for rank in range(world):
        environment = {**shared, calm.RANK: str(rank)}
        given = {"devices": world, "environment": environment, **options}
        processes.append(CONTEXT.Process(target=target, args=(folder, given)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    hanging = [p for p in processes if p.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"processes of '{folder}' hang: {said(folder)}"
    return [int(p.exitcode or 0) for p in processes]


def said(folder: Path) -> str:
    """What all processes said."""
    return "".join(p.read_text() for p in sorted(folder.glob("said-*.txt")))


def order(folder: Path) -> list[list[int]]:
    """The images of each step in the order of the global batch, whichever process had them."""
    seen: dict[int, dict[int, int]] = {}
    for file in folder.glob("consumed-*.jsonl"):
        for step, positions, indices in map(json.loads, file.read_bytes().splitlines()):
            for position, index in zip(positions, indices, strict=True):
                assert position not in seen.setdefault(step, {}), "twice"
                seen[step][position] = index
    return [[seen[step][place] for place in sorted(seen[step])] for step in sorted(seen)]

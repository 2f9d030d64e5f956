"""One file a command: it assembles the parts below, and does nothing else."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from featdistill.config.commands import Command
from featdistill.engine.lock import released
from featdistill.engine.peers import one_fate
from featdistill.tasks.first_look import first_look

_HOMES = {
    "quickstart": "quickstart",
    "check": "check",
    "distill": "distill",
    "compare": "compare",
    "finetune": "finetune",
    "probe": "probe",
    "knn": "knn",
    "predict": "predict",
    "features": "features",
    "segment": "segment",
    "diagnose": "diagnose",
    "landscape": "landscape",
    "curvature": "curvature",
    "pretrain": "pretrain",
    "export": "export",
    "report": "report",
    "models": "models",
    "recipes": "recipes",
    "bench": "bench",
}


def home_of(command: str) -> ModuleType:
    """The module of a command; to import it brings torch, for most of them."""
    return import_module(f"featdistill.tasks.{_HOMES[command]}")


def run_command(command: str, config: Command) -> Any:
    """Run a command; what it returns is the same as its Python function's result."""
    first_look(config)
    try:
        with released(), one_fate():
            return home_of(command).run(config)
    except RuntimeError as error:
        from featdistill.data.workers import trouble_of

        trouble = trouble_of(error, None)
        if trouble is None:
            raise
        raise trouble from None

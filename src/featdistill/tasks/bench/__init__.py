"""`featdistill bench`: what a part of the project costs, beside what it costs done plainly."""

from __future__ import annotations

import json
from importlib import import_module

from featdistill.config.commands import BenchConfig
from featdistill.engine.runtime import limit_threads
from featdistill.engine.tracking import say
from featdistill.tasks.bench.common import Outcome

_HOMES = {
    "step": "step",
    "data": "data",
    "caches": "caches",
    "load": "load",
    "diagnose": "attention",
    "landscape": "landscape",
}


def run(config: BenchConfig) -> Outcome:
    """Time it, and say what was found: a table, or one JSON object on standard output."""
    limit_threads(config.threads)
    found: Outcome = import_module(f"{__name__}.{_HOMES[config.what]}").run(config)
    if config.as_json:
        print(json.dumps(found.record(), indent=2))
    else:
        say("\n".join(found.lines()))
    return found

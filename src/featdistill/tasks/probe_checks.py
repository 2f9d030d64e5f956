"""What of `probe`'s options and data does not go together; said before a model is loaded."""

from __future__ import annotations

from featdistill.config.commands import ProbeCommandConfig
from featdistill.core.errors import ConfigError
from featdistill.data.sources import Source
from featdistill.data.splits import label_budget
from featdistill.engine.batches import check_batch
from featdistill.tasks.common import naming_problems
from featdistill.tasks.probe_grid import labels_of
from featdistill.tasks.probe_online import schedule_for


def check_options(config: ProbeCommandConfig) -> list[str]:
    """The models' names; every option that does not go with the others is said."""
    online = config.probe.style == "online"
    problems = naming_problems(config.models, names=config.names, weights=config.weights)
    names = list(config.names or config.models)
    schedule, run = config.schedule, config.run
    of_online = {
        "--epochs": schedule.epochs is not None,
        "--steps": schedule.steps is not None,
        "--lr": config.probe.online.lr is not None,
        "--run.devices": run.devices > 1,
        "--run.nodes": run.nodes > 1,
    }
    instead = {
        "--epochs": "--solver sgd --probe.grid.steps",
        "--steps": "--solver sgd --probe.grid.steps",
        "--lr": "--solver sgd --lrs",
    }
    if not online:
        problems += [
            f"{option} is for --style online"
            + (f"; the grid has {instead[option]}" if option in instead else "")
            for option, given in of_online.items()
            if given
        ]
    elif config.probe.grid.crops:
        problems.append("--crops is for --style grid; online draws a new crop in each epoch")
    problems += _solver_problems(config)
    if run.micro_batches > 1:
        problems.append("--run.micro_batches is of no use here: no gradient passes the model")
    if schedule.stop_at is not None:
        problems.append("--schedule.stop_at is not for probe, which resumes by itself")
    if problems:
        raise ConfigError(problems)
    return names


def _solver_problems(config: ProbeCommandConfig) -> list[str]:
    grid = config.probe.grid
    if config.probe.style == "online" or grid.solver == "sgd":
        return []
    problems = []
    if grid.lrs is not None:
        problems.append("--lrs is for --solver sgd; lbfgs finds the minimum, whatever the rate")
    if grid.steps is not None:
        problems.append("--probe.grid.steps is for --solver sgd; lbfgs ends at the minimum")
    if grid.weight_decays and min(grid.weight_decays) <= 0:
        problems.append(
            "--weight-decays 0 is for --solver sgd; without a decay, classes that can be parted "
            "have no minimum"
        )
    return problems


def check_sizes(config: ProbeCommandConfig, train: Source) -> None:
    """Refuse what cannot be, before any model is loaded."""
    budget = config.data.labels
    for seed in config.seeds:
        if config.probe.style == "grid":
            labels_of(train, config.probe.grid, budget=budget, seed=seed)
        else:
            mine = train if budget is None else label_budget(train, budget, seed)
            schedule_for(config, len(mine))
    processes = config.run.devices * config.run.nodes
    check_batch(config.data.batch_size, processes=processes, micro_batches=1)

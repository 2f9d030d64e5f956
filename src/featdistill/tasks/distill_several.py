"""`featdistill distill --student A --student B`: several students of one pass of the teacher.

OUT/A, OUT/B, ... are each the folder of a run, as its student alone would have left it, to the bit;
OUT itself holds the configuration of all and the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from featdistill.config.commands import DistillConfig
from featdistill.core.seeds import SampleStream
from featdistill.core.types import Batch
from featdistill.engine.batches import halved, is_out_of_memory
from featdistill.engine.plan import FitResult
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.runtime import Runtime
from featdistill.engine.together import Learner, fit_together
from featdistill.engine.tracking import duration, log, say
from featdistill.objectives.distillation import FeatureDistillation, taught_together
from featdistill.tasks.assembly import Assembly, assemble_all, optimizer_of, students_of
from featdistill.tasks.distill import (
    DistillResult,
    announce,
    keep,
    keep_best,
    plan_to_distill,
    say_next,
    teach,
    with_cache,
)
from featdistill.tasks.signal import Signal
from featdistill.tasks.teacher_cache import TeacherPass


def run_several(config: DistillConfig) -> DistillResult:
    """Distil several students, and export each.

    Raises:
        NonFiniteError: of a student whose loss or gradient was no number; the others are finished.
    """
    check_out(config.run.out, resume=config.run.resume)
    configs = students_of(config)
    assemblies = with_cache(config, assemble_all(configs))
    runtime = assemblies[0].runtime
    lines = announce(config, assemblies[0], assemblies[1:])
    steps = assemblies[0].schedule.steps
    folder = open_run(
        config.run.out, config, resume=config.run.resume, first=runtime.first, steps=steps
    )
    log.info("\n".join(lines))
    resumed = {name: _goes_on(config, folder / name) for name in configs}
    for assembly, (name, mine) in zip(assemblies, configs.items(), strict=True):
        open_run(
            mine.run.out,
            mine,
            resume=resumed[name],
            first=runtime.first,
            weights=assembly.weights,
            log_here=False,
            steps=steps,
        )
    taught = teach(config, assemblies, folder)
    learners = [
        _learner(configs[a.name], a, folder / a.name, taught, resume=resumed[a.name])
        for a in assemblies
    ]
    together = fit_together(
        learners,
        runtime=runtime,
        share=TeacherShare([a.objective for a in assemblies], config, runtime),
    )
    found = {
        a.name: _finish(configs[a.name], a, folder / a.name, together.results[a.name])
        for a in assemblies
        if a.name in together.results
    }
    if together.failures:
        runtime.barrier()  # one that ends badly ends all, and the first process exports the others
        raise next(iter(together.failures.values()))
    if all(result.finished for result in together.results.values()) and runtime.first:
        say_next(config, [str(result.out) for result in found.values()])
    steps = min(result.steps for result in found.values())
    seconds = max(result.seconds for result in found.values())
    return DistillResult(folder, None, steps, seconds, {}, found)


def _goes_on(config: DistillConfig, folder: Path) -> bool:
    """Whether a student's run is resumed; a kill may have come before it had a folder."""
    return config.run.resume and (folder / "config.yaml").is_file()


def _learner(
    config: DistillConfig,
    assembly: Assembly,
    folder: Path,
    taught: TeacherPass | None,
    *,
    resume: bool,
) -> Learner:
    plan = plan_to_distill(config, assembly, taught)
    signal = Signal(config, assembly, plan, folder)
    return Learner(
        name=assembly.name,
        objective=assembly.objective,
        optimizer=optimizer_of(config, assembly.objective),
        plan=plan,
        folder=folder,
        resume=resume,
        evaluate=signal if signal.wanted else None,
    )


class TeacherShare:
    """The teacher's pass of a step, for all students at once.

    It is taken as each student alone would have it taken: the same micro-batches, the same
    precision, the same addresses of what is drawn.
    """

    def __init__(
        self, objectives: Sequence[FeatureDistillation], config: DistillConfig, runtime: Runtime
    ) -> None:
        self.objectives, self.runtime = objectives, runtime
        self.seed, self.parts = config.run.seed, config.run.micro_batches

    def __call__(self, step: int, batch: Batch) -> list[Batch]:
        if batch.taught is not None:
            return [batch for _ in self.objectives]
        batch = batch.to(self.runtime.device)
        while (said := self._asked(step, batch)) is None:
            self.parts = halved(self.objectives[0], images=len(batch), parts=self.parts)
        # students of the same layer share a tensor, and shall share it joined too
        joined = {tuple(map(id, parts)): torch.cat(parts) for parts in zip(*said, strict=True)}
        return [
            replace(batch, taught=joined[tuple(map(id, parts))])
            for parts in zip(*said, strict=True)
        ]

    def _asked(self, step: int, batch: Batch) -> list[list[torch.Tensor]] | None:
        """Of each micro-batch, what is said to each student; None if memory was too small."""
        said = []
        try:
            for part in batch.split(self.parts):
                ready = replace(part, stream=SampleStream(self.seed, step, part.positions))
                with self.runtime.autocast():
                    said.append(taught_together(self.objectives, self.runtime.batch(ready)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return said


def _finish(
    config: DistillConfig, assembly: Assembly, folder: Path, result: FitResult
) -> DistillResult:
    export = None
    if not result.finished:
        steps = assembly.schedule.steps
        say(f"{assembly.name}: stopped at step {result.step} of {steps}; go on with --resume")
    elif assembly.runtime.first:
        exported = keep(config, assembly, folder, result)
        export = exported.folder
        say(
            f"{assembly.name}: done in {duration(result.seconds)} (with the others); for plain "
            f"timm, checked to {exported.difference:.0e}: {export}"
        )
        keep_best(config, assembly, folder, result)
    return DistillResult(folder, export, result.step, result.seconds, result.last)

"""`featdistill quickstart`: the whole loop on scikit-learn's digits, offline, in minutes.

Contrastive pre-training of a small teacher, distillation into a fresh student, fine-tuning of both
(and of a fresh model) under one recipe over three seeds, one report. docs/quickstart.md says how
this set-up was chosen, and what its result does and does not say.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featdistill.config.commands import QuickstartConfig
from featdistill.config.resolve import resolve
from featdistill.engine.rundir import check_out
from featdistill.engine.tracking import duration, say
from featdistill.tasks import run_command
from featdistill.tasks.compare import CompareResult


@dataclass(frozen=True)
class QuickstartResult:
    """The folders of the three steps, and the comparison's result."""

    teacher: Path
    student: Path
    compared: CompareResult
    seconds: float


def steps(config: QuickstartConfig) -> list[tuple[str, str, dict[str, Any]]]:
    """The commands of the loop: (what it does, command, options)."""
    out = Path(config.out)
    teacher, student = str(out / "teacher"), str(out / "student")
    run = {"seed": config.seed, "device": config.device}
    return [
        (
            "pre-train a teacher without labels (SimCLR)",
            "pretrain",
            {"recipe": "quickstart-pretrain", "out": teacher, **run},
        ),
        (
            "distil it into a fresh student",
            "distill",
            {"recipe": "quickstart-distill", "teacher": teacher, "out": student, **run},
        ),
        (
            "fine-tune teacher, student and a fresh model, and compare",
            "compare",
            {
                "recipe": "quickstart-compare",
                "teacher": teacher,
                "student": student,
                "out": str(out / "compared"),
                **run,
            },
        ),
    ]


def run(config: QuickstartConfig) -> QuickstartResult:
    """Run the loop; with `resume`, go on where it stopped."""
    began = time.monotonic()
    todo = steps(config)
    if not config.resume:
        check_out(config.out, resume=False)
    results = []
    for number, (what, command, options) in enumerate(todo, 1):
        say(f"\n[{number}/{len(todo)}] {what}\n")
        options = dict(options)
        recipe = options.pop("recipe")
        begun = (Path(options["out"]) / "config.yaml").is_file()
        resolved = resolve(command, {**options, "resume": config.resume and begun}, recipe=recipe)
        results.append(run_command(command, resolved))
    seconds = time.monotonic() - began
    compared: CompareResult = results[2]
    say(
        f"\nThe whole loop took {duration(seconds)}. Open the report: {compared.report}\n"
        "\nYour own images next (a folder, or a Hugging Face parquet):\n"
        "  featdistill check   --teacher timm/vit_base_patch16_224.dino --data IMAGES\n"
        "  featdistill distill --teacher timm/vit_base_patch16_224.dino --data IMAGES "
        "--out runs/distilled"
    )
    return QuickstartResult(results[0].out, results[1].out, compared, seconds)

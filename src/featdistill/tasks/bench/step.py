"""`bench step`: a training step of `distill` beside the official code's, and beside the limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from featdistill.config.commands import BenchConfig
from featdistill.core.errors import RunError
from featdistill.engine.runtime import pick_device
from featdistill.engine.tracking import say
from featdistill.models.student_sizes import check_student
from featdistill.tasks.bench.common import Times, ratio, set_up, table
from featdistill.tasks.bench.processes import Distant, distant
from featdistill.tasks.bench.ways import COPIED, PRODUCT, WAYS, Setting, make, products

_OURS = "featdistill"
_REFERENCE = "reference"


@dataclass(frozen=True)
class StepCost:
    """Times over rounds in which all took turns.

    Attributes:
        times: seconds of a step, by way; the first is the reference, the last `distill`'s own.
        losses: of each way's first step: they start from the same weights and images.
        products: seconds of a product of two matrices of side 3072, by precision; and of a copy.
        flops: operations of a step for each image, by way.
        precision: of each way's products.
        images: of a step.
        set_up: where and how it ran.
    """

    times: Mapping[str, Times]
    losses: Mapping[str, float]
    products: Mapping[str, Times]
    flops: Mapping[str, int]
    precision: Mapping[str, str]
    images: int
    set_up: Mapping[str, Any]

    def ceiling(self, way: str) -> float:
        """Operations a second of large products in a way's precision."""
        return PRODUCT / self.products[self.precision[way]].median

    @property
    def copied(self) -> float:
        """Bytes a second that a copy reads and writes."""
        return 2 * COPIED / self.products["copy"].median

    def fraction(self, way: str) -> float:
        """Of the ceiling that a way reaches."""
        return self.flops[way] * self.images / self.times[way].median / self.ceiling(way)

    def lines(self) -> list[str]:
        at = self.set_up
        rows = [("", "step", "range", "images/s", "times", "of the ceiling", "first loss")]
        for way, times in self.times.items():
            rows.append(
                (
                    way,
                    f"{times.median:.3f} s",
                    f"{min(times.seconds):.3f}-{max(times.seconds):.3f}",
                    f"{self.images / times.median:,.2f}",
                    f"{ratio(self.times[_REFERENCE], times):.2f}",
                    f"{self.fraction(way):.0%} ({self.precision[way]})",
                    f"{self.losses[way]:.4f}",
                )
            )
        rates = ", ".join(
            f"{name} {PRODUCT / times.median / 1e9:,.0f}"
            for name, times in self.products.items()
            if name != "copy"
        )
        return [
            f"{at['teacher']} -> {at['student']}, {self.images} images a step, {at['device']}, "
            f"{at['threads']} threads, {at['rounds']} rounds in turn",
            *table(rows),
            f"{self.flops[_OURS] / 1e9:,.1f} GFLOP an image; products of side 3072, GFLOP/s: "
            f"{rates}; a copy in memory: {self.copied / 1e9:,.0f} GB/s",
        ]

    def record(self) -> dict[str, Any]:
        ours = self.times[_OURS]
        return {
            "images_per_second": self.images / ours.median,
            "step_seconds": ours.record(),
            "reference_images_per_second": self.images / self.times[_REFERENCE].median,
            "reference_step_seconds": self.times[_REFERENCE].record(),
            "ratio": ratio(self.times[_REFERENCE], ours),
            "flops_per_image": self.flops[_OURS],
            "ceiling_flops_per_second": self.ceiling(_OURS),
            "fraction_of_ceiling": self.fraction(_OURS),
            "copy_bytes_per_second": self.copied,
            "ways": {
                way: {
                    "step_seconds": times.record(),
                    "ratio": ratio(self.times[_REFERENCE], times),
                    "fraction_of_ceiling": self.fraction(way),
                    "first_loss": self.losses[way],
                }
                for way, times in self.times.items()
            },
            "set_up": dict(self.set_up),
        }


def run(config: BenchConfig) -> StepCost:
    """Time steps, each way in a process of its own."""
    check_student(config.student)
    device: Literal["cpu", "cuda"] = "cuda" if pick_device(config.device) == "cuda" else "cpu"
    setting = Setting(
        teacher=config.teacher,
        student=config.student,
        image_size=config.image_size or 224,
        batch_size=config.batch_size or (4 if device == "cpu" else 128),
        device=device,
        threads=config.threads,
        precision=config.precision.value,
        cached=config.cached,
        drop_path=config.drop_path,
    )
    if config.profile is not None:
        _profile(setting, Path(config.profile))
    ways = list(WAYS) if config.changes else [_REFERENCE, _OURS]
    works: dict[str, Any] = {way: (make, {"way": way, "setting": setting}) for way in ways} | {
        "products": (products, {"device": device, "threads": config.threads})
    }
    with distant(works) as works_there:
        found = _rounds(works_there, config.rounds)
    first = {way: found[way][0] for way in ways}
    rates = found["products"]
    return StepCost(
        times={way: Times(tuple(r["seconds"] for r in found[way][1:])) for way in ways},
        losses={way: r["loss"] for way, r in first.items()},
        products={
            name: Times(tuple(r[name] for r in rates[1:])) for name in ("float32", "bf16", "copy")
        },
        flops={way: r["flops"] for way, r in first.items()},
        precision={way: r["precision"] for way, r in first.items()},
        images=setting.batch_size,
        set_up=set_up(
            torch.device(device),
            teacher=setting.teacher,
            student=setting.student,
            image_size=setting.image_size,
            images=setting.batch_size,
            rounds=config.rounds,
            precision=first[_OURS]["precision"],
            cached=setting.cached,
            drop_path=setting.drop_path,
        )
        | {"threads": first[_OURS]["threads"]},
    )


def _rounds(works: Mapping[str, Distant], rounds: int) -> dict[str, list[Any]]:
    """What each work returned: once cold, and then in each round; one more round warms up."""
    found: dict[str, list[Any]] = {name: [work()] for name, work in works.items()}
    for number in range(rounds + 1):
        for name, work in works.items():
            result = work()
            if number:
                found[name].append(result)
    return found


def _profile(setting: Setting, folder: Path) -> None:
    """Write a trace of one step, and a table of where its time goes."""
    from torch.profiler import ProfilerActivity, profile

    if folder.exists() and not folder.is_dir():
        raise RunError(f"'{folder}' is a file", fix="give --profile a folder")
    folder.mkdir(parents=True, exist_ok=True)
    work = make(_OURS, setting)
    for _ in range(2):
        work()
    activities = [ProfilerActivity.CPU]
    if setting.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as seen:
        work()
    seen.export_chrome_trace(str(folder / "trace.json"))
    order = f"self_{setting.device}_time_total"
    text = seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=40)
    (folder / "table.txt").write_text(text, encoding="utf-8")
    say(f"a trace (chrome://tracing, ui.perfetto.dev) and a table of a step: {folder}")

"""`featdistill features`: the features of images, in files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featdistill.config.commands import FeaturesConfig
from featdistill.core.errors import RunError
from featdistill.core.records import write_record
from featdistill.data.sources import Source
from featdistill.data.views import EvalView
from featdistill.engine.rundir import check_out, open_run
from featdistill.engine.runtime import limit_threads, pick_device
from featdistill.engine.tracking import duration, say
from featdistill.evaluation.extraction import (
    Extracted,
    Plan,
    bytes_per_image,
    extract_to_files,
    shard_size,
)
from featdistill.evaluation.feature_files import disk
from featdistill.evaluation.features import MEANINGS, choose
from featdistill.models.backbone import Backbone
from featdistill.models.weights import tensors_hash
from featdistill.tasks.common import images_of, model_of, plain, refuse_labels


@dataclass(frozen=True)
class FeaturesResult:
    """What was written.

    Attributes:
        out: the folder.
        files: the shards, in the data's order.
        images: rows in them.
        unreadable: images without a row.
        record: features.json.
    """

    out: Path
    files: tuple[Path, ...]
    images: int
    unreadable: int
    record: Path


def run(config: FeaturesConfig) -> FeaturesResult:
    """Write features."""
    check_out(config.run.out, resume=config.run.resume)
    refuse_labels(config.data)
    limit_threads()
    source = images_of(config.data, part=config.part, seed=config.run.seed)
    device = torch.device(pick_device(config.run.device))
    backbone = model_of(config.model, image_size=config.view.image_size, seed=config.run.seed)
    backbone.to(device)
    plan = _plan(config, backbone, source)
    _check_room(config.run.out, plan)
    folder = open_run(config.run.out, config, resume=config.run.resume)
    _describe(config, backbone, plan)
    extracted = extract_to_files(backbone, plan, folder=folder, resume=config.run.resume)
    record = _record(config, backbone, plan, extracted, folder)
    files = tuple(folder / s.file for s in extracted.shards)
    _say_end(plan, extracted, folder)
    return FeaturesResult(folder, files, extracted.rows, len(extracted.unreadable), record)


def _plan(config: FeaturesConfig, backbone: Backbone, source: Source) -> Plan:
    parts = choose(backbone, config.what, config.layers)
    dtype = {"float32": torch.float32, "float16": torch.float16}[config.dtype]
    return Plan(
        source=source,
        view=EvalView(backbone.image_size[0], config.view.eval_crop),
        parts=parts,
        dtype=dtype,
        format=config.format,
        batch_size=config.data.batch_size,
        shard_images=config.shard_images or shard_size(parts, dtype, config.data.batch_size),
        workers=config.data.workers,
        bad_image_limit=config.data.tolerated,
    )


def _check_room(out: str, plan: Plan) -> None:
    """Raise RunError if the disk cannot hold what is to come."""
    folder = Path(out).expanduser()
    there = sum(f.stat().st_size for f in folder.glob("features-*"))
    needed = len(plan.source) * bytes_per_image(plan.parts, plan.dtype) - there
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"the features take {_size(needed)}, and '{out}' has room for {_size(free)}",
            fix="write less (--what, --layers, --dtype float16), or give another --out",
        )


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} TiB"


def _describe(config: FeaturesConfig, backbone: Backbone, plan: Plan) -> None:
    height, width = backbone.image_size
    tensors = ", ".join(f"{p.name} {'x'.join(map(str, p.shape))}" for p in plan.parts)
    total = len(plan.source) * bytes_per_image(plan.parts, plan.dtype)
    say(
        f"model  {backbone.origin.spec} ({backbone.origin.weights}), {height}x{width} pixels, "
        f"grid {backbone.grid[0]}x{backbone.grid[1]}\n"
        f"data   {len(plan.source):,} images of {plan.source.name}\n"
        f"write  {tensors} as {config.dtype}: {_size(total)} of {plan.format}, "
        f"{min(plan.shard_images, len(plan.source)):,} images a file"
    )


def _record(
    config: FeaturesConfig, backbone: Backbone, plan: Plan, extracted: Extracted, folder: Path
) -> Path:
    mean, std = backbone.rgb
    results: dict[str, Any] = {
        "model": {
            **vars(backbone.origin),
            "tensors_sha256": tensors_hash(backbone),
            "image_size": backbone.image_size,
            "input": {"units": "RGB in [0, 1], before (x - mean) / std", "mean": mean, "std": std},
            "width": backbone.width,
            "grid": backbone.grid,
            "patch": backbone.patch,
            "prefix_names": backbone.prefix_names,
            "class_names": backbone.class_names if "logits" in config.what else None,
        },
        "data": {
            "name": plan.source.name,
            "images": len(plan.source),
            "classes": plan.source.classes,
        },
        "tensors": {
            p.name: {
                "shape": p.shape,
                "dimensions": MEANINGS[p.what][0],
                "dtype": config.dtype,
                "meaning": p.meaning,
                "units": "the model's own, neither scaled nor normalised",
            }
            for p in plan.parts
        },
        "files": [s.file for s in extracted.shards],
        "rows": extracted.rows,
        "unreadable": extracted.unreadable,
    }
    file = folder / "features.json"
    with disk(file):
        return write_record(file, "features", config=plain(config), results=results)


def _say_end(plan: Plan, extracted: Extracted, folder: Path) -> None:
    say(f"done in {duration(extracted.seconds)}: features of {extracted.rows:,} images")
    if extracted.unreadable:
        say(
            f"without a row, because unreadable: {len(extracted.unreadable):,}; "
            f"see {folder / 'quarantine.jsonl'}"
        )
    say(f"\n{_snippet(plan, folder)}")


def _snippet(plan: Plan, folder: Path) -> str:
    """Python that reads the first tensor of all images back, to be pasted."""
    part = plan.parts[0]
    variable, files = part.name.replace(".", "_"), f"features-*.{plan.format}"
    listed = f"files = sorted(Path({str(folder)!r}).glob({files!r}))"
    if plan.format == "parquet":
        shape = ", ".join(map(str, part.shape))
        return (
            f"from pathlib import Path\n\nimport pyarrow.dataset\n\n{listed}\n"
            "table = pyarrow.dataset.dataset(files).to_table()\n"
            f"flat = table[{part.name!r}].combine_chunks().flatten().to_numpy()\n"
            f"{variable} = flat.reshape(len(table), {shape})"
        )
    return (
        "from pathlib import Path\n\nimport torch\nfrom safetensors.torch import load_file\n\n"
        f"{listed}\n{variable} = torch.cat([load_file(f)[{part.name!r}] for f in files])"
    )

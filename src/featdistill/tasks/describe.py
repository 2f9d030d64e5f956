"""What a distillation will learn from what: the shape table of both sides, and plain lines."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor

from featdistill.config.commands import DistillConfig
from featdistill.core.seeds import seeded_globals
from featdistill.models.backbone import Backbone
from featdistill.models.weights import tensors_hash
from featdistill.objectives.distillation import FeatureDistillation
from featdistill.report.tables import count
from featdistill.tasks.assembly import Assembly

PUBLISHED_VIEWS = 384_000_000  # 300 epochs of ImageNet-1K
_WIDEST = 100
_LABEL = 15  # columns of the table's first column

Shapes = Mapping[str, Mapping[str, str]]


def describe(
    config: DistillConfig,
    assembly: Assembly,
    table: Shapes,
    *,
    others: Sequence[Assembly] = (),
    width: int = _WIDEST,
) -> list[str]:
    """Both sides, what is carried over and what is dropped, how long: as lines of text.

    Args:
        table: of `shapes`.
        others: that learn with it.
        width: columns that the lines may take.
    """
    objective, data, all_ = assembly.objective, assembly.data, (assembly, *others)
    steps, views = assembly.schedule.steps, views_of(config, assembly)
    options, width = config.objective, min(width, _WIDEST)
    facts = [
        ("data", f"{len(data.train):,} images of {data.train.name}"),
        ("held out", _held_out(assembly)),
        ("view", _view(assembly)),
        ("cache", "" if assembly.kept is None else assembly.kept.describe()),
        *_of_each(all_, "target", _target),
        *_of_each(all_, "resampled", _resampled),
        *_of_each(all_, "dropped", _dropped),
        *_of_each(all_, "projector", _projector),
        ("loss", f"{options.loss.value} to the target, whitened: {options.whitening.value}"),
        *(("start", note) for note in dict.fromkeys(note for a in all_ for note in a.notes)),
        (
            "run",
            f"{steps:,} steps of {config.data.batch_size:,}: {views:,} views, {_share(views)} of "
            f"the published {PUBLISHED_VIEWS:,}",
        ),
        ("on", assembly.runtime.describe()),
        ("note", budget_warning(config, assembly) or ""),
        ("note", _twins(all_)),
    ]
    lines = [*_table(table, width), ""]
    sides = {"teacher": objective.teacher, **{a.name: a.objective.student for a in all_}}
    for side, model in sides.items():
        if loading := getattr(model.origin, "loading", ()):
            lines += [f"{side}'s checkpoint", *(f"  {line}" for line in loading), ""]
    return lines + [line for name, fact in facts for line in wrapped(name, fact, width)]


def _twins(assemblies: Sequence[Assembly]) -> str:
    """Students that differ in nothing, and will not."""
    known: dict[tuple[str, float], str] = {}
    for each in assemblies:
        student = each.objective.student
        mine = (tensors_hash(student.model), student.slot.rate)
        if mine in known:
            return f"{known[mine]} and {each.name} are one and the same student, and will stay so"
        known[mine] = each.name
    return ""


def _of_each(
    assemblies: Sequence[Assembly], name: str, fact: Callable[[FeatureDistillation], str]
) -> list[tuple[str, str]]:
    """A fact of every student: once if it is the same of all, else with the students' names."""
    said = {a.name: fact(a.objective) for a in assemblies}
    if len(set(said.values())) == 1:
        return [(name, fact(assemblies[0].objective))]
    return [(name, f"{student}: {text}") for student, text in said.items() if text]


def _held_out(assembly: Assembly) -> str:
    voters = assembly.voters
    neighbours = (
        f"; kNN: {len(voters.train):,} images of {voters.train.name} vote on {len(voters.held):,}"
        if voters
        else ""
    )
    return assembly.held.describe() + neighbours


def wrapped(name: str, fact: str, width: int = _WIDEST) -> list[str]:
    """A fact under its name, on as many lines as it takes; none for an empty one."""
    return textwrap.wrap(
        fact,
        width,
        initial_indent=f"{name:<11}",
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )


def width_of(console: Console) -> int:
    """Columns of a console; those of a page where there is no terminal."""
    return console.width if console.is_terminal else _WIDEST


def views_of(config: DistillConfig, assembly: Assembly) -> int:
    """Images that the student will see."""
    return assembly.schedule.steps * config.data.batch_size


def shapes(assembly: Assembly, *others: Assembly) -> Shapes:
    """What is to be known of teacher and students, by side and by row of the table."""
    students = {a.name: _shape(a.objective.student, mine=True) for a in (assembly, *others)}
    return {"teacher": _shape(assembly.objective.teacher, mine=False), **students}


def _shape(model: Backbone, *, mine: bool) -> dict[str, str]:
    mean, std = (", ".join(f"{v:.3f}" for v in values) for values in model.rgb)
    return {
        "model": model.origin.spec,
        "weights": model.origin.weights,
        "licence": model.origin.licence or ("yours" if mine else "unknown"),
        "parameters": count(model.parameters_count),
        "image": f"{model.image_size[0]}x{model.image_size[1]}",
        "patch": str(model.patch),
        "token grid": f"{model.grid[0]}x{model.grid[1]}",
        "prefix tokens": ", ".join(model.prefix_names) or "none",
        "width": str(model.width),
        "layout": _layout(model),
        "mean": mean,
        "std": std,
    }


@torch.no_grad()
def _layout(model: Backbone) -> str:
    """What the model itself returns for an image, before it is split into map and prefix."""
    training, weight = model.training, next(model.parameters(), model.mean)
    model.eval()
    try:
        # a teacher that drops paths in evaluation draws here, and no draw may move the run's
        with seeded_globals("layout"):
            model.slot.fill(None, weight.device, "layout")
            blank = torch.zeros(1, 3, *model.image_size, device=weight.device, dtype=weight.dtype)
            final = model.model.forward_features(blank)
    finally:
        model.train(training)
    if not isinstance(final, Tensor):
        return type(final).__name__
    shape = ", ".join(map(str, final.shape[1:]))
    if final.ndim == 3:
        return f"tokens (B, {shape})"
    return f"map (B, {shape}), channels {'last' if model.layout.channels_last else 'first'}"


def _table(sides: Shapes, width: int) -> list[str]:
    column = max(20, (width - _LABEL - 2) // len(sides) - (len(sides) > 2))
    lines = [f"{'':<{_LABEL}}{'  '.join(f'{name:<{column}}' for name in sides)}".rstrip()]
    for row in sides["teacher"]:
        cells = [textwrap.wrap(side[row], column) or [""] for side in sides.values()]
        for at in range(max(map(len, cells))):
            parts = (cell[at] if at < len(cell) else "" for cell in cells)
            label = row if at == 0 else ""
            line = "  ".join(f"{part:<{column}}" for part in parts)
            lines.append(f"{label:<{_LABEL}}{line}".rstrip())
    return lines


def _view(assembly: Assembly) -> str:
    side, objective = assembly.view.size, assembly.objective
    smaller = [
        f"antialiased down to {model.image_size[0]}x{model.image_size[1]} for the {name}"
        for name, model in (("teacher", objective.teacher), ("student", objective.student))
        if model.image_size != (side, side)
    ]
    who = "all" if assembly.others else "both"
    return "; ".join([f"one crop for {who}, rendered at {side}x{side}", *smaller])


def _target(objective: FeatureDistillation) -> str:
    pairing, grid = objective.pairing, objective.pairing.teacher_grid
    layer = (
        "output"
        if pairing.layer is None
        else f"layer {pairing.layer} (of {len(objective.teacher.layer_grids)}, from 0), "
        "before any norm"
    )
    return {
        "map": f"{grid[0]}x{grid[1]} tokens{''.join(f' and {n}' for n in pairing.prefix)} of the "
        f"teacher's {layer}",
        "gap": f"the mean of the {grid[0]}x{grid[1]} tokens of the teacher's {layer}",
        "pooled": f"the teacher's own pooled vector of {objective.teacher.pooled_width}",
        "logits": f"the teacher's logits of {objective.teacher.num_classes} classes",
    }[objective.target]


def _projector(objective: FeatureDistillation) -> str:
    projector = objective.projector
    return f"linear, {projector.in_features} to {projector.out_features} channels"


def _resampled(objective: FeatureDistillation) -> str:
    pairing = objective.pairing
    if objective.target != "map" or not pairing.resampled:
        return ""
    (a, b), (c, d) = pairing.teacher_grid, pairing.student_grid
    order = objective.resample_order.replace("-", " ")
    return f"the teacher's {a}x{b} tokens to the student's {c}x{d} (bilinear), {order}"


def _dropped(objective: FeatureDistillation) -> str:
    if objective.target == "map":
        left = objective.pairing.left_out
        return f"{', '.join(left)}: no partner on the other side" if left else ""
    left = tuple(f"student.{name}" for name in objective.student.prefix_names)
    if objective.target == "gap":
        left = (*(f"teacher.{name}" for name in objective.teacher.prefix_names), *left)
    return f"{', '.join(left)}: the student's mean token is compared" if left else ""


def budget_warning(config: DistillConfig, assembly: Assembly) -> str | None:
    """A plain word where a fresh student cannot see enough to catch up with its teacher."""
    images, views = len(assembly.data.train), views_of(config, assembly)
    if config.student.init != "random" or views >= 0.05 * PUBLISHED_VIEWS:
        return None
    return (
        f"from random weights a student is unlikely to catch up with its teacher in so few "
        f"views of {images:,} images: start it from the teacher (--student-init teacher), add "
        "unlabelled images, or train for longer"
    )


def _share(views: int) -> str:
    share = views / PUBLISHED_VIEWS
    return f"{share:.2%}" if share >= 0.0001 else "less than 0.01%"

"""A checkpoint file as a timm model, strictly, with an account of every tensor."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import LoadReport, Rgb, TimmBuild
from featdistill.models.checkpoints.families import Plan
from featdistill.models.checkpoints.files import read_tree
from featdistill.models.checkpoints.formats import Format, recognise
from featdistill.models.checkpoints.settings import settings_beside
from featdistill.models.checkpoints.sizes import classes_of
from featdistill.models.checkpoints.tables import Converted, any_matches, convert, names_before
from featdistill.models.checkpoints.unwrap import Unwrapped, unwrap
from featdistill.models.timm_models import (
    accepts,
    check_name,
    create,
    drop_path_argument,
    family_filter,
)
from featdistill.models.weights import load_exactly


@dataclass(frozen=True)
class FromFile:
    """A model with a checkpoint's weights.

    Attributes:
        model: the timm model, loaded.
        build: how to make it again.
        image_size: side in pixels that its positions are made for.
        mean, std: the normalisation that it was trained with.
        report: what became of every tensor.
        projection: its head is a projection (CLIP's); None if that shows in the model itself.
    """

    model: nn.Module
    build: TimmBuild
    image_size: int
    mean: Rgb
    std: Rgb
    report: LoadReport
    projection: bool | None = None


@dataclass(frozen=True)
class _Read:
    """A checkpoint that was read and, if its format is known, converted."""

    path: Path
    unwrapped: Unwrapped
    settings: Mapping[str, Any]
    format: Format | None
    converted: Converted


def load_checkpoint(
    path: Path, *, arch: str | None = None, branch: str | None = None, drop_path: float = 0.0
) -> FromFile:
    """Load a checkpoint file into the timm model that it belongs to.

    Args:
        path: any format of `formats.FORMATS`, recognised by its keys; with `arch`, anything that
            timm itself can convert too.
        arch: timm's name of the architecture, for what tensors cannot show.
        branch: the part of the file to take, of several.
        drop_path: stochastic depth rate.

    Raises:
        ModelError: unreadable, unknown, or not exactly this model's tensors.
    """
    tree = read_tree(path)
    if branch is not None and not isinstance(tree.get(branch), Mapping):
        parts = [name for name, value in tree.items() if isinstance(value, Mapping)]
        raise ModelError(
            f"'{path}' has no part '{branch}'", expected=", ".join(parts) or "no parts at all"
        )
    unwrapped = unwrap(tree if branch is None else tree[branch], branch)
    if not unwrapped.tensors:
        raise ModelError(f"'{path}' is not a checkpoint: it holds no named tensors")
    format_ = recognise(unwrapped)
    rules = format_.rules if format_ else ()
    converted = convert(unwrapped.tensors, rules) if format_ else Converted(unwrapped.tensors)
    read = _Read(path, unwrapped, settings_beside(path), format_, converted)
    return _by_name(read, arch, drop_path) if arch else _by_keys(read, drop_path)


def _by_keys(read: _Read, drop_path: float) -> FromFile:
    format_ = read.format
    if format_ is None:
        raise _unknown(read)
    lost = [p for p in format_.required if not any_matches(p, read.unwrapped.tensors)]
    if lost:
        raise _misfit(read, f"{len(lost)} missing ({', '.join(lost)})")
    try:
        hints = format_.hints(read.unwrapped, read.converted, read.settings)
        known = format_.normalisation_known or "rgb" in hints or "mean" in read.settings
        rgb = hints.pop("rgb", (format_.mean, format_.std))
        tensors = format_.finish(read.converted.tensors)
        plan = format_.plan(tensors, hints)
    except ModelError as error:
        raise _misfit(read, error.given, expected=error.expected, fix=error.fix) from None
    rate = drop_path_argument(plan.build.architecture, drop_path)
    model = create(plan.build.architecture, **plan.build.arguments, **rate)
    _fill(read, model, tensors)
    assumed = list(plan.assumed)
    if not known:
        assumed.append(f"the normalisation, mean {_numbers(rgb[0])} and std {_numbers(rgb[1])}")
    if "mean" in read.settings:
        rgb = (read.settings["mean"], read.settings["std"])
    mean, std = rgb
    report = _report(read, format_.title, tuple(assumed))
    trunk = read.unwrapped.path.endswith("visual.trunk.") and "head.weight" in tensors
    return FromFile(
        model, plan.build, plan.image_size, mean, std, report, projection=True if trunk else None
    )


def _numbers(values: Rgb) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


def _by_name(read: _Read, arch: str, drop_path: float) -> FromFile:
    """The named architecture with the file's weights."""
    check_name(arch)
    architecture = arch.partition(".")[0]
    format_ = read.format
    config: dict[str, Any] = timm.get_pretrained_cfg(arch, allow_unregistered=False).to_dict()
    with torch.device("meta"):
        shell = timm.create_model(architecture)
    if format_ is not None and not isinstance(shell, format_.kind):
        raise ModelError(
            f"'{read.path}' holds a {format_.title}, and timm's '{architecture}' is a "
            f"{type(shell).__name__}",
            fix="leave the architecture out: it is recognised by the file's keys",
        )
    plan = _plan_by_name(read, architecture, config)
    rate = drop_path_argument(architecture, drop_path)
    model = create(architecture, **plan.build.arguments, **rate)
    if format_ is not None:
        _fill(read, model, format_.finish(read.converted.tensors))
        title = format_.title
    else:
        carry = family_filter(model)
        tensors = read.unwrapped.tensors
        filtered = tensors if carry is None else carry(dict(tensors), model)
        read = _filtered(read, filtered)
        load_exactly(model, filtered, what=str(read.path))
        title = f"as timm reads '{architecture}'"
    known = format_ is not None and format_.normalisation_known and "." not in arch
    source = {"mean": format_.mean, "std": format_.std} if known and format_ else config
    report = _report(read, title, plan.assumed)
    return FromFile(model, plan.build, plan.image_size, source["mean"], source["std"], report)


def _plan_by_name(read: _Read, architecture: str, config: Mapping[str, Any]) -> Plan:
    """The named architecture's own arguments, but for classes and the size of its positions."""
    first = config["classifier"]
    first = first[0] if isinstance(first, tuple | list) else first
    finish = read.format.finish if read.format else dict
    tensors = finish(read.converted.tensors)
    arguments: dict[str, Any] = {"num_classes": classes_of(tensors, first) if first else 0}
    size = int(config["input_size"][-1])
    if read.format is not None and accepts(architecture, "img_size"):
        # what the tensors do not show is the architecture's own, or does not fit
        with contextlib.suppress(ModelError):
            size = read.format.plan(tensors, {}).image_size
        arguments["img_size"] = size
    return Plan(TimmBuild(architecture, arguments), size)


def _filtered(read: _Read, tensors: Mapping[str, Tensor]) -> _Read:
    """The account of what timm's own conversion did."""
    before = read.unwrapped.tensors
    lost = [name for name in before if name not in tensors]
    made = [name for name in tensors if name not in before]
    gone = lost[len(made) :]  # renamed one for one, as far as names can tell
    left_out = {"left out by timm's conversion": gone} if gone else {}
    converted = Converted(dict(tensors), renamed=len(made), left_out=left_out)
    return _Read(read.path, read.unwrapped, read.settings, None, converted)


def _fill(read: _Read, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors, and compare the buffers that the model computes itself."""
    assert read.format is not None
    words = _file_words(read)
    converted = read.converted
    load_exactly(
        model,
        tensors,
        what=str(read.path),
        say=words,
        missing=converted.incomplete,
        strangers=(*converted.strangers, *read.unwrapped.strangers),
    )
    own = dict(model.named_buffers())
    for name, value in converted.buffers.items():
        mine = own.get(name)
        if (
            mine is None
            or mine.shape != value.shape
            or not torch.allclose(mine.double(), value.double(), atol=1e-4)
        ):
            shape = "no such tensor" if mine is None else f"{tuple(mine.shape)}"
            raise _misfit(
                read,
                f"1 other than the model computes ({converted.came_from[name]} "
                f"{tuple(value.shape)}, computed: {shape})",
            )


def _file_words(read: _Read) -> Callable[[str], str]:
    """timm's names as the file has them."""
    came_from = read.converted.came_from
    rules = read.format.rules if read.format else ()

    def say(name: str) -> str:
        if read.format:
            name = read.format.unfinish(name, read.converted.tensors)
        return came_from.get(name) or names_before(name, rules, read.unwrapped.tensors)

    return say


def _misfit(
    read: _Read, what: str, *, expected: str | None = None, fix: str | None = None
) -> ModelError:
    """An error about the tensors, in the file's own names."""
    assert read.format is not None
    say = _file_words(read)

    def words(text: str) -> str:
        return re.sub(r"[a-z_]+(?:\.\w+)+|pos_embed|\w+_token", lambda m: say(m[0]), text)

    return ModelError(
        f"'{read.path}' does not fit ({read.format.title}): {words(what)}",
        expected=words(expected) if expected else None,
        fix=fix or "is the file whole, and as its project saved it?",
    )


def _unknown(read: _Read) -> ModelError:
    names = list(read.unwrapped.tensors)
    if any(name.startswith("visual.layer1.") for name in names):
        return ModelError(
            f"'{read.path}' is a CLIP with a ResNet as its image tower, which is not known here",
            fix="use timm/resnet50_clip.openai or its relatives, or a ViT",
        )
    return ModelError(
        f"the keys of '{read.path}' are of no known format ({', '.join(names[:3])}, ...)",
        expected="DINO, iBOT, DeiT, MAE, DINOv2, BEiT, CLIP, Swin, EsViT, Swin V2, feature "
        "distillation's own, or timm's",
        fix="if timm has the architecture, name it beside the file: timm/NAME with the file as "
        "its weights",
    )


def _report(read: _Read, title: str, assumed: tuple[str, ...]) -> LoadReport:
    left_out: dict[str, tuple[str, ...]] = {}
    for source in (read.unwrapped.left_out, read.converted.left_out):
        for reason, names in source.items():
            left_out[reason] = (*left_out.get(reason, ()), *names)
    if read.converted.buffers:
        left_out["buffers, equal to what the model computes"] = tuple(
            read.converted.came_from[n] for n in read.converted.buffers
        )
    return LoadReport(
        title=title,
        path=read.unwrapped.path,
        total=read.unwrapped.total,
        renamed=read.converted.renamed,
        left_out=left_out,
        assumed=assumed,
    )

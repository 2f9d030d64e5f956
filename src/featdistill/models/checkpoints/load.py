"""A checkpoint file as a timm model, strictly, with an account of every tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import LoadReport, Rgb, TimmBuild
from featdistill.models.checkpoints import transformers
from featdistill.models.checkpoints.by_timm import fill_by_timm
from featdistill.models.checkpoints.families import Plan
from featdistill.models.checkpoints.recognised import (
    Recognised,
    file_words,
    misfit,
    no_format,
    recognised,
    report_of,
)
from featdistill.models.checkpoints.sizes import classes_of
from featdistill.models.checkpoints.tables import any_matches
from featdistill.models.timm_models import (
    accepts,
    check_name,
    create,
    drop_path_argument,
)
from featdistill.models.weights import Unfilled, likely_cause, listed, load_exactly, odd_numbers


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
        class_names: of its classifier, where a file beside the tensors names them.
    """

    model: nn.Module
    build: TimmBuild
    image_size: int
    mean: Rgb
    std: Rgb
    report: LoadReport
    projection: bool | None = None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Facts:
    """What a model needs that its tensors do not show."""

    arguments: dict[str, Any]
    mean: Rgb
    std: Rgb
    assumed: tuple[str, ...]


def load_checkpoint(
    path: Path, *, arch: str | None = None, branch: str | None = None, drop_path: float = 0.0
) -> FromFile:
    """Load a checkpoint file into the timm model that it belongs to.

    Args:
        path: any format of `formats.FORMATS`, recognised by its keys; with `arch`, anything that
            timm itself can convert too.
        arch: timm's name of the architecture, for what tensors cannot show.
        branch: the part of the file to take, of several: `student`, or a prefix, `base_encoder.`.
        drop_path: stochastic depth rate.

    Raises:
        ModelError: unreadable, unknown, or not exactly this model's tensors.
    """
    read = recognised(path, branch)
    if arch is None:
        if read.format is None:
            raise no_format(read)
        return _load(read, None, drop_path)
    check_name(arch)
    if _timm_reads_better(read, arch):
        try:
            return _load(read.without_format(), arch, drop_path)
        except ModelError:
            if read.format is None or isinstance(_shell(arch), read.format.kind):
                raise
            if not _is_whole(read):
                raise  # keys may look like another family's, and something else is wrong
            raise _other_family(read, arch) from None
    return _load(read, arch, drop_path)


def _load(read: Recognised, arch: str | None, drop_path: float) -> FromFile:
    """The model that the tensors show (or that is named), filled, with its account."""
    format_ = read.format
    if format_ is None:
        assert arch is not None
        facts = _facts(read, arch)
        plan = _plan_by_name(read, arch, read.converted.tensors)
        model = _create(plan, drop_path)
        converted = fill_by_timm(model, read.unwrapped, arch, what=str(read.path))
        read, tensors = replace(read, converted=converted), read.converted.tensors
    else:
        _check_required(read)
        _check_numbers(read)
        try:
            facts = _facts(read, arch)
            tensors = format_.finish(read.converted.tensors)
            plan = (
                _plan_by_name(read, arch, tensors)
                if arch
                else format_.plan(tensors, facts.arguments)
            )
        except ModelError as error:
            raise misfit(read, error.given, expected=error.expected, fix=error.fix) from None
        with Unfilled():
            model = _create(plan, drop_path)
        _fill(read, model, tensors)
    title = format_.title if format_ else f"as timm reads '{(arch or '').partition('.')[0]}'"
    trunk = read.unwrapped.path.endswith("visual.trunk.") and "head.weight" in tensors
    classes = plan.build.arguments.get("num_classes", 0)
    return FromFile(
        model,
        plan.build,
        plan.image_size,
        facts.mean,
        facts.std,
        report_of(read, title, (*plan.assumed, *facts.assumed)),
        projection=True if trunk else None,
        class_names=transformers.class_names_of(read.settings.get("transformers", {}), classes),
    )


def _create(plan: Plan, drop_path: float) -> nn.Module:
    rate = drop_path_argument(plan.build.architecture, drop_path)
    return create(plan.build.architecture, **plan.build.arguments, **rate)


def _check_required(read: Recognised) -> None:
    assert read.format is not None
    lost = [p for p in read.format.required if not any_matches(p, read.unwrapped.tensors)]
    if lost:
        raise misfit(read, f"{len(lost)} missing ({', '.join(lost)})")


def _check_numbers(read: Recognised) -> None:
    """Before anything is concluded from them."""
    beside = {name for names in read.converted.left_out.values() for name in names}
    beside |= {read.converted.came_from[name] for name in read.converted.buffers}
    beside |= set(read.converted.strangers)
    faults = odd_numbers({k: v for k, v in read.unwrapped.tensors.items() if k not in beside})
    if read.converted.unequal:
        faults["of another shape"] = list(read.converted.unequal)
    if faults:
        raise misfit(read, listed(faults), fix=likely_cause(faults), translate=False)


def _facts(read: Recognised, arch: str | None) -> _Facts:
    """Arguments and normalisation: of the settings beside the file, of a named tag, of the format.

    Raises:
        ModelError: the format cannot be used without being told more.
    """
    format_, settings = read.format, read.settings
    hints: dict[str, Any] = {}
    if format_ is not None and arch is None:
        hints = format_.hints(read.unwrapped, read.converted, settings)
    assumed: tuple[str, ...] = hints.pop("assumed", ())
    rgb: tuple[Rgb, Rgb] | None = hints.pop("rgb", None)
    if "mean" in settings:
        return _Facts(hints, settings["mean"], settings["std"], assumed)
    if arch is not None and "." in arch:
        config = _timm_config(arch)
        return _Facts(hints, config["mean"], config["std"], assumed)
    known = rgb is not None or (format_ is not None and format_.normalisation_known)
    if rgb is None and format_ is not None and (known or arch is None):
        rgb = (format_.mean, format_.std)
    if rgb is None:
        assert arch is not None  # without a tag: that of timm's usual weights for it
        config = _timm_config(arch)
        rgb = config["mean"], config["std"]
    if not known:
        numbers = (", ".join(f"{v:.3g}" for v in values) for values in rgb)
        assumed += ("the normalisation, mean {} and std {}".format(*numbers),)
    return _Facts(hints, *rgb, assumed)


def _timm_config(arch: str) -> dict[str, Any]:
    return timm.get_pretrained_cfg(arch, allow_unregistered=False).to_dict()


@cache
def _shell(arch: str) -> nn.Module:
    """The named architecture without weights."""
    with torch.device("meta"):
        return timm.create_model(arch.partition(".")[0])


def _timm_reads_better(read: Recognised, arch: str) -> bool:
    """Whether a named architecture is of another family than the keys show, or has more parts."""
    if read.format is None or not isinstance(_shell(arch), read.format.kind):
        return True
    strangers = set(read.converted.strangers)
    return bool(strangers) and strangers <= _shell(arch).state_dict().keys()


def _is_whole(read: Recognised) -> bool:
    """Whether a file is what its keys show, to the last tensor."""
    try:
        _load(read, None, 0.0)
    except ModelError:
        return False
    return True


def _other_family(read: Recognised, arch: str) -> ModelError:
    assert read.format is not None
    return ModelError(
        f"'{read.path}' holds a {read.format.title}, and timm's '{arch.partition('.')[0]}' is a "
        f"{type(_shell(arch)).__name__}",
        fix="leave the architecture out: it is recognised by the file's keys",
    )


def _plan_by_name(read: Recognised, arch: str, tensors: Mapping[str, Tensor]) -> Plan:
    """The named architecture's own arguments, but for classes and the size of its positions."""
    architecture, config = arch.partition(".")[0], _timm_config(arch)
    first = config["classifier"]
    first = first[0] if isinstance(first, tuple | list) else first
    arguments: dict[str, Any] = {"num_classes": classes_of(tensors, first) if first else 0}
    size = int(config["input_size"][-1])
    if read.format is not None and accepts(architecture, "img_size"):
        # what the tensors do not show is the architecture's own, or does not fit
        with contextlib.suppress(ModelError, KeyError):
            size = read.format.plan(tensors, {}).image_size
        arguments["img_size"] = size
    return Plan(TimmBuild(architecture, arguments), size)


def _fill(read: Recognised, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors, and compare the buffers that the model computes itself."""
    assert read.format is not None
    words = file_words(read)
    converted = read.converted
    load_exactly(
        model,
        tensors,
        what=str(read.path),
        say=words,
        missing=converted.incomplete,
        strangers=(*converted.strangers, *read.unwrapped.strangers),
        numbers="checked",
    )
    own = dict(model.named_buffers())
    for name, value in converted.buffers.items():
        mine = own.get(name)
        if (
            mine is None
            or mine.shape != value.shape
            or not torch.allclose(mine.double(), value.double(), *_closeness(value))
        ):
            shape = "no such tensor" if mine is None else f"{tuple(mine.shape)}"
            raise misfit(
                read,
                f"1 other than the model computes ({converted.came_from[name]} "
                f"{tuple(value.shape)}, computed: {shape})",
            )


def _closeness(value: Tensor) -> tuple[float, float]:
    """How near a buffer of a file has to be, relative and absolute: half precision rounds it."""
    return (1e-2, 1e-2) if value.dtype in (torch.float16, torch.bfloat16) else (1e-5, 1e-4)

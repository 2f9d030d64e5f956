"""A checkpoint file as a timm model, strictly, with an account of every tensor."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
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
from featdistill.models.checkpoints.clip import CLIP
from featdistill.models.checkpoints.families import Plan
from featdistill.models.checkpoints.files import read_tree
from featdistill.models.checkpoints.formats import recognise
from featdistill.models.checkpoints.settings import settings_beside
from featdistill.models.checkpoints.sizes import classes_of
from featdistill.models.checkpoints.spec import Format
from featdistill.models.checkpoints.tables import Converted, any_matches, convert, names_before
from featdistill.models.checkpoints.unwrap import Unwrapped, branch_option, prefixes_of, unwrap
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
class _Read:
    """A checkpoint that was read and, if its format is known, converted."""

    path: Path
    unwrapped: Unwrapped
    settings: Mapping[str, Any]
    format: Format | None
    converted: Converted

    def without_format(self) -> _Read:
        """The same for timm's own conversion."""
        return replace(self, format=None, converted=Converted(self.unwrapped.tensors))


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
    read = _read(path, branch)
    if arch is None:
        if read.format is None:
            raise _unknown(read)
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


def _read(path: Path, branch: str | None) -> _Read:
    unwrapped = unwrap(read_tree(path), branch, path)
    settings = settings_beside(path)
    format_ = recognise(unwrapped) or _of_transformers(path, settings)
    if "transformers" not in settings and not _is_tower(unwrapped, format_):
        settings = {}  # an open_clip_config.json says nothing of the other files in its folder
    rules = format_.rules if format_ else ()
    converted = convert(unwrapped.tensors, rules) if format_ else Converted(unwrapped.tensors)
    return _Read(path, unwrapped, settings, format_, converted)


def _is_tower(unwrapped: Unwrapped, format_: Format | None) -> bool:
    """Whether a model is the image tower of a language model, or was."""
    parts = ("norm_pre.", "attn_pool.", "trunk.norm_pre.", "trunk.attn_pool.")
    return (
        format_ is CLIP
        or unwrapped.path.endswith("visual.trunk.")
        or any(name.startswith(parts) for name in unwrapped.tensors)
    )


def _load(read: _Read, arch: str | None, drop_path: float) -> FromFile:
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
            raise _misfit(read, error.given, expected=error.expected, fix=error.fix) from None
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
        _report(read, title, (*plan.assumed, *facts.assumed)),
        projection=True if trunk else None,
        class_names=transformers.class_names_of(read.settings.get("transformers", {}), classes),
    )


def _create(plan: Plan, drop_path: float) -> nn.Module:
    rate = drop_path_argument(plan.build.architecture, drop_path)
    return create(plan.build.architecture, **plan.build.arguments, **rate)


def _check_required(read: _Read) -> None:
    assert read.format is not None
    lost = [p for p in read.format.required if not any_matches(p, read.unwrapped.tensors)]
    if lost:
        raise _misfit(read, f"{len(lost)} missing ({', '.join(lost)})")


def _check_numbers(read: _Read) -> None:
    """Before anything is concluded from them."""
    beside = {name for names in read.converted.left_out.values() for name in names}
    beside |= {read.converted.came_from[name] for name in read.converted.buffers}
    beside |= set(read.converted.strangers)
    faults = odd_numbers({k: v for k, v in read.unwrapped.tensors.items() if k not in beside})
    if read.converted.unequal:
        faults["of another shape"] = list(read.converted.unequal)
    if faults:
        raise _misfit(read, listed(faults), fix=likely_cause(faults), translate=False)


def _facts(read: _Read, arch: str | None) -> _Facts:
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


def _timm_reads_better(read: _Read, arch: str) -> bool:
    """Whether a named architecture is of another family than the keys show, or has more parts."""
    if read.format is None or not isinstance(_shell(arch), read.format.kind):
        return True
    strangers = set(read.converted.strangers)
    return bool(strangers) and strangers <= _shell(arch).state_dict().keys()


def _is_whole(read: _Read) -> bool:
    """Whether a file is what its keys show, to the last tensor."""
    try:
        _load(read, None, 0.0)
    except ModelError:
        return False
    return True


def _other_family(read: _Read, arch: str) -> ModelError:
    assert read.format is not None
    return ModelError(
        f"'{read.path}' holds a {read.format.title}, and timm's '{arch.partition('.')[0]}' is a "
        f"{type(_shell(arch)).__name__}",
        fix="leave the architecture out: it is recognised by the file's keys",
    )


def _of_transformers(path: Path, settings: Mapping[str, Any]) -> Format | None:
    """The format that a `config.json` of the transformers library beside the file names."""
    if "transformers" not in settings:
        return None
    try:
        return transformers.format_beside(settings["transformers"])
    except ModelError as error:
        raise ModelError(
            f"'{path}': {error.given}", expected=error.expected, fix=error.fix
        ) from None


def _plan_by_name(read: _Read, arch: str, tensors: Mapping[str, Tensor]) -> Plan:
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
            raise _misfit(
                read,
                f"1 other than the model computes ({converted.came_from[name]} "
                f"{tuple(value.shape)}, computed: {shape})",
            )


def _closeness(value: Tensor) -> tuple[float, float]:
    """How near a buffer of a file has to be, relative and absolute: half precision rounds it."""
    return (1e-2, 1e-2) if value.dtype in (torch.float16, torch.bfloat16) else (1e-5, 1e-4)


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
    read: _Read,
    what: str,
    *,
    expected: str | None = None,
    fix: str | None = None,
    translate: bool = True,
) -> ModelError:
    """An error about the tensors, in the file's own names (`translate`: from timm's)."""
    assert read.format is not None
    say = _file_words(read)

    def words(text: str) -> str:
        if not translate:
            return text
        return re.sub(r"[a-z_]+(?:\.\w+)+|pos_embed|\w+_token", lambda m: say(m[0]), text)

    return ModelError(
        f"'{read.path}' does not fit ({read.format.title}): {words(what)}",
        expected=words(expected) if expected else None,
        fix=fix
        or "is the file whole, and as its project saved it? If it is of another "
        "architecture of timm's, name that beside the file: timm/NAME",
    )


def _unknown(read: _Read) -> ModelError:
    names = list(read.unwrapped.tensors)
    if transformers.looks_like(read.unwrapped.tensors):
        return ModelError(
            f"'{read.path}' is a file of the transformers library without its config.json, which "
            "says what tensors do not show (heads, activation, image size)",
            fix="put config.json and preprocessor_config.json beside it",
        )
    if any(name.startswith("visual.layer1.") for name in names):
        return ModelError(
            f"'{read.path}' is a CLIP with a ResNet as its image tower, which is not known here",
            fix="use timm/resnet50_clip.openai or its relatives, or a ViT",
        )
    if inside := prefixes_of(read.unwrapped.tensors):
        return ModelError(
            f"the model in '{read.path}' has names that begin with {' or '.join(inside)}",
            fix=f"say which to take: {branch_option(inside[0])}",
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
        also=read.unwrapped.also,
        pads_first=read.format is not None and read.format.pads_first,
    )

"""A checkpoint file that was read and recognised, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featdistill.core.errors import ModelError
from featdistill.models.backbone import LoadReport
from featdistill.models.checkpoints import transformers
from featdistill.models.checkpoints.clip import CLIP
from featdistill.models.checkpoints.files import read_tree
from featdistill.models.checkpoints.formats import recognise
from featdistill.models.checkpoints.settings import settings_beside
from featdistill.models.checkpoints.spec import Format
from featdistill.models.checkpoints.tables import Converted, convert, names_before
from featdistill.models.checkpoints.unwrap import Unwrapped, branch_option, prefixes_of, unwrap


@dataclass(frozen=True)
class Recognised:
    """A checkpoint that was read and, if its format is known, converted.

    Attributes:
        path: the file.
        unwrapped: its state dict.
        settings: what files beside it say, as far as it concerns this one.
        format: whose keys these are; None if nobody's that is known here.
        converted: the tensors under timm's names, with an account.
    """

    path: Path
    unwrapped: Unwrapped
    settings: Mapping[str, Any]
    format: Format | None
    converted: Converted

    def without_format(self) -> Recognised:
        """The same for timm's own conversion."""
        return replace(self, format=None, converted=Converted(self.unwrapped.tensors))


def recognised(path: Path, branch: str | None) -> Recognised:
    """Read a checkpoint file, and convert it if its keys are known.

    Args:
        branch: the part of the file to take, of several.

    Raises:
        ModelError: unreadable, without such a part, or with a strange `config.json` beside it.
    """
    unwrapped = unwrap(read_tree(path), branch, path)
    settings = settings_beside(path)
    format_ = recognise(unwrapped) or _of_transformers(path, settings)
    if "transformers" not in settings and not _is_tower(unwrapped, format_):
        settings = {}  # an open_clip_config.json says nothing of the other files in its folder
    rules = format_.rules if format_ else ()
    converted = convert(unwrapped.tensors, rules) if format_ else Converted(unwrapped.tensors)
    return Recognised(path, unwrapped, settings, format_, converted)


def _is_tower(unwrapped: Unwrapped, format_: Format | None) -> bool:
    """Whether a model is the image tower of a language model, or was."""
    parts = ("norm_pre.", "attn_pool.", "trunk.norm_pre.", "trunk.attn_pool.")
    return (
        format_ is CLIP
        or unwrapped.path.endswith("visual.trunk.")
        or any(name.startswith(parts) for name in unwrapped.tensors)
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


def file_words(read: Recognised) -> Callable[[str], str]:
    """timm's names as the file has them."""
    came_from = read.converted.came_from
    rules = read.format.rules if read.format else ()

    def say(name: str) -> str:
        if read.format:
            name = read.format.unfinish(name, read.converted.tensors)
        return came_from.get(name) or names_before(name, rules, read.unwrapped.tensors)

    return say


def misfit(
    read: Recognised,
    what: str,
    *,
    expected: str | None = None,
    fix: str | None = None,
    translate: bool = True,
) -> ModelError:
    """An error about the tensors, in the file's own names (`translate`: from timm's)."""
    assert read.format is not None
    say = file_words(read)

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


def no_format(read: Recognised) -> ModelError:
    """The error for keys of no known format: what they look like, and what to do."""
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


def report_of(read: Recognised, title: str, assumed: tuple[str, ...]) -> LoadReport:
    """What became of every tensor.

    Args:
        title: the format's.
        assumed: what the file does not say and was taken for granted.
    """
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

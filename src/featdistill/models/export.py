"""Write a model for another library, load it back there, and compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from featdistill.core.errors import ModelError, did_you_mean
from featdistill.models.backbone import Backbone
from featdistill.models.exports.card import Story, card
from featdistill.models.exports.common import (
    Exported,
    Target,
    largest_difference,
    probe_images,
    replacing,
    settled,
)
from featdistill.models.extensions import split_arguments

TargetName = Literal["timm", "huggingface", "onnx", "plain", "official"]
TARGETS: tuple[str, ...] = get_args(TargetName)
_IMAGES = 2

__all__ = ["TARGETS", "Exported", "TargetName", "export", "export_timm", "target_of"]


def target_of(name: str) -> Target:
    """A format by name.

    Raises:
        ModelError: there is no such format.
    """
    if name not in TARGETS:
        raise ModelError(
            f"no export format '{name}'",
            expected=", ".join(TARGETS),
            fix=did_you_mean(name, TARGETS),
        )
    target: Target = getattr(import_module(f"featdistill.models.exports.to_{name}"), name.upper())
    return target


def export(
    backbone: Backbone,
    folder: Path,
    *,
    to: str = "timm",
    story: Story | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a model and its card into a folder; load it back with the target's library and compare.

    Args:
        folder: new, empty, or an earlier export to replace.
        to: one of `TARGETS`.
        story: what the card shall say of how the model was made.
        tolerance: the largest difference to let pass, as a share of the largest output; the
            format's own by default.

    Raises:
        ModelError: the format cannot hold the model, its library is missing, or the model that
            comes back is another.
        RunError: the folder cannot be written.
    """
    target = target_of(to)
    target.check_installed()
    limit = target.tolerance if tolerance is None else tolerance
    with replacing(folder) as temporary, settled(backbone):
        notes = target.write(backbone, temporary)
        images = probe_images(backbone, _IMAGES)
        difference = largest_difference(*target.read(backbone, temporary, images))
        if not difference <= limit:
            why = target.reason(backbone)
            raise ModelError(
                f"the export is not exact: {target.checked_with}'s output differs by "
                f"{difference:.2g} of the largest{f' ({why})' if why else ''}",
                expected=f"at most {limit:g}",
                fix="use --to plain, or say with --tolerance that this will do" if why else None,
            )
        done = Exported(folder, difference, tuple(notes), to, limit)
        done = replace(done, snippet=target.snippet(backbone, str(folder.resolve())))
        text = card(backbone, target, done, story or Story())
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return done


def export_timm(
    backbone: Backbone,
    folder: Path,
    *,
    card: Mapping[str, Any] | None = None,
    licences: Mapping[str, str | None] | None = None,
) -> Exported:
    """The export at a run's end: a folder that plain timm loads.

    A model with parts that plain timm cannot be told of (`extensions`), and which differs there,
    becomes a plain state dict instead: a run that took days shall not end in a refusal.

    Args:
        card: facts of how the model was made, for the model card.
        licences: whose weights went into it -> their licence.
    """
    story = Story(made=card or {}, licences=licences or {})
    try:
        return export(backbone, folder, story=story)
    except ModelError:
        if backbone.build is None or not split_arguments(backbone.build.arguments)[1]:
            raise
        return export(backbone, folder, to="plain", story=story)

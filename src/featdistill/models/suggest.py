"""A model that is not there: what may have been meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import timm

from featdistill.core.errors import ModelError, nearest
from featdistill.models import catalogue
from featdistill.models.checkpoints.files import SUFFIXES
from featdistill.models.student_sizes import SIZES


def no_model(spec: str) -> ModelError:
    """The error for a specification that is neither a name, nor a file, nor a folder."""
    if re.match(r"[a-z][a-z0-9+]+://", spec):
        return ModelError(
            f"'{spec}' is an address, and from addresses nothing is downloaded here",
            fix="download it, and give the file",
        )
    return ModelError(
        f"no model '{spec}'",
        expected="timm/NAME, a checkpoint file, hf-hub:NAME, a run or export folder, or "
        "package.module:factory",
        fix=_hint(spec),
    )


def _hint(spec: str) -> str | None:
    if spec in SIZES:
        return "that is a student's name; a model needs weights: timm/NAME or a run folder"
    scheme, colon, rest = spec.partition(":")
    if colon and scheme in ("local-dir", "file"):  # timm's, a browser's
        return f"give the folder or file itself: {rest}"
    if colon and nearest(scheme, ["hf-hub"]):
        return f"did you mean 'hf-hub:{rest}'?"
    entry = catalogue.find(spec)
    if entry is not None and not entry.in_timm:
        return (
            f"its weights are a file to download, which is then what to give: {entry.url}"
            if entry.url
            else "its weights were never published"
        )
    if timm.is_model(spec.partition(".")[0]):
        return f"did you mean 'timm/{spec}'?"
    path = Path(spec)
    if len(path.parts) > 1 or path.suffix in SUFFIXES:
        folder = path.expanduser().parent
        beside = (
            [p.name for p in folder.iterdir() if p.name != path.name] if folder.is_dir() else []
        )
        return _meant(str(path.parent / name) for name in nearest(path.name, beside))
    return _meant(f"timm/{name}" for name in nearest(spec, timm.list_models()))


def _meant(names: Iterable[str]) -> str | None:
    listed = " or ".join(f"'{name}'" for name in names)
    return f"did you mean {listed}?" if listed else None

"""What every export does: write beside, load back, compare, describe, and only then appear."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from featdistill.core.errors import ModelError, RunError
from featdistill.models.backbone import Backbone
from featdistill.models.modes import evaluating

# Names of a model's outputs (`map`, `prefix`, `pooled`, `logits`) and their values
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """An export, checked.

    Attributes:
        folder: where it is.
        difference: largest difference of the re-loaded model's outputs from the model's own, each
            over its largest value.
        notes: what the target would drop, leave fresh or do otherwise, one line each.
        target: the format's name.
        tolerance: the largest difference that was let pass.
        snippet: Python to paste.
    """

    folder: Path
    difference: float
    notes: tuple[str, ...]
    target: str = "timm"
    tolerance: float = 1e-5
    snippet: str = ""


@dataclass(frozen=True)
class Target:
    """A format to export to.

    Attributes:
        name: as users write it.
        title: what is written, in a few words.
        checked_with: what loads it back.
        front: lines of the model card's front matter.
        tolerance: largest difference by default, as a share of the largest output.
        write: writes the files and returns notes for the card; raises ModelError if the format
            cannot hold the model.
        read: the outputs of the files' model for images in [0, 1], and the model's own to compare
            them with.
        snippet: Python that loads the files from a folder.
        modules: libraries beyond the package's own that it needs.
        reason: why a model's output may differ, where that is known beforehand.
    """

    name: str
    title: str
    checked_with: str
    front: tuple[str, ...]
    tolerance: float
    write: Callable[[Backbone, Path], list[str]]
    read: Callable[[Backbone, Path, Tensor], tuple[Outputs, Outputs]]
    snippet: Callable[[Backbone, str], str]
    modules: tuple[str, ...] = ()
    reason: Callable[[Backbone], str | None] = lambda _: None

    def check_installed(self) -> None:
        """Raise ModelError if a library that this format needs is missing or broken."""
        missing = []
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                missing.append(module)
                continue
            try:
                importlib.import_module(module)
            except Exception as error:  # a broken installation raises whatever it likes
                line = " ".join(str(error).split())[:200]
                raise ModelError(
                    f"--to {self.name} needs {module}, which is installed but cannot be imported "
                    f"({line})",
                    fix=f"pip install --force-reinstall {module}",
                ) from None
        if missing:
            raise ModelError(
                f"--to {self.name} needs {', '.join(missing)}, which is not installed",
                fix="pip install featdistill[export]",
            )


def cannot(backbone: Backbone, what: str, why: str, fix: str) -> ModelError:
    """The error for a model that a format cannot hold."""
    return ModelError(f"{what} cannot hold '{backbone.origin.spec}': {why}", fix=fix)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` that takes its place when all went well.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder = folder.resolve()  # `.` has no name; and a link stays, only its folder is replaced
        temporary = folder.with_name(f".{folder.name}.writing")
    except (OSError, RuntimeError) as error:  # links in a circle
        raise RunError(f"cannot write the export '{folder}' ({error})") from None
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    except OSError as error:
        raise RunError(f"cannot write the export '{folder}' ({error.strerror or error})") from None
    except SafetensorError as error:
        raise RunError(f"cannot write the export '{folder}' ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def settled(backbone: Backbone) -> Iterator[Backbone]:
    """The backbone on the CPU and in evaluation mode, for a while."""
    device = backbone.mean.device
    with evaluating(backbone):
        try:
            yield backbone.to("cpu")
        finally:
            backbone.to(device)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors as files want them: on the CPU, contiguous, none sharing memory."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in module.state_dict().items()
    }


@torch.no_grad()
def outputs_of(backbone: Backbone, images: Tensor) -> Outputs:
    """A backbone's own outputs by name."""
    seen = backbone(images)
    found = {"map": seen.map, "prefix": seen.prefix, "pooled": seen.pooled}
    if not backbone.num_prefix:
        del found["prefix"]
    if seen.logits is not None:
        found["logits"] = seen.logits
    return found


def probe_images(backbone: Backbone, count: int) -> Tensor:
    """Uniform noise in [0, 1] of the backbone's size."""
    rng = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, *backbone.image_size, generator=rng)


def largest_difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> float:
    """Largest difference of any output, over that output's largest value.

    Raises:
        ModelError: an output is missing, of another shape, or not a number.
    """
    worst = 0.0
    for name, mine in ours.items():
        their = theirs.get(name)
        if their is None or their.shape != mine.shape:
            shape = "missing" if their is None else str(tuple(their.shape))
            raise ModelError(
                f"the export is not exact: its {name} is {shape}", expected=str(tuple(mine.shape))
            )
        share = (mine - their).abs().max() / mine.abs().max().clamp_min(1e-12)
        if not bool(torch.isfinite(share)):
            raise ModelError(f"the export is not exact: its {name} is not finite")
        worst = max(worst, float(share))
    return worst


def named_parameters(arguments: Mapping[str, Any]) -> str:
    """Keyword arguments as they stand in Python."""
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())

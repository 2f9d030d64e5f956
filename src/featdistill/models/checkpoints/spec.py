"""What a checkpoint format is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featdistill.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Rgb
from featdistill.models.checkpoints.families import Plan
from featdistill.models.checkpoints.tables import Converted, Rule, any_matches
from featdistill.models.checkpoints.unwrap import Unwrapped

CLIP_MEAN: Rgb = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Rgb = (0.26862954, 0.26130258, 0.27577711)
HALF: Rgb = (0.5, 0.5, 0.5)

# What a checkpoint's surroundings say: settings files beside it
Settings = Mapping[str, Any]
Hints = Callable[[Unwrapped, Converted, Settings], dict[str, Any]]


def _no_hints(_: Unwrapped, __: Converted, ___: Settings) -> dict[str, Any]:
    return {}


def _as_it_is(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _same_name(name: str, _: Mapping[str, Tensor]) -> str:
    return name


@dataclass(frozen=True)
class Format:
    """One way of writing a family's weights.

    Attributes:
        name: short.
        title: whose files these are.
        marks: patterns that must all occur.
        never: patterns none of which may occur.
        any_of: patterns of which one must occur, if there are any.
        rules: the key table.
        plan: the model from the tensors.
        mean, std: the normalisation that these models were trained with.
        normalisation_known: whether every such file was trained so; if not, the user is told.
        hints: arguments that the tensors cannot show, from the file and its surroundings.
        finish: what else happens to the tensors, where a table of names is not enough.
        unfinish: the name before `finish` of one after it, for messages.
        required: patterns that must occur in the file, although a model without them could exist.
        kind: timm's class.
        pads_first: Swins that are padded before they are shifted (`extensions`).
    """

    name: str
    title: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    plan: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Plan]
    never: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    mean: Rgb = IMAGENET_MEAN
    std: Rgb = IMAGENET_STD
    normalisation_known: bool = True
    hints: Hints = _no_hints
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _as_it_is
    unfinish: Callable[[str, Mapping[str, Tensor]], str] = _same_name
    required: tuple[str, ...] = ()
    kind: type[nn.Module] = VisionTransformer
    pads_first: bool = False

    def recognises(self, names: Mapping[str, Tensor]) -> bool:
        """Whether a state dict is of this format."""
        return (
            all(any_matches(m, names) for m in self.marks)
            and not any(any_matches(n, names) for n in self.never)
            and (not self.any_of or any(any_matches(a, names) for a in self.any_of))
        )


def same(*patterns: str) -> tuple[Rule, ...]:
    """Rules for names that are timm's already."""
    return tuple(Rule(p, p) for p in patterns)

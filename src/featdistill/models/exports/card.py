"""The model card: one template for every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featdistill.models.backbone import Backbone
from featdistill.models.exports.common import Exported, Target
from featdistill.models.weights import tensors_hash

_MADE, _RESULTS, _LICENCE = "How it was made", "Results so far", "Licence of the weights"
# SPDX names of licences that allow nearly everything, and beginnings of those that do not
_PERMISSIVE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0")
_NON_COMMERCIAL = ("cc-by-nc", "non-commercial", "noncommercial")


# stands in the place of a licence where no earlier weights went into a model
FRESH = "made from random weights"


@dataclass(frozen=True)
class Story:
    """What is known of a model besides its weights.

    Attributes:
        made: fact -> value: teacher, data, recipe, ...
        results: lines.
        licences: whose weights went into it -> their licence, None where it is not known, or
            `FRESH`.
    """

    made: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[str, ...] = ()
    licences: Mapping[str, str | None] = field(default_factory=dict)


def public_name(spec: str) -> str:
    """A model's name for others to read: without the folders that it lies in."""
    if spec.startswith(("timm/", "hf-hub:")) or not spec:
        return spec
    path = Path(spec).expanduser()
    if path.name in ("", ".", "..", "export"):
        path = path.resolve()
    if path.name == "export" or path.parent.name == "export":
        path = path.parent if path.name == "export" else path.resolve().parent.parent
    return path.name


def card(backbone: Backbone, target: Target, exported: Exported, story: Story) -> str:
    """The text of an export's README.md."""
    folder = exported.folder.resolve()
    name = folder.name if folder.name != "export" else folder.parent.name
    licence = [f"license: {backbone.origin.licence}"] if backbone.origin.licence else []
    lines = [
        *("---", *target.front, *licence, "---"),
        *(f"# {name or 'model'}", ""),
        *("```python", target.snippet(backbone, "THIS_FOLDER"), "```", ""),
        *_facts(backbone, target, exported),
        *("", "Made with featdistill."),
        *_section(_MADE, [f"{key}: {value}" for key, value in story.made.items()]),
        *_section(_RESULTS, story.results),
        *_section(_LICENCE, _licence_lines(backbone, story)),
        *_section(f"In {target.checked_with}", exported.notes),
        "",
    ]
    return "\n".join(lines)


def _section(title: str, points: list[str] | tuple[str, ...]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {point}" for point in points)] if points else []


def _facts(backbone: Backbone, target: Target, exported: Exported) -> list[str]:
    grid = f"{backbone.grid[0]}x{backbone.grid[1]}"
    mean, std = (", ".join(f"{v:.3f}" for v in values) for values in backbone.rgb)
    build = backbone.build
    rows = {
        "format": target.title,
        "architecture": build.architecture if build else type(backbone.model).__name__,
        "parameters": f"{backbone.parameters_count / 1e6:.2f} M",
        "image": f"{backbone.image_size[0]}x{backbone.image_size[1]}, RGB",
        "normalisation": f"mean {mean}; std {std}",
        "tokens": f"{grid} map of {backbone.width} channels, "
        f"prefix: {', '.join(backbone.prefix_names) or 'none'}",
        "classes": str(backbone.num_classes or "none"),
        "weights": f"sha256 {tensors_hash(backbone.model)}",
        "checked": f"{_possessive(target.checked_with)} output differs by "
        f"{exported.difference:.1g} of the largest value at most "
        f"(tolerance {exported.tolerance:g})",
    }
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]


def _possessive(name: str) -> str:
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def _licence_lines(backbone: Backbone, story: Story) -> list[str]:
    """What is known of the licences, and what it means; this is no legal advice."""
    licences = dict(story.licences)
    if not licences and backbone.origin.licence:
        licences[public_name(backbone.origin.spec)] = backbone.origin.licence
    if not licences:
        return ["Not known: ask whoever gave you the weights or the teacher before you pass it on."]
    lines = [
        f"{whose}: {licence or 'not known'}. {_meaning(licence)}"
        for whose, licence in licences.items()
    ]
    if all(licence == FRESH for licence in licences.values()):
        return lines
    return [
        *lines,
        "Whether the licence of a teacher's weights reaches a student that learned from its "
        "features is not settled; the careful reading is that it does.",
    ]


def _meaning(licence: str | None) -> str:
    if licence is None:
        return "Ask before you pass anything on that was made from it."
    if licence == FRESH:
        return "Nobody else's weights are in it; the images may have terms of their own."
    name = licence.lower()
    if any(word in name for word in _NON_COMMERCIAL):
        return "No commercial use."
    if name in _PERMISSIVE:
        return "Commercial use and changes are allowed; keep its notice."
    return "Terms of its own: read them before you pass anything on that was made from it."


def read_made(readme: Path) -> dict[str, str]:
    """How a model was made, from the card of an earlier export of ours; {} if it does not say."""
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    _, found, rest = text.partition(f"## {_MADE}\n")
    facts = {}
    for line in rest.partition("\n## ")[0].splitlines() if found else ():
        key, colon, value = line.removeprefix("- ").partition(": ")
        if line.startswith("- ") and colon:
            facts[key] = value
    return facts

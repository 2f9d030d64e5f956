"""Key tables: how one project's tensor names become another's, in both directions.

A pattern is a tensor's name in which `#` stands for a number and `*`, at the end, for the rest:
`blocks.#.norm1.*`. On the other side of a rule `#+1` is the number plus one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """One line of a key table.

    Attributes:
        source: pattern of the file's name; several, if their tensors are concatenated.
        target: pattern of timm's name, or None: left out on purpose.
        why: the reason for leaving it out.
        change: what happens to the values on the way in, where a name is not all that differs.
        back: the same on the way out.
        buffer: the model computes this tensor itself: it is compared instead of loaded.
    """

    source: str | tuple[str, ...]
    target: str | None
    why: str = ""
    change: Change | None = None
    back: Change | None = None
    buffer: bool = False

    def __post_init__(self) -> None:
        assert (self.target is None) == bool(self.why), self
        assert isinstance(self.source, str) or self.change is None, self

    @property
    def sources(self) -> tuple[str, ...]:
        """The source patterns as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class Converted:
    """Tensors under other names.

    Attributes:
        tensors: by their new names.
        came_from: new name -> the name in the file (the first, where several were joined).
        renamed: how many names changed.
        left_out: reason -> the file's names that were left out for it.
        strangers: names that no rule knows.
        incomplete: names that are missing beside others that they are joined with.
        unequal: names (with shapes) that others which they are joined with differ from.
        buffers: what the model computes itself, by its new name.
    """

    tensors: dict[str, Tensor]
    came_from: dict[str, str] = field(default_factory=dict)
    renamed: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    unequal: tuple[str, ...] = ()
    buffers: dict[str, Tensor] = field(default_factory=dict)


_TOKEN = re.compile(r"#(\+\d+)?|\*")


@cache
def _compile(pattern: str) -> tuple[re.Pattern[str], tuple[int, ...]]:
    """A pattern as an expression, and by how much each of its numbers is shifted."""
    out, shifts, last = "", [], 0
    for token in _TOKEN.finditer(pattern):
        out += re.escape(pattern[last : token.start()])
        last = token.end()
        out += r"(.+)" if token[0] == "*" else r"(\d+)"
        if token[0] != "*":
            shifts.append(int(token[1] or 0))
    return re.compile(out + re.escape(pattern[last:])), tuple(shifts)


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    """What `#` and `*` stand for in a name, shifts undone; None if it does not match."""
    expression, shifts = _compile(pattern)
    found = expression.fullmatch(name)
    if found is None:
        return None
    values = list(found.groups())
    for place, shift in enumerate(shifts):
        values[place] = str(int(values[place]) - shift)
    return tuple(values)


def _fill(pattern: str, values: tuple[str, ...]) -> str:
    """A pattern with its `#` and `*` filled in."""
    left = iter(values)

    def one(token: re.Match[str]) -> str:
        value = next(left)
        return str(int(value) + int(token[1])) if token[1] else value

    return _TOKEN.sub(one, pattern)


def matches(pattern: str, name: str) -> bool:
    """Whether a name is one of a pattern's."""
    return _match(pattern, name) is not None


def any_matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern has a match among names."""
    expression, _ = _compile(pattern)
    return any(expression.fullmatch(name) for name in names)


def convert(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> Converted:
    """The file's tensors under timm's names; the first rule that knows a name has it."""
    table = [(rule, place, source) for rule in rules for place, source in enumerate(rule.sources)]
    out: dict[str, Tensor] = {}
    came_from: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    strangers: list[str] = []
    buffers: dict[str, Tensor] = {}
    parts: dict[str, tuple[Rule, dict[int, str], tuple[str, ...]]] = {}
    for name, value in tensors.items():
        for rule, place, source in table:
            values = _match(source, name)
            if values is None:
                continue
            if rule.target is None:
                left_out.setdefault(rule.why, []).append(name)
            elif len(rule.sources) > 1:
                target = _fill(rule.target, values)
                parts.setdefault(target, (rule, {}, values))[1][place] = name
            else:
                target = _fill(rule.target, values)
                home = buffers if rule.buffer else out
                if target in home:  # two names for one tensor: neither can be trusted
                    strangers.append(name)
                    break
                home[target] = rule.change(value) if rule.change else value
                came_from[target] = name
            break
        else:
            strangers.append(name)
    incomplete: list[str] = []
    unequal: list[str] = []
    for target, (rule, names, values) in parts.items():
        missing = [s for i, s in enumerate(rule.sources) if i not in names]
        if missing:
            incomplete += [_fill(source, values) for source in missing]
            continue
        ordered = [names[i] for i in range(len(rule.sources))]
        if odd := _odd_ones({n: tuple(tensors[n].shape) for n in ordered}):
            unequal += odd
            continue
        out[target] = torch.cat([tensors[n] for n in ordered])
        came_from[target] = ordered[0]
    renamed = sum(old != new for new, old in came_from.items() if new in out)
    return Converted(
        out,
        came_from,
        renamed,
        left_out,
        tuple(strangers),
        tuple(incomplete),
        tuple(unequal),
        buffers,
    )


def _odd_ones(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Which of the tensors that are to be joined have another shape than most, with both shapes."""
    counts = Counter(shapes.values())
    usual, votes = counts.most_common(1)[0]
    if votes == len(shapes) and usual:
        return []
    if votes == 1 or not usual:  # nobody knows which is right
        return [f"{name} {shape}" for name, shape in shapes.items()]
    return [f"{name} {shape} for {usual}" for name, shape in shapes.items() if shape != usual]


def revert(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> Converted:
    """timm's tensors under the other project's names: `convert` the other way round."""
    out: dict[str, Tensor] = {}
    came_from: dict[str, str] = {}
    strangers: list[str] = []
    usable = [rule for rule in rules if rule.target is not None and not rule.buffer]
    for name, value in tensors.items():
        for rule in usable:
            assert rule.target is not None
            values = _match(rule.target, name)
            if values is None:
                continue
            assert rule.change is None or rule.back is not None, rule
            whole = rule.back(value) if rule.back else value
            for source, part in zip(rule.sources, whole.chunk(len(rule.sources)), strict=True):
                out[_fill(source, values)] = part
                came_from[_fill(source, values)] = name
            break
        else:
            strangers.append(name)
    return Converted(out, came_from, strangers=tuple(strangers))


def names_before(name: str, rules: Iterable[Rule], present: Collection[str] = ()) -> str:
    """The name in the file of timm's `name`, by a rule that makes it.

    Of several such rules, the one that knows names that are `present` is the file's.
    """
    found = []
    for rule in rules:
        values = None if rule.target is None else _match(rule.target, name)
        if values is not None:
            source = rule.sources[0]
            found.append((not any_matches(source, present), _fill(source, values)))
    return min(found, key=lambda pair: pair[0])[1] if found else name

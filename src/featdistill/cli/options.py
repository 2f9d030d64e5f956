"""Reads a command's options, and writes its help. No heavy import may reach this file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from featdistill.config.commands import Command
from featdistill.config.resolve import Leaf, leaves, parse_text, path_of, unknown_option


@dataclass
class Parsed:
    """Options as they were typed.

    Attributes:
        values: option name -> text, list of texts, True or None.
        problems: one line for each option that could not be understood.
    """

    values: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    config: str | None = None
    print_config: bool = False
    help: bool = False
    problems: list[str] = field(default_factory=list)


def parse(schema: type[Command], arguments: Sequence[str]) -> Parsed:
    """Split arguments into options; every mistake is kept, none ends the parsing."""
    parsed = Parsed()
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if word in ("-h", "--help"):
            parsed.help = True
        elif word == "--print-config":
            parsed.print_config = True
        elif word.startswith("--"):
            _option(schema, parsed, word[2:], queue)
        elif schema.positional and _bare(schema, schema.positional, parsed, word):
            continue
        else:
            parsed.problems.append(f"'{word}' is not an option; options begin with '--'")
    return parsed


def _bare(schema: type[Command], name: str, parsed: Parsed, word: str) -> bool:
    """Take in a bare word as the schema's positional; False where there is no room for it."""
    path = path_of(schema, name)
    if path is not None and leaves(schema)[path].is_tuple:
        _option(schema, parsed, name, [word])
        return True
    if name in parsed.values:
        return False
    parsed.values[name] = word
    return True


def _option(schema: type[Command], parsed: Parsed, word: str, queue: list[str]) -> None:
    name, equals, inline = word.partition("=")
    if name in ("recipe", "config"):
        value = inline if equals else _take(queue)
        if value is None:
            parsed.problems.append(f"--{name} needs a value")
        else:
            setattr(parsed, name, value)
        return
    path = path_of(schema, name)
    negated = name.startswith("no-") and path is None
    if negated:
        path = path_of(schema, name.removeprefix("no-"))
    leaf = leaves(schema).get(path) if path else None
    if path is None or (negated and not (leaf and leaf.is_bool)):
        parsed.problems.append(unknown_option(schema, name))
        if not equals:
            _take(queue)
        return
    if negated:
        parsed.values[path] = False
        return
    value = inline if equals else _take(queue, choices=("true", "false") if _flag(leaf) else None)
    if value is None:
        if _flag(leaf):
            parsed.values[path] = True
        else:
            parsed.problems.append(f"--{name} needs a value: {leaf.description if leaf else ''}")
        return
    new = parse_text(leaf, value)
    if leaf is not None and leaf.is_tuple and isinstance(parsed.values.get(path), list) and new:
        parsed.values[path] = [*parsed.values[path], *new]
    else:
        parsed.values[path] = new


def _flag(leaf: Leaf | None) -> bool:
    return leaf is not None and leaf.is_bool


def _take(queue: list[str], choices: tuple[str, ...] | None = None) -> str | None:
    if not queue or queue[0].startswith("--"):
        return None
    if choices is not None and queue[0].lower() not in choices:
        return None
    return queue.pop(0)


def help_text(name: str, schema: type[Command]) -> str:
    """The help of one command: everyday options first, then everything else by dotted path."""
    known = leaves(schema)
    out = [f"usage: featdistill {name} [--option value ...]", "", schema.summary, ""]
    out += ["example:", f"  {schema.example}", "", "everyday options:"]
    for flat, path in schema.flat.items():
        out += _entry(f"--{flat}", known.get(path))
    out += _entry("--recipe", None, "start from a shipped recipe (see 'featdistill recipes')")
    out += _entry("--config", None, "a YAML file; options win over it, and it over the recipe")
    out += _entry("--print-config", None, "print the resolved configuration and stop")
    rest = [leaf for path, leaf in known.items() if path not in schema.flat.values()]
    if rest:
        out += ["", "everything else:"]
        for leaf in rest:
            out += _entry(f"--{leaf.path}", leaf)
    return "\n".join(out)


def _entry(option: str, leaf: Leaf | None, text: str = "") -> list[str]:
    if leaf is not None:
        text = leaf.description
        if leaf.default is ...:
            text += " (required)"
        elif leaf.default not in (None, "", ()):
            text += f" [{_show(leaf.default)}]"
    lines = textwrap.wrap(text, 66) or [""]
    head = f"  {option:<28}"
    if len(option) > 26:
        return [f"  {option}", *(" " * 30 + line for line in lines)]
    return [head + lines[0], *(" " * 30 + line for line in lines[1:])]


def _show(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return ",".join(_show(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if isinstance(value, bool) else str(value)

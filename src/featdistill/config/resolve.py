"""Defaults, recipe, file and options become one dictionary, and that is validated once."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from featdistill.config.commands import COMMANDS, Command
from featdistill.core.errors import ConfigError, did_you_mean
from featdistill.core.parsing import parse_yaml


@dataclass(frozen=True)
class Leaf:
    """One settable value: its dotted path, type and description.

    Attributes:
        is_tuple: several values, repeated or separated by commas.
        is_bool: may be given without a value.
        optional: may have no value, for which `none` stands.
        has_none: `none` is a value of its own (`--position none`).
        default: what holds if it is not given; `...` where it must be.
    """

    path: str
    annotation: Any
    description: str
    is_tuple: bool
    is_bool: bool
    optional: bool
    default: Any
    has_none: bool = False


@cache
def leaves(schema: type[BaseModel]) -> dict[str, Leaf]:
    """Every settable value of a schema, by dotted path."""
    return {leaf.path: leaf for leaf in _walk(schema, None, "")}


def _walk(schema: type[BaseModel], instance: BaseModel | None, prefix: str) -> Iterator[Leaf]:
    for name, info in schema.model_fields.items():
        path = f"{prefix}{name}"
        default = _default(info, instance, name)
        section = section_of(info.annotation)
        if section is not None:
            yield from _walk(
                section, default if isinstance(default, BaseModel) else None, path + "."
            )
            continue
        options = _union(info.annotation)
        yield Leaf(
            path=path,
            annotation=info.annotation,
            description=info.description or "",
            is_tuple=any(typing.get_origin(o) is tuple for o in options),
            is_bool=bool in options,
            optional=type(None) in options,
            default=default,
            has_none=any(
                isinstance(o, type) and issubclass(o, Enum) and "none" in {m.value for m in o}
                for o in options
            ),
        )


def _default(info: FieldInfo, instance: BaseModel | None, name: str) -> Any:
    if instance is not None:
        return getattr(instance, name)
    return ... if info.is_required() else info.get_default(call_default_factory=True)


def _union(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return tuple(o for part in typing.get_args(annotation) for o in _union(part))
    if typing.get_origin(annotation) is typing.Annotated:
        return _union(typing.get_args(annotation)[0])
    return (annotation,)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one (and not a value)."""
    for option in _union(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def path_of(schema: type[Command], name: str) -> str | None:
    """The dotted path that an option's name means; None if there is no such option."""
    flat = name.replace("_", "-")
    if flat in schema.flat:
        return schema.flat[flat]
    dotted = name.replace("-", "_")
    if dotted in leaves(schema) or dotted in _optional_sections(schema):
        return dotted
    return None


def _optional_sections(schema: type[Command]) -> set[str]:
    return {
        name
        for name, info in schema.model_fields.items()
        if section_of(info.annotation) and type(None) in _union(info.annotation)
    }


def unknown_option(schema: type[Command], name: str) -> str:
    """One line for an option that does not exist, with the nearest that does."""
    known = [*schema.flat, *leaves(schema), "recipe", "config", "print-config", "help"]
    names = dict.fromkeys(known)  # an option without a section is among both
    flat_last = {path.rsplit(".", 1)[-1].replace("_", "-"): path for path in leaves(schema)}
    bare = name.replace("_", "-")
    hint = f"did you mean '{flat_last[bare]}'?" if bare in flat_last else did_you_mean(bare, names)
    return f"unknown option '{name}'" + (f"; {hint}" if hint else "; see --help")


def parse_text(leaf: Leaf | None, text: str) -> Any:
    """What a command-line string stands for; its type is checked later, with all others'."""
    if text.lower() == "none" and (leaf is None or (leaf.optional and not leaf.has_none)):
        return None
    if leaf is not None and leaf.is_tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


class _Merged:
    """A nested dictionary that remembers which source each value came from."""

    def __init__(self, schema: type[Command]) -> None:
        self.schema = schema
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []

    def put(self, path: str, value: Any, origin: str) -> None:
        *sections, last = path.split(".")
        at = self.values
        for depth, name in enumerate(sections):
            if not isinstance(at.get(name), dict):
                at[name] = {}
                self.origins[".".join(sections[: depth + 1])] = origin
            at = at[name]
        at[last] = value
        self.origins[path] = origin

    def add_tree(self, tree: Mapping[str, Any], origin: str, prefix: str = "") -> None:
        """Add nested values; short names are understood at the top level."""
        if not prefix:
            _replace_length(self, tree, origin)
        for name, value in tree.items():
            path = f"{prefix}{name}"
            if isinstance(value, BaseModel):
                value = value.model_dump()
            if isinstance(value, Mapping):
                self.add_tree(value, origin, path + ".")
                continue
            known = path_of(self.schema, path)
            if known is None:
                self.problems.append(f"{origin}: {unknown_option(self.schema, path)}")
            else:
                self.put(known, value, origin)


def resolve(
    command: str,
    options: Mapping[str, Any],
    *,
    recipe: str | None = None,
    config: str | Path | None = None,
    origin: str = "options",
    problems: tuple[str, ...] = (),
) -> Command:
    """The immutable configuration of a command.

    Args:
        command: a name in `COMMANDS`.
        options: values by short name, dotted path or nested section; they win over the file.
        recipe: a shipped recipe to start from.
        config: a YAML file, which wins over the recipe.
        origin: what error messages call the source of `options`.
        problems: mistakes found before (unknown options, say), to be reported with the others.

    Raises:
        ConfigError: with every mistake in every source.
    """
    schema = COMMANDS[command]
    merged = _Merged(schema)
    merged.problems.extend(problems)
    if recipe is not None:
        tree = read_recipe(recipe)
        meant = tree.pop("command", command)
        if meant != command:
            raise ConfigError(
                [f"recipe '{recipe}' is for 'featdistill {meant}', not 'featdistill {command}'"]
            )
        merged.add_tree(tree, f"recipe {recipe}")
    if config is not None:
        tree = _read_yaml(Path(config))
        tree.pop("command", None)
        merged.add_tree(tree, str(config))
    merged.add_tree(options, origin)
    _extend(merged)
    for name, info in schema.model_fields.items():
        if not section_of(info.annotation):
            continue
        if info.is_required():  # so that what is missing is named, leaf by leaf
            merged.values.setdefault(name, {})
        elif isinstance(info.default, BaseModel) and isinstance(merged.values.get(name), dict):
            # a command's own defaults of a section outlive a single value given for it
            merged.values[name] = {**info.default.model_dump(), **merged.values[name]}
    try:
        value = schema.model_validate(merged.values)
    except ValidationError as error:
        lines = [_say(schema, merged, detail) for detail in error.errors()]
        raise ConfigError([*merged.problems, *dict.fromkeys(lines)]) from None
    if merged.problems:
        raise ConfigError(merged.problems)
    return value


def _replace_length(merged: _Merged, tree: Mapping[str, Any], origin: str) -> None:
    """`steps` in one source replaces the `epochs` of those before it, and the reverse."""
    section = tree.get("schedule")
    nested = [f"schedule.{name}" for name in section] if isinstance(section, Mapping) else []
    given = {path_of(merged.schema, name) for name in (*tree, *nested)}
    for mine, other in (("steps", "epochs"), ("epochs", "steps")):
        alone = f"schedule.{mine}" in given and f"schedule.{other}" not in given
        if alone and f"schedule.{other}" in leaves(merged.schema):
            merged.put(f"schedule.{other}", None, origin)


def _extend(merged: _Merged) -> None:
    """The length that a run is to be extended to takes the place of the one that is given."""
    run = merged.values.get("run")
    wanted = run.get("extend") if isinstance(run, dict) else None
    name, equals, number = wanted.partition("=") if isinstance(wanted, str) else ("", "", "")
    if name not in ("epochs", "steps") or not equals or "run.extend" not in leaves(merged.schema):
        return  # nothing, or what validation refuses
    for length in ("epochs", "steps"):
        merged.put(f"schedule.{length}", number if length == name else None, "--extend")


def _say(schema: type[Command], merged: _Merged, detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    path = ""
    for depth in range(len(location), 0, -1):
        candidate = ".".join(location[:depth])
        if candidate in leaves(schema) or candidate in merged.origins:
            path = candidate
            break
    path = path or ".".join(location)
    short = next((f"--{flat}" for flat, p in schema.flat.items() if p == path), None)
    name = f"{short} ({path})" if short else f"--{path}"
    leaf = leaves(schema).get(path)
    if detail["type"] == "missing":
        return f"{name} is required: {leaf.description if leaf else 'a value'}"
    if detail["type"] == "extra_forbidden":
        return f"{merged.origins.get(path, 'options')}: {unknown_option(schema, path)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error" and not path:
        return message  # of the whole command
    if detail["type"] == "value_error":
        return f"{name.removeprefix('--') if not short else name}: {message}"
    given = detail["input"]
    expected = message[0].lower() + message[1:].replace("Input", "it")
    expected = expected.replace("input should be", "expected").rstrip(".")
    choices = detail.get("ctx", {}).get("expected")
    hint = None
    if choices and isinstance(given, str):
        hint = did_you_mean(given, [c.strip("' ") for c in choices.replace(" or ", ",").split(",")])
    where = merged.origins.get(path)
    source = f" (from {where})" if where and where != "options" else ""
    return f"{name}: given {given!r}{source}; {expected}" + (f"; {hint}" if hint else "")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"no configuration file at '{path}'; check --config"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot read configuration '{path}': {error}"]) from None
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError([f"'{path}' is not valid YAML: {line}"]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"'{path}' holds a {type(tree).__name__}; expected keys and values"])
    return cast(dict[str, Any], tree)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("featdistill.config").joinpath("recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """A recipe's file, comments and all.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name not in recipe_names():
        hint = did_you_mean(name, recipe_names()) or "see 'featdistill recipes'"
        raise ConfigError([f"no recipe called '{name}'; {hint}"])
    file = resources.files("featdistill.config").joinpath("recipes", f"{name}.yaml")
    return file.read_text(encoding="utf-8")


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's values, `command` among them."""
    return cast(dict[str, Any], yaml.safe_load(recipe_text(name)))


def to_yaml(config: BaseModel) -> str:
    """A configuration as YAML that `--config` takes back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)

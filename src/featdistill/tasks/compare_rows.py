"""The rows of a comparison: which models there are, and that they can be compared at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from featdistill.config.commands import CompareConfig
from featdistill.config.commands.comparison import ROWS, named, slug
from featdistill.config.sections import ModelConfig
from featdistill.core.errors import ConfigError
from featdistill.engine.tracking import say
from featdistill.models.backbone import Backbone, Origin
from featdistill.models.exports.card import public_name
from featdistill.models.students import build_fresh
from featdistill.tasks.common import model_of
from featdistill.tasks.lineage import Lineage, lineage


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    Attributes:
        make: builds it; from a seed, where its weights are random.
        origin: of its weights; None where they are random, by seed.
        past: what had been done to it.
    """

    name: str
    title: str
    make: Callable[[int], Backbone]
    origin: Origin | None
    past: Lineage

    @property
    def fresh(self) -> bool:
        """Whether it begins with no knowledge at all."""
        return self.origin is None


def own_size(config: CompareConfig) -> int:
    """The student's own image size, at which all rows are compared unless told otherwise."""
    return model_of(config.student, quiet=True).image_size[0]


def rows_of(config: CompareConfig, size: int) -> list[Row]:
    """Teacher, student, the further models, and the student's shape from nothing.

    Raises:
        ConfigError: a model or a name is there twice.
        ModelError: a model cannot be loaded.
    """
    further = [named(text) for text in config.also]
    _refuse_doubles(config, [spec for _, spec in further])
    rows = [
        _loaded("teacher", "Teacher", config.teacher, config, size, quiet=False),
        _loaded("student", "Distilled student", config.student, config, size),
    ]
    for name, spec in further:
        row = _loaded("", "", ModelConfig(spec=spec), config, size)
        title = name or row.past.title or public_name(spec)
        rows.append(Row(slug(title), title, row.make, row.origin, row.past))
    _refuse_same_names(rows, config.also)
    if config.scratch:
        rows += _scratch(config, rows[1], size)
    return rows


def _loaded(
    name: str,
    title: str,
    model: ModelConfig,
    config: CompareConfig,
    size: int,
    *,
    quiet: bool = True,
) -> Row:
    """A row whose model was loaded once, so that what is wrong with it is said now."""

    def make(_: int) -> Backbone:
        return model_of(model, image_size=size, seed=config.run.seed, quiet=True)

    origin = model_of(model, image_size=size, seed=config.run.seed, quiet=quiet).origin
    return Row(name, title, make, origin, lineage(origin, model.spec))


def _scratch(config: CompareConfig, student: Row, size: int) -> list[Row]:
    shape = student.make(0)
    if shape.build is None:
        say("note: no row from scratch, since the student's shape is not one of timm's")
        return []
    build, (mean, std) = shape.build, shape.rgb

    def make(seed: int) -> Backbone:
        return build_fresh(
            build, spec=config.student.spec, seed=seed, mean=mean, std=std, image_size=size
        )

    return [Row("scratch", "From scratch", make, None, Lineage())]


def _refuse_doubles(config: CompareConfig, further: Iterable[str]) -> None:
    """Raise ConfigError for a model that is compared with itself."""
    seen: dict[tuple[str, ...], str] = {}
    models = [
        ("--teacher", config.teacher),
        ("--student", config.student),
        *(("--also", ModelConfig(spec=spec)) for spec in further),
    ]
    for option, model in models:
        path = Path(model.spec).expanduser()
        place = str(path.resolve()) if path.exists() else model.spec
        key = (place, model.weights, model.arch or "", model.branch or "")
        if key in seen:
            raise ConfigError(
                [f"{seen[key]} and {option} are one model, '{model.spec}'; give two that differ"]
            )
        seen[key] = option


def _refuse_same_names(rows: list[Row], also: tuple[str, ...]) -> None:
    specs = dict.fromkeys(ROWS, "a row of every comparison")
    for row, text in zip(rows[2:], also, strict=True):
        if row.name in specs:
            raise ConfigError(
                [
                    f"--also '{text}' would be called '{row.title}', which is the name of "
                    f"{specs[row.name]}; give it one: --also NAME={named(text)[1]}"
                ]
            )
        specs[row.name] = f"'{text}' too"


def weights_of(rows: Iterable[Row]) -> Mapping[str, str]:
    """Which weights the rows begin with, for a run that may be resumed."""
    return {row.name: row.origin.weights for row in rows if row.origin is not None}


def keep_inputs(config: CompareConfig, folder: Path) -> None:
    """Copy how teacher and student came to be, so that the page can be made again from here."""
    for name, spec in (("teacher", config.teacher.spec), ("student", config.student.spec)):
        source = Path(spec).expanduser()
        for file in ("metrics.jsonl", "config.yaml", "distill.json", "pretrain.json"):
            if (source / file).is_file():
                (folder / "inputs" / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, folder / "inputs" / name / file)

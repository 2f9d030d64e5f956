"""Defaults, recipe, file and options become one immutable configuration, or one error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from featdistill.config import resolve as resolve_module
from featdistill.config.commands import COMMANDS
from featdistill.config.commands.comparison import named, slug
from featdistill.config.resolve import (
    leaves,
    path_of,
    read_recipe,
    recipe_names,
    resolve,
    to_yaml,
)
from featdistill.core.errors import ConfigError

REQUIRED: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "check": {"teacher": "timm/x", "data": "digits"},
    "distill": {"teacher": "timm/x", "data": "digits", "out": "o"},
    "compare": {"teacher": "a", "student": "b", "data": "digits", "out": "o"},
    "finetune": {"model": "a", "data": "digits", "out": "o"},
    "knn": {"model": ["a", "b"], "data": "digits"},
    "predict": {"model": "a", "data": "digits"},
    "probe": {"model": ["a"], "data": "digits", "out": "o"},
    "features": {"model": "a", "data": "digits", "out": "o"},
    "pretrain": {"data": "digits", "out": "o"},
    "export": {"model": "a", "out": "o"},
    "curvature": {"model": ["a"], "data": "digits", "out": "o"},
    "landscape": {"model": ["a"], "data": "digits", "out": "o"},
    "segment": {"model": "a", "data": "d", "out": "o"},
    "diagnose": {"kind": "features", "model": ["a"], "data": "digits", "out": "o"},
    "report": {"run": ["a"]},
    "models": {},
    "recipes": {},
    "bench": {"what": "diagnose"},
}


def problems(command: str, options: Mapping[str, Any], **more: Any) -> list[str]:
    """The lines of the one error that these options give."""
    with pytest.raises(ConfigError) as caught:
        resolve(command, options, **more)
    return str(caught.value).splitlines()


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe called `made`, to be filled by the test."""
    values: dict[str, Any] = {"command": "distill"}
    monkeypatch.setattr(resolve_module, "read_recipe", lambda name: dict(values))
    return values


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def test_precedence(recipe: dict[str, Any], file: Path) -> None:
    recipe["view"] = {"image_size": 2, "flip": False}
    recipe["data"] = {"batch_size": 2, "workers": 2}
    file.write_text("data: {batch_size: 3, workers: 3}")
    options = {**REQUIRED["distill"], "data.batch_size": "4"}
    config = resolve("distill", options, recipe="made", config=file)
    assert config.data.batch_size == 4, "options win over the file"
    assert config.data.workers == 3, "the file wins over the recipe"
    assert config.view.image_size == 2, "the recipe wins over the defaults"
    assert config.run.seed == 0, "the rest is default"


def test_short_names_and_dotted_paths_are_the_same() -> None:
    short = resolve("distill", {**REQUIRED["distill"], "image-size": 64, "drop_path": 0.2})
    nested = resolve(
        "distill",
        {
            "teacher": {"spec": "timm/x"},
            "data.path": "digits",
            "run": {"out": "o"},
            "view": {"image_size": 64},
            "student.drop_path": 0.2,
        },
    )
    assert short == nested


def test_a_configuration_is_immutable() -> None:
    config = resolve("distill", REQUIRED["distill"])
    with pytest.raises(ValidationError, match="frozen"):
        config.run.seed = 3


def test_every_mistake_at_once(file: Path) -> None:
    file.write_text("studnet: {name: vit-b}\nview: {image_size: -4}")
    lines = problems(
        "distill",
        {"data": "digits", "batch-size": "ten", "whitening": "layernrom", "drop-path": "1.5"},
        config=file,
        problems=("unknown option 'foo'",),
    )
    text = "\n".join(lines)
    assert len(lines) == 8, text
    for words in (
        ("unknown option 'foo'",),
        (str(file), "'studnet.name'"),
        ("--teacher (teacher.spec) is required",),
        ("--out (run.out) is required",),
        ("--batch-size (data.batch_size)", "'ten'", "integer"),
        ("--whitening", "'layernrom'", "did you mean 'layernorm'?"),
        ("--drop-path (student.drop_path)", "'1.5'", "less than 1"),
        ("--image-size (view.image_size)", "-4", str(file), "greater than 0"),
    ):
        assert [line for line in lines if all(w in line for w in words)], (words, text)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batch-sise", "did you mean 'batch-size'"),
        ("bad_image_limit", "did you mean 'data.bad_image_limit'"),
        ("data.batchsize", "did you mean 'data.batch_size'"),
        ("recipes", "did you mean 'recipe'"),
        ("zzzzzz", "see --help"),
    ],
)
def test_unknown_key_gets_a_suggestion(name: str, hint: str) -> None:
    (line,) = problems("distill", {**REQUIRED["distill"], name: 1})
    assert f"unknown option '{name}'; {hint}" in line


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("distill", {"view.crop_scale": [0.5, 0.1]}, "crop_scale must be two numbers"),
        ("distill", {"view.crop_scale": [0.5, 1.1]}, "crop_scale cannot exceed 1"),
        ("distill", {"view.crop_ratio": [0, 1]}, "crop_ratio must be two numbers"),
        ("distill", {"epochs": 3, "steps": 4}, "either epochs or steps, not both"),
        ("distill", {"seed": -1}, "--seed (run.seed): given -1; expected greater than"),
        ("distill", {"val-fraction": 1}, "--val-fraction (data.val_fraction)"),
        ("compare", {"seeds": [1, 1]}, "seeds must differ"),
        ("compare", {"lrs": []}, "--lrs"),
        ("compare", {"lrs": [1, 1.0]}, "lrs must differ"),
        ("compare", {"extend-lrs": -1}, "--extend-lrs (extend_lrs)"),
        ("compare", {"also": ["=x"]}, "expected MODEL or NAME=MODEL"),
        ("compare", {"also": ["..=x"]}, "'..' names no row"),
        ("compare", {"also": ["Two A=x", "two-a=y"]}, "has the name of 'Two A=x'"),
        ("finetune", {"pool": "model"}, "--pool"),
        ("knn", {"k": [0]}, "--k"),
    ],
)
def test_impossible_values(command: str, options: dict[str, Any], words: str) -> None:
    (line,) = problems(command, {**REQUIRED[command], **options})
    assert words in line


def test_further_rows_of_a_comparison_may_have_names() -> None:
    assert named("Mean only = runs/gap") == ("Mean only", "runs/gap")
    assert named("runs/rate=3/best") == (None, "runs/rate=3/best")  # a path, not a name
    assert named("hub=timm/resnet18") == ("hub", "timm/resnet18")
    assert named("package.module:factory") == (None, "package.module:factory")
    assert slug("Second round, on logits") == "second-round-on-logits"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_required_is_named_option_by_option(command: str) -> None:
    if not REQUIRED[command]:
        resolve(command, {})
        return
    lines = problems(command, {})
    named = set(REQUIRED[command]) - ({"data"} if command == "segment" else set())
    assert {line.split()[0] for line in lines} == {f"--{name}" for name in named}
    assert all("required" in line for line in lines)


def test_segment_wants_data_or_images_to_predict() -> None:
    given = {"model": "a", "out": "o"}
    (line,) = problems("segment", given)
    assert line.startswith("--data is required")
    resolve("segment", {**given, "predict": "images"})
    (line,) = problems("segment", {**given, "data": "d", "predict": "images"})
    assert "not both" in line


@pytest.mark.parametrize(("mine", "other"), [("steps", "epochs"), ("epochs", "steps")])
def test_an_option_replaces_the_recipes_length(
    recipe: dict[str, Any], mine: str, other: str
) -> None:
    recipe["schedule"] = {other: 7}
    for name in (mine, f"schedule.{mine}"):
        config = resolve("distill", {**REQUIRED["distill"], name: "9"}, recipe="made")
        assert getattr(config.schedule, mine) == 9
        assert getattr(config.schedule, other) is None


@pytest.mark.parametrize("options", [{"steps": 9}, {"schedule": {"steps": 9}}])
def test_steps_replace_the_default_epochs(options: dict[str, Any]) -> None:
    config = resolve("distill", {**REQUIRED["distill"], **options})
    assert (config.schedule.steps, config.schedule.epochs) == (9, None)


def test_a_nested_option_replaces_the_recipes_length(recipe: dict[str, Any]) -> None:
    recipe["schedule"] = {"epochs": 7}
    options = {**REQUIRED["distill"], "schedule": {"steps": 9}}
    config = resolve("distill", options, recipe="made")
    assert (config.schedule.steps, config.schedule.epochs) == (9, None)


def test_a_file_replaces_the_recipes_length(recipe: dict[str, Any], file: Path) -> None:
    recipe["schedule"] = {"epochs": 7}
    file.write_text("steps: 9")
    config = resolve("distill", REQUIRED["distill"], recipe="made", config=file)
    assert (config.schedule.steps, config.schedule.epochs) == (9, None)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "schedule" in COMMANDS[c].model_fields])
def test_one_value_of_a_section_leaves_its_other_defaults(command: str) -> None:
    """Whatever else is given, what `--help` calls the default of an option is its default."""
    schema = COMMANDS[command]
    touched: dict[str, Any] = {
        "optimizer.clip": 1.0,
        "schedule.final_ratio": 0.5,
        "run.log_every": 3,
    }
    touched |= {"student.depth": 2, "model.depth": 2, "probe.grid.refit": False}
    touched = {path: value for path, value in touched.items() if path in leaves(schema)}
    given = {path_of(schema, name) for name in (*REQUIRED[command], *touched)}
    config = _flat(resolve(command, {**REQUIRED[command], **touched}).model_dump())
    wrong = {
        path: f"{config[path]} instead of {leaf.default}"
        for path, leaf in leaves(schema).items()
        if path not in given and config[path] != leaf.default
    }
    assert wrong == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_yaml_round_trips_through_config(command: str, file: Path) -> None:
    config = resolve(command, REQUIRED[command])
    file.write_text(to_yaml(config))
    assert resolve(command, {}, config=file) == config


def test_unusual_values_round_trip(file: Path) -> None:
    options = {**REQUIRED["compare"], "knn": None, "lrs": [1e-7, 3.0], "seeds": [3]}
    options |= {"steps": 5, "view.randaugment": None, "optimizer.lr": 1e-5}
    config = resolve("compare", options)
    assert config.knn is None
    file.write_text(to_yaml(config))
    assert resolve("compare", {}, config=file) == config


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name: str) -> None:
    command = read_recipe(name)["command"]
    wanted = {
        option: value
        for option, value in REQUIRED[command].items()
        if path_of(COMMANDS[command], option) not in _flat(read_recipe(name))
    }
    config = resolve(command, wanted, recipe=name)
    kept = _flat(config.model_dump(mode="json"))
    for path, value in _flat(read_recipe(name)).items():
        assert path == "command" or kept[path] == value, path


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        p: v
        for name, value in tree.items()
        for p, v in _flat(value, f"{prefix}.{name}" if prefix else name).items()
    }


def test_a_recipe_of_another_command() -> None:
    (line,) = problems("finetune", REQUIRED["finetune"], recipe="quickstart-distill")
    assert line == (
        "recipe 'quickstart-distill' is for 'featdistill distill', not 'featdistill finetune'"
    )


def test_no_such_recipe() -> None:
    (line,) = problems("distill", {}, recipe="quickstart-distil")
    assert line.startswith(
        "no recipe called 'quickstart-distil'; did you mean 'quickstart-distill'"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1, 2", "is not valid YAML"),
        (b"- 1\n- 2", "holds a list"),
        (b"\xff\xfe\x00", "cannot read"),
        (None, "no configuration file"),
    ],
)
def test_a_file_that_is_no_configuration(file: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        file.write_bytes(content)
    (line,) = problems("distill", REQUIRED["distill"], config=file)
    assert words in line
    assert str(file) in line


def test_a_folder_as_configuration(tmp_path: Path) -> None:
    (line,) = problems("distill", REQUIRED["distill"], config=tmp_path)
    assert str(tmp_path) in line


def test_an_empty_file_changes_nothing(file: Path) -> None:
    file.write_text("# nothing yet\n")
    expected = resolve("distill", REQUIRED["distill"])
    assert resolve("distill", REQUIRED["distill"], config=file) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_short_names_mean_existing_values(command: str) -> None:
    schema = COMMANDS[command]
    assert set(schema.flat.values()) <= set(leaves(schema))
    assert len(set(schema.flat.values())) == len(schema.flat)
    assert schema.positional is None or schema.positional in schema.flat


@pytest.mark.parametrize("command", COMMANDS)
def test_every_value_is_described(command: str) -> None:
    assert [p for p, leaf in leaves(COMMANDS[command]).items() if not leaf.description] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_validate(command: str) -> None:
    from featdistill.cli.options import parse

    program, name, *words = COMMANDS[command].example.split()
    assert (program, name) == ("featdistill", command)
    parsed = parse(COMMANDS[command], words)
    assert parsed.problems == []
    resolve(command, parsed.values, recipe=parsed.recipe)


def test_defaults_are_the_published_method() -> None:
    """Paper, section 4.1 and the official configurations."""
    config = resolve("distill", REQUIRED["distill"])
    assert (config.objective.target, config.objective.whitening) == ("map", "layernorm")
    assert (config.objective.loss, config.objective.beta) == ("smooth-l1", 2.0)
    assert config.view.crop_scale == (0.08, 1.0)
    assert config.optimizer.betas == (0.9, 0.999)
    assert (config.optimizer.lr_per_512, config.optimizer.weight_decay) == (3e-4, 0.05)
    assert (config.optimizer.clip, config.schedule.epochs) == (3.0, 300)
    assert config.schedule.warmup * 300 == pytest.approx(10)
    assert config.optimizer.lr_per_512 * config.schedule.start_ratio == pytest.approx(5e-7)
    assert config.optimizer.lr_per_512 * config.schedule.final_ratio == pytest.approx(5e-6)
    assert config.teacher.drop_path == 0
    assert (config.student.drop_path, config.student.position) == (0.1, None)


def test_importing_configuration_is_cheap() -> None:
    code = (
        "import sys, featdistill.config, featdistill.config.resolve, featdistill.cli.options\n"
        "heavy = {'torch', 'timm', 'torchvision', 'datasets', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_yaml_is_plain(file: Path) -> None:
    """No Python tags: a run's config.yaml is read by anything."""
    assert yaml.safe_load(to_yaml(resolve("finetune", REQUIRED["finetune"])))["pool"] == "mean"

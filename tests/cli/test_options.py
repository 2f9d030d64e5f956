"""Words to options: forms of writing, and every mistake kept."""

from __future__ import annotations

import pytest

from featdistill.cli.options import help_text, parse
from featdistill.config.commands import COMMANDS
from featdistill.config.resolve import leaves

DISTILL, COMPARE, KNN = COMMANDS["distill"], COMMANDS["compare"], COMMANDS["knn"]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--out a", {"run.out": "a"}),
        ("--out=a=b", {"run.out": "a=b"}),
        ("--run.out a", {"run.out": "a"}),
        ("--drop-path 0.2", {"student.drop_path": "0.2"}),
        ("--drop_path=0.2", {"student.drop_path": "0.2"}),
        ("--resume", {"run.resume": True}),
        ("--resume --out a", {"run.resume": True, "run.out": "a"}),
        ("--resume false", {"run.resume": "false"}),
        ("--resume=no", {"run.resume": "no"}),
        ("--no-resume", {"run.resume": False}),
        ("--no-view.flip", {"view.flip": False}),
        ("--seed 1 --seed 2", {"run.seed": "2"}),
        ("--lr none", {"optimizer.lr": None}),
        ("--optimizer.clip None", {"optimizer.clip": None}),
        ("--position none", {"student.position": "none"}),
        ("--whitening none", {"objective.whitening": "none"}),
        ("--view.crop_scale 0.1,1", {"view.crop_scale": ["0.1", "1"]}),
        ("--optimizer.weight_decay -1", {"optimizer.weight_decay": "-1"}),
    ],
)
def test_forms(words: str, values: dict[str, object]) -> None:
    parsed = parse(DISTILL, words.split())
    assert (parsed.values, parsed.problems) == (values, [])


def test_repeated_and_listed_values_are_the_same() -> None:
    expected = {"models": ["a", "b", "c"]}
    assert parse(KNN, ["--model", "a", "--model", "b,c"]).values == expected
    assert parse(KNN, ["--model", "a, b ,c"]).values == expected


def test_none_for_an_optional_section() -> None:
    assert parse(COMPARE, ["--knn", "none"]).values == {"knn": None}


def test_a_bare_word_is_the_positional_option() -> None:
    assert parse(COMMANDS["recipes"], ["x"]).values == {"name": "x"}
    many = parse(COMMANDS["report"], ["a", "--out", "o", "b", "--run", "c"])
    assert many.values == {"runs": ["a", "b", "c"], "out": "o"}
    assert parse(COMMANDS["export"], ["runs/a", "--out", "b"]).values["model"] == "runs/a"


def test_recipe_config_and_switches() -> None:
    parsed = parse(DISTILL, ["--recipe", "r", "--config=c.yaml", "--print-config", "-h"])
    assert (parsed.recipe, parsed.config) == ("r", "c.yaml")
    assert parsed.print_config
    assert parsed.help


def test_every_mistake_is_kept() -> None:
    words = ["word", "--teachr", "x", "--out", "--no-teacher", "--recipe", "--lr=3"]
    parsed = parse(DISTILL, words)
    assert parsed.values == {"optimizer.lr": "3"}
    assert [p.split(";")[0].split(":")[0] for p in parsed.problems] == [
        "'word' is not an option",
        "unknown option 'teachr'",
        "--out needs a value",
        "unknown option 'no-teacher'",
        "--recipe needs a value",
    ]
    assert "did you mean 'teacher'" in parsed.problems[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str) -> None:
    schema = COMMANDS[command]
    text = help_text(command, schema)
    assert schema.summary in text
    assert schema.example in text
    for path in leaves(schema):
        short = [f"--{name}" for name, p in schema.flat.items() if p == path]
        assert (short or [f"--{path}"])[0] in text
    assert max(len(line) for line in text.splitlines() if "featdistill" not in line) <= 100

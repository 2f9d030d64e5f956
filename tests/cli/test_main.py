"""The command line as a person meets it: help, exit statuses, one line an error."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from featdistill import __version__
from featdistill.cli.main import SUMMARIES, main
from featdistill.config.commands import COMMANDS
from featdistill.core.errors import DataError, Interrupted, NonFiniteError

DISTILL = ["distill", "--teacher", "timm/x", "--data", "digits", "--out", "o"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "featdistill", *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_summaries_are_the_schemas_own() -> None:
    assert tuple((name, schema.summary) for name, schema in COMMANDS.items()) == SUMMARIES


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], {"torch", "timm", "pydantic", "yaml", "numpy"}),
        (["--version"], {"torch", "timm", "pydantic", "yaml", "numpy"}),
        (["distill", "--help"], {"torch", "timm", "numpy"}),
        ([*DISTILL, "--print-config"], {"torch", "timm", "numpy"}),
        (["distill", "--oops"], {"torch", "timm", "numpy"}),
        (["distill", "--teacher", "x", "--data", "gone", "--out", "o"], {"torch", "timm"}),
        ([*DISTILL, "--student", "vit-x"], {"torch", "timm"}),
        (["knn", "--model", "x", "--data", "digits", "--out", __file__], {"torch", "timm"}),
        (["recipes"], {"torch", "timm"}),
        (["models"], {"torch", "timm"}),
    ],
)
def test_nothing_heavy_is_imported(words: list[str], heavy: set[str]) -> None:
    code = (
        "import sys\nfrom featdistill.cli.main import main\n"
        f"main({words!r})\nprint(' '.join({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert not set(done.stderr.splitlines()[-1].split()) & heavy


def test_help_lists_the_commands() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("words", [[], ["-h"], ["help"]])
def test_other_ways_to_ask_for_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: featdistill")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"featdistill {__version__}\n"


def test_help_of_a_command_needs_no_required_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--help"]) == 0
    assert "--teacher" in capsys.readouterr().out


def test_an_unknown_command_is_one_line_and_2() -> None:
    done = run("distil")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command 'distil'; did you mean 'distill'")
    assert done.stderr.count("\n") == 1


def test_mistakes_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--teachr", "x", "--batch-size", "ten"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) == 5
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_print_config_is_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DISTILL, "--no-view.flip", "--print-config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["teacher"]["spec"] == "timm/x"
    assert config["view"]["flip"] is False


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("no image"), 2),
        (NonFiniteError("no number"), 3),
        (Interrupted("stopped", signal_number=15), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_statuses(
    error: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(command: str, config: object) -> None:
        raise error

    monkeypatch.setattr("featdistill.tasks.run_command", fail)
    assert main(["recipes"]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "quickstart-distill" in capsys.readouterr().out
    assert main(["recipes", "quickstart-distill"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["command"] == "distill"
    assert main(["recipes", "quickstart-distil"]) == 2
    assert "did you mean 'quickstart-distill'" in capsys.readouterr().err

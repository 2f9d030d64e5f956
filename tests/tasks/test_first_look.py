"""What is refused before torch is imported, and what is left to the command itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featdistill.config.commands import Command
from featdistill.config.resolve import resolve
from featdistill.core.errors import DataError, FeatDistillError, ModelError, RunError
from featdistill.tasks.first_look import first_look


@pytest.fixture
def full(tmp_path: Path) -> str:
    """A folder with something in it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").touch()
    return str(tmp_path / "full")


def distil(tmp_path: Path, **options: Any) -> Command:
    base = {"teacher": "timm/x", "data": "digits", "out": str(tmp_path / "new")}
    return resolve("distill", {**base, **options})


@pytest.mark.parametrize("data", ["digits", "cifar10", "torchvision:svhn", "hf:some/name"])
def test_names_of_data_pass(tmp_path: Path, data: str) -> None:
    first_look(distil(tmp_path, data=data, val_data=data))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"data": "digit"}, DataError, "no data at 'digit'.*did you mean 'digits'"),
        ({"val_data": "gone"}, DataError, "no data at 'gone'"),
        ({"student": "vit-x"}, ModelError, "no student called 'vit-x'"),
        ({"resume": True}, RunError, "no run to resume"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, options: dict[str, Any], kind: type[FeatDistillError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        first_look(distil(tmp_path, **options))


def test_an_output_folder_that_is_taken(tmp_path: Path, full: str) -> None:
    with pytest.raises(RunError, match="is not empty"):
        first_look(distil(tmp_path, out=full))


def test_commands_with_a_rule_of_their_own(full: str) -> None:
    first_look(resolve("check", {"teacher": "timm/x", "data": "digits", "out": full}))
    first_look(resolve("segment", {"model": full, "predict": full, "out": full}))
    first_look(resolve("knn", {"model": ["timm/x"], "data": "digits"}))
    first_look(resolve("recipes", {}))

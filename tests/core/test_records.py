"""Records are written whole or not at all, and read back or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from featdistill.core import records
from featdistill.core.errors import RunError
from featdistill.core.records import read_record, write_json, write_record


def test_json_round_trip_of_numpy_and_paths(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "a.json"
    write_json(file, {"n": np.int64(3), "x": np.arange(2.0), "p": Path("a/b")})
    assert json.loads(file.read_text()) == {"n": 3, "x": [0.0, 1.0], "p": "a/b"}


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_what_is_not_json_leaves_the_old_file(tmp_path: Path, value: object) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"old": True})
    with pytest.raises((ValueError, TypeError)):
        write_json(file, {"new": value})
    assert json.loads(file.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_kill_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    write_json(file, 1)

    def killed(source: Path, target: Path) -> None:
        assert json.loads(Path(source).read_text()) == 2, "renamed before it was whole"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, 2)
    assert json.loads(file.read_text()) == 1


def test_record_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "knn.json"
    arrays = {"votes": np.eye(3)}
    write_record(file, "knn", config={"k": 5}, results={"top1": 0.5}, arrays=arrays)
    record = read_record(file, "knn")
    assert record["config"] == {"k": 5}
    assert record["results"] == {"top1": 0.5}
    assert record["environment"]["versions"]["torch"]
    with np.load(file.with_suffix(".npz")) as found:
        np.testing.assert_array_equal(found["votes"], np.eye(3))
    assert {p.name for p in tmp_path.iterdir()} == {"knn.json", "knn.npz"}
    assert read_record(file)["kind"] == "knn"


def test_a_record_of_another_kind(tmp_path: Path) -> None:
    file = write_record(tmp_path / "a.json", "knn", config={}, results={})
    with pytest.raises(RunError, match=r"'knn' record; expected a 'comparison' one"):
        read_record(file, "comparison")


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no record at .*a\.json"):
        read_record(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b'{"kind": "kn', b"\xff\xfe", b"[]", b"3"])
def test_not_a_record(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"a\.json"):
        read_record(file, "knn")


def test_a_folder_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        read_record(tmp_path, "knn")


def test_environment_survives_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert records.environment()["commit"] is None

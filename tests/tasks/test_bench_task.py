"""`bench`: it runs, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featdistill.cli.main import main
from featdistill.core.errors import RunError
from featdistill.tasks.bench import load
from featdistill.tasks.bench.common import in_turn
from featdistill.tasks.bench.photographs import photograph
from featdistill.tasks.bench.processes import _serve

SMALL = ("--model", "timm/vit_tiny_patch16_224", "--image-size", "64", "--device", "cpu")


def test_it_says_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "diagnose", *SMALL, "--batch-size", "2", "--rounds", "1"]) == 0
    said = capsys.readouterr().err
    for line in ("plain forward pass   1.00  ", "all of attention", "all maps kept first", "MiB"):
        assert line in said


def test_a_cnn_has_nothing_to_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "diagnose", *SMALL, "--model", "timm/resnet18"]) == 2
    assert "no attention was seen" in capsys.readouterr().err


def test_a_landscapes_points_beside_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "landscape", *SMALL, "--batch-size", "2", "--rounds", "2"]) == 0
    said = capsys.readouterr().err
    for line in ("plain evaluation      1.00", "directions", "441 evaluations, 457 points"):
        assert line in said


def test_loading_beside_the_official_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featdistill.tasks.bench.data._STEPS", 4)
    monkeypatch.setattr("featdistill.tasks.bench.data._EACH", 4)
    few = ("--images", "2", "--rounds", "2", "--image-size", "160")
    assert main(["bench", "data", *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"]["height"] == 400
    assert found["images"]["width"] == 500
    assert 90_000 < found["images"]["bytes"] < 130_000, "as ImageNet's"
    for part in (found["core"], found["loader"]):
        for way in ("official", "exact", "fast"):
            assert part[way]["images_per_second"] > 0
            assert part[way]["ratio"]["min"] <= part[way]["ratio"]["max"]
    assert found["core"]["official"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert found["ratio"] == found["core"]["exact"]["ratio"]["median"]
    assert found["cores_for"]["exact"] >= 2500 / found["images_per_second"]
    assert found["difference"] == {"mean": 0, "max": 0, "views": 0}, "no crop is twice as large"
    assert found["set_up"]["rounds"] == 2


def test_loading_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Large pictures, of which fast decodes less."""
    (tmp_path / "a.jpg").write_bytes(photograph(0, height=300, width=300))
    (tmp_path / "b.jpg").write_bytes(photograph(1, height=300, width=300))
    few = ("--images", "2", "--rounds", "1", "--image-size", "16", "--data", str(tmp_path))
    assert main(["bench", "data", *few]) == 0
    said = capsys.readouterr().err
    for line in ("2 images, 300x300 and ", "official (Pillow, float)", "fast differs from exact"):
        assert line in said
    assert "in 0% of the views" not in said


def test_what_bench_data_cannot_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "data", "--data", "digits"]) == 2
    assert "'digits' is no folder of image files" in capsys.readouterr().err
    (tmp_path / "a.jpg").write_bytes(photograph(0, height=30, width=30)[:300])
    assert main(["bench", "data", "--data", str(tmp_path)]) == 2
    assert "cannot read 'a.jpg'" in capsys.readouterr().err


def test_in_turn_forgets_warm_rounds_and_keeps_the_order() -> None:
    seconds = {"a": iter([9.0, 1.0, 3.0]), "b": iter([9.0, 2.0, 4.0])}
    order: list[str] = []
    told: list[int] = []

    def work(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    found = in_turn(
        {name: lambda name=name: work(name) for name in seconds}, rounds=2, told=told.append
    )
    assert order == ["a", "b"] * 3
    assert told == [1, 2, 3, 4, 5, 6]
    assert {name: times.seconds for name, times in found.items()} == {"a": (1, 3), "b": (2, 4)}


def test_start_up_and_files_beside_their_references(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are real; the processes, which take seconds, are stood in for."""
    fakes = dict(zip(load._PROCESSES, (2.0, 0.5, 1.0, 3.0), strict=True))
    monkeypatch.setattr(
        load, "_commands", lambda *_: {name: lambda s=s: s for name, s in fakes.items()}
    )
    words = ["bench", "load", *SMALL[:2], *SMALL[4:], "--rounds", "2"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["processes"]["first_step"] == {"median": 3, "min": 3, "max": 3, "ratio": 1.5}
    assert record["processes"]["help"]["ratio"] == 0.25
    assert record["bytes"] > 4 * 5_000_000
    for suffix in ("safetensors", "pth"):
        found = record["files"][suffix]
        for way in ("plain", "load_backbone"):
            assert 0 < found[way]["min"] <= found[way]["median"] <= found[way]["max"]
        assert found["ratio"] > 0
    assert main(words) == 0
    said = capsys.readouterr().err
    for line in ("featdistill --help ", "command to first step ", ".pth, load_backbone ", "1.50"):
        assert line in said


def test_both_ways_load_the_same(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    images = torch.rand(1, 3, 224, 224)
    found = []
    for file in load._write(name, tmp_path).values():
        plain, ours = load.load_plainly(name, file), load._load(name, file)
        with torch.no_grad():
            found += [plain((images - ours.mean) / ours.std), ours(images).logits]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_first_step_is_waited_for_and_its_process_is_gone(tmp_path: Path) -> None:
    small = ["--student.depth", "1", "--batch-size", "2", "--no-run.preflight"]
    assert load._first_step([*load._TINY, *small, "--holdout", "none"], tmp_path) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-c", "import sys; sys.exit('oh no')"], "failed: oh no"),
        (["-c", "import sys; sys.exit(3)"], "it said nothing"),
    ],
)
def test_a_process_that_fails_is_not_timed(words: list[str], says: str) -> None:
    with pytest.raises(RunError, match=says):
        load._whole(words)


def test_a_run_that_fails_is_not_timed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="failed: error: no data at 'gone'"):
        load._first_step([*load._TINY, "--data", "gone"], tmp_path)


def test_files_are_made_of_timms_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "load", "--model", "vit-b", "--device", "cpu"]) == 2
    assert (
        "error: bench load writes files of 'vit-b'; expected timm/NAME" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data", "--profile", "trace"], "--profile is of bench step, and of no use to data"),
        (["step", "--images", "9"], "--images is of bench data or caches, and of no use to step"),
        (["load", "--batch-size", "4"], "--batch-size is of bench step or diagnose or landscape"),
    ],
)
def test_options_of_another_benchmark_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["bench", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_too_little_memory_in_a_process_is_one_line(error: type[Exception]) -> None:
    asked, told = iter([True]), list[Any]()

    class Line:
        send = told.append

        def recv(self) -> bool:
            if next(asked, None) is None:
                raise EOFError
            return True

    def hungry() -> Any:
        raise error("out of memory")

    _serve(Line(), hungry, {})  # type: ignore[arg-type]
    [found] = told
    assert isinstance(found, RunError)
    assert "give a smaller --batch-size" in str(found)

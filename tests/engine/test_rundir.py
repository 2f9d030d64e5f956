"""A run's folder: claimed once, and continued only by the same run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from featdistill.config.commands import FinetuneConfig
from featdistill.config.resolve import resolve
from featdistill.core.errors import RunError
from featdistill.engine.rundir import check_out, flatten, open_run, read_metrics


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    log = logging.getLogger("featdistill")
    before = list(log.handlers), log.level
    yield
    for handler in log.handlers:
        if handler not in before[0]:
            handler.close()
    log.handlers[:], log.level = before


def config(folder: Path, **options: object) -> FinetuneConfig:
    given = {"model": "m", "data": "digits", "out": str(folder), **options}
    found = resolve("finetune", given)
    assert isinstance(found, FinetuneConfig)
    return found


def test_a_new_run(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    run = open_run(str(out), config(out), resume=False)
    assert run == out
    assert {p.name for p in out.iterdir()} == {
        "config.yaml",
        "environment.json",
        "log.txt",
        ".lock",
    }
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["spec"] == "m"
    logging.getLogger("featdistill").info("a line")
    assert (out / "log.txt").read_text().endswith("a line\n")


def test_checking_writes_nothing(tmp_path: Path) -> None:
    check_out(str(tmp_path / "deep" / "run"), resume=False)
    check_out(str(tmp_path), resume=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(RunError, match=r"is not empty; give another --out"):
        check_out(str(tmp_path), resume=False)


def test_a_folder_with_a_run_in_it(tmp_path: Path) -> None:
    open_run(str(tmp_path), config(tmp_path), resume=False)
    with pytest.raises(RunError, match=r"is not empty; continue that run with --resume"):
        open_run(str(tmp_path), config(tmp_path), resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_as_output(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"is a file; expected a folder"):
        check_out(str(tmp_path / "file"), resume=resume)


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="not a writable folder"):
        check_out(str(tmp_path / "file" / "run"), resume=False)


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RunError, match="not a writable folder"):
        check_out(str(tmp_path / "run"), resume=False)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_nothing_to_resume(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="there is no run to resume in"):
        check_out(str(tmp_path / name), resume=True)


def test_resuming_with_the_same_configuration(tmp_path: Path) -> None:
    open_run(str(tmp_path), config(tmp_path), resume=False)
    before = (tmp_path / "config.yaml").read_text()
    open_run(str(tmp_path), config(tmp_path), resume=True)
    assert (tmp_path / "config.yaml").read_text() == before


def test_keys_that_change_no_weight_may_differ(tmp_path: Path) -> None:
    open_run(str(tmp_path), config(tmp_path), resume=False)
    changed = {
        "resume": True,
        "out": f"{tmp_path}/../{tmp_path.name}",
        "workers": 3,
        "run.log_every": 1,
        "run.checkpoint_every": 7,
        "run.checkpoint_keep": 9,
        "run.tensorboard": False,
        "schedule.stop_at": 5,
    }
    open_run(str(tmp_path), config(tmp_path, **changed), resume=True)


def test_what_changes_no_weight_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_run(str(tmp_path), config(tmp_path), resume=False)
    same = config(tmp_path, resume=True, **{"schedule.stop_at": 5})
    open_run(str(tmp_path), same, resume=True)
    assert "note" not in capsys.readouterr().err
    other = config(tmp_path, resume=True, workers=3, **{"run.log_every": 7})
    open_run(str(tmp_path), other, resume=True)
    line = capsys.readouterr().err
    assert "data.workers: None -> 3; run.log_every: 10 -> 7" in line
    assert "none of which changes a weight" in line
    assert line.strip() in (tmp_path / "log.txt").read_text()


def saved(out: Path, step: int) -> None:
    (out / f"checkpoints/step-{step:08d}").mkdir(parents=True)


def length(out: Path) -> tuple[float | None, int | None, bool, str | None]:
    values = yaml.safe_load((out / "config.yaml").read_text())
    plan, run = values["schedule"], values["run"]
    return plan["epochs"], plan["steps"], run["resume"], run["extend"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [("epochs=150", (150, None, False, None)), ("steps=9000", (None, 9000, False, None))],
)
def test_an_extended_run_has_its_new_length(
    given: str, expected: tuple[object, ...], tmp_path: Path
) -> None:
    open_run(str(tmp_path), config(tmp_path, epochs=100), resume=False, steps=500)
    saved(tmp_path, 40)
    longer = config(tmp_path, epochs=100, resume=True, extend=given)
    for _ in range(2):  # the same command goes on with it
        open_run(str(tmp_path), longer, resume=True, steps=750)
        assert length(tmp_path) == expected
    # the first command no longer says what is meant
    with pytest.raises(RunError, match=r"schedule\.epochs: .* -> 100.*with --extend"):
        open_run(str(tmp_path), config(tmp_path, epochs=100, resume=True), resume=True, steps=500)


def test_a_run_is_not_extended_to_before_where_it_is(tmp_path: Path) -> None:
    open_run(str(tmp_path), config(tmp_path, steps=100), resume=False, steps=100)
    saved(tmp_path, 40)
    before = (tmp_path / "config.yaml").read_text()
    shorter = config(tmp_path, steps=100, resume=True, extend="steps=39")
    with pytest.raises(RunError, match=r"39 steps, and the run has done 40"):
        open_run(str(tmp_path), shorter, resume=True, steps=39)
    assert (tmp_path / "config.yaml").read_text() == before


def test_an_extension_changes_nothing_else(tmp_path: Path) -> None:
    open_run(str(tmp_path), config(tmp_path, steps=100), resume=False, steps=100)
    other = config(tmp_path, steps=100, resume=True, extend="steps=200", seed=3)
    with pytest.raises(RunError, match=r"run\.seed: 0 -> 3\)"):
        open_run(str(tmp_path), other, resume=True, steps=200)


def test_another_configuration_is_refused_and_listed(tmp_path: Path) -> None:
    open_run(str(tmp_path), config(tmp_path), resume=False)
    changed = {"batch-size": 8, "run.log_every": 1, "drop-path": 0.2, "data.decode": "fast"}
    other = config(tmp_path, seed=3, **changed)
    with pytest.raises(RunError) as caught:
        open_run(str(tmp_path), other, resume=True)
    message = str(caught.value)
    for change in (
        "run.seed: 0 -> 3",
        "data.batch_size: 256 -> 8",
        "drop_path: 0.1 -> 0.2",
        "data.decode: 'exact' -> 'fast'",
    ):
        assert change in message
    assert "log_every" not in message
    assert "resume with the same options" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00"])
def test_a_damaged_configuration(tmp_path: Path, content: bytes) -> None:
    open_run(str(tmp_path), config(tmp_path), resume=False)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match=str(tmp_path)):
        open_run(str(tmp_path), config(tmp_path), resume=True)


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}


def test_a_metrics_line_cut_off_by_a_crash(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1}]


def test_a_resumed_run_refuses_other_weights(tmp_path: Path) -> None:
    out = tmp_path / "run"
    here, then = {"teacher": "a.pth (sha256 1)"}, {"teacher": "a.pth (sha256 2)"}
    open_run(str(out), config(out), resume=False, weights=here)
    open_run(str(out), config(out), resume=True, weights=here)
    with pytest.raises(RunError, match=r"other weights \(teacher: a.pth \(sha256 1\) -> a.pth \("):
        open_run(str(out), config(out), resume=True, weights=then)


def without_option(file: Path, section: str, name: str) -> None:
    """As an earlier version wrote it, which did not know the option."""
    before = yaml.safe_load(file.read_text())
    del before[section][name]
    file.write_text(yaml.safe_dump(before))


def test_a_run_of_an_earlier_version_had_the_new_options_defaults(tmp_path: Path) -> None:
    out = tmp_path / "run"
    open_run(str(out), config(out), resume=False)
    without_option(out / "config.yaml", "optimizer", "layer_decay")
    open_run(str(out), config(out, resume=True), resume=True)
    with pytest.raises(RunError, match=r"optimizer\.layer_decay: 0\.65 -> 0\.9"):
        open_run(str(out), config(out, resume=True, optimizer={"layer_decay": 0.9}), resume=True)


def test_an_option_that_is_no_more_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    open_run(str(out), config(out), resume=False)
    values = yaml.safe_load((out / "config.yaml").read_text())
    values["optimizer"]["momentum"] = 0.5
    (out / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RunError, match=r"optimizer\.momentum: 0\.5 -> None"):
        open_run(str(out), config(out, resume=True), resume=True)


def test_another_machine_is_told_and_not_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_run(str(tmp_path), config(tmp_path), resume=False)
    open_run(str(tmp_path), config(tmp_path), resume=True)
    assert "WARNING" not in capsys.readouterr().err
    file = tmp_path / "environment.json"
    known = json.loads(file.read_text())
    versions = {**known["versions"], "torch": "1.0"}
    changed = {"threads": 77, "versions": versions, "cpu_features": ["avx9", "neon"]}
    changed["kernels"] = {**known["kernels"], "deterministic": True}
    file.write_text(json.dumps({**known, **changed}))
    open_run(str(tmp_path), config(tmp_path), resume=True)
    line = capsys.readouterr().err
    for part in (
        "threads: 77 -> ",
        "versions.torch: 1.0 -> ",
        "cpu_features.avx9: yes -> None",
        "kernels.deterministic: True -> False",
        "not to the very same bits",
    ):
        assert part in line
    assert part in (tmp_path / "log.txt").read_text()
    assert json.loads(file.read_text())["threads"] != 77


def test_an_environment_of_an_earlier_version_lacks_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_run(str(tmp_path), config(tmp_path), resume=False)
    file = tmp_path / "environment.json"
    known = json.loads(file.read_text())
    for name in ("cpu", "cpu_features", "kernels"):
        del known[name]
    file.write_text(json.dumps(known))
    open_run(str(tmp_path), config(tmp_path), resume=True)
    assert "WARNING" not in capsys.readouterr().err

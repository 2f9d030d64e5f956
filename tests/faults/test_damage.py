"""A damaged newest checkpoint gives way to the one before, aloud; no run restarts in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Victim, consumed, digest, finish, rows_of, said


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 9, with checkpoints of steps 6 and 9."""
    folder = tmp_path_factory.mktemp("stopped")
    finish(folder, resume=False, stop_at=9)
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def _cut(share: float, name: str = "model.safetensors") -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[: int(share * len(data))])

    return damage


def _flip(name: str, where: Callable[[bytes], int]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        data = bytearray((checkpoint / name).read_bytes())
        data[where(data)] ^= 0x10
        (checkpoint / name).write_bytes(data)

    return damage


def _drop(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def _other_images(checkpoint: Path) -> None:
    """A manifest that reads well and says something else."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "data_images": manifest["data_images"] + 1}))


DAMAGE: dict[str, Callable[[Path], None]] = {
    **{f"model cut at {share:.0%}": _cut(share) for share in (0, 0.5, 0.99)},
    **{f"manifest cut at {share:.0%}": _cut(share, "manifest.json") for share in (0, 0.5, 0.99)},
    **{
        f"a byte of {name}'s tensors": _flip(f"{name}.safetensors", lambda d: len(d) - 1)
        for name in ("model", "optimizer", "random", "average", "meter")
    },
    "a byte of the tensors' table": _flip("model.safetensors", lambda d: 30),
    "a digit of the manifest's numbers": _flip(
        "manifest.json", lambda d: d.index(b'"data_images": ') + 15
    ),
    "the manifest says other things": _other_images,
    "a byte of a checksum": _flip("manifest.json", lambda d: d.index(b'"model.safetensors"') + 25),
    "a file deleted": _drop("optimizer.safetensors"),
    "no manifest": _drop("manifest.json"),
}
QUICK = {"model cut at 50%", "a digit of the manifest's numbers", "a file deleted"}


@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, marks=() if d in QUICK else pytest.mark.faults) for d in DAMAGE],
)
def test_the_one_before_is_used_aloud_and_the_bad_one_kept(
    damage: str, run: Path, undisturbed: Path
) -> None:
    bad = run / "checkpoints/step-00000009"
    DAMAGE[damage](bad)
    content = {p.name: p.read_bytes() for p in bad.iterdir()}
    finish(run, resume=True)
    assert digest(run) == digest(undisturbed)
    lines = [line for line in said(run).splitlines() if "WARNING" in line]
    assert len(lines) == 1
    assert str(bad) in lines[0], "it names the file"
    assert "damaged" in lines[0]
    assert "from step 6" in lines[0]
    aside = run / "checkpoints/damaged-step-00000009"
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == content


def test_the_second_session_after_a_damage_says_nothing_of_it(run: Path) -> None:
    DAMAGE["no manifest"](run / "checkpoints/step-00000009")
    finish(run, resume=True, stop_at=12)
    finish(run, resume=True, stop_at=15)
    assert said(run).count("WARNING") == 1


def test_all_damaged_is_an_end_not_a_new_beginning(run: Path) -> None:
    for step in (6, 9):
        DAMAGE["model cut at 50%"](run / f"checkpoints/step-{step:08d}")
    before, names = consumed(run), sorted((run / "checkpoints").iterdir())
    for _ in range(2):  # nor the second time
        assert Victim(run, resume=True).end() == 2
    assert consumed(run) == before, "not a step was taken"
    assert sorted((run / "checkpoints").iterdir()) == names
    line = said(run).splitlines()[-1]
    for part in ("RunError", "step-00000009", "step-00000006", "no whole checkpoint"):
        assert part in line


def test_with_only_what_was_set_aside_there_is_no_new_beginning(run: Path) -> None:
    folder = run / "checkpoints"
    (folder / "step-00000009").rename(folder / "damaged-step-00000009")
    shutil.rmtree(folder / "step-00000006")
    before = consumed(run)
    assert Victim(run, resume=True).end() == 2
    assert consumed(run) == before
    assert "damaged-step-00000009" in said(run).splitlines()[-1]


def test_a_run_without_a_checkpoint_yet_begins_again_aloud(
    tmp_path: Path, undisturbed: Path
) -> None:
    finish(tmp_path, resume=True)
    assert digest(tmp_path) == digest(undisturbed)
    assert rows_of(tmp_path) == rows_of(undisturbed)
    assert "begins again at its first step" in said(tmp_path)

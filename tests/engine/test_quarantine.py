"""Unreadable images are listed once each, and too many end a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featdistill.core.errors import DataError
from featdistill.core.types import Replaced
from featdistill.engine.quarantine import Quarantine


def bad(*indices: int, reason: str = "cut off") -> list[Replaced]:
    return [Replaced(i, f"{i}.jpg: {reason}", 0) for i in indices]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "quarantine.jsonl"


def test_each_image_is_listed_once(file: Path) -> None:
    quarantine = Quarantine(file, images=100, limit=0.05)
    quarantine.add(bad(3, 4))
    quarantine.add(bad(4))
    quarantine.add([])
    assert len(quarantine) == 2
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [
        {"index": 3, "reason": "3.jpg: cut off"},
        {"index": 4, "reason": "4.jpg: cut off"},
    ]


def test_an_image_twice_in_one_batch_is_listed_once(file: Path) -> None:
    Quarantine(file, images=100, limit=0.05).add(bad(3, 3))
    assert len(file.read_text().splitlines()) == 1


def test_nothing_is_written_where_all_is_well(file: Path) -> None:
    Quarantine(file, images=100, limit=0.0).add([])
    assert not file.exists()


def test_the_limit_may_be_reached_but_not_passed(file: Path) -> None:
    quarantine = Quarantine(file, images=100, limit=0.02)
    quarantine.add(bad(1, 2))
    with pytest.raises(DataError) as caught:
        quarantine.add(bad(9))
    message = str(caught.value)
    assert message.startswith("3 of 100 images cannot be read, the last: 9.jpg: cut off")
    assert "at most 2.00%" in message
    assert str(file) in message
    assert len(file.read_text().splitlines()) == 3, "the last one is listed too"


def test_a_limit_of_nothing(file: Path) -> None:
    with pytest.raises(DataError):
        Quarantine(file, images=10**6, limit=0.0).add(bad(1))


def test_a_resumed_run_remembers(file: Path) -> None:
    Quarantine(file, images=100, limit=0.02).add(bad(1, 2))
    again = Quarantine(file, images=100, limit=0.02)
    assert len(again) == 2
    again.add(bad(1))
    with pytest.raises(DataError):
        again.add(bad(3))


@pytest.mark.parametrize("reason", ["cut off", "strange } mark"])
def test_a_kill_at_any_byte_is_survived(file: Path, reason: str) -> None:
    """The line that was being written may be lost; what was before and comes after is not."""
    Quarantine(file, images=100, limit=1.0).add(bad(1, 2, reason=reason))
    data = file.read_bytes()
    first = data.index(b"\n") + 1
    for end in range(first, len(data)):
        file.write_bytes(data[:end])
        resumed = Quarantine(file, images=100, limit=1.0)
        resumed.add(bad(1, 2, 3, reason=reason))
        assert len(resumed) == 3, end
        assert len(Quarantine(file, images=100, limit=1.0)) == 3, end


def test_a_resume_past_the_limit_ends_again_until_the_limit_is_raised(file: Path) -> None:
    with pytest.raises(DataError):
        Quarantine(file, images=100, limit=0.01).add(bad(1, 2))
    again = Quarantine(file, images=100, limit=0.01)
    again.add([])
    with pytest.raises(DataError, match=r"2 of 100 images cannot be read, the last: 1.jpg"):
        again.add(bad(1))
    Quarantine(file, images=100, limit=0.02).add(bad(1, 2))
    assert len(file.read_text().splitlines()) == 2


def test_the_policy_error_names_the_image(file: Path) -> None:
    with pytest.raises(DataError) as caught:
        Quarantine(file, images=10**6, limit=0.0).add(bad(7, 8))
    message = str(caught.value)
    assert message.startswith("cannot read 7.jpg: cut off")
    assert "--data.bad_images skip" in message
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("content", ["{}\n", "[1]\n", "no json\n", "[" * 100_000 + "\n", "\0\0\n"])
def test_a_damaged_list_is_named(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(DataError, match=r"quarantine.jsonl' is damaged; delete it"):
        Quarantine(file, images=10, limit=0.5)

"""Which images are held out, and that training never sees them."""

from __future__ import annotations

import pytest
import torch

from featdistill.core.errors import ConfigError, DataError
from featdistill.data.holdout import HeldOut, hold_out, without
from featdistill.data.parts import Data
from featdistill.data.sources import ArraySource


def source(name: str, images: int, first: int = 0) -> ArraySource:
    values = torch.arange(first, first + images, dtype=torch.uint8)
    return ArraySource(name, values[:, None, None, None].expand(-1, 3, 2, 2))


def numbers(found: object) -> list[int]:
    return [int(found.read(i)[0, 0, 0]) for i in range(len(found))]  # type: ignore[attr-defined,arg-type]


def held(wanted: str | None, *, val: int = 0, test: int = 0, seed: int = 0) -> HeldOut:
    data = Data(
        source("train", 50),
        val=source("val", val, 100) if val else None,
        test=source("test", test, 150) if test else None,
    )
    return hold_out(data, wanted, seed=seed, most=8)


@pytest.mark.parametrize(("wanted", "count"), [("0.1", 5), ("10%", 5), ("7", 7), ("0.001", 1)])
def test_a_share_or_a_number_leaves_training(wanted: str, count: int) -> None:
    found = held(wanted, test=20)
    assert found.images is not None
    assert found.taken_from == "training"
    assert len(found.images) == count
    assert sorted(numbers(found.train) + numbers(found.images)) == list(range(50))
    assert without(Data(source("train", 50)), found).train is found.train


def test_the_choice_is_seeded_and_no_block() -> None:
    first, same, other = (numbers(held("10", seed=s).images) for s in (0, 0, 1))
    assert first == same != other
    assert first != list(range(10))


def test_auto_takes_no_training_image() -> None:
    for val, test, part, first in ((20, 20, "validation", 100), (0, 20, "test", 150)):
        found = held("auto", val=val, test=test)
        assert found.taken_from == part
        assert numbers(found.train) == list(range(50))
        assert len(numbers(found.images)) == 8
        assert set(numbers(found.images)) < set(range(first, first + 20))
    assert numbers(held("auto", val=5).images) == list(range(100, 105))
    assert held("auto").images is None


@pytest.mark.parametrize("wanted", [None, "0", "0%"])
def test_off(wanted: str | None) -> None:
    found = held(wanted, val=20)
    assert found.images is None
    assert len(found.train) == 50
    assert "--holdout" in found.describe()


def test_another_data_set() -> None:
    found = held("digits")
    assert found.taken_from == "other"
    assert found.images is not None
    assert len(found.images) == 8
    assert len(found.train) == 50
    assert "digits" in found.describe()


@pytest.mark.parametrize("wanted", ["-1", "1.5", "120%", "nan"])
def test_impossible_numbers(wanted: str) -> None:
    with pytest.raises(ConfigError, match="expected a share"):
        held(wanted)


def test_nothing_left_to_train_on_and_no_such_data() -> None:
    with pytest.raises(DataError, match="takes 50 of the 50"):
        held("50")
    with pytest.raises(DataError, match="no data at 'nowhere'"):
        held("nowhere")

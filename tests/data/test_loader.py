"""Which sample comes when: the same for any number of workers, processes and restarts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.core.types import Batch
from featdistill.data import loader
from featdistill.data.decode import BadImage
from featdistill.data.loader import (
    Share,
    default_workers,
    listed_batches,
    ordered_batches,
    plainly,
    steps_per_epoch,
    training_batches,
)
from featdistill.data.sources import ArraySource, digits
from featdistill.data.views import CropView, EvalView

N = 22


@dataclass(frozen=True)
class Damaged(ArraySource):
    """A source some of whose images cannot be read."""

    bad: frozenset[int] = field(default_factory=frozenset)

    def read(self, index: int) -> Tensor:
        if index in self.bad:
            raise BadImage("bad bytes")
        return super().read(index)


@pytest.fixture
def source() -> Damaged:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 3, 9, 7), np.uint8))
    return Damaged("made", pixels, np.arange(N) % 3, ("a", "b", "c"))


VIEW = CropView(8)
PLAN: dict[str, Any] = {"batch_size": 4, "seed": 7, "start": 0, "stop": 12, "workers": 0}


def batches(source: Damaged, **changes: Any) -> list[Batch]:
    return list(training_batches(source, VIEW, **{**PLAN, **changes}))


def same(ones: Iterable[Batch], others: Iterable[Batch]) -> None:
    """Assert that two series of batches are equal to the bit."""
    for a, b in zip(ones, others, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.positions, b.positions)
        assert (a.labels is None) == (b.labels is None)
        assert a.labels is None or b.labels is None or torch.equal(a.labels, b.labels)
        assert a.replaced == b.replaced


def test_a_batch(source: Damaged) -> None:
    batch = batches(source)[0]
    assert len(batch) == 4
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert batch.labels is not None
    assert source.labels is not None
    assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()
    for row, index in enumerate(batch.indices.tolist()):
        assert torch.equal(batch.images[row], VIEW(source.read(index), (7, 0, index))[0])


def test_workers_change_nothing(source: Damaged) -> None:
    damaged = replace(source, bad=frozenset({3, 5}))
    same(batches(damaged), batches(damaged, workers=2))


def test_the_shares_of_two_processes_are_the_batch_of_one(source: Damaged) -> None:
    damaged = replace(source, bad=frozenset({3, 5}))
    halves = [batches(damaged, share=Share(rank, 2)) for rank in (0, 1)]
    joined = [
        Batch(
            views=(torch.cat([a.images, b.images]),),
            labels=torch.cat([a.labels, b.labels]),
            indices=torch.cat([a.indices, b.indices]),
            positions=torch.cat([a.positions, b.positions]),
            replaced=a.replaced + b.replaced,
        )
        for a, b in zip(*halves, strict=True)
        if a.labels is not None and b.labels is not None
    ]
    same(joined, batches(damaged))


@pytest.mark.parametrize("start", [1, 5, 7, 12])
def test_a_start_in_the_middle_is_the_tail(source: Damaged, start: int) -> None:
    same(batches(source, start=start), batches(source)[start:])


def test_an_epoch_repeats_nothing_and_each_has_its_order(source: Damaged) -> None:
    per_epoch = steps_per_epoch(N, 4)
    assert per_epoch == 5
    steps = batches(source, stop=3 * per_epoch)
    epochs = [
        torch.cat([b.indices for b in steps[e * per_epoch : (e + 1) * per_epoch]]).tolist()
        for e in range(3)
    ]
    assert all(len(set(epoch)) == 4 * per_epoch for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert set().union(*epochs) == set(range(N)), "what one epoch leaves out, another has"


def test_another_seed_is_another_order(source: Damaged) -> None:
    assert batches(source)[0].indices.tolist() != batches(source, seed=8)[0].indices.tolist()


def test_the_same_image_looks_different_in_another_epoch(source: Damaged) -> None:
    first, second = (
        next(b for b in batches(source, stop=10)[e * 5 :] if 3 in b.indices.tolist())
        for e in (0, 1)
    )
    images = [b.images[b.indices.tolist().index(3)] for b in (first, second)]
    assert not torch.equal(*images)


def test_an_unreadable_image_is_replaced_and_reported(source: Damaged) -> None:
    damaged = replace(source, bad=frozenset({3}))
    whole, replaced = batches(source, stop=5), batches(damaged, stop=5)
    same(replaced, batches(damaged, stop=5))
    reports = [r for b in replaced for r in b.replaced]
    assert len(reports) == 1
    assert (reports[0].index, reports[0].reason) == (3, "made[3]: bad bytes")
    assert reports[0].substitute != 3
    for a, b in zip(whole, replaced, strict=True):
        assert torch.equal(a.indices, b.indices), "the address of the sample stays"
        for row, index in enumerate(a.indices.tolist()):
            if index != 3:
                assert torch.equal(a.images[row], b.images[row]), "no other sample changes"
                continue
            substitute = reports[0].substitute
            assert torch.equal(b.images[row], VIEW(source.read(substitute), (7, 0, substitute))[0])
            assert b.labels is not None
            assert source.labels is not None
            assert b.labels[row] == source.labels[substitute]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_any_readable_image(source: Damaged, workers: int) -> None:
    damaged = replace(source, bad=frozenset(range(N)))
    loader = training_batches(damaged, VIEW, **{**PLAN, "workers": workers})
    with pytest.raises(DataError) as caught:
        list(plainly(loader))
    message = str(caught.value)
    assert message.startswith("20 images in a row could not be read, the last: made[")
    assert message.endswith("look at the images of 'made'")
    assert "\n" not in message


def test_unlabelled_data_gives_no_labels(source: Damaged) -> None:
    assert batches(replace(source, labels=None, classes=None))[0].labels is None


def test_a_batch_larger_than_the_data(source: Damaged) -> None:
    with pytest.raises(DataError, match=r"batch of 23 is larger than the 22 .*--batch-size 22"):
        batches(source, batch_size=23)


def test_no_step_to_do(source: Damaged) -> None:
    assert batches(source, start=12, workers=2) == []


def test_the_global_generator_does_not_decide(source: Damaged) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = batches(source, workers=1, stop=2)
        torch.manual_seed(2)
        same(first, batches(source, workers=1, stop=2))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (3, 0), (30, 0)])
def test_ordered_batches_see_each_image_once(source: Damaged, world: int, workers: int) -> None:
    found = [
        list(
            ordered_batches(
                source, EvalView(4), batch_size=5, workers=workers, share=Share(rank, world)
            )
        )
        for rank in range(world)
    ]
    indices = [i for share in found for b in share for i in b.indices.tolist()]
    assert sorted(indices) == list(range(N))
    assert source.labels is not None
    for batch in (b for share in found for b in share):
        assert len(batch) <= 5
        assert batch.labels is not None
        assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()
    if world == 1:
        assert indices == list(range(N))
        assert len(found[0][-1]) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_score_needs_every_image(source: Damaged, workers: int) -> None:
    damaged = replace(source, bad=frozenset({7}))
    loader = ordered_batches(damaged, EvalView(4), batch_size=5, workers=workers)
    with pytest.raises(DataError) as caught:
        list(plainly(loader))
    assert str(caught.value) == (
        "cannot read 'made[7]' of 'made': bad bytes; mend or remove it; a score needs every image"
    )


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 0), (2, 1, 1), (4, 1, 3), (8, 8, 0), (16, 1, 15), (16, 2, 7), (64, 1, 16), (64, 8, 7)],
)
def test_default_workers_leave_a_core(
    cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(loader, "_QUOTA", Path("no such file"))
    assert default_workers(processes) == workers
    assert Share(0, processes).workers == workers
    assert Share(0, 4 * processes, here=processes).workers == workers, "of four machines"


def test_listed_images_are_read_by_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(loader, "_QUOTA", Path("no such file"))
    train, _ = digits()
    batches = [range(i, i + 32) for i in range(0, 1184, 32)]
    for share, workers in ((Share(), 15), (Share(1, 4), 3)):
        listed = listed_batches(train, VIEW, batches=batches, share=share)
        assert listed.num_workers == workers


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("400000 100000", 4), ("max 100000", 16), ("50000 100000", 1), ("9900000 100000", 16)],
)
def test_a_containers_share_of_the_cores(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(loader, "_QUOTA", tmp_path / "cpu.max")
    assert loader.cores() == cores


def test_a_device_gets_a_loading_process(source: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "cores", lambda: 1)
    plan = {**PLAN, "workers": None}
    assert training_batches(source, VIEW, **plan).num_workers == 0
    assert training_batches(source, VIEW, **plan, pin_memory=True).num_workers == 1


@pytest.mark.parametrize(("batch", "ahead"), [(4, 4), (128, 2)])
def test_few_large_batches_are_kept_ready(batch: int, ahead: int) -> None:
    images = ArraySource("made", torch.zeros(256, 3, 1, 1, dtype=torch.uint8))
    plan = {**PLAN, "batch_size": batch, "workers": 1}
    assert training_batches(images, VIEW, **plan).prefetch_factor == ahead


@pytest.mark.parametrize("workers", [0, 2])
def test_listed_batches_are_the_given_ones(source: Damaged, workers: int) -> None:
    wanted = [range(3), range(7, 9), [21, 0]]
    found = list(plainly(listed_batches(source, EvalView(8), batches=wanted, workers=workers)))
    assert [b.indices.tolist() for b in found] == [list(w) for w in wanted]
    for b in found:
        assert b.labels is not None
        assert source.labels is not None
        assert b.labels.tolist() == source.labels[b.indices.numpy()].tolist()
        for row, index in enumerate(b.indices.tolist()):
            assert torch.equal(b.images[row], EvalView(8)(source.read(index))[0])


def test_an_unreadable_listed_image_is_black_and_named(source: Damaged) -> None:
    damaged = replace(source, bad=frozenset({1, 2}))
    [first, second] = listed_batches(damaged, EvalView(8), batches=[[0, 1], [2]])
    whole = next(iter(listed_batches(source, EvalView(8), batches=[[0]])))
    assert torch.equal(first.images[0], whole.images[0])
    assert not first.images[1].any()
    assert not second.images.any()
    assert first.images.shape[1:] == second.images.shape[1:]
    assert [(r.index, r.reason, r.substitute) for b in (first, second) for r in b.replaced] == [
        (1, "made[1]: bad bytes", None),
        (2, "made[2]: bad bytes", None),
    ]

"""Batches from images on the device are, to the bit, those of the loader."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featdistill.core.errors import DataError
from featdistill.core.types import Batch
from featdistill.data import device_cache
from featdistill.data.decode import BadImage
from featdistill.data.device_cache import DeviceImages, device_batches, free_memory, to_device
from featdistill.data.kept import Block
from featdistill.data.loader import Share, training_batches
from featdistill.data.sources import ArraySource, Source, Subset
from featdistill.data.views import CropView, View
from tests.data.test_batched_views import EXACT, finetune

CPU = torch.device("cpu")
N = 22


@dataclass(frozen=True)
class Mixed(ArraySource):
    """A source of images of several sizes, some of which cannot be read."""

    bad: frozenset[int] = field(default_factory=frozenset)
    sizes: tuple[tuple[int, int], ...] = ((9, 7),)

    def read(self, index: int) -> Tensor:
        if index in self.bad:
            raise BadImage("bad bytes")
        height, width = self.sizes[index % len(self.sizes)]
        return super().read(index)[:, :height, :width].contiguous()


@pytest.fixture
def source() -> Mixed:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 3, 9, 8), np.uint8))
    return Mixed("made", pixels, np.arange(N) % 3, ("a", "b", "c"))


def on_device(source: Source, **options: Any) -> DeviceImages:
    return to_device(source, CPU, workers=0, progress=lambda done: None, **options)


def same(found: list[Batch], wanted: list[Batch]) -> None:
    """Assert that two series of batches are equal (to the bit where torchvision is)."""
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert (a.images.int() - b.images.int()).abs().max() <= (0 if EXACT else 1)
        assert a.images.dtype == b.images.dtype == torch.uint8
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.positions, b.positions)
        assert a.replaced == b.replaced
        assert (a.labels is None) == (b.labels is None)
        assert a.labels is None or b.labels is None or torch.equal(a.labels, b.labels)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no labels": {"labels": None, "classes": None},
    "bad images": {"bad": frozenset((3, 5, 6))},
    "sizes": {"sizes": ((9, 7), (8, 8), (5, 6)), "bad": frozenset((0, 4, 9))},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("view", [CropView(8), finetune(8)], ids=["crop", "finetune"])
@pytest.mark.parametrize(("start", "share"), [(0, Share()), (7, Share()), (2, Share(1, 2))])
def test_batches_are_the_loader_s(
    source: Mixed, case: str, view: View, start: int, share: Share
) -> None:
    source = replace(source, **CASES[case])
    plan: dict[str, Any] = {"batch_size": 4, "seed": 7, "start": start, "stop": 12}
    wanted = list(training_batches(source, view, **plan, workers=0, share=share))
    found = list(device_batches(on_device(source), view, **plan, share=share))
    same(found, wanted)
    assert any(b.replaced for b in found) == ("bad" in CASES[case])


def test_a_part_of_the_images(source: Mixed) -> None:
    """Label budgets and slices that were held out: numbers are those of the part."""
    part = Subset(source, np.array([2, 3, 5, 7, 11, 13, 17, 19]))
    plan: dict[str, Any] = {"batch_size": 3, "seed": 1, "start": 0, "stop": 5}
    wanted = list(training_batches(part, CropView(8), **plan, workers=0))
    same(list(device_batches(on_device(part), CropView(8), **plan, share=Share())), wanted)


def test_large_images_on_a_cpu_are_cut_one_by_one(
    source: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = replace(source, **CASES["sizes"])
    plan: dict[str, Any] = {"batch_size": 4, "seed": 1, "start": 0, "stop": 9, "share": Share()}
    at_once = list(device_batches(on_device(source), CropView(8), **plan))
    monkeypatch.setattr(device_cache, "_PRODUCTS", 8 * 9 - 1)
    monkeypatch.setattr(device_cache, "Cutter", None)
    same(list(device_batches(on_device(source), CropView(8), **plan)), at_once)


def test_workers_change_nothing(source: Mixed) -> None:
    source = replace(source, **CASES["sizes"])
    one = on_device(source)
    two = to_device(source, CPU, workers=2, progress=lambda done: None)
    assert torch.equal(one.pixels, two.pixels)
    assert np.array_equal(one.sizes, two.sizes)
    assert one.reasons == two.reasons == dict.fromkeys((0, 4, 9), "bad bytes")


def test_no_block_stays_in_shared_memory(source: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have a thousand files open, and a million images have more blocks."""
    shared: list[bool] = []
    real = device_cache._fill

    def fill(pixels: Tensor, blocks: list[Block]) -> None:
        shared.extend(t.is_shared() for b in blocks for t in (b.pixels, b.sizes))
        real(pixels, blocks)

    monkeypatch.setattr(device_cache, "_fill", fill)
    monkeypatch.setattr("featdistill.data.kept._BLOCK", 1000)
    to_device(source, CPU, workers=2, progress=lambda done: None)
    assert len(shared) > 4
    assert not any(shared)


def test_it_is_a_source(source: Mixed) -> None:
    source = replace(source, **CASES["sizes"])
    kept = on_device(source)
    assert (kept.name, kept.classes, len(kept)) == (source.name, source.classes, N)
    assert kept.labels is source.labels
    assert kept.identify(4) == source.identify(4)
    for index in set(range(N)) - source.bad:
        assert torch.equal(kept.read(index), source.read(index))
    with pytest.raises(BadImage, match="bad bytes"):
        kept.read(0)


def test_larger_images_are_made_smaller(source: Mixed) -> None:
    kept = on_device(source, short_side=5)
    assert kept.pixels.shape == (N, 6, 3, 5)
    assert kept.read(1).shape == (3, 6, 5)
    assert on_device(source, short_side=7).read(1).shape == (3, 9, 7)


def test_progress_is_told(source: Mixed) -> None:
    told: list[int] = []
    to_device(source, CPU, workers=0, progress=told.append)
    assert told[-1] == N


@pytest.mark.parametrize("count", [N - 1, N])
def test_no_image_to_show(source: Mixed, count: int) -> None:
    """As in the loader: after 20 in a row it gives up."""
    kept = on_device(source)
    kept.sizes[:count] = 0
    kept.reasons.update(dict.fromkeys(range(count), "gone"))
    plan: dict[str, Any] = {"batch_size": 22, "seed": 0, "start": 0, "stop": 9, "share": Share()}
    with pytest.raises(DataError, match=r"20 images in a row .* the last: made\[\d+\]: gone"):
        list(device_batches(kept, CropView(8), **plan))


def test_too_large_for_the_device(source: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    need = N * 3 * 9 * 7
    monkeypatch.setattr(device_cache, "free_memory", lambda device: need)
    on_device(source)
    with pytest.raises(DataError, match=r"in each of 2 processes, and this machine has .* free"):
        on_device(source, copies=2)
    monkeypatch.setattr(device_cache, "free_memory", lambda device: need - 1)
    reads: list[int] = []
    monkeypatch.setattr(Mixed, "read", _counted(Mixed.read, reads))
    with pytest.raises(DataError, match=r"the 22 images of 'made' take about .*--data.cache disk"):
        on_device(source)
    assert len(reads) == N, "the sample alone"


def _counted(read: Any, reads: list[int]) -> Any:
    return lambda self, index: reads.append(index) or read(self, index)


def test_out_of_memory_after_all(source: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_cache, "_fill", full)
    with pytest.raises(DataError, match="take about"):
        on_device(source)


def test_sizes_that_would_be_mostly_padding(source: Mixed) -> None:
    source = replace(source, sizes=((9, 1), (1, 8)))
    with pytest.raises(DataError) as caught:
        on_device(source)
    said = str(caught.value)
    assert "many sizes (2 sizes of a sample of 64): padded to 8 x 9" in said
    assert "--data.cache disk" in said
    on_device(replace(source, sizes=((9, 8), (1, 8))))  # 1.8 times


def test_the_free_memory_of_this_machine() -> None:
    found = free_memory(CPU)
    assert found is not None
    assert 1 << 20 < found < 1 << 50


def test_files_that_were_read_leave_a_container_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_cache, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("999000\n")
    (tmp_path / "memory.stat").write_text("anon 500\nactive_file 200\ninactive_file 3000\n")
    assert free_memory(CPU) == 1000 + 3200


def test_blocks_are_given_up_as_they_are_put_in_place(
    source: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or all images would be in memory twice."""
    left: list[int] = []
    real = torch.zeros

    def zeros(*shape: Any, **options: Any) -> Tensor:
        left.append(sum(type(thing) is Block for thing in gc.get_objects()))
        return real(*shape, **options)

    monkeypatch.setattr("featdistill.data.kept._BLOCK", 1000)
    monkeypatch.setattr(torch, "zeros", zeros)
    on_device(source)
    _, *filling = left  # one fewer each time
    assert len(filling) > 4
    assert filling == list(range(filling[0], filling[0] - len(filling), -1))

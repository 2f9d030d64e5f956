"""What the caches are timed by: works over the same images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from featdistill.cli.main import main
from featdistill.core.types import Batch
from featdistill.data.sources import digits
from featdistill.data.views import CropView
from featdistill.tasks.bench import caches
from featdistill.tasks.bench.common import take_turns
from tests.data.test_batched_views import EXACT


def test_the_works_load_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = digits()
    cpu = torch.device("cpu")
    works = caches.cache_works(
        source, CropView(8), batch_size=16, batches=3, folder=tmp_path, device=cpu
    )
    assert set(take_turns(works, rounds=1, device=cpu)) == {"plain", "disk", "device"}
    taken: list[list[Batch]] = []
    monkeypatch.setattr(caches, "_take", lambda batches, device: taken.append(list(batches)))
    for work in works.values():
        work()
    plain, *others = taken
    for other in others:
        for one, two in zip(plain, other, strict=True):
            assert len(one) == 16
            assert torch.equal(one.indices, two.indices)
            assert (one.images.int() - two.images.int()).abs().max() <= (0 if EXACT else 1)


def test_the_command_says_what_each_way_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = ("--data", "digits", "--images", "40", "--image-size", "8", "--rounds", "1")
    assert main(["bench", "caches", *few, "--device", "cpu", "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)["ways"]
    assert ways["plain"]["ratio"] == 1
    assert all(ways[way]["images_per_second"] > 0 for way in ("plain", "disk", "device"))
    assert main(["bench", "caches", *few, "--device", "cpu"]) == 0
    assert "--data.cache device" in capsys.readouterr().err
    assert main(["bench", "caches"]) == 2
    assert "needs images of one size" in capsys.readouterr().err

"""Precision and attention by what a machine and a model are good at."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from featdistill.engine import speed
from featdistill.engine.runtime import Runtime

LARGE = nn.Sequential(nn.Linear(192, 768, device="meta"))
CONVOLUTION = nn.Conv2d(192, 192, 3, device="meta")
SMALL = nn.Sequential(nn.Linear(64, 256))


@pytest.mark.parametrize(
    ("model", "times", "pays"),
    [
        *((LARGE, 2.0, True), (CONVOLUTION, 2.0, True), (LARGE, 1.1, False)),
        *((SMALL, 2.0, False), (nn.ReLU(), 2.0, False)),
    ],
)
def test_bf16_pays_for_large_models_on_quick_machines(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, times: float, pays: bool
) -> None:
    monkeypatch.setattr(speed, "bf16_products", lambda: times)
    assert speed.bf16_pays(model) is pays


def test_the_machine_is_asked_once() -> None:
    found = speed.bf16_products()
    assert found > 0
    assert speed.bf16_products() is found


def test_a_runtime_settles_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "bf16_products", lambda: 2.0)
    small, large = Runtime(device="cpu"), Runtime(device="cpu")
    small.settle(SMALL)
    large.settle(LARGE)
    assert (small.precision, large.precision) == ("float32", "bf16")
    with large.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    with small.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_what_is_asked_for_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "bf16_products", lambda: 2.0)
    told = Runtime(device="cpu", precision="float32")
    told.settle(LARGE)
    assert told.precision == "float32"
    assert not told.pays(LARGE)


def test_a_resumed_run_keeps_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "bf16_products", lambda: 2.0)
    left, told = Runtime(device="cpu"), Runtime(device="cpu", precision="bf16")
    left.settle(LARGE)
    assert not left.go_on_in("bf16")
    assert left.go_on_in("float32")
    left.settle(LARGE)
    assert left.precision == "float32"
    assert not told.go_on_in("float32")
    assert told.precision == "bf16"


@pytest.mark.parametrize("most", [0, 1 << 25, 1 << 30])
def test_what_an_older_library_refuses_is_asked_in_smaller(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    taken = {}

    def mallopt(what: int, value: int) -> int:
        if what == -3 and value > most:
            return 0
        taken[what] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    speed.keep_memory()
    assert taken == ({-3: most, -1: 2**31 - 1} if most else {})


def test_keeping_memory_is_harmless() -> None:
    speed.keep_memory()
    speed.keep_memory()
    assert float(torch.ones(1 << 20).sum()) == 1 << 20

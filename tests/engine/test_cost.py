"""Time and energy of a run: counters of the kernel and of NVML, sums over sessions."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from featdistill.engine.cost import CostMeter, RaplCounter, Spent, energy_counter
from featdistill.engine.loop import fit
from featdistill.engine.optimizer import adamw, parameter_groups
from featdistill.engine.plan import FitResult
from featdistill.engine.runtime import Runtime
from tests.engine.test_loop import Line, plan


def package(root: Path, number: int, microjoules: int, span: int = 1_000_000) -> Path:
    zone = root / f"intel-rapl:{number}"
    (root / f"{zone.name}:0").mkdir(parents=True)  # a part of it, whose energy it holds already
    (root / f"{zone.name}:0" / "energy_uj").write_text("999")
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text(f"{span}\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    return zone / "energy_uj"


def test_packages_are_added_and_their_overflow_is_seen(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 900_000), package(tmp_path, 1, 5)
    counter = RaplCounter(tmp_path)
    assert counter.joules() == 0
    second.write_text("250005")
    assert counter.joules() == pytest.approx(0.25)
    first.write_text("100000")  # past 1,000,000 and round
    assert counter.joules() == pytest.approx(0.45)
    first.write_text("gone")
    assert CostMeter(counter).now().joules is None


def test_where_nothing_counts_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featdistill.engine.cost.RAPL", tmp_path)
    with pytest.raises(FileNotFoundError):
        RaplCounter(tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter(torch.device("cuda")) is None
    spent = CostMeter(None, Spent(5.0, 3.0)).now()
    assert spent.seconds >= 5
    assert spent.joules is None


class NvmlError(Exception):
    pass


def test_a_gpu_is_found_by_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules = iter([7_000, 9_500])

    def handle(identity: str) -> str:
        if identity != "GPU-abc":
            raise NvmlError(identity)
        return "handle"

    fake = SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(millijoules),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    identity = SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: identity)
    counter = energy_counter(torch.device("cuda"))
    assert counter is not None
    assert counter.joules() == 2.5
    identity.uuid = "another"
    assert energy_counter(torch.device("cuda")) is None


def test_sums_know_what_they_do_not_know() -> None:
    assert Spent(1, 2) + Spent(3, 4) == Spent(4, 6)
    assert Spent(1, 2) + Spent(3, None) == Spent(4, None)
    assert Spent.of_manifest({}) == Spent(0.0, None)  # of an earlier version
    assert Spent.of_manifest({"seconds": 3, "joules": 0.0}) == Spent(3.0, 0.0)


class Steady:
    def joules(self) -> float:
        return 5.0


def session(folder: Path, *, stop_at: int | None, resume: bool) -> FitResult:
    objective = Line()
    optimizer = adamw(parameter_groups([("", objective)], weight_decay=0.0), betas=(0.9, 0.999))
    return fit(
        objective,
        optimizer,
        plan(stop_at=stop_at),
        runtime=Runtime(device="cpu"),
        folder=folder,
        resume=resume,
    )


def test_a_resumed_run_counts_all_its_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "energy_counter", lambda _: Steady())
    first = session(tmp_path, stop_at=2, resume=False)
    assert first.joules == 5.0
    second = session(tmp_path, stop_at=4, resume=True)
    assert second.joules == 10.0
    assert second.seconds > first.seconds > 0
    again = session(tmp_path, stop_at=4, resume=True)  # nothing to do: nothing spent or forgotten
    assert (again.seconds, again.joules) == (second.seconds, second.joules)
    monkeypatch.setattr(Runtime, "energy_counter", lambda _: None)
    last = session(tmp_path, stop_at=None, resume=True)
    assert last.seconds > second.seconds
    assert last.joules is None  # a part is not known

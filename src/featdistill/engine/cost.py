"""What a run costs: wall time, and energy where the machine counts it; over all its sessions."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Spent:
    """Time and energy; energy is None where nothing counts it, never a guess."""

    seconds: float = 0.0
    joules: float | None = 0.0

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Spent:
        """What a checkpoint had cost; a checkpoint of an earlier version does not say."""
        return cls(float(manifest.get("seconds", 0.0)), manifest.get("joules"))

    def __add__(self, other: Spent) -> Spent:
        known = self.joules is not None and other.joules is not None
        return Spent(
            self.seconds + other.seconds,
            (self.joules or 0.0) + (other.joules or 0.0) if known else None,
        )


class Counter(Protocol):
    """Counts energy from its making on."""

    def joules(self) -> float: ...


class NvmlCounter:
    """What one NVIDIA GPU drew, whoever used it.

    Args:
        device: a CUDA device.

    Raises:
        OSError: NVML or its Python package is not there, or this GPU does not count.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            pynvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise OSError("pynvml is not installed") from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            # by its identity: the driver's numbers are not those of CUDA_VISIBLE_DEVICES
            identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(identity)
            self._began = self._total()
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from error

    def _total(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def joules(self) -> float:
        """Since it was made."""
        try:
            return (self._total() - self._began) / 1e3
        except self._nvml.NVMLError:
            return math.nan


class RaplCounter:
    """What the processor's packages drew, whoever used them; memory and the rest are left out.

    A package's counter starts again at 0 after some kilojoules: it must be read now and then.

    Args:
        root: the kernel's powercap folder.

    Raises:
        OSError: the kernel has no such counters, or only root may read them.
    """

    def __init__(self, root: Path = RAPL) -> None:
        zones = sorted(root.glob("intel-rapl:*"))  # of AMD's processors too
        packages = [zone for zone in zones if zone.name.count(":") == 1]
        if not packages:
            raise FileNotFoundError(f"no energy counter in '{root}'")
        self._files = [zone / "energy_uj" for zone in packages]
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in packages]
        self._last = [int(file.read_text()) for file in self._files]
        self._microjoules = 0

    def joules(self) -> float:
        """Since it was made."""
        try:
            now = [int(file.read_text()) for file in self._files]
        except (OSError, ValueError):
            return math.nan
        for before, after, span in zip(self._last, now, self._ranges, strict=True):
            self._microjoules += after - before + (span if after < before else 0)
        self._last = now
        return self._microjoules / 1e6


class Nothing:
    """For a process whose energy another one counts."""

    def joules(self) -> float:
        """None."""
        return 0.0


def energy_counter(device: torch.device) -> Counter | None:
    """The counter of a device; None where there is none."""
    try:
        return NvmlCounter(device) if device.type == "cuda" else RaplCounter()
    except (OSError, ValueError):
        return None


class CostMeter:
    """What a run has cost so far.

    Args:
        counter: of this session's energy; None: not known.
        before: what earlier sessions had cost.
    """

    def __init__(self, counter: Counter | None, before: Spent | None = None) -> None:
        self._counter, self._before = counter, before or Spent()
        self._began = time.monotonic()

    def now(self) -> Spent:
        """Over all sessions; but what a kill undid is forgotten."""
        joules = None if self._counter is None else self._counter.joules()
        if joules is not None and math.isnan(joules):
            joules = None
        return self._before + Spent(time.monotonic() - self._began, joules)

"""NVML's energy counter on a real GPU; skipped where there is none, or no pynvml."""

from __future__ import annotations

import time

import pytest
import torch

from featdistill.engine.cost import CostMeter, energy_counter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_busy_gpu_draws_a_plausible_power() -> None:
    pytest.importorskip("pynvml")
    device = torch.device("cuda", 0)
    counter = energy_counter(device)
    if counter is None:
        pytest.skip("this GPU (or its MIG part) does not count energy")
    meter = CostMeter(counter)
    one = torch.randn(4096, 4096, device=device)
    began = time.monotonic()
    while time.monotonic() - began < 3:
        one @ one
        torch.cuda.synchronize()
    spent = meter.now()
    assert spent.joules is not None
    assert 10 < spent.joules / spent.seconds < 2000  # watts

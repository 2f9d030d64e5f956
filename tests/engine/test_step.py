"""Clipping within the optimiser is clipping before it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from featdistill.engine.optimizer import Lars, adamw, parameter_groups, sgd
from featdistill.engine.step import descend


def build(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups([("", model)], weight_decay=0.05)
    made = {
        "adamw": lambda: adamw(groups, betas=(0.9, 0.99)),
        "sgd": lambda: sgd(groups, momentum=0.9),
        "lars": lambda: Lars(groups, momentum=0.9),
    }[kind]()
    for group in made.param_groups:
        group["lr"] = 0.01
    return made


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("size", [0.1, 100.0])
def test_five_steps_end_where_torchs_own_clipping_ends(kind: str, size: float) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))
    plain = copy.deepcopy(ours)
    one, other = build(kind, ours), build(kind, plain)
    for _ in range(5):
        x = torch.randn(8, 6)
        for model in (ours, plain):
            (size * model(x).square().mean()).backward()
        norm, bad = descend(one, one, clip=1.0)
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        other.step()
        other.zero_grad()
        torch.testing.assert_close(norm, expected)
        assert not bad
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

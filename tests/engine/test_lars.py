"""LARS against timm's own, and what it does where a gradient is no number."""

from __future__ import annotations

import pytest
import torch
from timm.optim.lars import Lars as TimmLars
from torch import nn

from featdistill.engine.optimizer import Lars, parameter_groups, sgd


def layer() -> nn.Linear:
    made = nn.Linear(5, 3)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=rng)
    return made


def slope(made: nn.Linear, step: int) -> None:
    rng = torch.Generator().manual_seed(step)
    for parameter in made.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_timms(weight_decay: float) -> None:
    """timm scales 1-d parameters too: it gets the weight alone."""
    mine, theirs = layer(), layer()
    groups = parameter_groups([("", mine)], weight_decay=weight_decay)
    one = Lars(groups, momentum=0.9)
    other = TimmLars(
        [theirs.weight],
        lr=1.0,
        momentum=0.9,
        weight_decay=weight_decay,
        trust_coeff=1e-3,
        always_adapt=True,
    )
    plain = torch.optim.SGD([theirs.bias], lr=1.0, momentum=0.9)
    for step in range(5):
        lr = 2.0 - 0.3 * step
        for made in (mine, theirs):
            slope(made, step)
        for group in [*one.param_groups, *other.param_groups, *plain.param_groups]:
            group["lr"] = lr
        for optimizer in (one, other, plain):
            optimizer.step()
        torch.testing.assert_close(mine.weight, theirs.weight)
        torch.testing.assert_close(mine.bias, theirs.bias)


def test_weights_of_zero_move() -> None:
    made = layer()
    nn.init.zeros_(made.weight)
    optimizer = Lars(parameter_groups([("", made)], weight_decay=0.0), momentum=0.9)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    slope(made, 0)
    optimizer.step()
    torch.testing.assert_close(made.weight, -0.5 * made.weight.grad)


@pytest.mark.parametrize("make", [Lars, sgd])
def test_a_gradient_that_is_no_number_reaches_nothing(make: object) -> None:
    """The loop says so in `found_inf`; also of SGD, whose fused form torch makes."""
    made = layer()
    optimizer = make(parameter_groups([("", made)], weight_decay=0.0), momentum=0.9)  # type: ignore[operator]
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    slope(made, 0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    before = [p.detach().clone() for p in made.parameters()]
    momenta = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    for parameter in made.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(made.parameters(), before, strict=True))
    states = optimizer.state.values()
    assert all(torch.equal(s["momentum_buffer"], m) for s, m in zip(states, momenta, strict=True))

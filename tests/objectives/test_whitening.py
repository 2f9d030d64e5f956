"""Whitenings against their closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdistill.objectives.whitening import (
    L2Whitening,
    LayerNormWhitening,
    NoWhitening,
    PcaWhitening,
    Standardize,
    build_whitening,
)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Correlated features with a mean and a scale of their own in each channel."""
    rng = torch.Generator().manual_seed(seed)
    channels = shape[-1]
    mixing = torch.randn(channels, channels, generator=rng, dtype=torch.float64)
    scale = torch.logspace(-1, 1, channels, dtype=torch.float64)
    x = torch.randn(*shape, generator=rng, dtype=torch.float64)
    return ((x @ mixing) * scale + torch.arange(channels) - 1).to(dtype)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layernorm", LayerNormWhitening),
        ("none", NoWhitening),
        ("l2", L2Whitening),
        ("standardize", Standardize),
        ("pca", PcaWhitening),
    ],
)
def test_names(name: str, kind: type) -> None:
    made = build_whitening(name, 6)
    assert isinstance(made, kind)
    assert not list(made.parameters())
    assert made(tokens(2, 3, 6)).shape == (2, 3, 6)


def test_layernorm_is_the_closed_form() -> None:
    x = tokens(2, 5, 7)
    y = x.double()
    centred = y - y.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(LayerNormWhitening()(x).double(), expected, rtol=1e-5, atol=1e-5)


@given(scale=st.floats(0.1, 1e3), shift=st.floats(-100, 100), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_layernorm_does_not_see_scale_and_shift(scale: float, shift: float, seed: int) -> None:
    x = tokens(1, 3, 16, seed=seed, dtype=torch.float64) * 10
    whiten = LayerNormWhitening()
    torch.testing.assert_close(whiten(scale * x + shift), whiten(x), rtol=1e-3, atol=1e-3)


def test_none_and_l2() -> None:
    x = tokens(2, 3, 4)
    assert torch.equal(NoWhitening()(x), x)
    got = L2Whitening()(x)
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(got * x.norm(dim=-1, keepdim=True), x)
    assert torch.isfinite(L2Whitening()(torch.zeros(1, 1, 4))).all()


# --- standardize


def test_calibrated_data_have_zero_mean_and_unit_variance() -> None:
    parts = [tokens(3, 5, 6, seed=1), tokens(4, 5, 6, seed=1) * 2 + 1, tokens(1, 5, 6, seed=1)]
    whiten = Standardize(6)
    whiten.calibrate(iter(parts))
    got = torch.cat([whiten.eval()(p).flatten(0, 1) for p in parts]).double()
    torch.testing.assert_close(got.mean(0), torch.zeros(6).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(got.var(0, correction=0), torch.ones(6).double(), rtol=0, atol=1e-4)


def test_calibration_forgets_what_was_before() -> None:
    whiten, fresh = Standardize(6).train(), Standardize(6)
    whiten(tokens(2, 3, 6, seed=9))
    whiten.calibrate([tokens(2, 3, 6)])
    fresh.calibrate([tokens(2, 3, 6)])
    assert torch.equal(whiten.mean, fresh.mean)
    assert torch.equal(whiten.var, fresh.var)
    assert not whiten.pending.any()


def test_end_step_moves_by_the_momentum() -> None:
    whiten = Standardize(4, momentum=0.25).train()
    x = tokens(8, 5, 4)
    whiten(x)
    whiten.end_step()
    flat = x.double().flatten(0, 1)
    torch.testing.assert_close(whiten.mean.double(), 0.25 * flat.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        whiten.var.double(), 0.75 + 0.25 * flat.var(0, correction=0), rtol=1e-5, atol=1e-5
    )


def test_statistics_do_not_move_within_a_step() -> None:
    whiten = Standardize(4).train()
    x = tokens(2, 3, 4)
    first = whiten(x)
    assert torch.equal(whiten(x), first)
    whiten.end_step()
    assert not torch.equal(whiten(x), first)


@pytest.mark.parametrize("sizes", [[4, 4], [1, 7], [2, 2, 2, 2]])
def test_end_step_does_not_see_micro_batches(sizes: list[int]) -> None:
    whole, parts = Standardize(6).train(), Standardize(6).train()
    for step in range(3):
        x = tokens(8, 5, 6, seed=step)
        whole(x)
        for part in x.split(sizes):
            parts(part)
        whole.end_step()
        parts.end_step()
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(parts.var, whole.var, rtol=1e-6, atol=1e-7)


def test_end_step_sums_over_processes() -> None:
    x = tokens(8, 5, 6)
    whole, first, second = (Standardize(6).train() for _ in range(3))
    whole(x)
    first(x[:3])
    second(x[3:])
    total = first.pending + second.pending
    whole.end_step()
    first.end_step(lambda _: total.clone())
    second.end_step(lambda _: total.clone())
    for one in (first, second):
        torch.testing.assert_close(one.mean, whole.mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(one.var, whole.var, rtol=1e-6, atol=1e-7)


def test_evaluation_collects_nothing() -> None:
    whiten = Standardize(6).eval()
    whiten(tokens(2, 3, 6))
    assert not whiten.pending.any()


def test_a_step_that_saw_nothing_moves_nothing() -> None:
    whiten = Standardize(6)
    whiten.calibrate([tokens(2, 3, 6)])
    before = whiten.mean.clone()
    whiten.end_step()
    assert torch.equal(whiten.mean, before)


def test_constant_channel_stays_finite() -> None:
    whiten = Standardize(2)
    x = torch.full((2, 3, 2), 5.0)
    whiten.calibrate([x])
    torch.testing.assert_close(whiten.eval()(x), torch.zeros_like(x))


@pytest.mark.parametrize(
    ("name", "saved"), [("standardize", {"mean", "var"}), ("pca", {"mean", "rotation"})]
)
def test_statistics_are_saved(name: str, saved: set[str]) -> None:
    whiten, again = build_whitening(name, 5), build_whitening(name, 5)
    whiten.calibrate([tokens(6, 3, 5)])
    state = whiten.state_dict()
    assert set(state) == saved
    again.load_state_dict(state)
    x = tokens(2, 3, 5, seed=3)
    assert torch.equal(again.eval()(x), whiten.eval()(x))


# --- pca


def test_pca_whitens() -> None:
    parts = [tokens(20, 7, 6, seed=2, dtype=torch.float64) for _ in range(1)]
    parts += [0.5 * tokens(9, 7, 6, seed=3, dtype=torch.float64)]
    whiten = PcaWhitening(6, floor=0.0).double()
    whiten.calibrate(iter(parts))
    got = torch.cat([whiten(p).flatten(0, 1) for p in parts])
    torch.testing.assert_close(got.mean(0), torch.zeros(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(got.T @ got / len(got), torch.eye(6).double(), rtol=0, atol=1e-9)


def test_pca_does_not_blow_up_directions_without_variance() -> None:
    x = tokens(50, 3, 4, dtype=torch.float64)
    flat = torch.cat([x, x[..., :1] + x[..., 1:2]], dim=-1)  # rank 4 of 5
    whiten = PcaWhitening(5, floor=1e-5).double()
    whiten.calibrate([flat])
    got = whiten(flat).flatten(0, 1)
    variances = torch.linalg.eigvalsh(got.T @ got / len(got))
    torch.testing.assert_close(variances[1:], torch.ones(4).double(), rtol=0, atol=1e-6)
    assert float(variances[0]) < 1e-6
    assert float(whiten.rotation.abs().max()) < 1e3


def test_pca_in_single_precision() -> None:
    x = tokens(200, 3, 8)
    whiten = PcaWhitening(8)
    whiten.calibrate([x])
    got = whiten(x).flatten(0, 1).double()
    torch.testing.assert_close(got.T @ got / len(got), torch.eye(8).double(), rtol=0, atol=1e-2)

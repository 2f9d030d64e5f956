"""Positions at another image size: closed forms, and references that are not torch's."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.interpolate import CubicSpline
from torch import Tensor

from featdistill.models.positions import (
    SHARED_TABLE,
    carry_positions,
    layer_table,
    resize_absolute,
    resize_bias_table,
    tie_tables,
    untie_tables,
)
from tests.models.model_zoo import images, small

BEIT = {"use_abs_pos_emb": False, "global_pool": "token"}


def table(window: int, heads: int = 2, extra: int = 0) -> Tensor:
    rows = (2 * window - 1) ** 2 + extra
    return torch.randn(rows, heads, generator=torch.Generator().manual_seed(window))


def on_grid(values: Tensor, window: int, extra: int = 0) -> Tensor:
    """A table as (H, 2w-1, 2w-1)."""
    side = 2 * window - 1
    return values[: len(values) - extra].T.reshape(-1, side, side)


@pytest.mark.parametrize("how", ["linear", "geometric"])
@pytest.mark.parametrize("extra", [0, 3])
def test_nothing_changes_where_nothing_changes(how: str, extra: int) -> None:
    same = table(7, extra=extra)
    assert resize_bias_table(same, (7, 7), extra=extra, how=how) is same  # type: ignore[arg-type]
    positions = torch.randn(1, 2 + 16, 8)
    assert resize_absolute(positions, 2, (4, 4)) is positions


@pytest.mark.parametrize("grid", [(7, 7), (2, 2), (3, 6)])
def test_absolute_positions_are_resampled_as_pil_does_it(grid: tuple[int, int]) -> None:
    positions = torch.randn(1, 1 + 16, 3, generator=torch.Generator().manual_seed(0))
    got = resize_absolute(positions, 1, grid)
    assert torch.equal(got[:, :1], positions[:, :1])
    for channel in range(3):
        image = Image.fromarray(positions[0, 1:, channel].reshape(4, 4).numpy())
        right = np.asarray(image.resize((grid[1], grid[0]), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(got[0, 1:, channel].reshape(grid), right, atol=1e-5)


@pytest.mark.parametrize("how", ["linear", "geometric"])
@pytest.mark.parametrize("window", [(12, 12), (4, 4), (6, 9)])
def test_a_table_keeps_its_extra_rows_its_centre_and_its_symmetry(
    how: str, window: tuple[int, int]
) -> None:
    side = 13
    distance = torch.arange(side).sub(side // 2).abs().float()
    mirrored = (-0.2 * (distance[:, None] + 2 * distance[None])).reshape(-1, 1).expand(-1, 2)
    kept = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    got = resize_bias_table(torch.cat([mirrored, kept]), window, extra=3, how=how)  # type: ignore[arg-type]
    assert torch.equal(got[-3:], kept)
    grid = got[:-3].T.reshape(2, 2 * window[0] - 1, 2 * window[1] - 1)
    torch.testing.assert_close(grid, grid.flip(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(grid, grid.flip(2), atol=1e-5, rtol=0)
    assert grid[0].argmax() == grid[0].numel() // 2  # no offset at all stays the nearest


@given(old=st.integers(2, 9), new=st.integers(2, 16), value=st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("how", ["linear", "geometric"])
def test_a_constant_table_stays_constant(how: str, old: int, new: int, value: float) -> None:
    got = resize_bias_table(torch.full(((2 * old - 1) ** 2, 1), value), (new, new), how=how)  # type: ignore[arg-type]
    assert got.shape == ((2 * new - 1) ** 2, 1)
    torch.testing.assert_close(got, torch.full_like(got, value), atol=1e-5, rtol=1e-5)


def test_geometric_keeps_near_offsets_in_place_and_meets_the_far_ones() -> None:
    """BEiT's rule by another route: 1-d splines, and the ratio from the sum of the sequence."""
    new = 12  # the old window is 7
    profile = np.exp(-np.abs(np.arange(-6, 7)) / 2.0)
    got = resize_bias_table(
        torch.from_numpy(np.outer(profile, np.ones(13))).float().reshape(-1, 1),
        (new, new),
        how="geometric",
    )
    ratio = np.roots([1, 1, 1, 1, 1, 1 - 11.0])  # 1 + q + ... + q^5 = 11
    q = float(next(r.real for r in ratio if abs(r.imag) < 1e-9 and r.real > 0))
    places = np.cumsum(q ** np.arange(6))
    assert places[0] == 1
    np.testing.assert_allclose(places[-1], new - 1)
    spline = CubicSpline(np.r_[-places[::-1], 0, places], profile, bc_type="not-a-knot")
    right = spline(np.arange(-11, 12))
    np.testing.assert_allclose(on_grid(got, new)[0, :, 5], right, atol=1e-4)
    np.testing.assert_allclose(on_grid(got, new)[0, 11 - 1, 0], profile[5], atol=1e-4)


def test_linear_stretches_the_whole_table() -> None:
    got = resize_bias_table(table(4), (8, 8))
    image = Image.fromarray(on_grid(table(4), 4)[0].numpy())
    right = np.asarray(image.resize((15, 15), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(on_grid(got, 8)[0], right, atol=1e-5)


def test_a_shared_table_as_copies_and_back() -> None:
    shared = small(
        "beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False, **BEIT
    )
    layered = small("beit_base_patch16_224", use_rel_pos_bias=True, **BEIT)
    state = shared.model.state_dict()
    copies = untie_tables(state, layers=3)
    layered.model.load_state_dict(copies)
    x = images(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(layered(x).map, shared(x).map)
    back, lost = tie_tables(copies, layers=3)
    assert lost == 0
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_different_tables_become_their_mean() -> None:
    tensors = {layer_table(i): torch.full((4, 1), float(i)) for i in range(3)}
    tied, lost = tie_tables({**tensors, "x": torch.ones(1)}, layers=3)
    assert tied.keys() == {SHARED_TABLE, "x"}
    assert torch.equal(tied[SHARED_TABLE], torch.ones(4, 1))
    assert lost == 1


def test_swin_keeps_its_tables_while_its_windows_fit() -> None:
    build = {"embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2), "window_size": 7}
    small = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, **build)
    large = timm.create_model("swin_tiny_patch4_window7_224", img_size=112, **build)
    carried = carry_positions(small.state_dict(), large)
    assert carried.resized == ()
    tiny = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **build)
    carried = carry_positions(small.state_dict(), tiny)  # the last stage has a grid of 4
    assert carried.resized == ("layers.1.blocks.0.attn.relative_position_bias_table",)
    tiny.load_state_dict(carried.tensors)

"""Measures of attention: closed forms, a slow float64 reference, merging, windows."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.diagnostics.attention import (
    AttentionDistance,
    AttentionEntropy,
    HeadDivergence,
    HeadSimilarity,
    MeanMaps,
    Measure,
    Moments,
    MutualInformation,
    PrefixMass,
    map_pattern,
)
from featdistill.diagnostics.attention_layout import TokenLayout, layout_for
from featdistill.diagnostics.capture import Window

GRID = TokenLayout((14, 14), patch=16)
SMALL = TokenLayout((3, 4), prefix=2, patch=8)
ALL = (
    AttentionDistance,
    AttentionEntropy,
    HeadDivergence,
    HeadSimilarity,
    MeanMaps,
    MutualInformation,
    PrefixMass,
)


def attention(images: int, heads: int, tokens: int, *, seed: int = 0, sharp: float = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(images, heads, tokens, tokens, generator=generator)).softmax(-1)


def uniform(heads: int = 2, tokens: int = 196) -> Tensor:
    return torch.full((2, heads, tokens, tokens), 1 / tokens)


def identity(heads: int = 2) -> Tensor:
    return torch.eye(196).expand(2, heads, 196, 196)


# closed forms


def test_uniform_attention() -> None:
    distance = AttentionDistance().update(uniform(), GRID)
    np.testing.assert_allclose(distance.compute().mean, 116.49, atol=0.005)
    np.testing.assert_allclose(distance.compute("patches").mean, 116.49 / 16, atol=0.0004)
    np.testing.assert_allclose(distance.compute("relative").mean, 1, rtol=1e-6)
    np.testing.assert_allclose(distance.compute().error, 0, atol=1e-12)
    entropy = AttentionEntropy().update(uniform(), GRID)
    np.testing.assert_allclose(entropy.compute().mean, math.log(196), rtol=1e-6)
    np.testing.assert_allclose(entropy.compute("relative").mean, 1, rtol=1e-6)
    alike = HeadSimilarity().update(uniform(), GRID).compute()
    np.testing.assert_allclose([alike.per_query.mean, alike.flat.mean], 1, atol=1e-6)
    assert alike.per_query_centred.mean == alike.flat_centred.mean == 0  # nothing to compare
    maps = MeanMaps().update(uniform(), GRID)
    assert np.isnan(maps.pattern().column).all()
    assert np.isnan(maps.layer_pattern().relative)


def test_attention_to_oneself() -> None:
    np.testing.assert_array_equal(AttentionDistance().update(identity(), GRID).compute().mean, 0)
    np.testing.assert_allclose(AttentionEntropy().update(identity(), GRID).compute().mean, 0)
    nmi = MutualInformation().update(identity(), GRID).compute()
    np.testing.assert_allclose(nmi.mean, 1, atol=1e-6)
    assert HeadDivergence().update(identity(), GRID).compute().mean == 0


def test_a_step_to_the_right() -> None:
    """Every query attends to its right neighbour, the last of a row to itself."""
    right = torch.eye(12).roll(1, 1)
    right[3::4] = torch.eye(12)[3::4]
    found = AttentionDistance().update(right.expand(1, 1, 12, 12), TokenLayout((3, 4), patch=8))
    np.testing.assert_allclose(found.compute().mean, 8 * 9 / 12)


def test_identical_heads_are_alike() -> None:
    weights = attention(2, 1, 196).expand(2, 3, 196, 196)
    found = HeadSimilarity().update(weights, GRID).compute()
    for value in vars(found).values():
        np.testing.assert_allclose(value.mean, 1, atol=1e-5)
    np.testing.assert_allclose(HeadDivergence().update(weights, GRID).compute().mean, 0, atol=1e-5)


def test_heads_that_share_nothing() -> None:
    left, right = torch.zeros(2, 196, 196)
    left[:, :98], right[:, 98:] = 1 / 98, 1 / 98
    found = HeadSimilarity().update(torch.stack([left, right])[None], GRID).compute()
    np.testing.assert_allclose([found.per_query.mean, found.flat.mean], 0, atol=1e-6)
    np.testing.assert_allclose([found.per_query_centred.mean, found.flat_centred.mean], -1, 1e-5)


def test_a_column_map() -> None:
    columns = torch.rand(196, generator=torch.Generator().manual_seed(0)).softmax(0) ** 2
    weights = (columns / columns.sum()).expand(2, 2, 196, 196)
    np.testing.assert_allclose(
        MutualInformation().update(weights, GRID).compute().mean, 0, atol=1e-5
    )
    pattern = MeanMaps().update(weights, GRID).pattern()
    np.testing.assert_allclose(pattern.column, 1, atol=1e-9)
    assert (pattern.relative < 0.05).all()


def test_a_gaussian_of_the_offset() -> None:
    y, x = np.divmod(np.arange(196), 14)
    squared = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    pattern = map_pattern(np.exp(-squared / 2), (14, 14))
    np.testing.assert_allclose(pattern.relative, 1, atol=1e-12)
    assert pattern.column < 0.05


def test_prefix_mass() -> None:
    weights = torch.full((1, 2, 14, 14), 0.5 / 12)
    weights[..., :2] = 0.25
    np.testing.assert_allclose(PrefixMass().update(weights, SMALL).compute().mean, 0.5)
    np.testing.assert_allclose(
        AttentionDistance().update(weights, SMALL).compute("relative").mean, 1, rtol=1e-6
    )


# a slow reference in float64, by loops, from the definitions


def renormalised(weights: Tensor, prefix: int) -> np.ndarray:
    patches = weights.double().numpy()[:, :, prefix:, prefix:]
    return patches / patches.sum(-1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def over_pairs(maps: np.ndarray, of_pair: object) -> list[float]:
    """Of each image: the mean over ordered pairs of heads."""
    pairs = list(permutations(range(maps.shape[1]), 2))
    return [float(np.mean([of_pair(m[h], m[g]) for h, g in pairs])) for m in maps]  # type: ignore[operator]


def check(found: object, values: object) -> None:
    values = np.asarray(values)
    np.testing.assert_allclose(found.mean, values.mean(0), atol=2e-6)  # type: ignore[attr-defined]
    error = values.std(0, ddof=1) / math.sqrt(len(values))
    np.testing.assert_allclose(found.error, error, atol=2e-6)  # type: ignore[attr-defined]


def test_everything_equals_a_slow_reference() -> None:
    weights = attention(5, 3, 14)
    maps = renormalised(weights, 2)
    y, x = np.divmod(np.arange(12), 4)
    d = np.hypot(y[:, None] - y, x[:, None] - x)
    check(AttentionDistance().update(weights, SMALL).compute(), 8 * (maps * d).sum(-1).mean(-1))
    entropy = -(maps * np.log(maps)).sum(-1).mean(-1)
    check(AttentionEntropy().update(weights, SMALL).compute(), entropy)
    check(AttentionEntropy().update(weights, SMALL).compute("relative"), entropy / np.log(12))
    column = maps.mean(2)
    of_keys = -(column * np.log(column)).sum(-1)
    nmi = (of_keys - entropy) / np.sqrt(of_keys * np.log(12))
    check(MutualInformation().update(weights, SMALL).compute(), nmi)
    check(
        HeadDivergence().update(weights, SMALL).compute(),
        over_pairs(maps, lambda a, b: (a * np.log(a / b)).sum(-1).mean()),
    )
    found = HeadSimilarity().update(weights, SMALL).compute()
    centred = maps - maps.mean(-1, keepdims=True)
    for m, per_query, flat in (
        (maps, found.per_query, found.flat),
        (centred, found.per_query_centred, found.flat_centred),
    ):
        check(flat, over_pairs(m, cosine))
        rows = lambda a, b: np.mean([cosine(p, q) for p, q in zip(a, b, strict=True)])  # noqa: E731
        check(per_query, over_pairs(m, rows))
    mass = weights.double().numpy()[:, :, 2:, :2].sum(-1).mean(-1)
    check(PrefixMass().update(weights, SMALL).compute(), mass)
    np.testing.assert_allclose(MeanMaps().update(weights, SMALL).compute(), maps.mean(0), atol=1e-6)


def test_patterns_equal_least_squares() -> None:
    maps = np.random.default_rng(0).random((2, 12, 12))
    y, x = np.divmod(np.arange(12), 4)
    offset = 10 * (y[:, None] - y) + (x[:, None] - x)
    relative = (offset.ravel()[:, None] == np.unique(offset)).astype(float)
    column = np.tile(np.eye(12), (12, 1))
    found = map_pattern(maps, (3, 4))
    for values, design in ((found.column, column), (found.relative, relative)):
        for value, m in zip(values, maps, strict=True):
            fit = design @ np.linalg.lstsq(design, m.ravel(), rcond=None)[0]
            r2 = 1 - np.square(m.ravel() - fit).sum() / np.square(m - m.mean()).sum()
            assert value == pytest.approx(r2, abs=1e-9)


# streaming


def numbers(measure: Measure) -> list[np.ndarray]:
    found = measure.compute()  # type: ignore[attr-defined]
    if isinstance(found, np.ndarray):
        return [found]
    parts = vars(found).values() if isinstance(measure, HeadSimilarity) else [found]
    return [a for part in parts for a in (part.mean, part.error, np.asarray(part.images))]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("cuts", [(4,), (1, 2, 6), (1, 2, 3, 4, 5, 6)])
def test_parts_equal_the_whole(kind: type[Measure], cuts: tuple[int, ...]) -> None:
    """By batches of any size, and by merging what several processes saw, in any order."""
    weights = attention(7, 3, 14)
    whole = kind().update(weights, SMALL)
    streamed, merged = kind(), kind()
    for part in reversed(weights.tensor_split(cuts)):
        streamed.update(part, SMALL)
        merged.merge(kind().update(part, SMALL))
    merged.merge(kind())  # one that saw nothing
    for want, a, b in zip(numbers(whole), numbers(streamed), numbers(merged), strict=True):
        np.testing.assert_allclose(a, want, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(b, want, rtol=1e-6, atol=1e-9)


def test_moments_of_numbers_far_from_zero() -> None:
    values = 1e8 + torch.arange(6, dtype=torch.float64)[:, None]
    moments = Moments()
    for part in values.split(4):
        moments.update(part)
    found = moments.estimate()
    np.testing.assert_allclose(found.error, np.std(range(6), ddof=1) / math.sqrt(6), rtol=1e-9)


def test_one_image_has_no_error() -> None:
    found = AttentionDistance().update(attention(1, 2, 196), GRID).compute()
    assert np.isnan(found.error).all()
    assert np.isfinite(found.mean).all()


# windows

SHIFTED = TokenLayout((8, 8), patch=4, window=Window((8, 8), (4, 4), (1, 2)))


def shifted_by_hand(full: Tensor) -> Tensor:
    """Attention (B, H, 64, 64) of an 8x8 map as Swin's shifted windows hold it, masked."""
    numbers = torch.arange(64).view(8, 8).roll((-1, -2), (0, 1))
    rolled_y, rolled_x = numbers // 8 < 1, numbers % 8 < 2
    windows = [
        (rows, cols) for rows in (slice(0, 4), slice(4, 8)) for cols in (slice(0, 4), slice(4, 8))
    ]
    parts = []
    for rows, cols in windows:
        at = numbers[rows, cols].flatten()
        side = (2 * rolled_y.int() + rolled_x.int())[rows, cols].flatten()
        # the first rows and columns appear at the far edges alone
        allowed = side[:, None] == side
        block = full[:, :, at][:, :, :, at] * allowed
        parts.append(block / block.sum(-1, keepdim=True))
    return torch.stack(parts, 1).flatten(0, 1)


def test_shifted_windows_count_true_distances_and_allowed_keys() -> None:
    """Against the same attention written on the whole map, where nothing is rolled."""
    full = attention(3, 2, 64)
    weights = shifted_by_hand(full)
    y, x = np.divmod(np.arange(64), 8)
    line = lambda a, shift: (a + 8 - shift) % 8 // 4 + 2 * (a < shift)  # noqa: E731
    part = 10 * line(y, 1) + line(x, 2)
    allowed = part[:, None] == part
    maps = full.double().numpy() * allowed
    maps /= maps.sum(-1, keepdims=True)
    d = np.hypot(y[:, None] - y, x[:, None] - x)
    distance = AttentionDistance().update(weights, SHIFTED)
    want = (maps * d).sum(-1).mean(-1)
    check(distance.compute("patches"), want)
    flat = allowed / allowed.sum(-1, keepdims=True)
    check(distance.compute("relative"), want / (flat * d).sum(-1).mean())
    logs = np.log(np.where(maps > 0, maps, 1))
    entropy = -(maps * logs).sum(-1)
    check(AttentionEntropy().update(weights, SHIFTED).compute(), entropy.mean(-1))
    check(
        AttentionEntropy().update(weights, SHIFTED).compute("relative"),
        (entropy / np.log(allowed.sum(-1))).mean(-1),
    )
    found = HeadSimilarity().update(weights, SHIFTED).compute()
    rows = lambda a, b: np.mean([cosine(p, q) for p, q in zip(a, b, strict=True)])  # noqa: E731
    check(found.per_query, over_pairs(maps, rows))
    check(found.per_query_centred, over_pairs(maps - flat, rows))
    check(found.flat, over_pairs(maps, cosine))
    check(found.flat_centred, over_pairs(maps - flat, cosine))
    kl = over_pairs(
        maps,
        lambda a, b: (a * np.log(np.where(a > 0, a, 1) / np.where(b > 0, b, 1))).sum(-1).mean(),
    )
    check(HeadDivergence().update(weights, SHIFTED).compute(), kl)


def test_uniform_attention_in_divided_windows() -> None:
    weights = shifted_by_hand(torch.full((2, 2, 64, 64), 1 / 64))
    found = AttentionDistance().update(weights, SHIFTED).compute("relative")
    np.testing.assert_allclose(found.mean, 1, rtol=1e-6)
    relative = AttentionEntropy().update(weights, SHIFTED).compute("relative")
    np.testing.assert_allclose(relative.mean, 1, rtol=1e-6)
    # the only whole window says so; a divided one would feign structure
    assert np.isnan(MeanMaps().update(weights, SHIFTED).pattern().relative).all()
    nmi = MutualInformation().update(weights, SHIFTED).compute()
    np.testing.assert_allclose(nmi.mean, 0, atol=1e-5)


def test_weights_that_a_mask_of_minus_100_lets_through_do_not_count() -> None:
    """Swin masks by -100: after a softmax, what is left of it is not zero, but next to it."""
    weights = shifted_by_hand(attention(1, 2, 64))
    leaky = (weights + 1e-30).div(1 + 16e-30)
    for kind in (AttentionDistance, HeadDivergence):
        a, b = (kind().update(w, SHIFTED).compute() for w in (weights, leaky))
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-6)


# wrong use


def test_a_single_head_is_like_no_other() -> None:
    weights = attention(2, 1, 14)
    for kind in (HeadSimilarity, HeadDivergence):
        with pytest.raises(ModelError, match=r"of a single head; expected at least two heads"):
            kind().update(weights, SMALL)


def test_weights_of_another_layout() -> None:
    with pytest.raises(ModelError, match=r"shape \(2, 3, 14, 14\); expected .* 196 patches"):
        AttentionDistance().update(attention(2, 3, 14), GRID)


@pytest.mark.parametrize("kind", ALL)
def test_nothing_seen(kind: type[Measure]) -> None:
    with pytest.raises(ModelError, match="before"):
        kind().compute()  # type: ignore[attr-defined]


def test_layouts_are_found() -> None:
    assert layout_for(197) == TokenLayout((14, 14), 1)
    assert layout_for(201, grid=(14, 14), image_size=(224, 224)) == TokenLayout((14, 14), 5, 16)
    window = Window((8, 8), (4, 4), (2, 2))
    assert layout_for(16, window=window, image_size=(32, 32)) == TokenLayout((8, 8), 0, 4, window)
    with pytest.raises(ModelError, match="make no square grid; expected a square image"):
        layout_for(14 * 10)
    with pytest.raises(ModelError, match="attends among 48 tokens; expected 1 prefix tokens"):
        layout_for(48, grid=(14, 14), prefix=1)

"""Students: their shapes, arguments and initial weights."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import images
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone
from featdistill.models.students import SIZES, build_student
from featdistill.models.weights import tensors_hash

TINY = {"width": 64, "depth": 4, "heads": 2, "patch": 8}


def tiny(**options: object) -> Backbone:
    return build_student("vit-t", **{"image_size": 32, **TINY, **options})


# --- shapes


@pytest.mark.parametrize(
    ("name", "image", "width", "grid", "prefix"),
    [
        ("vit-t", 64, 192, (4, 4), ("cls",)),
        ("vit-s", 32, 384, (2, 2), ("cls",)),
        ("swin-t", 64, 768, (2, 2), ()),
    ],
)
@torch.no_grad()
def test_small_students(
    name: str, image: int, width: int, grid: tuple[int, int], prefix: tuple[str, ...]
) -> None:
    student = build_student(name, image_size=image).eval()
    got = student(images(1, image))
    assert got.map.shape == (1, width, *grid)
    assert got.prefix.shape == (1, len(prefix), width)
    assert (student.width, student.grid, student.prefix_names) == (width, grid, prefix)
    assert got.logits is None
    assert torch.isfinite(got.map).all()


def on_meta(name: str, image_size: int) -> Backbone:
    with torch.device("meta"):
        return build_student(name, image_size=image_size)


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "patch"),
    [("vit-b", 768, 12, 12, 16), ("vit-l", 1024, 24, 16, 14)],
)
def test_large_vits(name: str, width: int, depth: int, heads: int, patch: int) -> None:
    student = on_meta(name, 224)
    n = 224 // patch
    assert isinstance(student.model, Beit)
    assert student.grid == (n, n)
    assert student.build.arguments == {
        "img_size": 224,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "init_values": 0.1,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
        "num_classes": 0,
        "global_pool": "token",
    }
    layer = 4 * width + 12 * width**2 + (2 + 1 + 4 + 1) * width + 2 * width  # no key bias
    table = ((2 * n - 1) ** 2 + 3) * heads
    patches, cls, norm = (3 * patch**2 + 1) * width, width, 2 * width
    assert student.parameters_count == depth * layer + table + patches + cls + norm


def test_vit_b_has_86_million_weights() -> None:
    assert round(on_meta("vit-b", 224).parameters_count / 1e6, 1) == 85.7


def test_swin_b() -> None:
    student = on_meta("swin-b", 224)
    assert isinstance(student.model, SwinTransformerV2)
    assert (student.width, student.grid) == (1024, (7, 7))
    arguments = student.build.arguments
    assert arguments["depths"] == (2, 2, 18, 2)
    assert arguments["num_heads"] == (4, 8, 16, 32)
    assert (arguments["embed_dim"], arguments["patch_size"]) == (128, 4)
    assert arguments["window_size"] == 14
    assert round(student.parameters_count / 1e6, 1) == 86.9


def test_swin_window_is_no_larger_than_the_map() -> None:
    assert on_meta("swin-b", 32).build.arguments["window_size"] == 8


def test_every_short_name_is_tested_here() -> None:
    assert set(SIZES) == {
        "vit-t",
        "vit-s",
        "vit-b",
        "vit-l",
        "swin-t",
        "swin-s",
        "swin-b",
        "swin-g",
    }
    assert on_meta("swin-s", 224).build.arguments["depths"] == (2, 2, 18, 2)


def test_swin_g_has_three_billion_weights_and_extra_norms() -> None:
    student = on_meta("swin-g", 224)
    assert round(student.parameters_count / 1e9, 2) == 3.0
    norms = [n for n in student.model.state_dict() if n.endswith("enorm.weight")]
    assert len(norms) == 42 // 6


def test_sizes_instead_of_the_named_ones() -> None:
    student = tiny()
    assert (student.width, student.patch, len(student.model.blocks)) == (64, 8, 4)
    assert student.model.blocks[0].attn.num_heads == 2
    heads = build_student("vit-b", image_size=32, width=192, depth=1).model.blocks[0].attn.num_heads
    assert heads == 3  # 64 channels a head


@torch.no_grad()
def test_any_timm_model_as_student() -> None:
    student = build_student("timm/vit_tiny_patch16_224", image_size=32).eval()
    assert (student.grid, student.num_classes) == ((2, 2), 0)


def test_student_without_a_fixed_size_is_made_for_the_size_asked() -> None:
    student = build_student("timm/resnet18", image_size=64)
    assert student.image_size == (64, 64)
    assert student.grid == (2, 2)


# --- position


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (None, {"rel_pos_bias.relative_position_bias_table"}),
        ("shared-rpb", {"rel_pos_bias.relative_position_bias_table"}),
        ("rpb", {f"blocks.{i}.attn.relative_position_bias_table" for i in range(4)}),
        ("ape", {"pos_embed"}),
        ("none", set()),
    ],
)
def test_position_options(position: str | None, expected: set[str]) -> None:
    parameters = dict(tiny(position=position).model.named_parameters())
    positional = {k for k in parameters if "position" in k or "pos_" in k}
    assert positional == expected
    for name in positional:
        shape = (1, 17, 64) if name == "pos_embed" else (7 * 7 + 3, 2)
        assert parameters[name].shape == shape


@pytest.mark.parametrize("position", ["shared-rpb", "rpb"])
def test_relative_bias_starts_at_zero(position: str) -> None:
    tables = [p for n, p in tiny(position=position).model.named_parameters() if "table" in n]
    assert tables
    assert all(not t.any() for t in tables)


@torch.no_grad()
def test_without_positions_a_student_cannot_tell_patches_apart() -> None:
    blind = tiny(position="none").eval()
    x = images(1, 32)
    mirrored = x.unflatten(3, (4, 8)).flip(3).flatten(3)  # columns of patches in reverse
    torch.testing.assert_close(blind(mirrored).map, blind(x).map.flip(3), rtol=1e-4, atol=1e-4)
    seeing = tiny(position="ape").eval()
    assert not torch.allclose(seeing(mirrored).map, seeing(x).map.flip(3), atol=1e-3)


# --- initial weights


def test_init_is_a_pure_function_of_the_seed() -> None:
    def states() -> tuple[object, ...]:
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )

    torch.manual_seed(1)
    before = states()
    first = tensors_hash(tiny(seed=5))
    assert states() == before
    torch.rand(3)
    assert tensors_hash(tiny(seed=5)) == first
    assert tensors_hash(tiny(seed=5, drop_path=0.2)) == first
    assert tensors_hash(tiny(seed=6)) != first


# a standard normal cut at one std has this std
CUT = 0.5396


def test_vit_b_init_is_the_official_one() -> None:
    model = build_student("vit-b", image_size=32, depth=4).model
    for number, block in enumerate(model.requires_grad_(False).blocks, start=1):
        for weight in (block.attn.qkv.weight, block.mlp.fc1.weight):
            assert float(weight.std()) == pytest.approx(0.02 * CUT, rel=0.01)
            assert float(weight.abs().max()) <= 0.02
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            scale = (2 * number) ** -0.5
            assert float(weight.std()) == pytest.approx(0.02 * CUT * scale, rel=0.01)
            assert float(weight.abs().max()) <= 0.02 * scale * (1 + 1e-6)
        for bias in (block.attn.q_bias, block.attn.v_bias, block.attn.proj.bias):
            assert not bias.any()
        for bias in (block.mlp.fc1.bias, block.mlp.fc2.bias):
            assert not bias.any()
        for gamma in (block.gamma_1, block.gamma_2):
            assert torch.equal(gamma, torch.full((768,), 0.1))
        assert block.attn.qkv.bias is None
        assert not block.attn.k_bias.any()
        assert "k_bias" not in dict(block.attn.named_parameters())
    assert float(model.cls_token.std()) == pytest.approx(0.02 * CUT, rel=0.1)


def test_narrow_vit_starts_with_a_larger_std() -> None:
    weight = build_student("vit-t", image_size=32, depth=1).model.blocks[0].attn.qkv.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02 * (768 / 192) ** 0.5 * CUT, rel=0.02)


def test_swin_residual_norms_start_at_1e_5() -> None:
    model = build_student("swin-t", image_size=32, patch=2).model
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert len(blocks) == 12
    for block in blocks:
        for norm in (block.norm1, block.norm2):
            assert torch.equal(norm.weight, torch.full_like(norm.weight, 1e-5))
            assert torch.equal(norm.bias, torch.full_like(norm.bias, 1e-5))
    assert torch.equal(model.norm.weight, torch.ones(768))


# --- what does not go together


@given(image=st.integers(1, 600), patch=st.integers(2, 64))
@settings(deadline=None, max_examples=30)
def test_patch_that_does_not_divide_says_which_sizes_do(image: int, patch: int) -> None:
    if image % patch == 0:
        return
    with pytest.raises(ModelError) as caught:
        build_student("vit-b", image_size=image, patch=patch)
    line = str(caught.value)
    low = image - image % patch
    offered = line.partition("--image-size ")[2].partition(",")[0].split(" or ")
    assert [int(n) for n in offered] == [n for n in (low, low + patch) if n]
    assert f"{patch} pixels" in line
    assert str(image) in line


@pytest.mark.parametrize(("image", "offered"), [(230, "224 or 256"), (20, "32")])
def test_image_that_a_swin_cannot_halve(image: int, offered: str) -> None:
    with pytest.raises(ModelError, match=f"--image-size {offered}$"):
        build_student("swin-t", image_size=image)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("swin-t", {"position": "ape"}, ["position", "own continuous position bias"]),
        ("swin-t", {"width": 96}, ["width"]),
        ("vit-t", {"window": 7}, ["window"]),
        ("timm/resnet18", {"patch": 8}, ["patch"]),
        ("timm/resnet18", {"position": "rpb", "depth": 3}, ["position", "depth"]),
        ("vit-t", {"width": 100, "heads": 3}, ["3 heads", "100"]),
        ("vit-x", {}, ["no student called 'vit-x'", "'vit-t'"]),
        ("timm/resnet17", {}, ["'timm/resnet18'"]),
    ],
)
def test_options_that_a_student_does_not_take(
    name: str, options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        build_student(name, image_size=64, **options)
    assert all(word in str(caught.value) for word in words)


def test_drop_path_that_a_model_does_not_have_is_not_ignored() -> None:
    with pytest.raises(ModelError, match="no drop path"):
        build_student("timm/ghostnet_050", image_size=64, drop_path=0.1)

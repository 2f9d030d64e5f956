"""Attention weights: of every family, fused or not, without touching what the model says."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.diagnostics.capture import CapturedAttention, Window, capture_attention

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}


class Own(nn.Module):
    """A user's module: SDPA on q, k and v made by hand, with a bias and a scale."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.embed = nn.Conv2d(3, 32, 16, 16)
        self.qkv = nn.Linear(32, 96)
        self.bias = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None], scale=0.5)
        else:
            out = ((0.5 * q @ k.mT + self.bias).softmax(-1)) @ v
        return out.transpose(1, 2).flatten(2)


def timm_model(name: str, **options: Any) -> Callable[[bool], nn.Module]:
    def make(fused: bool) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, **options)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return model

    return make


def torchvision_vit(fused: bool) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(fused)
    return VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
    )


def torchvision_swin(fused: bool) -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    return SwinTransformer([4, 4], embed_dim=16, depths=[2], num_heads=[2], window_size=[8, 8])


def hugging_face_vit(fused: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        attn_implementation="sdpa" if fused else "eager",
    )
    return transformers.ViTModel(config)


def own(fused: bool) -> nn.Module:
    torch.manual_seed(0)
    return Own(fused)


@dataclass(frozen=True)
class Family:
    """How to make it, and what there is to see: layers, heads, tokens of a window."""

    make: Callable[[bool], nn.Module]
    layers: int = 2
    heads: int = 2
    tokens: int = 17


SWIN = {"img_size": 64, "window_size": 8, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
FAMILIES = {
    "vit": Family(timm_model("vit_tiny_patch16_224", img_size=64, **SMALL)),
    "deit": Family(timm_model("deit_tiny_distilled_patch16_224", img_size=64, **SMALL), tokens=18),
    "beit": Family(timm_model("beit_base_patch16_224", img_size=64, init_values=0.1, **SMALL)),
    "student": Family(
        timm_model(
            "beit_base_patch16_224",
            img_size=64,
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
            **SMALL,
        )
    ),
    "eva": Family(timm_model("eva02_tiny_patch14_224", img_size=56, **SMALL)),
    "dinov2-registers": Family(
        timm_model("vit_small_patch14_reg4_dinov2", img_size=56, **SMALL), tokens=21
    ),
    "clip": Family(timm_model("vit_base_patch16_clip_224", img_size=64, **SMALL)),
    "swin": Family(timm_model("swin_tiny_patch4_window7_224", **SWIN), tokens=64),
    "swin-v2": Family(timm_model("swinv2_tiny_window8_256", **SWIN), tokens=64),
    "torchvision-vit": Family(torchvision_vit),
    "torchvision-swin": Family(torchvision_swin, tokens=64),
    "hugging-face-vit": Family(hugging_face_vit),
    "own": Family(own, layers=1, tokens=16),
}
SIDES = {"eva": 56, "dinov2-registers": 56}


@pytest.fixture(autouse=True)
def _fast_path() -> Any:
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def images_for(name: str, count: int = 2) -> Tensor:
    side = SIDES.get(name, 64)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, side, side, generator=generator)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


def stirred(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def captured(model: nn.Module, images: Tensor) -> tuple[list[CapturedAttention], Tensor]:
    seen: list[CapturedAttention] = []
    with capture_attention(model, seen.append):
        output = first(model(images))
    return seen, output


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_fused_and_unfused_weights_are_equal(name: str) -> None:
    family, images = FAMILIES[name], images_for(name)
    fused = stirred(family.make(True))
    want = first(fused(images))
    seen, output = captured(fused, images)
    assert torch.equal(output, want)  # bit for bit
    assert [s.weights.shape[1:] for s in seen] == [
        (family.heads, family.tokens, family.tokens)
    ] * family.layers
    assert len({s.layer for s in seen}) == family.layers
    assert all(s.images == 2 for s in seen)
    plain, _ = captured(stirred(family.make(False)), images)
    for one, other in zip(seen, plain, strict=True):
        assert one.layer == other.layer
        assert one.weights.dtype == torch.float32
        torch.testing.assert_close(one.weights, other.weights, atol=1e-5, rtol=0)
    assert max(float(s.weights.max()) for s in seen) > 2 / family.tokens  # not uniform


def test_weights_make_the_output() -> None:
    """The weights are the model's own: with them, its output comes out."""
    model, images = stirred(own(True)), images_for("own")
    seen, output = captured(model, images)
    tokens = model.embed(images).flatten(2).transpose(1, 2)  # type: ignore[operator]
    v = model.qkv(tokens).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)[2]  # type: ignore[operator]
    torch.testing.assert_close((seen[0].weights @ v).transpose(1, 2).flatten(2), output)


@pytest.mark.parametrize("name", ["swin", "swin-v2", "torchvision-swin"])
def test_windows_are_known(name: str) -> None:
    seen, _ = captured(FAMILIES[name].make(True).eval(), images_for(name))
    assert [s.window for s in seen] == [
        Window((16, 16), (8, 8), (0, 0)),
        Window((16, 16), (8, 8), (4, 4)),
    ]
    assert all(len(s.weights) == 2 * 4 for s in seen)


def test_names_are_the_modules() -> None:
    for name, want in {
        "vit": "blocks.0.attn",
        "swin": "layers.0.blocks.0.attn",
        "torchvision-vit": "encoder.layers.encoder_layer_0.self_attention",
        "own": "",
    }.items():
        seen, _ = captured(FAMILIES[name].make(True).eval(), images_for(name))
        assert seen[0].layer == want


@torch.no_grad()
def test_methods_and_several_passes_keep_their_names() -> None:
    model = FAMILIES["vit"].make(True).eval()
    layers: list[str] = []
    with capture_attention(model, lambda seen: layers.append(seen.layer)):
        for _ in range(2):
            model.forward_features(images_for("vit"))  # type: ignore[operator]
        model(images_for("vit"))
    assert layers == ["blocks.0.attn", "blocks.1.attn"] * 3


@torch.no_grad()
def test_a_second_call_in_a_pass_has_a_name_of_its_own() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.scaled_dot_product_attention(x, x, x)
            return F.scaled_dot_product_attention(x, x, x)

    model, layers = nn.Sequential(Twice()), []
    with capture_attention(model, lambda seen: layers.append(seen.layer)):
        for _ in range(2):
            model(torch.randn(1, 2, 4, 8))
    assert layers == ["0", "0#2"] * 2


def test_nothing_is_kept() -> None:
    """When a layer is handed over, the one before it is gone."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def sink(seen: CapturedAttention) -> None:
        gc.collect()
        assert all(ref() is None for ref in alive)
        alive.append(weakref.ref(seen.weights))

    model = FAMILIES["vit"].make(True).eval()
    with torch.no_grad(), capture_attention(model, sink):
        model(images_for("vit"))
    assert len(alive) == 2


@pytest.mark.parametrize("change", [{"depth": 6}, {"passes": 5}])
def test_memory_grows_neither_with_depth_nor_with_images(change: dict[str, int]) -> None:
    """With all measures on: what is alive of a layer's maps when it has been measured."""
    small = {"depth": 2, "passes": 1}
    assert _largest_alive(**small) == _largest_alive(**{**small, **change})


@torch.no_grad()
def _largest_alive(*, depth: int, passes: int) -> int:
    """Most bytes of tensors with a map for each of 5 images, whenever a layer was measured."""
    from featdistill.diagnostics.attention_model import ModelAttention, Tokens

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, **{**SMALL, "depth": depth})
    attention, alive = ModelAttention(Tokens((4, 4), 1)), [0]

    def sink(seen: CapturedAttention) -> None:
        attention(seen)
        maps = [
            t
            for t in gc.get_objects()
            if type(t) is Tensor and t.ndim == 4 and len(t) == 5 and {*t.shape[1:]} & {16, 17}
        ]
        alive.append(sum({t.untyped_storage().data_ptr(): t.nbytes for t in maps}.values()))

    with capture_attention(model.eval(), sink):
        for _ in range(passes):
            model(images_for("vit", 5))
    assert len(alive) == 1 + depth * passes
    assert max(alive) >= 5 * 2 * 17 * 17 * 4  # the layer's own weights, at least
    return max(alive)


def test_training_is_not_disturbed() -> None:
    """Dropout, its generator, and gradients are those of a pass that nobody watched."""
    for name in ("vit", "torchvision-vit"):
        model = FAMILIES[name].make(True).train()
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.5
            if hasattr(module, "attn_drop"):
                module.attn_drop.p = 0.5
        outcomes = []
        for watched in (False, True):
            torch.manual_seed(3)
            model.zero_grad()
            seen: list[CapturedAttention] = []
            if watched:
                with capture_attention(model, seen.append):
                    output = model(images_for(name))
            else:
                output = model(images_for(name))
            output.square().sum().backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            outcomes.append([output.detach(), *gradients])
        assert all(map(torch.equal, *outcomes))
        rows = torch.cat([s.weights.sum(-1).flatten() for s in seen])
        torch.testing.assert_close(rows, torch.ones_like(rows))  # no weight was dropped


def test_masks_causality_and_shared_keys() -> None:
    """Every option of SDPA, against its own output for one-hot values."""
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    full, eye = k.repeat_interleave(2, 1), torch.eye(6).expand(2, 4, 6, 6)
    mask = torch.rand(6, 6) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    options: list[dict[str, Any]] = [
        {"is_causal": True},
        {"attn_mask": mask},
        {"attn_mask": torch.randn(4, 6, 6), "scale": 0.1},
        {"enable_gqa": True},
    ]
    for option in options:
        shared = "enable_gqa" in option
        value = torch.eye(6).expand(2, 2, 6, 6) if shared else eye
        seen: list[CapturedAttention] = []
        with capture_attention(nn.Identity(), seen.append):
            out = F.scaled_dot_product_attention(q, k if shared else full, value, **option)
        torch.testing.assert_close(seen[0].weights, out)


def test_half_precision_weights_come_as_float32() -> None:
    model = stirred(FAMILIES["swin"].make(True)).bfloat16()
    seen, _ = captured(model, images_for("swin").bfloat16())
    assert all(s.weights.dtype == torch.float32 for s in seen)
    exact, _ = captured(stirred(FAMILIES["swin"].make(True)), images_for("swin"))
    torch.testing.assert_close(seen[0].weights, exact[0].weights, atol=0.05, rtol=0)


def test_pooling_heads_are_left_out() -> None:
    make = timm_model("vit_base_patch16_siglip_224", img_size=64, **SMALL)
    seen, _ = captured(make(True).eval(), images_for("vit"))
    assert [s.layer for s in seen] == ["blocks.0.attn", "blocks.1.attn"]


def test_a_cnn_has_no_attention() -> None:
    model = timm.create_model("resnet18").eval()
    with pytest.raises(ModelError, match="no attention was seen in ResNet; expected"):
        captured(model, images_for("vit"))


def test_nothing_ran() -> None:
    nothing = pytest.raises(ModelError, match="no attention was seen in Identity")
    with nothing, capture_attention(nn.Identity(), print):
        pass


def test_weights_that_are_no_numbers() -> None:
    model = FAMILIES["vit"].make(True).eval()
    model.blocks[1].attn.qkv.weight.data.fill_(torch.nan)  # type: ignore[index, union-attr]
    with pytest.raises(ModelError, match=r"'blocks.1.attn' do not sum to 1"):
        captured(model, images_for("vit"))


def test_an_error_in_the_model_is_its_own() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("mine")

    model = nn.Sequential(Broken())
    with pytest.raises(ValueError, match="mine"), capture_attention(model, print):
        model(torch.zeros(1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

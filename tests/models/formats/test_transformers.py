"""Files that the transformers library itself saves, against its own models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone
from featdistill.models.checkpoints import load as loading
from featdistill.models.checkpoints import recognised
from featdistill.models.export import export
from featdistill.models.load import load_backbone
from tests.models.formats.test_strictness import CHANGES

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZE = 32
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # not the 64 channels a head that tensors would suggest
    "image_size": SIZE,
    "patch_size": 8,
}
MLP = {**VIT, "intermediate_size": 48}
SWIN = {
    "image_size": SIZE,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def make(kind: str, config: str, **arguments: Any) -> nn.Module:
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**arguments)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


Case = tuple[str, str, dict[str, Any]]
PLAIN: dict[str, Case] = {
    "vit": ("ViTModel", "ViTConfig", MLP),
    "vit-other-facts": (
        "ViTModel",
        "ViTConfig",
        {**MLP, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-2, "qkv_bias": False},
    ),
    "mae": ("ViTMAEModel", "ViTMAEConfig", {**MLP, "mask_ratio": 0.0}),
    "deit": ("DeiTModel", "DeiTConfig", MLP),
    "dinov2": ("Dinov2Model", "Dinov2Config", VIT),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", {**VIT, "use_swiglu_ffn": True}),
    "dinov2-registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", VIT),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**MLP, "num_register_tokens": 2}),
    "dinov3-gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**MLP, "num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "beit-shared": (
        "BeitModel",
        "BeitConfig",
        {**MLP, "use_shared_relative_position_bias": True, "use_mask_token": True},
    ),
    "beit-own": (
        "BeitModel",
        "BeitConfig",
        {**MLP, "use_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "beit-bare": (
        "BeitModel",
        "BeitConfig",
        {**MLP, "use_mean_pooling": False, "layer_scale_init_value": 0.0},
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", MLP),
    "clip-gelu": ("CLIPVisionModel", "CLIPVisionConfig", {**MLP, "hidden_act": "gelu"}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", MLP),
    "swin": ("SwinModel", "SwinConfig", SWIN),
    "swinv2": ("Swinv2Model", "Swinv2Config", SWIN),
    "swinv2-pretrained-window": (
        "Swinv2Model",
        "Swinv2Config",
        {**SWIN, "pretrained_window_sizes": [3, 2]},
    ),
}
# their `last_hidden_state` comes before the norm that ours has behind it
LATE_NORM = {
    "clip": "post_layernorm",
    "clip-gelu": "post_layernorm",
    "beit-shared": "pooler.layernorm",
}
# their pooler is a layer of its own, which is left out
OTHER_POOLER = ("vit", "vit-other-facts", "deit")
HEADS: dict[str, Case] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**MLP, "num_labels": 3}),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**MLP, "num_labels": 3}),
    "beit": (
        "BeitForImageClassification",
        "BeitConfig",
        {**MLP, "use_relative_position_bias": True, "num_labels": 3},
    ),
    "swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, "num_labels": 3}),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", {**SWIN, "num_labels": 3}),
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[nn.Module], Path]:
    def save(model: nn.Module) -> Path:
        model.save_pretrained(tmp_path)  # type: ignore[operator]
        return tmp_path

    return save


def images(size: int = SIZE) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))


def tokens(backbone: Backbone, x: Tensor) -> Tensor:
    seen = backbone(x)
    return torch.cat([seen.prefix, seen.map.flatten(2).transpose(1, 2)], 1)


def theirs(model: nn.Module, name: str, backbone: Backbone, x: Tensor) -> Any:
    options = {}
    if name == "mae":  # keeps the tokens in their order
        options["noise"] = torch.arange((x.shape[-1] // 8) ** 2).float().expand(len(x), -1)
    return model(pixel_values=(x - backbone.mean) / backbone.std, **options)


def normed(model: nn.Module, name: str, hidden: Tensor) -> Tensor:
    if name not in LATE_NORM:
        return hidden
    inner = getattr(model, "vision_model", model)  # version 5 has no such layer
    return inner.get_submodule(LATE_NORM[name])(hidden)


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_every_token(name: str, saved: Callable[[nn.Module], Path]) -> None:
    kind, config, arguments = PLAIN[name]
    model = make(kind, config, **arguments)
    backbone = load_backbone(str(saved(model)))
    seen = theirs(model, name, backbone, images())
    right = normed(model, name, seen.last_hidden_state)
    torch.testing.assert_close(tokens(backbone, images()), right, atol=1e-4, rtol=1e-4)
    pooled = getattr(seen, "pooler_output", None)
    if pooled is not None and name not in OTHER_POOLER:
        torch.testing.assert_close(backbone(images()).pooled, pooled, atol=1e-4, rtol=1e-4)


def check_every_change(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, some: int | None
) -> None:
    """Whatever happens to a tensor is an error that names it; of numbered ones, to `some`."""
    path = folder / "model.safetensors"
    tree = recognised.read_tree(path)
    left_out = loading.load_checkpoint(path).report.left_out
    gone = {name for names in left_out.values() for name in names}
    single = [key for key in tree if key not in gone and not any(c.isdigit() for c in key)]
    many = [key for key in tree if key not in gone and key not in single]
    chosen = np.random.RandomState(0).permutation(len(many))[:some]
    for key in [*single, *(many[i] for i in chosen)]:
        for how, change in CHANGES.items():
            changed = dict(tree)
            change(changed, key)
            monkeypatch.setattr(recognised, "read_tree", lambda _, changed=changed: changed)
            with pytest.raises(ModelError) as caught:
                loading.load_checkpoint(path)
            assert key in str(caught.value), (key, how)


@pytest.mark.parametrize("name", PLAIN)
def test_some_changes(
    name: str, saved: Callable[[nn.Module], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, config, arguments = PLAIN[name]
    check_every_change(name, saved(make(kind, config, **arguments)), monkeypatch, some=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_every_change(
    name: str, saved: Callable[[nn.Module], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, config, arguments = PLAIN[name]
    check_every_change(name, saved(make(kind, config, **arguments)), monkeypatch, some=None)


def test_a_config_of_more_layers_than_the_tensors_have(saved: Callable[[nn.Module], Path]) -> None:
    folder = saved(make(*PLAIN["vit"][:2], **MLP))
    tensors = load_file(folder / "model.safetensors")
    kept = {n: v for n, v in tensors.items() if ".layer.1." not in n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"num_hidden_layers 2 .* for 1 layers"):
        load_backbone(str(folder))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov3", "clip", "siglip"])
def test_at_another_size(name: str, saved: Callable[[nn.Module], Path]) -> None:
    """The library's own interpolation differs from family to family, so it gets our positions."""
    kind, config, arguments = PLAIN[name]
    folder = saved(make(kind, config, **arguments))
    backbone = load_backbone(str(folder), image_size=48)
    model = make(kind, config, **{**arguments, "image_size": 48})
    wanted = model.state_dict()
    state = getattr(transformers, kind).from_pretrained(folder).state_dict()
    for key in wanted:
        if state[key].shape != wanted[key].shape and "position" in key:
            state[key] = backbone.model.pos_embed.reshape(wanted[key].shape)
        elif "position_ids" in key:
            state[key] = wanted[key]
    model.load_state_dict(state)
    right = normed(model, name, theirs(model, name, backbone, images(48)).last_hidden_state)
    torch.testing.assert_close(tokens(backbone, images(48)), right, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 34])  # windows that fill the maps, and that do not
@pytest.mark.parametrize("name", ["swin", "swinv2", "swinv2-pretrained-window"])
def test_swins_at_another_size(
    name: str, size: int, saved: Callable[[nn.Module], Path], tmp_path: Path
) -> None:
    """The library pads before it shifts, as the original Swins do and timm does not."""
    kind, config, arguments = PLAIN[name]
    model = make(kind, config, **arguments)
    backbone = load_backbone(str(saved(model)), image_size=size)
    right = theirs(model, name, backbone, images(size)).last_hidden_state
    torch.testing.assert_close(tokens(backbone, images(size)), right, atol=1e-4, rtol=1e-4)
    if size == 34:
        assert backbone.build is not None
        assert backbone.build.arguments["pad_first"]
        copied = copy.deepcopy(backbone)
        copied.model.patch_embed.proj.bias.zero_()
        assert not torch.allclose(copied(images(size)).map, backbone(images(size)).map)
        with pytest.raises(ModelError, match="no argument for pad_first"):
            export(backbone, tmp_path / "timm", to="timm")
        export(backbone, tmp_path / "plain", to="plain")
        again = load_backbone(str(tmp_path / "plain"))
        assert torch.equal(again(images(size)).map, backbone(images(size)).map)


def test_dinov2_with_registers_interpolates_as_we_do(saved: Callable[[nn.Module], Path]) -> None:
    model = make(*PLAIN["dinov2-registers"][:2], **VIT)
    backbone = load_backbone(str(saved(model)), image_size=48)
    with torch.no_grad():
        right = theirs(model, "", backbone, images(48)).last_hidden_state
        torch.testing.assert_close(tokens(backbone, images(48)), right, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_logits_and_class_names(name: str, saved: Callable[[nn.Module], Path]) -> None:
    kind, config, arguments = HEADS[name]
    names = {0: "cat", 1: "dog", 2: "hen"}
    model = make(kind, config, **{**arguments, "id2label": names})
    backbone = load_backbone(str(saved(model)))
    right = theirs(model, name, backbone, images()).logits
    torch.testing.assert_close(backbone(images()).logits, right, atol=1e-4, rtol=1e-4)
    assert backbone.class_names == ("cat", "dog", "hen")


@torch.no_grad()
@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_image_tower_of_a_language_model(family: str, saved: Callable[[nn.Module], Path]) -> None:
    more = {"projection_dim": 24} if family == "CLIP" else {}
    model = make(f"{family}Model", f"{family}Config", vision_config=MLP, text_config=TEXT, **more)
    backbone = load_backbone(str(saved(model)))
    pixels = (images() - backbone.mean) / backbone.std
    right: Any = model.get_image_features(pixel_values=pixels)  # type: ignore[operator]
    right = getattr(right, "pooler_output", right)
    torch.testing.assert_close(backbone(images()).pooled, right, atol=1e-4, rtol=1e-4)
    assert backbone.num_classes == 0
    assert backbone.projection == (family == "CLIP")
    assert any("the text tower" in line for line in backbone.origin.loading)


def test_decoder_and_heads_are_left_out_and_said(saved: Callable[[nn.Module], Path]) -> None:
    decoder = {
        "decoder_num_hidden_layers": 1,
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    }
    model = make("ViTMAEForPreTraining", "ViTMAEConfig", **MLP, **decoder)
    backbone = load_backbone(str(saved(model)))
    assert backbone.origin.report is not None
    assert sum(map(len, backbone.origin.report.left_out.values())) == 24
    assert any("the decoder of the pre-training" in line for line in backbone.origin.loading)


def test_pixels_come_from_the_processor_or_are_assumed(saved: Callable[[nn.Module], Path]) -> None:
    folder = saved(make(*PLAIN["vit"][:2], **MLP))
    without = load_backbone(str(folder))
    assert without.rgb == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert any("normalisation" in line for line in without.origin.loading)
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    backbone = load_backbone(str(folder))
    assert backbone.rgb[0] == pytest.approx((0.1, 0.2, 0.3))
    assert backbone.rgb[1] == pytest.approx((0.4, 0.5, 0.6))
    assert not any("normalisation" in line for line in backbone.origin.loading)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert load_backbone(str(folder)).rgb == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@torch.no_grad()
def test_pytorch_bin_of_an_older_version(saved: Callable[[nn.Module], Path]) -> None:
    """Older files are pickles, and have the counted positions among their tensors."""
    from safetensors.torch import load_file

    folder = saved(make(*PLAIN["clip"][:2], **MLP))
    before = load_backbone(str(folder))
    bare = load_file(folder / "model.safetensors")
    tensors = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in bare.items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    again = load_backbone(str(folder / "pytorch_model.bin"))
    assert torch.equal(tokens(again, images()), tokens(before, images()))


def test_unknown_model_type(saved: Callable[[nn.Module], Path]) -> None:
    folder = saved(make(*PLAIN["vit"][:2], **MLP))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "dinov"}))
    with pytest.raises(ModelError, match="model_type 'dinov', which is not known here") as error:
        load_backbone(str(folder))
    assert "\n" not in str(error.value)
    assert "did you mean 'dinov2'" in str(error.value)


def test_without_config(saved: Callable[[nn.Module], Path]) -> None:
    folder = saved(make(*PLAIN["vit"][:2], **MLP))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"without its config\.json"):
        load_backbone(str(folder / "model.safetensors"))


def test_config_of_another_model(saved: Callable[[nn.Module], Path]) -> None:
    folder = saved(make(*PLAIN["vit"][:2], **MLP))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "beit"}))
    with pytest.raises(ModelError, match=r"encoder.layer.0.attention.attention.key.bias"):
        load_backbone(str(folder))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", {"hidden_act": "mish"}, "hidden_act 'mish'"),
        ("swin", {"hidden_act": "relu"}, "GELU and nothing else"),
        ("swin", {"image_size": [32, 64]}, "a square"),
    ],
)
def test_what_timm_has_not(
    name: str, change: dict[str, Any], message: str, saved: Callable[[nn.Module], Path]
) -> None:
    kind, config, arguments = PLAIN[name]
    folder = saved(make(kind, config, **arguments))
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, **change}))
    with pytest.raises(ModelError, match=message):
        load_backbone(str(folder))


def test_weights_in_several_files(saved: Callable[[nn.Module], Path]) -> None:
    folder = saved(make(*PLAIN["vit"][:2], **MLP))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="spread over several files"):
        load_backbone(str(folder))


BROKEN: list[tuple[str, str, Any]] = [
    ("vit", "num_attention_heads", "two"),
    ("vit", "num_attention_heads", 0),
    ("vit", "num_attention_heads", None),
    ("vit", "layer_norm_eps", "x"),
    ("beit-shared", "image_size", None),
    ("beit-shared", "image_size", []),
    ("dinov3", "num_attention_heads", "two"),
    ("dinov3", "rope_theta", "x"),
    ("dinov3", "num_attention_heads", 5),
    ("dinov3", "num_attention_heads", 64),
    ("swinv2", "num_heads", 3),
    ("swinv2", "num_heads", [1]),
    ("swinv2", "num_heads", [1, "x"]),
    ("swinv2", "depths", None),
    ("swinv2", "window_size", "x"),
    ("swinv2", "pretrained_window_sizes", 2),
]


@pytest.mark.parametrize(("name", "key", "value"), BROKEN)
def test_a_broken_config_is_named(
    name: str, key: str, value: Any, saved: Callable[[nn.Module], Path]
) -> None:
    kind, config, arguments = PLAIN[name]
    folder = saved(make(kind, config, **arguments))
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {key: value}))
    with pytest.raises(ModelError, match=rf"{key}.*in its config\.json"):
        load_backbone(str(folder))


def test_class_names_without_numbers_are_none(saved: Callable[[nn.Module], Path]) -> None:
    kind, config, arguments = HEADS["vit"]
    folder = saved(make(kind, config, **arguments))
    told = json.loads((folder / "config.json").read_text())
    told["id2label"] = {f"x{key}": name for key, name in told["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(told))
    assert load_backbone(str(folder)).class_names is None

"""Checkpoint files beside the name of their architecture; parts of files; facts beside files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from featdistill.core.errors import ModelError
from featdistill.models import catalogue
from featdistill.models.checkpoints.families import swin_v2
from featdistill.models.checkpoints.formats import FORMATS
from featdistill.models.checkpoints.load import load_checkpoint
from featdistill.models.checkpoints.swins import SWIN_V2
from featdistill.models.checkpoints.tables import convert, revert
from featdistill.models.checkpoints.unwrap import Unwrapped
from featdistill.models.load import NORMALISATIONS, load_backbone
from featdistill.models.timm_models import create
from tests.models.formats.parity import CASES, Case, images, shapes_hash


@pytest.fixture
def dino_full(tmp_path: Path) -> Path:
    return Case.read("dino-full").write(tmp_path)


def test_the_report_counts_every_tensor(dino_full: Path) -> None:
    origin = load_backbone(str(dino_full)).origin
    assert origin.report is not None
    assert origin.report.path == "teacher/backbone."
    text = "\n".join(origin.loading)
    left = sum(map(len, origin.report.left_out.values()))
    total = len(Case.read("dino-full").tree()["teacher"])
    counts = f"loaded {total - left} of {total} tensors, renamed 0, resized 0, left out {left}"
    assert f"{counts} (head.*)\n" in text
    assert "the projection head of the pre-training (head.*)" in text
    assert "normalisation" in text
    resized = load_backbone(str(dino_full), image_size=96).origin
    assert "resized 1" in "\n".join(resized.loading)


def test_the_report_does_not_say_blocks_where_it_means_a_part_of_each(tmp_path: Path) -> None:
    origin = load_backbone(str(Case.read("beit-finetuned").write(tmp_path))).origin
    assert "left out 3 (blocks.*.attn.relative_position_index)" in origin.loading[1]
    origin = load_backbone(str(Case.read("mae-pretrain").write(tmp_path))).origin
    assert "decoder_blocks.*, " in origin.loading[1]


def test_a_normalisation_that_is_given_is_not_assumed(dino_full: Path) -> None:
    backbone = load_backbone(str(dino_full), normalisation="half")
    assert backbone.rgb == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert "normalisation" not in "\n".join(backbone.origin.loading)


def test_normalisations_by_name_are_the_catalogues() -> None:
    for entry in catalogue.teachers():
        if entry.mean_std:
            assert NORMALISATIONS[entry.mean_std] == (entry.mean, entry.std)


def test_what_files_of_one_format_may_differ_in_is_assumed(tmp_path: Path) -> None:
    """DINOv3 has models of satellite images; BEiT v2 sees ImageNet's normalisation, BEiT 0.5."""
    dinov3 = Case.read("dinov3").write(tmp_path)
    assert "the normalisation" in "\n".join(load_backbone(str(dinov3)).origin.loading)
    tree = Case.read("beit-pretrain").tree()
    tree["model"] |= {f"cls_pt_layers.0.{n}": torch.ones(1) for n in ("norm1.weight", "gamma_1")}
    torch.save(tree, tmp_path / "beitv2.pth")
    backbone = load_backbone(str(tmp_path / "beitv2.pth"))
    np.testing.assert_allclose(backbone.rgb, NORMALISATIONS["imagenet"], rtol=1e-6)
    assert "looks like BEiT v2's" in "\n".join(backbone.origin.loading)


def test_another_part_of_the_file(dino_full: Path) -> None:
    tree = Case.read("dino-full").tree()
    student = load_backbone(str(dino_full), branch="student")
    right = tree["student"]["module.backbone.blocks.1.attn.qkv.weight"]
    assert torch.equal(student.model.blocks[1].attn.qkv.weight, right)
    assert student.origin.report is not None
    assert student.origin.report.path == "student/module.backbone."
    with pytest.raises(ModelError, match="no part 'ema'; expected student, teacher"):
        load_backbone(str(dino_full), branch="ema")


def test_options_of_files_are_refused_where_there_is_no_file() -> None:
    for option in ({"arch": "vit_tiny_patch16_224"}, {"branch": "ema"}, {"normalisation": "clip"}):
        with pytest.raises(ModelError, match="no checkpoint file; leave it out"):
            load_backbone("timm/vit_tiny_patch16_224", weights="random", **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("spelt", ["vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"])
def test_the_architecture_beside_the_file(tmp_path: Path, spelt: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    backbone = load_backbone(path, arch=spelt)
    again = load_backbone("timm/vit_tiny_patch16_224", weights=path)
    assert backbone.image_size == again.image_size == (64, 64)
    x = images(64)
    assert torch.equal(backbone(x).logits, again(x).logits)
    assert backbone.num_classes == 3


def test_the_weights_tag_brings_its_normalisation(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    assert load_backbone(path, arch="vit_tiny_patch16_224.augreg_in21k").rgb[0] == (0.5, 0.5, 0.5)
    assert load_backbone(path).rgb[0] == pytest.approx((0.485, 0.456, 0.406))


def test_another_family_than_the_named_one(dino_full: Path) -> None:
    with pytest.raises(ModelError, match=r"holds a plain ViT.*'swin_tiny.*' is a SwinTransformer"):
        load_backbone(str(dino_full), arch="swin_tiny_patch4_window7_224")
    with pytest.raises(ModelError, match=r"does not fit the model.*of another shape"):
        load_backbone(str(dino_full), arch="vit_tiny_patch16_224")


def test_what_only_timm_can_read(tmp_path: Path) -> None:
    """A family without a table here: ConvNeXt, by timm's own conversion."""
    model = timm.create_model("convnext_atto", num_classes=4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    path = str(tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"of no known format \(stem.*timm/NAME"):
        load_backbone(path)
    backbone = load_backbone("timm/convnext_atto", weights=path)
    x = (images(64) - backbone.mean) / backbone.std
    torch.testing.assert_close(backbone(images(64)).logits, model.eval()(x))
    tensors = model.state_dict()
    tensors.pop("stages.0.blocks.0.mlp.fc1.weight")
    torch.save({"state_dict": tensors}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"1 missing \(stages\.0\.blocks\.0\.mlp\.fc1\.weight\)"):
        load_backbone("timm/convnext_atto", weights=path)


# --- CLIP: what tensors do not show


def test_a_clip_of_unknown_activation_asks_for_its_name(tmp_path: Path) -> None:
    path = Case.read("open-clip-gelu").write(tmp_path)
    with pytest.raises(ModelError, match=r"activation cannot be told.*clip_quickgelu_224"):
        load_backbone(str(path))
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": True, "vision_cfg": {}}})
    )
    assert type(load_backbone(str(path)).model.blocks[0].mlp.act).__name__ == "QuickGELU"


def test_a_clip_in_timms_names(tmp_path: Path) -> None:
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 16, "img_size": 64}
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_clip_quickgelu_224", **arguments).eval()
    halves = {k: v.half() for k, v in model.state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    with pytest.raises(ModelError, match="activation cannot be told"):  # anybody's may be halved
        load_backbone(str(tmp_path / "half.safetensors"))
    save_file({k: v.float() for k, v in halves.items()}, tmp_path / "w.safetensors")
    backbone = load_backbone(str(tmp_path / "w.safetensors"))
    assert backbone.mean.flatten()[0] == pytest.approx(0.48145466)
    assert backbone(images(64)).logits is None
    assert backbone(images(64)).pooled.shape == (2, 16)
    assert backbone.num_classes == 0


def test_a_clip_with_a_resnet(tmp_path: Path) -> None:
    torch.save({"visual.layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "RN50.pt")
    with pytest.raises(ModelError, match=r"ResNet as its image tower.*timm/resnet50_clip.openai"):
        load_backbone(str(tmp_path / "RN50.pt"))


# --- what equal tensors could hide


def test_epsilons(tmp_path: Path) -> None:
    def epsilons(name: str) -> set[float]:
        folder = tmp_path / name
        folder.mkdir()
        backbone = load_backbone(str(Case.read(name).write(folder)))
        norms = (m for m in backbone.model.modules() if isinstance(m, torch.nn.LayerNorm))
        return {norm.eps for norm in norms}

    assert epsilons("dino-backbone") == epsilons("beit-finetuned") == epsilons("esvit-w3") == {1e-6}
    assert epsilons("clip-state") == epsilons("swin") == epsilons("fd-swin-finetuned") == {1e-5}
    assert epsilons("dinov3") == {1e-5}


def test_a_buffer_of_another_window_is_found_out(tmp_path: Path) -> None:
    tree = Case.read("swin").tree()
    name = "layers.0.blocks.0.attn.relative_position_index"
    tree["model"][name] = tree["model"][name].flip(0)
    torch.save(tree, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=f"other than the model computes \\({name}"):
        load_backbone(str(tmp_path / "w.pth"))


# --- the giant


GIANT = {
    "img_size": 256,
    "embed_dim": 512,
    "depths": (2, 2, 42, 4),
    "num_heads": (16, 32, 64, 128),
    "window_size": 8,
    "num_classes": 0,
    "end_norm_period": 6,
}


def test_swin_v2_g_on_the_meta_device() -> None:
    """SwinV2-G (Liu et al. 2022): 512 channels, depths 2, 2, 42, 4, a norm after every 6 blocks."""
    with torch.device("meta"):
        model = create("swinv2_tiny_window8_256", **GIANT)
    # feature distillation's own module at these sizes
    right = json.loads((CASES.parent / "swin-v2-g.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == right["parameters"] == 2_997_843_680
    extra = [n for n in model.state_dict() if ".enorm.weight" in n]
    assert [n.split(".")[1] for n in extra] == ["2"] * 7
    assert [int(n.split(".")[3]) % 6 for n in extra] == [5] * 7
    # out to the official names and back by the same table, and recognised
    official = revert(model.state_dict(), SWIN_V2.rules)
    assert official.strangers == ()
    assert len(official.tensors) == right["tensors"]
    assert shapes_hash(official.tensors) == right["sha256"]
    assert next(f for f in FORMATS if f.recognises(official.tensors)) is SWIN_V2
    back = convert(official.tensors, SWIN_V2.rules)
    assert back.strangers == ()
    assert back.tensors.keys() == model.state_dict().keys()
    plan = swin_v2(back.tensors, {"windows": [8, 8, 8, 8]})
    assert {k: plan.build.arguments[k] for k in GIANT} == GIANT


def test_timms_own_giant_on_the_meta_device() -> None:
    """timm's `swinv2_cr_giant` has two blocks less in its last stage than SwinV2-G, and other
    coordinates for its bias: official weights do not fit it, its own do."""
    with torch.device("meta"):
        model = timm.create_model("swinv2_cr_giant_224", num_classes=0, depths=(2, 2, 42, 4))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(3.0, abs=0.05)
    assert sum(".norm3.weight" in n for n in model.state_dict()) >= 7
    assert not any(f.recognises(model.state_dict()) for f in FORMATS)


def test_timms_cr_family_by_name(tmp_path: Path) -> None:
    model = timm.create_model("swinv2_cr_tiny_ns_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("timm/swinv2_cr_tiny_ns_224", weights=str(tmp_path / "w.safetensors"))
    assert backbone.grid == (7, 7)
    assert load_checkpoint(tmp_path / "w.safetensors", arch="swinv2_cr_tiny_ns_224").build


def test_end_norms_survive_another_size_and_a_classifier(tmp_path: Path) -> None:
    from featdistill.models.classifier import build_classifier

    path = Case.read("fd-swin-extra-norm").write(tmp_path)
    backbone = load_backbone(str(path), image_size=192)
    classifier = build_classifier(backbone, class_names=("a", "b"))
    for a, b in ((backbone, classifier),):
        assert torch.equal(
            a.model.layers[0].blocks[1].enorm.weight, b.model.layers[0].blocks[1].enorm.weight
        )
    with torch.no_grad():
        np.testing.assert_allclose(
            classifier(images(192)).map, backbone(images(192)).map, atol=1e-5
        )


# --- parts of a file, and what begins with a prefix


def tiny(tmp_path: Path, wrap: str = "", **others: object) -> Path:
    """A small DINO under a prefix, with other parts beside it."""
    tensors = {f"{wrap}{n}": v for n, v in Case.read("dino-backbone").tree().items()}
    path = tmp_path / "w.pth"
    torch.save({"state_dict": tensors, **others}, path)
    return path


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "model.backbone."]
)
def test_prefixes_that_say_nothing(tmp_path: Path, prefix: str) -> None:
    assert load_backbone(str(tiny(tmp_path, prefix))).width == 128


def test_prefixes_that_have_to_be_chosen(tmp_path: Path) -> None:
    whole = Case.read("dino-backbone").tree()
    tensors = {f"base_encoder.{n}": v for n, v in whole.items()}
    tensors |= {f"momentum_encoder.{n}": v * 2 for n, v in whole.items()}
    path = tmp_path / "moco.pth"
    torch.save({"state_dict": tensors}, path)
    with pytest.raises(ModelError, match=r"base_encoder\. or momentum_encoder\..*branch base_enc"):
        load_backbone(str(path))
    backbone = load_backbone(str(path), branch="momentum_encoder.")
    assert torch.equal(backbone.model.cls_token, whole["cls_token"] * 2)
    assert backbone.origin.report is not None
    assert len(backbone.origin.report.left_out["outside the chosen part"]) == len(whole)


def test_an_average_beside_the_weights_is_told(tmp_path: Path) -> None:
    average = {n: v * 0.5 for n, v in Case.read("dino-backbone").tree().items()}
    path = tiny(tmp_path, state_dict_ema=average, optimizer={"state": {}})
    backbone = load_backbone(str(path))
    assert "not taken: state_dict_ema" in "\n".join(backbone.origin.loading)
    assert torch.equal(
        load_backbone(str(path), branch="state_dict_ema").model.cls_token, average["cls_token"]
    )
    torch.save({"state_dict_ema": average}, path)
    with pytest.raises(ModelError, match="no named tensors but in state_dict_ema; say which"):
        load_backbone(str(path))


def test_a_part_inside_a_part(tmp_path: Path) -> None:
    tensors = Case.read("dino-backbone").tree()
    path = tmp_path / "w.pth"
    torch.save({"a": {"b": tensors}}, path)
    with pytest.raises(ModelError, match=r"but in a; say .*branch a "):
        load_backbone(str(path))
    with pytest.raises(ModelError, match=r"but in a/b; say .*branch a/b "):
        load_backbone(str(path), branch="a")
    assert load_backbone(str(path), branch="a/b").width == 128
    with pytest.raises(ModelError, match=r"no part 'a/c'; expected a/b$"):
        load_backbone(str(path), branch="a/c")


def test_the_state_of_an_optimiser_is_no_part(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    path = tmp_path / "w.pth"
    torch.save(optimizer.state_dict(), path)
    with pytest.raises(ModelError, match="the state of an optimiser"):
        load_backbone(str(path))
    torch.save({"optimizer": optimizer.state_dict(), "model": {}, "epoch": 3}, path)
    with pytest.raises(ModelError, match=r"no named tensors \(it holds optimizer, model, epoch\)$"):
        load_backbone(str(path))


# --- what a name must not change


def test_the_projection_is_wanted_by_name_too(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    trunk = timm.create_model(name, num_classes=0).state_dict()
    tensors = {f"visual.trunk.{n}": v for n, v in trunk.items()}
    tensors["visual.head.proj.weight"] = torch.randn(24, 192)
    torch.save(tensors, tmp_path / "w.bin")
    backbone = load_backbone(f"timm/{name}", weights=str(tmp_path / "w.bin"))
    assert backbone.num_classes == 0
    assert backbone(images(224)).pooled.shape == (2, 24)

    case = Case.read("clip-state")
    tree = case.tree()
    del tree["visual.proj"]
    torch.save(tree, tmp_path / "clip.pt")
    with pytest.raises(ModelError, match=r"1 missing \(visual\.proj\)"):
        load_backbone("timm/vit_base_patch16_clip_224", weights=str(tmp_path / "clip.pt"))


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "xcit_nano_12_p16_224", "vit_relpos_small_patch16_224"]
)
def test_families_whose_keys_look_like_others(tmp_path: Path, name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(f"timm/{name}", weights=str(tmp_path / "w.safetensors"))
    assert type(backbone.model) is type(model)
    assert backbone.num_classes == 3


def test_timms_conversion_may_not_stretch_in_silence(tmp_path: Path) -> None:
    """Nor hide what is damaged, or take it for another family."""
    name = "eva02_tiny_patch14_224"
    tensors = timm.create_model(name).state_dict()
    path = tmp_path / "w.safetensors"
    other_size = timm.create_model(name, img_size=112).state_dict()["pos_embed"]
    for key, value, words in (
        ("pos_embed", other_size, r"pos_embed \(1, 65, 192\) for \(1, 257, 192\)\).*at the size"),
        ("pos_embed", other_size[0, 0].clone(), r"cannot read .*pos_embed \(192,\) for"),
        ("cls_token", torch.full((1, 1, 192), float("nan")), r"1 not finite \(cls_token\)"),
    ):
        save_file({**tensors, key: value}, path)
        with pytest.raises(ModelError, match=words):
            load_backbone(f"timm/{name}", weights=str(path))
    save_file({k: v for k, v in tensors.items() if k != "cls_token"}, path)
    with pytest.raises(ModelError, match=r"1 missing \(cls_token\)"):
        load_backbone(f"timm/{name}", weights=str(path))


def test_a_file_that_timms_conversion_cannot_read(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"w\.safetensors"):
        load_backbone("timm/convnext_atto", weights=str(tmp_path / "w.safetensors"))


def test_settings_of_another_model_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"preprocess_cfg": {"mean": [0.1, 0.1, 0.1], "std": [1, 1, 1]}})
    )
    path = Case.read("dino-backbone").write(tmp_path)
    assert load_backbone(str(path)).mean.flatten()[0] == pytest.approx(0.485)


@pytest.mark.parametrize(
    "config",
    [
        {"model_cfg": None, "preprocess_cfg": None},
        {"model_cfg": {"quick_gelu": False, "vision_cfg": None}},
        {"preprocess_cfg": {"mean": [0.5], "std": [0.5, 0.5, 0.5]}},
        {"preprocess_cfg": {"mean": "x", "std": 1}},
        {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_unheard_of"}}},
    ],
)
def test_damaged_settings(tmp_path: Path, config: dict[str, object]) -> None:
    path = Case.read("open-clip-gelu").write(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with contextlib.suppress(ModelError):  # some are good enough; anything else is a traceback
        load_backbone(str(path))


def test_half_precision_buffers(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        tree = Case.read("swinv2").tree()
        tree["model"] = {
            n: v.to(dtype) if v.is_floating_point() else v for n, v in tree["model"].items()
        }
        torch.save(tree, tmp_path / "w.pth")
        assert load_backbone(str(tmp_path / "w.pth")).image_size == (96, 96)


def test_a_deit_3_has_no_position_for_its_cls(tmp_path: Path) -> None:
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 64, "num_classes": 5}
    model = timm.create_model("deit3_small_patch16_224", **arguments).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(str(tmp_path / "w.safetensors"))
    x = (images(64) - backbone.mean) / backbone.std
    with torch.no_grad():
        torch.testing.assert_close(backbone(images(64)).logits, model(x))


def test_options_are_checked() -> None:
    for option in ({"normalisation": "clpi"}, {"bias_resampling": "lineal"}):
        with pytest.raises(ModelError, match="did you mean"):
            load_backbone("timm/vit_tiny_patch16_224", weights="random", **option)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no model was named"):
        load_backbone("")
    with pytest.raises(ModelError, match="cannot look at"):
        load_backbone("x" * 5000 + ".pth")
    with pytest.raises(ModelError, match="did you mean 'random'"):
        load_backbone("timm/vit_tiny_patch16_224", weights="Random")


def test_an_official_deit_3(tmp_path: Path) -> None:
    """Its layer scales are named as BEiT's, everything else as DeiT's; the CLS has no position."""
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 64, "num_classes": 5}
    model = timm.create_model("deit3_small_patch16_224", **arguments).eval()
    official = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v
        for n, v in model.state_dict().items()
    }
    torch.save({"model": official}, tmp_path / "deit_3_small.pth")
    backbone = load_backbone(str(tmp_path / "deit_3_small.pth"))
    x = (images(64) - backbone.mean) / backbone.std
    with torch.no_grad():
        torch.testing.assert_close(backbone(images(64)).logits, model(x))


def test_heads_of_a_trunk_that_its_settings_name(tmp_path: Path) -> None:
    """SigLIP 2's giant has 16 heads of 96 channels."""
    name = "vit_giantopt_patch16_siglip_256"
    with torch.device("meta"):
        tensors = timm.create_model(name, depth=1, num_classes=0).state_dict()
    found = next(f for f in FORMATS if f.recognises(tensors))
    unwrapped = Unwrapped(tensors, "visual.trunk.", {}, (), len(tensors), (), ())
    hints = found.hints(unwrapped, convert(tensors, found.rules), {"timm_model_name": name})
    assert hints["num_heads"] == 16

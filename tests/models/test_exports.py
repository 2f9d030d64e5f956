"""Exports to each format: what it holds, what it refuses, and what comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from model_zoo import images, small, small_beit, small_swin, small_vit, wrap
from safetensors.torch import load_file
from torch import Tensor, nn

from featdistill.config.commands import ExportConfig
from featdistill.core.errors import ModelError, RunError
from featdistill.core.records import write_json
from featdistill.engine.rundir import check_out
from featdistill.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    CustomBackbone,
    Origin,
)
from featdistill.models.classifier import build_classifier
from featdistill.models.export import TARGETS, export, export_timm, target_of
from featdistill.models.exports.card import FRESH, Story
from featdistill.models.exports.common import largest_difference
from featdistill.models.load import load_backbone
from tests.models.formats.parity import Case

NAMES = ("cat", "dog", "hen")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def clip(*, projection: int = 0) -> Backbone:
    model = small("vit_base_patch16_clip_quickgelu_224", num_classes=projection).model
    if projection:
        with torch.no_grad():
            model.head.bias.zero_()
    build = small("vit_base_patch16_clip_quickgelu_224", num_classes=projection).build
    return wrap(model, (32, 32), build=build)


def classifier(backbone: Backbone, pool: str = "mean") -> Backbone:
    return build_classifier(backbone, class_names=NAMES, pool=pool).eval()  # type: ignore[arg-type]


class Convolution(nn.Module):
    """A user's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


def custom() -> Backbone:
    torch.manual_seed(0)
    return CustomBackbone(Convolution(), image_size=32, origin=Origin("mine:make", "own")).eval()


REGISTERS = {"init_values": 1e-5, "reg_tokens": 2, "no_embed_class": True}
NATIVE: dict[str, tuple[Callable[[], Backbone], str]] = {
    "shared-rpb": (small_beit, "BeitModel"),
    "rpb": (lambda: small_beit("rpb"), "BeitModel"),
    "ape": (lambda: small_beit("ape"), "BeitModel"),
    "none": (lambda: small_beit("none"), "BeitModel"),
    "no-layer-scale": (lambda: small_beit(init_values=0.0), "BeitModel"),
    "no-bias": (lambda: small_beit(qkv_bias=False), "BeitModel"),
    "beit-mean": (lambda: small_beit(global_pool="avg"), "BeitModel"),
    "beit-classifier": (lambda: classifier(small_beit()), "BeitForImageClassification"),
    "beit-cls": (lambda: classifier(small_beit(), "cls"), "BeitForImageClassification"),
    "vit": (small_vit, "ViTModel"),
    "vit-no-class-position": (lambda: small_vit(no_embed_class=True), "ViTModel"),
    "vit-cls": (lambda: classifier(small_vit(), "cls"), "ViTForImageClassification"),
    "deit": (lambda: small("deit_tiny_distilled_patch16_224"), "DeiTModel"),
    "deit-classifier": (
        lambda: small("deit_tiny_distilled_patch16_224", num_classes=3),
        "DeiTForImageClassificationWithTeacher",
    ),
    "dinov2": (lambda: small_vit(init_values=1e-5), "Dinov2Model"),
    "dinov2-registers": (lambda: small_vit(**REGISTERS), "Dinov2WithRegistersModel"),
    "clip": (clip, "CLIPVisionModel"),
    "clip-projection": (lambda: clip(projection=24), "CLIPVisionModelWithProjection"),
    "swin": (
        lambda: small("swin_tiny_patch4_window7_224", window_size=2),
        "SwinModel",
    ),
    "swinv2": (small_swin, "Swinv2Model"),
    "swinv2-classifier": (lambda: classifier(small_swin()), "Swinv2ForImageClassification"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
def test_transformers_gives_equal_features_and_we_read_it_back(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    make, architecture = NATIVE[name]
    backbone = make()
    done = export(backbone, tmp_path / "out", to="huggingface")
    assert done.difference <= 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [architecture]
    again = load_backbone(str(tmp_path / "out"))
    x = images(2, 32)
    ours, back = backbone(x), again(x)
    torch.testing.assert_close(back.map, ours.map, **CLOSE)
    torch.testing.assert_close(back.prefix, ours.prefix, **CLOSE)
    torch.testing.assert_close(back.pooled, ours.pooled, **CLOSE)
    assert again.prefix_names == backbone.prefix_names
    assert again.rgb[0] == pytest.approx(backbone.rgb[0])
    if backbone.num_classes:
        torch.testing.assert_close(back.logits, ours.logits, **CLOSE)
    if backbone.class_names:
        assert again.class_names == NAMES
    assert again.origin.report is not None
    assert not any("assumed" in line for line in again.origin.loading)


@torch.no_grad()
def test_auto_classes_and_image_processor(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import numpy as np
    from PIL import Image

    backbone = classifier(small_beit())
    done = export(backbone, tmp_path / "out", to="huggingface")
    scope: dict[str, Any] = {}
    exec(done.snippet, scope)
    assert isinstance(scope["model"], transformers.BeitForImageClassification)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == dict(enumerate(NAMES))
    # an image of a single colour is the same however it is resized
    colour = Image.fromarray(np.full((50, 70, 3), (10, 100, 200), dtype=np.uint8))
    pixels = scope["processor"](images=colour, return_tensors="pt")["pixel_values"]
    flat = torch.tensor([10, 100, 200]).view(1, 3, 1, 1) / 255
    wanted = ((flat - backbone.mean) / backbone.std).expand(1, 3, 32, 32)
    torch.testing.assert_close(pixels, wanted, rtol=1e-4, atol=1e-4)
    logits = backbone(flat.expand(1, 3, 32, 32)).logits
    torch.testing.assert_close(model(pixels).logits, logits, **CLOSE)


@torch.no_grad()
def test_transformers_loads_a_timm_folder_too(tmp_path: Path) -> None:
    """What a refusal recommends has to be true."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("the wrapper of older versions takes no arguments for timm")
    backbone = classifier(small_vit())
    with pytest.raises(ModelError, match="TimmWrapperModel"):
        export(backbone, tmp_path / "native", to="huggingface")
    export(backbone, tmp_path / "out", to="timm")
    model = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "out").eval()
    x = images(2, 32)
    pixels = (x - backbone.mean) / backbone.std
    torch.testing.assert_close(model(pixels).logits, backbone(x).logits, **CLOSE)
    export(small_swin(), tmp_path / "swin", to="timm")
    features = transformers.TimmWrapperModel.from_pretrained(tmp_path / "swin").eval()
    pooled = features(pixels).pooler_output
    torch.testing.assert_close(pooled, small_swin()(x).pooled, **CLOSE)


def _squeeze(told: dict[str, Any]) -> dict[str, Any]:
    """Settings of another normalisation."""
    other: dict[str, Any] = {"mean": [0.0] * 3, "std": [9.0] * 3}
    told = told | {"image_mean": other["mean"], "image_std": other["std"]}
    return told | {"pretrained_cfg": told.get("pretrained_cfg", {}) | other}


def _swap_names(told: dict[str, Any]) -> dict[str, Any]:
    """Settings of other class names."""
    names = ["dog", "cat", "hen"]
    timms = {"label_names": names}
    told = told | {"id2label": {str(i): n for i, n in enumerate(names)}}
    return told | timms | {"pretrained_cfg": told.get("pretrained_cfg", {}) | timms}


@pytest.mark.parametrize("to", ["timm", "huggingface"])
@pytest.mark.parametrize("change", [_squeeze, _swap_names])
def test_the_check_reads_the_settings_too(
    to: str,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if to == "huggingface":
        pytest.importorskip("transformers", reason="transformers is not installed")
    module = f"featdistill.models.exports.to_{to}.write_json"
    monkeypatch.setattr(module, lambda path, told: write_json(path, change(told)))
    with pytest.raises(ModelError, match="not exact"):
        export(classifier(small_beit()), tmp_path / "out", to=to)


REFUSED: dict[str, tuple[str, Callable[[], Backbone], str]] = {
    "mean of a ViT": ("huggingface", lambda: classifier(small_vit()), "its norm follows the mean"),
    "no CLS": (
        "huggingface",
        lambda: small_vit(class_token=False, global_pool="avg"),
        "it has no CLS token",
    ),
    "norms of queries": ("huggingface", lambda: small_vit(qk_norm=True), "q_norm"),
    "another family": (
        "huggingface",
        lambda: small("vit_small_patch16_dinov3_qkvb"),
        "a Eva has no equal",
    ),
    "windows that differ": (
        "huggingface",
        lambda: small("swin_tiny_patch4_window7_224"),
        "smaller than the other windows",
    ),
    "end norms in transformers": (
        "huggingface",
        lambda: small_swin(end_norm_period=1),
        r"no place for layers\.0\.blocks\.0\.enorm",
    ),
    "end norms in timm": ("timm", lambda: small_swin(end_norm_period=1), "layer norm after every"),
    "own module in timm": ("timm", custom, "not an architecture of timm"),
    "own module in transformers": ("huggingface", custom, "has no equal"),
    "own module officially": ("official", custom, "neither a BEiT-style ViT nor a Swin V2"),
    "plain ViT officially": ("official", small_vit, "neither a BEiT-style ViT nor a Swin V2"),
    "CLS classifier officially": (
        "official",
        lambda: imagenet(classifier(small_beit(), "cls")),
        "pools by the mean",
    ),
    "other pixels officially": (
        "official",
        lambda: wrap(small_beit().model, (32, 32), build=small_beit().build),
        "normalises with ImageNet",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_hold(name: str, tmp_path: Path) -> None:
    to, make, reason = REFUSED[name]
    if to == "huggingface":
        pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(ModelError, match=reason) as error:
        export(make(), tmp_path / "out", to=to)
    assert "\n" not in str(error.value)
    assert error.value.fix is not None
    assert "--to" in error.value.fix
    assert not list(tmp_path.iterdir())


def imagenet(backbone: Backbone) -> Backbone:
    """The same model, normalised as the official code does it."""
    return Backbone(
        backbone.model,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=backbone.image_size,
        origin=backbone.origin,
        build=backbone.build,
        class_names=backbone.class_names,
    ).eval()


@pytest.mark.parametrize(
    "name", ["fd-vit-pretrain", "fd-vit-finetuned", "fd-swin-pretrain", "fd-swin-finetuned"]
)
def test_official_files_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    case = Case.read(name)
    path = case.write(tmp_path)
    before = torch.load(path, weights_only=False)["model"]
    done = export(load_backbone(str(path)), tmp_path / "out", to="official")
    assert done.difference == 0
    after = torch.load(tmp_path / "out/ckpt_featdistill.pth", weights_only=True)["model"]
    wanted = {k: v for k, v in before.items() if k.startswith("encoder.")} or before
    assert after.keys() == wanted.keys()
    for key, value in wanted.items():
        assert after[key].dtype == value.dtype, key
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-6, msg=key)
    again = load_backbone(str(tmp_path / "out/ckpt_featdistill.pth"))
    assert again.rgb[0] == pytest.approx(IMAGENET_MEAN)


@pytest.mark.parametrize("position", ["shared-rpb", "rpb", "ape", "none"])
def test_students_in_the_official_layout(position: str, tmp_path: Path) -> None:
    done = export(imagenet(small_beit(position)), tmp_path / "out", to="official")
    assert done.difference == 0
    assert f"USE_APE: {position == 'ape'}" in done.notes[0]
    assert f"USE_RPB: {position.endswith('rpb')}" in done.notes[0]


@torch.no_grad()
@pytest.mark.parametrize("position", ["shared-rpb", "rpb", "ape", "none"])
@pytest.mark.parametrize("heads", [2, 4])
def test_the_official_files_snippet_gives_the_model(
    heads: int, position: str, tmp_path: Path
) -> None:
    """Heads of other than 64 channels show in the layers' bias tables alone."""
    backbone = imagenet(small_beit(position, embed_dim=128, num_heads=heads))
    done = export(backbone, tmp_path / "out", to="official")
    scope: dict[str, Any] = {}
    exec(done.snippet, scope)
    if position == "none" or (position != "rpb" and heads == 4):
        assert "model" not in scope
        assert "do not show" in done.notes[-1]
    else:
        again = scope["model"](images(2, 32))
        torch.testing.assert_close(again.map, backbone(images(2, 32)).map, rtol=1e-5, atol=1e-5)


def test_an_official_file_that_loads_as_another_model(tmp_path: Path) -> None:
    backbone = imagenet(small_beit("rpb", norm_eps=1e-2))
    with pytest.raises(ModelError, match="not exact"):
        export(backbone, tmp_path / "out", to="official")


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        small_beit,
        lambda: classifier(small_swin()),
        lambda: clip(projection=24),
        lambda: small_swin(end_norm_period=1),
        lambda: small_vit(norm_eps=1e-3),
    ],
)
def test_plain_state_dict(make: Callable[[], Backbone], tmp_path: Path) -> None:
    backbone = make()
    done = export(backbone, tmp_path / "out", to="plain")
    assert done.difference == 0
    assert load_file(tmp_path / "out/model.safetensors").keys() == (
        backbone.model.state_dict().keys()
    )
    scope: dict[str, Any] = {}
    exec(done.snippet, scope)
    for spec in ("out", "out/model.safetensors"):
        again = load_backbone(str(tmp_path / spec))
        assert torch.equal(again(images(2, 32)).pooled, backbone(images(2, 32)).pooled)
        assert again.class_names == backbone.class_names
        assert again.projection == backbone.projection


def test_plain_state_dict_of_an_own_module(tmp_path: Path) -> None:
    done = export(custom(), tmp_path / "out", to="plain")
    assert done.difference == 0
    module = Convolution()
    module.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    facts = json.loads((tmp_path / "out/model.json").read_text())
    assert facts["module"] == "Convolution"
    assert facts["input_size"] == [3, 32, 32]
    assert "load_state_dict" in done.snippet


@torch.no_grad()
def test_projection_and_extensions_outlive_a_timm_folder(tmp_path: Path) -> None:
    backbone = clip(projection=24)
    with torch.no_grad():  # no longer to be known by its zeros
        backbone.model.head.bias.add_(0.1)
    export(backbone, tmp_path / "clip", to="timm")
    again = load_backbone(str(tmp_path / "clip"))
    assert again.projection
    assert torch.equal(again(images(2, 32)).pooled, backbone(images(2, 32)).pooled)
    other = small_vit(norm_eps=0.95e-6)
    done = export(other, tmp_path / "eps", to="timm")
    assert 0 < done.difference <= 1e-5
    assert any("norm_eps" in note for note in done.notes)
    again = load_backbone(str(tmp_path / "eps"))
    assert torch.equal(again(images(2, 32)).map, other(images(2, 32)).map)


@torch.no_grad()
@pytest.mark.parametrize("extension", [{"norm_eps": 1e-2}, {"end_norm_period": 1}])
def test_a_run_ends_in_a_plain_state_dict_where_timm_fails(
    extension: dict[str, Any], tmp_path: Path
) -> None:
    backbone = small_swin(**extension)
    done = export_timm(backbone, tmp_path / "run" / "export", card={"teacher": "DINO"})
    assert done.target == "plain"
    again = load_backbone(str(tmp_path / "run"))
    assert torch.equal(again(images(2, 32)).map, backbone(images(2, 32)).map)


def test_what_timm_drops_is_measured(tmp_path: Path) -> None:
    backbone = small_vit(norm_eps=1e-2)
    with pytest.raises(ModelError, match=r"not exact.*norm_eps"):
        export(backbone, tmp_path / "out", to="timm")
    assert not list(tmp_path.iterdir())
    done = export(backbone, tmp_path / "out", to="timm", tolerance=1.0)
    assert done.difference > 1e-5
    assert "(tolerance 1)" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("to", ["timm", "huggingface", "plain", "official"])
def test_card(to: str, tmp_path: Path) -> None:
    if to == "huggingface":
        pytest.importorskip("transformers", reason="transformers is not installed")
    story = Story(
        made={"teacher": "DINO", "data": "photographs"},
        results=("nearest neighbours: 50 %",),
        licences={"timm/vit_base_patch16_224.mae": "CC-BY-NC-4.0", "other": None, "mine": FRESH},
    )
    done = export(imagenet(small_beit()), tmp_path / "run" / "export", to=to, story=story)
    text = (tmp_path / "run/export/README.md").read_text()
    assert text.startswith("---\nlibrary_name: ")
    assert "\n# run\n" in text
    assert "- teacher: DINO\n- data: photographs\n" in text
    assert "## Results so far\n\n- nearest neighbours: 50 %" in text
    assert "CC-BY-NC-4.0. No commercial use." in text
    assert "other: not known. Ask" in text
    assert "mine: made from random weights. Nobody else's weights" in text
    assert f"(tolerance {done.tolerance:g})" in text
    assert all(f"- {note}" in text for note in done.notes)
    assert len(done.snippet.splitlines()) <= 3


def test_targets_are_the_commands(tmp_path: Path) -> None:
    assert get_args(ExportConfig.model_fields["to"].annotation) == TARGETS
    assert all(target_of(name).name == name for name in TARGETS)
    with pytest.raises(ModelError, match="did you mean 'onnx'"):
        export(small_beit(), tmp_path / "out", to="onxx")


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    target = replace(target_of("onnx"), modules=("onnx_that_nobody_has",))
    with pytest.raises(ModelError, match=r"pip install featdistill\[export\]") as error:
        target.check_installed()
    assert "onnx_that_nobody_has" in str(error.value)


def test_mode_and_device_are_left(tmp_path: Path) -> None:
    backbone = small_beit().train()
    backbone.model.blocks[0].eval()
    export(backbone, tmp_path / "out", to="plain")
    assert backbone.training
    assert not backbone.model.blocks[0].training
    assert backbone.model.blocks[1].training


def test_difference_of_outputs() -> None:
    ones = torch.ones(2, 3)
    assert largest_difference({"map": ones}, {"map": ones * 2}) == pytest.approx(0.5)
    with pytest.raises(ModelError, match="its logits is missing"):
        largest_difference({}, {"logits": ones})
    with pytest.raises(ModelError, match="its map is"):
        largest_difference({"map": ones[:1]}, {"map": ones})
    with pytest.raises(ModelError, match="not finite"):
        largest_difference({"map": ones * float("nan")}, {"map": ones})


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the export"):
        export(small_beit(), tmp_path / "file" / "out", to="plain")


_FULL_DISK = """
import resource, sys
from pathlib import Path
from test_exports import imagenet
from model_zoo import small_beit
from featdistill.core.errors import RunError
from featdistill.models.export import export
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for to in ("plain", "timm", "official", *sys.argv[2:]):
    try:
        export(imagenet(small_beit()), Path(sys.argv[1]) / to, to=to)
    except RunError as error:
        print(error)
"""


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    more = ["huggingface"] if find_spec("transformers") else []
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path), *more],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 + len(more)
    assert all("cannot write the export" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_the_folder_may_be_the_current_one_or_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "here")
    export(small_beit(), Path(), to="plain")
    export(small_beit(), tmp_path / "link", to="plain")
    assert (tmp_path / "link").is_symlink()
    for name in ("here", "there"):
        assert (tmp_path / name / "model.safetensors").is_file()
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(RunError, match="a link to nothing"):
        check_out(str(tmp_path / "dangling"), resume=False)


def test_a_library_that_is_installed_and_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_library.py").write_text("raise ImportError('libfoo.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    target = replace(target_of("plain"), modules=("broken_library",))
    with pytest.raises(ModelError, match=r"cannot be imported \(libfoo\.so is missing\)"):
        target.check_installed()


def test_a_broken_epsilon_in_a_timm_folder(tmp_path: Path) -> None:
    export(small_vit(norm_eps=0.95e-6), tmp_path / "out", to="timm")
    path = tmp_path / "out/config.json"
    told = json.loads(path.read_text())
    told["featdistill_args"]["norm_eps"] = "x"
    path.write_text(json.dumps(told))
    with pytest.raises(ModelError, match="norm_eps 'x'"):
        load_backbone(str(tmp_path / "out"))

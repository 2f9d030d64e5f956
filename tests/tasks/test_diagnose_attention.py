"""`diagnose attention`: what it writes, for any batch size, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import featdistill
from featdistill.cli.main import main
from featdistill.core.errors import ModelError
from featdistill.diagnostics.attention import AttentionDistance
from featdistill.diagnostics.attention_layout import TokenLayout
from featdistill.diagnostics.attention_model import ModelAttention, Tokens, bias_alone
from featdistill.diagnostics.capture import CapturedAttention, capture_attention
from featdistill.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Origin
from featdistill.tasks import diagnose_attention

COMMON: dict[str, Any] = {"data": "digits", "workers": 0, "device": "cpu"}


def diagnosed(out: Path, **options: Any) -> Any:
    return featdistill.diagnose("attention", out=out, **COMMON, **options)


@pytest.fixture(scope="module")
def found(teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("diagnosed") / "attention"
    names = ["teacher", "student"]
    return diagnosed(out, model=[teacher, student], name=names, images=50, batch_size=16)


def test_the_record_has_everything(found: Any) -> None:
    record = json.loads(found.record.read_text())
    assert record["kind"] == "diagnose-attention"
    results = record["results"]
    assert (results["data"]["images"], results["unit"]) == (50, "pixels")
    teacher, student = results["models"]
    assert [layer["name"] for layer in teacher["layers"]] == [
        "model.blocks.0.attn",
        "model.blocks.1.attn",
    ]
    layer = student["layers"][1]
    assert (layer["heads"], layer["grid"], layer["window"]) == (2, [2, 2], None)
    for name in ("distance", "entropy", "nmi", "prefix_mass", "relative_r2_heads"):
        assert len(layer[name]) == 2
    assert 0 < layer["similarity"] <= 1
    assert layer["similarity_error"] > 0
    assert teacher["layers"][0]["bias"] is None  # absolute positions
    assert len(layer["bias"]["distance"]) == 2  # a shared bias
    arrays = np.load(found.record.with_suffix(".npz"))
    assert arrays["0.map.1"].shape == (4, 4)
    assert arrays["1.heads.0"].shape == (2, 4, 4)
    np.testing.assert_allclose(arrays["1.heads.0"].sum(-1), 1, rtol=1e-5)


def test_numbers_are_those_of_the_weights(found: Any, teacher: Path) -> None:
    """Taken another way: all images at once, straight from the model."""
    from featdistill.config.sections import DataConfig
    from featdistill.data.views import EvalView
    from featdistill.tasks.common import images_of

    source = images_of(DataConfig(path="digits"))
    chosen = [i * len(source) // 50 for i in range(50)]
    images = torch.stack([EvalView(8)(source.read(i))[0] for i in chosen]).float() / 255
    seen: list[CapturedAttention] = []
    model = featdistill.load_backbone(str(teacher)).eval()
    with torch.no_grad(), capture_attention(model, seen.append):
        model(images)
    want = AttentionDistance().update(seen[1].weights, TokenLayout((2, 2), 1, 4)).compute()
    layer = found.models["teacher"].layers["model.blocks.1.attn"]
    np.testing.assert_allclose(layer.distance.compute().mean, want.mean, rtol=1e-5)
    np.testing.assert_allclose(layer.distance.compute().error, want.error, rtol=1e-3)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for n, part in value.items() for k, v in flat(part, f"{path}.{n}").items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{path}.{i}").items()}
    return {path: value}


def test_the_batch_size_changes_nothing(found: Any, teacher: Path, tmp_path: Path) -> None:
    one = diagnosed(tmp_path / "a", model=teacher, name="teacher", images=50, batch_size=7)
    two = json.loads(one.record.read_text())["results"]["models"][0]["layers"]
    want = json.loads(found.record.read_text())["results"]["models"][0]["layers"]
    for (key, a), (other, b) in zip(flat(two).items(), flat(want).items(), strict=True):
        assert key == other
        assert a == (pytest.approx(b, rel=1e-4, abs=1e-6) if isinstance(b, float) else b), key


@torch.no_grad()
def test_processes_change_nothing() -> None:
    """What several processes saw of their shares, merged, is what one sees of all."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    images, tokens = torch.randn(7, 3, 32, 32), Tokens((2, 2), 1, (32, 32))
    whole, merged = ModelAttention(tokens), ModelAttention(tokens)
    with capture_attention(model, whole):
        model(images)
    for rank in range(3):
        share = ModelAttention(tokens)
        with capture_attention(model, share):
            model(images[rank::3])
        merged.merge(share)
    for name, layer in whole.layers.items():
        other = merged.layers[name]
        for unit in ("pixels", "relative"):
            a, b = layer.distance.compute(unit), other.distance.compute(unit)
            np.testing.assert_allclose(b.mean, a.mean, rtol=1e-6)
            np.testing.assert_allclose(b.error, a.error, rtol=1e-4)
        np.testing.assert_allclose(other.maps.compute(), layer.maps.compute(), rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_the_bias_alone(name: str) -> None:
    """What is left of Swin with no content is the softmax of its own bias, shift mask and all."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, window_size=8, depths=(2,), num_heads=(2,)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = bias_alone(model, torch.zeros(1, 3, 64, 64), Tokens(image_size=(64, 64)))
    attention = model.layers[0].blocks[0].attn
    if name.startswith("swinv2"):  # Liu et al. 2022, arXiv 2111.09883, equation 3
        table = attention.cpb_mlp(attention.relative_coords_table).view(-1, 2)
        bias = 16 * table[attention.relative_position_index].sigmoid().permute(2, 0, 1)
    else:
        bias = attention._get_rel_pos_bias()[0]
    first = found.layers["layers.0.blocks.0.attn"]
    np.testing.assert_allclose(first.maps.compute(), bias.softmax(-1), atol=1e-6)
    assert list(found.layers) == ["layers.0.blocks.0.attn", "layers.0.blocks.1.attn"]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_the_page_shows_it(found: Any, tmp_path: Path) -> None:
    assert main(["report", str(found.record.parent), "--out", str(tmp_path / "report")]) == 0
    assert "How far heads look" in next((tmp_path / "report").glob("*.html")).read_text()


def fails(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> str:
    base = ["diagnose", "attention", "--data", "digits", "--out", str(out), "--device", "cpu"]
    assert main([*base, *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert not (out / "diagnose-attention.json").exists()
    return err


RANDOM = ("--weights", "random", "--image-size", "32")


def test_a_cnn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    err = fails(capsys, tmp_path / "o", "--model", "timm/resnet18", *RANDOM)
    assert "'timm/resnet18': no attention was seen" in err
    assert "expected a vision transformer" in err


def test_one_image(capsys: pytest.CaptureFixture[str], teacher: Path, tmp_path: Path) -> None:
    err = fails(capsys, tmp_path / "o", "--model", str(teacher), "--images", "1")
    assert "1 image to look at; expected at least 2" in err


def test_a_mistyped_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["diagnose", "atention", "--model", "x", "--data", "digits", "--out", "o"]) == 2
    assert "attention" in capsys.readouterr().err


def test_images_that_are_not_square() -> None:
    """A model of oblong images is refused before the long work."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=1)
    backbone = Backbone(
        model,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=(32, 64),
        origin=Origin("oblong", "random"),
    )
    with pytest.raises(ModelError, match=r"'oblong' sees 32x64 .*expected .* square images"):
        diagnose_attention._bias("oblong", backbone)


def test_layers_of_channels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """XCiT attends among channels: that has no distance."""
    err = fails(capsys, tmp_path / "o", "--model", "timm/xcit_nano_12_p16_224", *RANDOM)
    assert "attends among" in err


def test_a_single_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory = tmp_path / "single_head.py"
    factory.write_text(
        "import timm\n"
        "def make():\n"
        "    return timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, num_heads=1,\n"
        "        num_classes=0, global_pool='')\n"
    )
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        found = diagnosed(tmp_path / "o", model="single_head:make", image_size=32, images=4)
    finally:
        sys.path.remove(str(tmp_path))
    assert "a layer with a single head has no similarity" in capsys.readouterr().err
    layer = json.loads(found.record.read_text())["results"]["models"][0]["layers"][0]
    assert layer["similarity"] is None
    assert layer["divergence_error"] is None
    assert len(layer["distance"]) == 1

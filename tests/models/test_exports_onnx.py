"""ONNX graphs, run by onnxruntime."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import images, small_beit, small_swin, small_vit
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone, CustomBackbone, Origin
from featdistill.models.classifier import build_classifier
from featdistill.models.export import export
from featdistill.models.exports import to_onnx

for module in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is not installed")

NAMES = ("cat", "dog", "hen")


def classifier() -> Backbone:
    return build_classifier(small_beit(depth=1), class_names=NAMES).eval()


class Convolution(nn.Module):
    """A user's own module, without prefix or classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


def custom() -> Backbone:
    return CustomBackbone(Convolution(), image_size=32, origin=Origin("mine:make", "own")).eval()


CASES: dict[str, tuple[Callable[[], Backbone], list[str]]] = {
    "classifier": (classifier, ["map", "prefix", "pooled", "logits"]),
    "swin": (
        lambda: small_swin(depths=(2, 1), num_heads=(1, 2)),
        ["map", "pooled"],
    ),
    "own module": (custom, ["map", "pooled"]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_graph_takes_pixels_and_any_batch(name: str, tmp_path: Path) -> None:
    import onnxruntime

    make, outputs = CASES[name]
    backbone = make()
    done = export(backbone, tmp_path / "out", to="onnx")
    assert done.difference <= 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"))
    assert [o.name for o in session.get_outputs()] == outputs
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    assert isinstance(session.get_inputs()[0].shape[0], str)
    x = images(5, 32, seed=7)  # neither the traced batch nor the checked ones
    seen = backbone(x)
    for output, value in zip(outputs, session.run(None, {"images": x.numpy()}), strict=True):
        right = getattr(seen, output).numpy()
        assert value == pytest.approx(right, rel=1e-3, abs=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["image_size"]) == [32, 32]
    assert json.loads(said["class_names"]) == list(backbone.class_names or ())
    assert json.loads(said["mean"]) == pytest.approx(backbone.rgb[0])
    assert said["spec"] == backbone.origin.spec.rpartition("/")[2]
    written = (tmp_path / "out/model.onnx").read_bytes()
    for trace in ('File "', sys.prefix, str(Path.cwd())):
        assert trace.encode() not in written
    assert not any(m.fused_attn is False for m in backbone.modules() if hasattr(m, "fused_attn"))


def test_large_weights_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "_INLINE_LIMIT", 0)
    done = export(custom(), tmp_path / "out", to="onnx")
    assert (tmp_path / "out/model.onnx.data").is_file()
    assert any("model.onnx.data" in note for note in done.notes)
    scope: dict[str, Any] = {"images": images(1, 32).numpy()}
    exec(done.snippet, scope)
    assert len(scope["outputs"]) == 2


class Deciding(nn.Module):
    """Looks at its values, which no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::8, ::8] if bool(x.mean() > 0) else -x[:, :, ::8, ::8]


def test_module_that_cannot_be_traced(tmp_path: Path) -> None:
    backbone = CustomBackbone(Deciding(), image_size=32, origin=Origin("mine:make", "own")).eval()
    with pytest.raises(ModelError, match="its code cannot be traced") as error:
        export(backbone, tmp_path / "out", to="onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_plain_vit_and_deep_swin(tmp_path: Path) -> None:
    for number, backbone in enumerate((small_vit(), small_swin())):
        assert export(backbone, tmp_path / str(number), to="onnx").difference <= 1e-5

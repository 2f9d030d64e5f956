"""Exports as plain timm reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from model_zoo import images, small_beit, small_swin, small_vit, wrap
from safetensors.torch import load_file
from torch import Tensor

from featdistill.core.errors import ModelError, RunError
from featdistill.models.backbone import Backbone
from featdistill.models.classifier import build_classifier
from featdistill.models.export import export_timm
from featdistill.models.load import load_backbone, resize

NAMES = ("cat", "dog", "hen")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def classifier() -> Backbone:
    return build_classifier(small_beit(), class_names=NAMES).eval()


def swin_classifier() -> Backbone:
    return build_classifier(small_swin(), class_names=NAMES).eval()


MODELS: dict[str, Callable[[], Backbone]] = {
    "shared-rpb": small_beit,
    "rpb": lambda: small_beit("rpb"),
    "ape": lambda: small_beit("ape"),
    "none": lambda: small_beit("none"),
    "vit": small_vit,
    "swin": small_swin,
    "classifier": classifier,
    "swin-classifier": swin_classifier,
}


@pytest.fixture(scope="session", params=MODELS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Backbone, Path]:
    backbone = MODELS[request.param]()
    folder = tmp_path_factory.mktemp("runs") / "export"
    done = export_timm(backbone, folder)
    assert done.difference <= 1e-5
    return backbone, folder


def in_timm(folder: Path, **options: object) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def seen(backbone: Backbone, x: Tensor) -> Tensor:
    return (x - backbone.mean) / backbone.std


@torch.no_grad()
def test_timm_gives_equal_features(exported: tuple[Backbone, Path]) -> None:
    backbone, folder = exported
    model = in_timm(folder)
    x = seen(backbone, images(2, 32))
    torch.testing.assert_close(
        model.forward_features(x), backbone.model.forward_features(x), **CLOSE
    )
    torch.testing.assert_close(model(x), backbone.model(x), **CLOSE)


@torch.no_grad()
def test_with_other_classes(exported: tuple[Backbone, Path]) -> None:
    backbone, folder = exported
    model = in_timm(folder, num_classes=7)
    x = seen(backbone, images(2, 32))
    assert model(x).shape == (2, 7)
    torch.testing.assert_close(
        model.forward_features(x), backbone.model.forward_features(x), **CLOSE
    )


@torch.no_grad()
def test_at_another_image_size(exported: tuple[Backbone, Path]) -> None:
    backbone, folder = exported
    model = in_timm(folder, img_size=64)
    ours = load_backbone(str(folder), image_size=64)
    x = seen(backbone, images(2, 64))
    if not any("relative_position_bias_table" in n for n in model.state_dict()):
        # timm resamples bias tables in a way of its own (the model card says so)
        torch.testing.assert_close(
            model.forward_features(x), ours.model.forward_features(x), **CLOSE
        )
    torch.testing.assert_close(
        ours(images(2, 64)).map, resize(load_backbone(str(folder)), 64)(images(2, 64)).map, **CLOSE
    )


@torch.no_grad()
def test_as_a_pyramid(exported: tuple[Backbone, Path]) -> None:
    backbone, folder = exported
    model = in_timm(folder, features_only=True)
    maps = model(seen(backbone, images(2, 32)))
    last = range(len(backbone.layer_grids))[-len(maps) :]
    ours = backbone(images(2, 32), layers=tuple(last)).layers
    for index, map_ in zip(last, maps, strict=True):
        map_ = map_ if map_.shape[1] == ours[index].map.shape[1] else map_.permute(0, 3, 1, 2)
        torch.testing.assert_close(map_, ours[index].map, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("make", [small_beit, small_swin, small_vit])
def test_a_resized_model_exports_and_rebuilds_as_it_is(
    tmp_path: Path, make: Callable[[], Backbone]
) -> None:
    backbone = resize(make(), 64).eval()
    x = images(2, 64)
    export_timm(backbone, tmp_path / "export")
    torch.testing.assert_close(
        load_backbone(str(tmp_path / "export"))(x).map, backbone(x).map, **CLOSE
    )
    made = build_classifier(backbone, class_names=NAMES).eval()
    torch.testing.assert_close(
        made(x, layers=(0,)).layers[0].map, backbone(x, layers=(0,)).layers[0].map, **CLOSE
    )


def test_config_has_every_argument(exported: tuple[Backbone, Path]) -> None:
    backbone, folder = exported
    config = json.loads((folder / "config.json").read_text())
    plain = json.loads(json.dumps(dict(backbone.build.arguments)))
    assert config["model_args"].pop("global_pool") in ("token", "avg")
    plain.pop("global_pool", None)
    assert plain.pop("num_classes") == config["num_classes"] == backbone.num_classes
    assert config["model_args"] == plain
    assert config["model_args"]["img_size"] == 32
    assert config["architecture"] == backbone.build.architecture
    pretrained = config["pretrained_cfg"]
    assert pretrained["input_size"] == [3, 32, 32]
    assert pretrained["mean"] == pytest.approx(backbone.rgb[0])
    assert pretrained["std"] == pytest.approx(backbone.rgb[1])


@pytest.mark.parametrize(
    ("name", "pool"), [("shared-rpb", "token"), ("classifier", "avg"), ("swin", "avg")]
)
def test_config_says_how_to_pool(tmp_path: Path, name: str, pool: str) -> None:
    export_timm(MODELS[name](), tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["model_args"]["global_pool"] == pool


def test_weights_are_all_there_and_nothing_else(exported: tuple[Backbone, Path]) -> None:
    backbone, folder = exported
    tensors, state = load_file(folder / "model.safetensors"), backbone.model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[k], state[k]) for k in state)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert list(folder.parent.iterdir()) == [folder]


@torch.no_grad()
def test_label_names_are_kept(tmp_path: Path) -> None:
    backbone = classifier()
    export_timm(backbone, tmp_path / "export")
    model = in_timm(tmp_path / "export")
    assert tuple(model.pretrained_cfg["label_names"]) == NAMES
    again = load_backbone(str(tmp_path / "export"))
    assert again.class_names == NAMES
    assert torch.equal(again(images(2, 32)).logits, backbone(images(2, 32)).logits)


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    export_timm(small_beit("ape"), tmp_path / "export")
    backbone = classifier()
    export_timm(backbone, tmp_path / "export")
    assert load_backbone(str(tmp_path / "export")).class_names == NAMES


def test_export_leaves_the_mode(tmp_path: Path) -> None:
    backbone = small_beit().train()
    export_timm(backbone, tmp_path / "export")
    assert backbone.training
    assert backbone.model.training


def test_card(tmp_path: Path) -> None:
    export_timm(small_beit(), tmp_path / "run" / "export", card={"teacher": "DINO"})
    text = (tmp_path / "run/export/README.md").read_text()
    assert text.startswith("---\nlibrary_name: timm\n")
    assert "- teacher: DINO" in text
    assert "global_pool='avg'" in text


def test_snippet_runs(tmp_path: Path) -> None:
    done = export_timm(small_beit(), tmp_path / "export")
    scope: dict[str, object] = {}
    exec(done.snippet, scope)
    assert isinstance(scope["model"], torch.nn.Module)


def test_model_that_is_not_timms(tmp_path: Path) -> None:
    backbone = wrap(small_beit().model, (32, 32))
    with pytest.raises(ModelError, match="not an architecture of timm"):
        export_timm(backbone, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_build_that_does_not_describe_the_model_is_caught(tmp_path: Path) -> None:
    right = small_beit("ape")
    wrong = small_beit("ape", num_heads=4)
    right.build = wrong.build
    with pytest.raises(ModelError, match="not exact"):
        export_timm(right, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the export"):
        export_timm(small_beit(), tmp_path / "file" / "export")

"""`load_backbone`: every way to name a model, and every way to get it wrong."""

from __future__ import annotations

import importlib
import json
import pickle
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from model_zoo import images, small_beit, stir
from safetensors.torch import save_file
from torch import Tensor

from featdistill.core.errors import ModelError, RunError
from featdistill.models.backbone import Backbone
from featdistill.models.checkpoints.files import read_tree
from featdistill.models.export import export_timm
from featdistill.models.load import load_backbone, resize
from featdistill.models.weights import load_exactly

VIT = "timm/vit_tiny_patch16_224"


def complaint(spec: str, **options: object) -> str:
    """The one line that loading fails with."""
    with pytest.raises(ModelError) as caught:
        load_backbone(spec, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- names


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("timm/vit_tiny_patch16_244", "'timm/vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224", "'timm/vit_tiny_patch16_224'"),
        ("vit_base_patch16_224.dino", "'timm/vit_base_patch16_224.dino'"),
        ("timm:vit_tiny_patch16_224", "'timm/vit_tiny_patch16_224'"),
        ("hf_hub:timm/vit_tiny", "'hf-hub:timm/vit_tiny'"),
        ("local-dir:exported", "give the folder or file itself: exported"),
        ("https://example.org/w.pth", "download it, and give the file"),
        ("esvit-swin-b-w7", "a file to download"),
        ("timm/vit_base_patch16_224.dinoo", "'dino'"),
        ("vit-b", "student"),
        ("timm/xyzzy", "featdistill models"),
    ],
)
def test_typos(spec: str, hint: str) -> None:
    line = complaint(spec)
    assert spec.removeprefix("timm/").partition(".")[0] in line
    assert hint in line


def test_mistyped_folder(tmp_path: Path) -> None:
    (tmp_path / "my-run").mkdir()
    assert f"did you mean '{tmp_path}/my-run'?" in complaint(str(tmp_path / "my-rnu"))


def test_what_is_like_nothing_gets_no_suggestion() -> None:
    assert "did you mean" not in complaint("nomodule")


def test_a_bare_checkpoint_needs_an_architecture(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "dino.pth")
    line = complaint(str(tmp_path / "dino.pth"))
    assert "timm/NAME" in line
    assert "dino.pth" in line


def test_weights_for_a_model_that_has_its_own(tmp_path: Path) -> None:
    assert "random" in complaint(str(tmp_path), weights="random")


def test_no_drop_path_to_set() -> None:
    assert "no drop path" in complaint("timm/ghostnet_050", weights="random", drop_path=0.1)


@pytest.mark.parametrize("size", [70, 8])
def test_image_size_that_the_patch_does_not_divide(size: int) -> None:
    line = complaint(VIT, weights="random", image_size=size)
    assert str(size) in line
    assert "multiple of its patch of 16" in line


@pytest.mark.parametrize("size", [70, 8])
def test_resize_to_a_size_that_the_patch_does_not_divide(size: int) -> None:
    backbone = load_backbone(VIT, weights="random", image_size=64)
    with pytest.raises(ModelError, match=rf"{size} pixels.*multiple of its patch of 16"):
        resize(backbone, size)


# --- the hub, out of reach


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_hub_out_of_reach(offline: None) -> None:
    line = complaint("timm/vit_tiny_patch16_224.augreg_in21k")
    assert "vit_tiny_patch16_224.augreg_in21k" in line
    assert "--teacher-weights" in line


@pytest.fixture
def cached(offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub whose repository `me/model` has been downloaded before; returns its empty folder."""
    folder = tmp_path / "models--me--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


@torch.no_grad()
def test_a_hub_repository_in_either_layout(cached: Path) -> None:
    from transformers import ViTConfig, ViTModel

    settings = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=128,
        image_size=32,
    )
    theirs = ViTModel(settings).eval()
    theirs.save_pretrained(cached)
    backbone = load_backbone("hf-hub:me/model@main")
    assert backbone.origin.spec == "hf-hub:me/model@main"
    mean, std = (torch.tensor(v)[:, None, None] for v in backbone.rgb)
    right = theirs((images(2, 32) - mean) / std).last_hidden_state
    torch.testing.assert_close(backbone(images(2, 32)).prefix, right[:, :1], atol=1e-4, rtol=1e-4)

    export_timm(small_beit(), cached)
    assert torch.equal(
        load_backbone("hf-hub:me/model")(images(2, 32)).map, small_beit()(images(2, 32)).map
    )


def test_a_hub_repository_out_of_reach(offline: None) -> None:
    line = complaint("hf-hub:me/other")
    assert "'hf-hub:me/other'" in line
    assert "out of reach" in line
    assert "OWNER/NAME" in complaint("hf-hub:")


def test_no_weights_published(offline: None) -> None:
    assert "no pretrained weights" in complaint("timm/test_vit4", weights="hub")


# --- checkpoint files


@pytest.fixture(scope="session")
def trained() -> Backbone:
    """A full-size vit_tiny whose weights are nobody's initialisation."""
    backbone = load_backbone(VIT, weights="random", seed=7)
    stir(backbone.model)
    return backbone


@pytest.fixture(scope="session")
def state(trained: Backbone) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in trained.model.state_dict().items()}


def write(tensors: dict[str, Tensor], path: Path, wrapper: str | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors if wrapper is None else {wrapper: tensors, "epoch": 3}, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "wrapper"),
    [
        ("w.safetensors", None),
        ("w.pth", None),
        ("w.pt", "model"),
        ("w.bin", "state_dict"),
    ],
)
def test_file_loads_exactly(
    tmp_path: Path, trained: Backbone, state: dict[str, Tensor], file: str, wrapper: str | None
) -> None:
    path = write(state, tmp_path / file, wrapper)
    got = load_backbone(VIT, weights=str(path))
    assert got.model.state_dict().keys() == state.keys()
    assert all(torch.equal(got.model.state_dict()[k], v) for k, v in state.items())
    x = images(1, 224)
    assert torch.equal(got(x).logits, trained(x).logits)
    assert file in got.origin.weights


def test_file_without_a_head(tmp_path: Path, state: dict[str, Tensor]) -> None:
    body = {k: v for k, v in state.items() if not k.startswith("head.")}
    got = load_backbone(VIT, weights=str(write(body, tmp_path / "w.safetensors")))
    assert got.num_classes == 0
    assert torch.equal(got.model.pos_embed, state["pos_embed"])


def test_file_with_a_head_of_other_classes(tmp_path: Path, state: dict[str, Tensor]) -> None:
    own = {**state, "head.weight": torch.ones(3, 192), "head.bias": torch.ones(3)}
    got = load_backbone(VIT, weights=str(write(own, tmp_path / "w.safetensors")))
    assert got.num_classes == 3
    assert torch.equal(got.model.head.weight, own["head.weight"])


@torch.no_grad()
def test_file_at_another_image_size(
    tmp_path: Path, trained: Backbone, state: dict[str, Tensor]
) -> None:
    path = write(state, tmp_path / "w.safetensors")
    got = load_backbone(VIT, weights=str(path), image_size=96)
    ours = load_backbone(VIT, weights=str(path))
    assert got.image_size == (96, 96)
    assert torch.equal(got(images(1, 96)).map, resize(ours, 96)(images(1, 96)).map)


def spoil(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    spoilt = dict(state)
    value = spoilt.pop("blocks.3.mlp.fc1.weight")
    if how == "renamed":
        spoilt["blocks.3.mlp.w1.weight"] = value
    elif how == "reshaped":
        spoilt["blocks.3.mlp.fc1.weight"] = value[:-1].contiguous()
    return spoilt


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("missing", ["1 missing (blocks.3.mlp.fc1.weight)"]),
        ("renamed", ["1 missing", "1 unexpected (blocks.3.mlp.w1.weight)"]),
        ("reshaped", ["1 of another shape", "blocks.3.mlp.fc1.weight (767, 192) for (768, 192)"]),
    ],
)
def test_file_that_does_not_fit(
    tmp_path: Path, state: dict[str, Tensor], how: str, names: list[str]
) -> None:
    path = write(spoil(state, how), tmp_path / "w.safetensors")
    line = complaint(VIT, weights=str(path))
    assert "w.safetensors" in line
    assert all(name in line for name in names)


def test_a_failed_load_leaves_the_model_alone(state: dict[str, Tensor]) -> None:
    module = torch.nn.Linear(2, 2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ModelError, match="missing"):
        load_exactly(module, {"weight": torch.ones(2, 2)}, what="file")
    assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())


def test_load_exactly_counts() -> None:
    module = torch.nn.Linear(2, 2)
    tensors = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "head.x": torch.ones(1)}
    line = load_exactly(module, tensors, what="f", left_out=lambda k: k.startswith("head."))
    assert line == "loaded 2 of 3 tensors, left out 1, missing 0"
    with pytest.raises(ModelError, match=r"1 unexpected \(head\.x\)"):
        load_exactly(module, tensors, what="f")


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (Path.mkdir, (self.canary,))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_refused_and_does_not_run(
    tmp_path: Path, suffix: str, zipped: bool
) -> None:
    canary, path = tmp_path / "canary", tmp_path / f"w{suffix}"
    if zipped:
        torch.save({"state_dict": Hostile(canary)}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Hostile(canary)}))
    assert "is refused: it " in complaint(VIT, weights=str(path))
    assert not canary.exists()
    # the canary does sing where code is run
    with open(path, "rb") as file:
        torch.load(path, weights_only=False) if zipped else pickle.load(file)
    assert canary.exists()


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors", "w.bin"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(range(256)) * 40])
def test_file_that_is_no_checkpoint(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    line = complaint(VIT, weights=str(tmp_path / file))
    assert file in line
    assert "is not a checkpoint" in line


def test_file_cut_off(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for file in ("w.safetensors", "w.pth"):
        path = write(state, tmp_path / file)
        path.write_bytes(path.read_bytes()[:-1000])
        line = complaint(VIT, weights=str(path))
        assert "is not a checkpoint" in line
        assert "truncated" in line


@pytest.mark.parametrize("value", [[1, 2], {"epoch": 3}, torch.zeros(2), {"model": {}}])
def test_file_without_named_tensors(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "w.pth")
    assert "no named tensors" in complaint(VIT, weights=str(tmp_path / "w.pth"))


def test_file_that_is_absent(tmp_path: Path) -> None:
    assert "no checkpoint file at" in complaint(VIT, weights=str(tmp_path / "gone.pth"))


def test_read_tensors_is_exact(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.5, float("nan")]), "b": torch.arange(4)}
    for file in ("w.safetensors", "w.pth"):
        got = read_tree(write(tensors, tmp_path / file))
        assert got.keys() == tensors.keys()
        assert torch.equal(got["b"], tensors["b"])
        assert torch.equal(got["a"].view(torch.int32), tensors["a"].view(torch.int32))


# --- package.module:factory

_MODULE = """
import torch
from torch import nn
from featdistill.core.types import Features

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 8, 8)

class Map(Body):
    mean, std = (0.0, 0.1, 0.2), (1.0, 2.0, 4.0)
    image_size = 32
    def forward(self, x):
        return self.conv(x)

class Tokens(Body):
    num_prefix_tokens = 1
    image_size = 32
    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)

class Rich(Body):
    image_size = 32
    def forward(self, x):
        map_ = self.conv(x)
        prefix = torch.stack([map_.mean((2, 3)), map_.amax((2, 3))], 1)
        return Features(map_, prefix, ("reg1", "cls"), map_[:, :4, 0, 0], map_[:, :2, 1, 1])

class Wrong(Body):
    def forward(self, x):
        return {"features": x}

def number():
    return 3

def breaks():
    raise RuntimeError("no such GPU")

def wants(argument):
    return argument

NOTHING = None
"""


@pytest.fixture(scope="session")
def factories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "users_own_models.py").write_text(_MODULE)
    sys.path.insert(0, str(folder))
    yield "users_own_models"
    sys.path.remove(str(folder))
    sys.modules.pop("users_own_models", None)


@torch.no_grad()
def test_factory_of_a_map(factories: str) -> None:
    backbone = load_backbone(f"{factories}:Map")
    x = images(2, 32)
    mean = torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1)
    std = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    expected = backbone.model.module.conv((x - mean) / std)
    got = backbone(x)
    torch.testing.assert_close(got.map, expected)
    torch.testing.assert_close(got.pooled, expected.mean((2, 3)))
    assert got.prefix.shape == (2, 0, 6)
    assert (backbone.width, backbone.grid, backbone.image_size) == (6, (4, 4), (32, 32))
    assert got.logits is None
    assert load_backbone(f"{factories}:Map", image_size=64).grid == (8, 8)


@torch.no_grad()
def test_factory_of_tokens(factories: str) -> None:
    backbone = load_backbone(f"{factories}:Tokens")
    got = backbone(images(2, 32))
    assert (backbone.prefix_names, backbone.grid, backbone.width) == (("cls",), (4, 4), 6)
    torch.testing.assert_close(got.prefix[:, 0], got.map.mean((2, 3)))


@torch.no_grad()
def test_factory_of_features(factories: str) -> None:
    backbone = load_backbone(f"{factories}:Rich")
    got = backbone(images(2, 32))
    assert (backbone.grid, backbone.width, backbone.num_prefix) == ((4, 4), 6, 2)
    torch.testing.assert_close(got.prefix[:, 0], got.map.mean((2, 3)))
    torch.testing.assert_close(got.prefix[:, 1], got.map.amax((2, 3)))


@torch.no_grad()
def test_factory_of_features_keeps_what_the_module_says(factories: str) -> None:
    backbone = load_backbone(f"{factories}:Rich")
    got = backbone(images(2, 32))
    assert got.prefix_names == backbone.prefix_names == ("reg1", "cls")
    torch.testing.assert_close(got.pooled, got.map[:, :4, 0, 0])
    torch.testing.assert_close(got.logits, got.map[:, :2, 1, 1])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Mpa", ["no callable 'Mpa'", "'Map'"]),
        ("NOTHING", ["no callable 'NOTHING'"]),
        ("number", ["returned a int", "torch.nn.Module"]),
        ("breaks", ["fails (RuntimeError: no such GPU, ", "users_own_models.py, line "]),
        ("wants", ["cannot be called without arguments", "'argument'"]),
        ("Wrong", ["returned a dict", "a map (B, C, h, w)"]),
    ],
)
def test_factory_that_is_wrong(factories: str, name: str, words: list[str]) -> None:
    line = complaint(f"{factories}:{name}")
    assert all(word in line for word in words)


def test_factory_of_a_module_that_breaks(factories: str) -> None:
    folder = Path(str(importlib.import_module(factories).__file__)).parent
    (folder / "users_broken_models.py").write_text("1 / 0")
    line = complaint("users_broken_models:build")
    assert "ZeroDivisionError" in line
    assert "users_broken_models.py, line 1" in line


def test_factory_of_a_module_that_is_not_there() -> None:
    assert "cannot import 'no_such_module'" in complaint("no_such_module:build")


# --- folders


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Path]:
    backbone = small_beit()
    run = tmp_path_factory.mktemp("run")
    export_timm(backbone, run / "export")
    (run / "config.yaml").write_text("{}")
    return backbone, run


@torch.no_grad()
@pytest.mark.parametrize("part", [".", "export"])
def test_run_and_export_folders_give_the_model_back(
    exported: tuple[Backbone, Path], part: str
) -> None:
    backbone, run = exported
    got = load_backbone(str(run / part))
    x = images(2, 32)
    assert torch.equal(got(x).map, backbone(x).map)
    assert torch.equal(got(x).prefix, backbone(x).prefix)
    assert got.rgb == backbone.rgb
    assert got.build == backbone.build
    assert not got.training


def test_folder_at_another_size(exported: tuple[Backbone, Path]) -> None:
    assert load_backbone(str(exported[1]), image_size=48).grid == (6, 6)


def test_run_without_an_export(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(RunError, match=r"no export yet.*--resume"):
        load_backbone(str(tmp_path))


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a model"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[1]", "does not hold a JSON object"),
        ("{", "cannot read"),
        ("{}", "names no architecture"),
        (json.dumps({"architecture": "resnet18"}), "input_size"),
    ],
)
def test_folder_with_a_bad_config(tmp_path: Path, config: str, words: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert words in complaint(str(tmp_path))


def test_folder_without_weights(exported: tuple[Backbone, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((exported[1] / "export/config.json").read_bytes())
    assert "no weights" in complaint(str(tmp_path))


# --- seeds


def test_random_weights_are_a_pure_function_of_the_seed() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (
        load_backbone("timm/resnet18", weights="random", seed=s).model.conv1.weight
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_timm_knows_the_models_of_these_tests() -> None:
    assert timm.is_model("vit_tiny_patch16_224")
    assert timm.is_model("ghostnet_050")

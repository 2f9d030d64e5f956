"""`featdistill features` as a user meets it: files, record, resume, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import featdistill
from featdistill.cli.main import main
from featdistill.core.errors import ConfigError, DataError, ModelError, RunError
from featdistill.data.views import EvalView

OPTIONS: dict[str, Any] = {"batch_size": 4, "workers": 0, "device": "cpu"}
RANDOM = ["--model", "timm/vit_tiny_patch16_224", "--weights", "random", "--image-size", "32"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images of two classes."""
    rng = np.random.default_rng(0)
    for i in range(10):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_all_features_of_all_images(classifier: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = featdistill.features(
        model=classifier,
        data=images,
        out=out,
        what="pooled,logits,map",
        layers=-2,
        shard_images=6,
        **OPTIONS,
    )
    assert [f.name for f in done.files] == [f"features-0000{i}.safetensors" for i in (0, 1)]
    assert (done.out, done.images, done.unreadable) == (out, 10, 0)
    shards = [load_file(f) for f in done.files]
    got = {name: torch.cat([s[name] for s in shards]) for name in shards[0]}
    assert set(got) == {"pooled", "logits", "map", "layers.0.map", "index", "label"}
    assert got["label"].tolist() == [0] * 5 + [1] * 5
    model = featdistill.load_backbone(str(classifier))
    view = EvalView(8)
    files = sorted(images.glob("*/*.png"))
    pixels = [torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files]
    with torch.no_grad():
        seen = model(torch.stack([view(p)[0] for p in pixels]).float() / 255, layers=(0,))
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got["pooled"], seen.pooled, **close)
    torch.testing.assert_close(got["logits"], seen.logits, **close)
    torch.testing.assert_close(got["map"], seen.map, **close)
    torch.testing.assert_close(got["layers.0.map"], seen.layers[0].map, **close)


def test_the_record_says_what_made_them(classifier: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (images / "a/2.png").write_bytes(b"no image")
    data = {"path": str(images), "bad_image_limit": 0.2, "batch_size": 4, "workers": 0}
    done = featdistill.features(
        model=classifier, data=data, out=out, what=["map", "prefix"], dtype="float16"
    )
    assert (done.images, done.unreadable) == (9, 1)
    record = json.loads(done.record.read_text())
    assert record["kind"] == "features"
    assert record["config"]["what"] == ["map", "prefix"]
    results = record["results"]
    model = featdistill.load_backbone(str(classifier))
    mean, std = model.rgb
    assert results["model"]["weights"] == model.origin.weights
    assert results["model"]["image_size"] == [8, 8]
    assert results["model"]["grid"] == list(model.grid)
    assert results["model"]["prefix_names"] == list(model.prefix_names)
    assert (results["model"]["input"]["mean"], results["model"]["input"]["std"]) == (
        list(mean),
        list(std),
    )
    assert results["tensors"]["map"] | {"units": ""} == {
        "shape": [32, 2, 2],
        "dimensions": "C h w",
        "dtype": "float16",
        "meaning": "patch tokens, after the final norm",
        "units": "",
    }
    assert results["rows"] == 9
    assert results["data"]["images"] == 10
    assert results["data"]["classes"] == ["a", "b"]
    [unreadable] = results["unreadable"]
    assert unreadable["index"] == 1
    assert unreadable["reason"].startswith("a/2.png: ")


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_the_snippet_reads_them_back(
    teacher: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format: str,
) -> None:
    featdistill.features(
        model=teacher, data=images, out=tmp_path / "out", what="map", format=format, **OPTIONS
    )
    said = capsys.readouterr().err
    found: dict[str, Any] = {}
    exec(compile(said[said.index("from pathlib") :], "snippet", "exec"), found)
    assert tuple(found["map"].shape) == (10, 32, 2, 2)


def test_a_part_is_chosen_as_predict_chooses_it(teacher: Path, tmp_path: Path) -> None:
    for part, count in ((None, 599), ("test", 599), ("train", 1198)):
        done = featdistill.features(
            model=teacher,
            data="digits",
            out=tmp_path / str(part),
            **({} if part is None else {"part": part}),
            **{**OPTIONS, "batch_size": 256},
        )
        assert done.images == count
    with pytest.raises(DataError, match=r"no val part; give --part train or test"):
        featdistill.features(model=teacher, data="digits", out=tmp_path / "x", part="val")
    held = featdistill.features(
        model=teacher, data="digits", val_fraction=0.1, part="val", out=tmp_path / "y"
    )
    assert held.images == 120


def test_one_image_is_enough(teacher: Path, images: Path, tmp_path: Path) -> None:
    done = featdistill.features(model=teacher, data=images / "a/0.png", out=tmp_path / "one")
    assert done.images == 1
    assert "label" not in load_file(done.files[0])


def run(out: Path, images: Path, *words: str) -> int:
    data = ["--data", str(images), "--batch-size", "4", "--shard-images", "4", "--device", "cpu"]
    return main(["features", *RANDOM, *data, "--out", str(out), *words])


def unchanging(folder: Path) -> dict[str, bytes]:
    """The files that no clock, place or machine has a part in."""
    dated = ("features.json", "environment.json", "config.yaml", "log.txt")
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in dated}


def test_the_same_command_with_resume(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, images) == 0
    shutil.copytree(whole, cut)
    # as a kill after the first shard leaves it
    shards = json.loads((cut / "shards.json").read_text())
    shards["shards"] = shards["shards"][:1]
    (cut / "shards.json").write_text(json.dumps(shards))
    for name in ("features-00002.safetensors", "images.csv", "features.json"):
        (cut / name).unlink()
    capsys.readouterr()
    assert run(cut, images) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(cut, images, "--resume", "--dtype", "float16", "--layers", "1") == 2
    err = capsys.readouterr().err
    assert "dtype: 'float32' -> 'float16'" in err
    assert "layers: [] -> [1]" in err
    assert run(cut, images, "--resume", "--workers", "0") == 0
    assert "4 of 10 images are done" in capsys.readouterr().err
    assert unchanging(cut) == unchanging(whole)
    results = [json.loads((f / "features.json").read_text())["results"] for f in (cut, whole)]
    assert results[0] == results[1]
    assert yaml.safe_load((cut / "config.yaml").read_text())["shard_images"] == 4


# --- mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--layers", "12"], "has no layer 12; expected 0 to 11, or -12 to -1"),
        (["--layers", "3,x"], "given 'x'"),
        (["--what", "poled"], "did you mean 'pooled'?"),
        (["--what", ","], "--what (what): name at least one of"),
        (["--format", "parket"], "did you mean 'parquet'?"),
        (["--dtype", "float61"], "did you mean 'float16' or 'float32'?"),
        (["--part", "val"], "no val part"),
        (["--part", "vall"], "did you mean 'val'?"),
        (["--shard-images", "0"], "--shard-images"),
        (["--data.labels", "3"], "--data.labels is of no use"),
        (["--image-size", "30"], "a multiple of its patch of 16"),
        (["--lyers", "3"], "did you mean 'layers'?"),
        (["--resume"], "there is no run to resume"),
    ],
)
def test_mistakes(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    assert run(tmp_path / "out", images, *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert says in err
    assert not (tmp_path / "out").exists()


def test_what_the_model_lacks(student: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="no classifier; leave logits out"):
        featdistill.features(model=student, data=images, out=out, what="pooled,logits")
    with pytest.raises(ModelError, match="no prefix tokens; leave prefix out"):
        featdistill.features(
            model="timm/resnet18", weights="random", data=images, out=out, what="prefix"
        )
    assert not out.exists()


class Plain(torch.nn.Module):
    """A user's own model, of which nothing but its output is known."""

    image_size = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::4, ::4]


def test_a_model_without_layers(images: Path, tmp_path: Path) -> None:
    spec = f"{__name__}:Plain"
    with pytest.raises(ModelError, match=r"no layer 0; leave --layers out"):
        featdistill.features(model=spec, data=images, out=tmp_path / "out", layers=[0])
    done = featdistill.features(model=spec, data=images, out=tmp_path / "out", what="mean,map")
    assert load_file(done.files[0])["map"].shape == (10, 3, 2, 2)


def test_what_does_not_fit_on_the_disk(
    teacher: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(RunError, match=r"take 5.2 KiB, and .* has room for 1000 bytes"):
        featdistill.features(model=teacher, data=images, out=tmp_path / "out", what="map")
    assert not (tmp_path / "out").exists()


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        featdistill.features(model="x", data="digits", what="poled", dtype="x", format="y")
    assert len(caught.value.problems) == 4

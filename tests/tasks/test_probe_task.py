"""`probe`: the number, what it leaves alone, what it leaves behind, and how it goes on."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import featdistill
from featdistill.core.errors import ConfigError, FeatDistillError, Interrupted, RunError
from featdistill.data.open import open_data
from featdistill.data.splits import label_budget, split_places
from featdistill.evaluation.features import extract
from featdistill.models.backbone import Backbone
from featdistill.models.weights import tensors_hash
from featdistill.tasks import probe as probe_task

OPTIONS: dict[str, Any] = {"data": "digits", "device": "cpu", "workers": 0}
TINY_PREDICT = {"device": "cpu", "workers": 0}
FEW: dict[str, Any] = {**OPTIONS, "labels": "10", "seeds": [1], "weight_decays": [1e-5, 1e-3]}


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "probe.json").read_text())["results"]


@pytest.fixture(scope="module")
def probed(teacher: Path) -> Path:
    out = teacher.parent / "probed"
    featdistill.probe(model=teacher, out=out, image_size=8, **OPTIONS)
    return out


# --- the number


def theirs(
    x: torch.Tensor, y: np.ndarray, queries: torch.Tensor, truth: np.ndarray, seed: int
) -> float:
    """scikit-learn's logistic regression on the same features; its C from the same split."""
    a, b = x.double().numpy(), queries.double().numpy()

    def fit(rows: np.ndarray, decay: float) -> tuple[Any, Any]:
        mean, std = a[rows].mean(0), a[rows].std(0)
        scale = np.where(std > 1e-6, std, np.inf) * np.sqrt((std > 1e-6).sum())
        model = LogisticRegression(C=1 / (decay * len(rows)), tol=1e-7, max_iter=2000)
        return model.fit((a[rows] - mean) / scale, y[rows]), lambda v: (v - mean) / scale

    rest, held = split_places(len(a), y, 0.2, seed)
    found = []
    for decay in 10.0 ** np.arange(-7, -1):
        model, standard = fit(rest, decay)
        found.append((model.score(standard(a[held]), y[held]), decay))
    model, standard = fit(np.arange(len(a)), max(found)[1])
    return float(model.score(standard(b), truth))


def test_within_a_point_of_scikit_learn_over_three_seeds(teacher: Path, probed: Path) -> None:
    backbone, data = featdistill.load_backbone(str(teacher)), open_data("digits")
    assert data.held_out is not None
    x, queries = (
        extract(backbone, part, how="mean", batch_size=256, workers=0)
        for part in (data.train, data.held_out)
    )
    expected = [
        theirs(x, data.train.labels, queries, data.held_out.labels, seed) for seed in (1, 2, 3)
    ]
    [model] = results(probed)["models"]
    assert model["top1"]["n"] == 3
    assert model["top1"]["mean"] == pytest.approx(np.mean(expected), abs=0.01)
    assert model["top1"]["mean"] > 0.6


def test_sgd_comes_near_it(teacher: Path, probed: Path, tmp_path: Path) -> None:
    featdistill.probe(
        model=teacher, out=tmp_path / "o", image_size=8, solver="sgd", seeds=[1], **OPTIONS
    )
    [one], [other] = results(tmp_path / "o")["models"], results(probed)["models"]
    [run] = one["runs"]
    assert len(run["grid"]) == 30
    assert run["steps"] == 1000
    assert run["top1"] == pytest.approx(other["top1"]["mean"], abs=0.05)


def test_the_record_is_what_its_arrays_say(probed: Path) -> None:
    found, arrays = results(probed), np.load(probed / "probe.npz")
    [model] = found["models"]
    hits = arrays["predictions"] == arrays["labels"]
    assert hits.shape == (1, 3, 599)
    for run, hit in zip(model["runs"], hits[0], strict=True):
        assert run["top1"] == pytest.approx(hit.mean())
        chosen = [t for t in run["grid"] if t["weight_decay"] == run["weight_decay"]]
        assert [t["val_top1"] for t in chosen] == [run["val_top1"]]
        assert sum(c["images"] for c in run["by_class"]) == 599
    tops = [run["top1"] for run in model["runs"]]
    assert model["top1"]["std"] == pytest.approx(np.std(tops, ddof=1))
    assert 0 < model["calibration_error"]["mean"] < 1
    assert model["top5"]["mean"] > model["top1"]["mean"]


def test_the_exported_classifier_predicts_what_was_scored(probed: Path, tmp_path: Path) -> None:
    first = np.load(probed / "probe.npz")["predictions"][0, 0]
    classifier = featdistill.load_backbone(str(probed))
    assert classifier.class_names == tuple(str(d) for d in range(10))
    said = featdistill.predict(model=probed, data="digits", top=1, **TINY_PREDICT)
    got = np.array([int(p.classes[0]) for p in said.predictions])
    assert (got == first).mean() > 0.998
    card = (probed / "export/README.md").read_text()
    assert "frozen" in card
    exported = featdistill.export(model=probed, out=tmp_path / "again")
    assert exported.difference < 1e-5
    assert "frozen" in (tmp_path / "again/README.md").read_text(), "the story goes on"


# --- what it leaves alone


RESNET = "timm/resnet18"


@pytest.mark.parametrize("style", ["grid", "online"])
def test_the_backbone_is_untouched(
    style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ResNet: a pass in training mode would move its running statistics."""
    kept: list[Backbone] = []
    real = probe_task.model_of

    def keep(*args: Any, **options: Any) -> Backbone:
        kept.append(real(*args, **options).train())
        next(m for m in kept[0].modules() if isinstance(m, nn.BatchNorm2d)).eval()
        return kept[0]

    monkeypatch.setattr(probe_task, "model_of", keep)
    options: dict[str, Any] = {"steps": 2, "batch_size": 16} if style == "online" else {}
    featdistill.probe(
        model=RESNET,
        weights="random",
        style=style,
        image_size=32,
        out=tmp_path / "o",
        **{**FEW, "weight_decays": None if style == "online" else [1e-3]},
        **options,
    )
    fresh = real(probe_task.ModelConfig(spec=RESNET, weights="random"), image_size=32)
    assert tensors_hash(kept[0]) == tensors_hash(fresh)
    modes = [m.training for m in kept[0].modules()]
    norms = [m.training for m in kept[0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [False, *[True] * (len(norms) - 1)]
    assert sum(not mode for mode in modes) == 1


# --- several models, budgets, crops


def test_models_side_by_side_on_the_same_labels(
    teacher: Path, student: Path, tmp_path: Path
) -> None:
    done = featdistill.probe(
        model=[teacher, student], out=tmp_path / "o", **{**FEW, "seeds": [3, 4]}
    )
    arrays = np.load(done.record.with_suffix(".npz"))
    assert arrays["predictions"].shape == (2, 2, 599)
    train = open_data("digits").train
    for seed, images in zip((3, 4), arrays["labelled_images"], strict=True):
        assert np.array_equal(images, label_budget(train, "10", seed).chosen)
    assert list(done.top1) == [str(teacher), str(student)]
    for name, path in done.exports.items():
        assert path is not None
        assert featdistill.load_backbone(str(path.parent)).num_classes == 10, name
    assert not list(done.out.glob("**/features"))
    with pytest.raises(RunError, match=r"several models.*give the folder of one"):
        featdistill.load_backbone(str(done.out))


def test_crops_train_and_the_centre_chooses(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    from featdistill.tasks import probe_grid

    real = probe_grid.solve_heads

    def spy(features: Any, labels: Any, rows: Any, **options: Any) -> Any:
        seen.append({"features": features, "labels": labels, "rows": rows})
        return real(features, labels, rows, **options)

    monkeypatch.setattr(probe_grid, "solve_heads", spy)
    featdistill.probe(model=student, out=tmp_path / "o", crops=2, **FEW)
    grid, refit = seen
    assert grid["features"].shape == (200, 32)
    assert (len(grid["rows"]), len(refit["rows"])) == (160, 200)
    first, second = grid["features"].chunk(2)
    assert not torch.equal(first, second), "each crop is its own"
    assert torch.equal(grid["labels"][:100], grid["labels"][100:])


@pytest.mark.parametrize(
    ("options", "channels", "exported"),
    [
        ({"pool": "both"}, 64, False),
        ({"pool": "cls", "layers": 2}, 64, False),
        ({"pool": "cls"}, 32, True),
        ({"pool": "model"}, 32, True),
    ],
    ids=str,
)
def test_pooling(
    teacher: Path,
    tmp_path: Path,
    options: dict[str, Any],
    channels: int,
    exported: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = featdistill.probe(model=teacher, out=tmp_path / "o", **{**FEW, **options})
    [model] = results(done.out)["models"]
    assert model["channels"] == channels
    assert (done.exports[str(teacher)] is not None) == exported
    assert ("no classifier that pools so" in capsys.readouterr().err) == (not exported)
    assert np.load(done.out / "seed-1/probe-fit.npz")["weight"].shape == (10, channels)
    if not exported:
        with pytest.raises(RunError, match="has no export"):
            featdistill.load_backbone(str(done.out))


def test_a_single_setting_needs_no_choice(student: Path, tmp_path: Path) -> None:
    """One label a class: there is none to choose by."""
    options = {**FEW, "labels": "1"}
    with pytest.raises(FeatDistillError, match="leaves none to choose a setting by"):
        featdistill.probe(model=student, out=tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()
    done = featdistill.probe(
        model=student, out=tmp_path / "o", **{**options, "weight_decays": [1e-4]}
    )
    [run] = results(done.out)["models"][0]["runs"]
    assert (run["labels"], run["grid"], run["val_top1"]) == (10, [], None)


def test_the_edge_of_the_grid_is_said(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**FEW, "labels": None, "weight_decays": [1e-1, 1.0]}
    done = featdistill.probe(model=student, out=tmp_path / "o", **options)
    [run] = results(done.out)["models"][0]["runs"]
    assert run["edge"] == ["weight_decay below"]
    assert "at the edge of the grid" in capsys.readouterr().err


# --- going on


def test_a_stopped_grid_goes_on(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featdistill.evaluation import logistic
    from featdistill.tasks import probe_grid

    options = {**FEW, "seeds": [1, 2]}
    whole = featdistill.probe(model=student, out=tmp_path / "whole", **options)
    real, calls = probe_grid.solve_heads, 0

    def stop(*args: Any, **given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # the second seed's grid
            signal.raise_signal(signal.SIGINT)
        return real(*args, **given)

    monkeypatch.setattr(probe_grid, "solve_heads", stop)
    with pytest.raises(Interrupted, match="--resume"):
        featdistill.probe(model=student, out=tmp_path / "halves", **options)
    monkeypatch.setattr(probe_grid, "solve_heads", logistic.solve_heads)
    made = {f: f.stat().st_mtime_ns for f in (tmp_path / "halves").glob("features/*/*.safetensors")}
    stamp = (tmp_path / "halves/seed-1/probe-fit.json").stat().st_mtime_ns
    assert len(made) == 2
    done = featdistill.probe(model=student, out=tmp_path / "halves", resume=True, **options)
    assert (tmp_path / "halves/seed-1/probe-fit.json").stat().st_mtime_ns == stamp
    arrays = [np.load(d.record.with_suffix(".npz")) for d in (whole, done)]
    assert np.array_equal(*(a["predictions"] for a in arrays))


ONLINE: dict[str, Any] = {
    **OPTIONS,
    "style": "online",
    "image_size": 8,
    "batch_size": 64,
    "steps": 12,
    "seeds": [5],
    "run": {"checkpoint_every": 4, "tensorboard": False, "log_every": 4},
}


def test_online_learns_and_goes_on_after_a_kill(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = featdistill.probe(model=teacher, out=tmp_path / "whole", **ONLINE)
    [run] = results(whole.out)["models"][0]["runs"]
    assert (run["steps"], run["labels"]) == (12, 1198)
    assert run["top1"] > 0.2
    assert not (whole.out / "seed-5/checkpoints").exists()
    from featdistill.engine.loop import _Loop

    real = _Loop._log

    def kill(self: Any, done: int, *args: Any) -> None:
        real(self, done, *args)
        if done == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Loop, "_log", kill)
    with pytest.raises(KeyboardInterrupt):
        featdistill.probe(model=teacher, out=tmp_path / "halves", **ONLINE)
    monkeypatch.setattr(_Loop, "_log", real)
    done = featdistill.probe(model=teacher, out=tmp_path / "halves", resume=True, **ONLINE)
    one, other = (np.load(d.out / "seed-5/probe-fit.npz") for d in (whole, done))
    assert all(np.array_equal(one[name], other[name]) for name in one.files)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_the_online_export_is_what_was_scored(
    teacher: Path, tmp_path: Path, optimizer: str
) -> None:
    done = featdistill.probe(model=teacher, out=tmp_path / "o", optimizer=optimizer, **ONLINE)
    said = featdistill.predict(model=done.out, data="digits", top=1, **TINY_PREDICT)
    got = np.array([int(p.classes[0]) for p in said.predictions])
    assert (got == np.load(done.out / "probe.npz")["predictions"][0, 0]).mean() > 0.99


# --- whatever load_backbone takes


class Net(nn.Module):
    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "users_own", sys.modules[__name__])
    return "users_own"


def test_any_model(factory: str, teacher: Path, tmp_path: Path) -> None:
    models = [f"{factory}:Net", teacher / "export/model.safetensors", teacher / "export"]
    done = featdistill.probe(model=models, out=tmp_path / "o", **FEW)
    assert len(done.top1) == 3
    assert done.exports[f"{factory}:Net"] is None
    assert sorted(p.name for p in done.out.iterdir() if p.is_dir()) == [
        "export",
        "model.safetensors",
        "users_own-Net",
    ]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("timm/vit_tny_patch16_224", "did you mean 'timm/vit_tiny_patch16_224'"),
        ("nowhere.pth", "nowhere.pth"),
        ("users_own:Nett", "did you mean .Net."),
        ("no.such.module:thing", "cannot import 'no.such.module'"),
    ],
)
@pytest.mark.parametrize("command", ["probe", "knn"])
def test_what_is_no_model(factory: str, tmp_path: Path, command: str, spec: str, says: str) -> None:
    options = FEW if command == "probe" else OPTIONS
    with pytest.raises(FeatDistillError, match=says) as caught:
        getattr(featdistill, command)(model=spec, out=tmp_path / "o", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 3}, "--epochs is for --style online"),
        ({"lr": 0.1}, "--lr is for --style online"),
        ({"lrs": [1.0]}, "--lrs is for --solver sgd"),
        ({"weight_decays": [0.0, 1e-3]}, "--weight-decays 0 is for --solver sgd"),
        ({"style": "online", "crops": 2}, "--crops is for --style grid"),
        ({"run": {"devices": 2}}, "--run.devices is for --style online"),
        ({"run": {"micro_batches": 2}}, "of no use"),
        ({"name": ["a", "b"]}, "--name given 2 times for 1 models"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        featdistill.probe(model="x", out=tmp_path / "o", **{**OPTIONS, **options})

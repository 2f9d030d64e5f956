"""`landscape`: what it writes, that no stop and no batch size changes it, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featdistill
from featdistill.config.resolve import resolve
from featdistill.core.errors import FeatDistillError, Interrupted
from featdistill.data.sources import Subset
from featdistill.data.views import EvalView
from featdistill.diagnostics import landscape as measures
from featdistill.evaluation.classification import score
from featdistill.evaluation.fidelity import fidelity
from featdistill.report.page import write_report
from featdistill.tasks import landscape_sweep
from featdistill.tasks.losses import fixed_images, loss_runtime, subjects_of
from tests.report.test_report_page import Page
from tests.tasks.conftest import TINY

COMMON: dict[str, Any] = {
    "data": "digits",
    "images": 40,
    "batch_size": 16,
    "workers": 0,
    "device": "cpu",
    "grid": 5,
}


@pytest.fixture(scope="module")
def other(student: Path) -> Path:
    """The classifier of another seed."""
    out = student.parent / "classifier-1"
    featdistill.finetune(
        model=student,
        steps=6,
        seed=1,
        out=out,
        view={"randaugment": None},
        mix={"mixup": 0.0},
        **TINY,
    )
    return out


@pytest.fixture(scope="module")
def found(classifier: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("landscapes") / "plane"
    names = ["student", "again"]
    return featdistill.landscape(model=[classifier, other], name=names, out=out, **COMMON)


def arrays_of(record: Path) -> dict[str, np.ndarray]:
    with np.load(record.with_suffix(".npz")) as stored:
        return dict(stored)


def results_of(record: Path) -> dict[str, Any]:
    return json.loads(record.read_text())["results"]


def same(one: Path, two: Path, **tolerance: float) -> None:
    a, b = arrays_of(one), arrays_of(two)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(b[name], a[name], **(tolerance or {"rtol": 0}), err_msg=name)


def test_the_record_has_everything(found: Any) -> None:
    results = results_of(found.record)
    assert (results["kind"], results["objective"]) == ("plane", "Cross-entropy, nats")
    data = results["data"]
    assert (data["images"], data["part"], data["augmentation"]) == (40, "train", None)
    assert len(data["fingerprint"]) == 12
    # 25 of the grid and 8 at each radius, less the 4 on the axes that the grid has at 0.5 and 1
    assert results["points"] == {"done": 2 * (25 + 8 + 4 + 4), "of": 2 * (25 + 8 + 4 + 4)}
    for model, name in zip(results["models"], ("student", "again"), strict=True):
        assert model["name"] == name
        assert model["varied_weights"] < model["all_weights"]
        assert [r["radius"] for r in model["rise"]] == [0.25, 0.5, 1.0]
        assert model["rise"][0]["error"] is None  # a single plane
        assert [a["rise"] for a in model["low_area"]] == [0.1, 0.5, 1.0]
        assert 0 <= model["low_area"][0]["mean"] <= model["low_area"][2]["mean"] <= 1
    arrays = arrays_of(found.record)
    assert arrays["coordinates"].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert arrays["0.loss"].shape == arrays["1.accuracy"].shape == (1, 5, 5)
    assert np.isfinite(arrays["0.loss"]).all()
    assert np.array_equal(found.losses["again"], arrays["1.loss"])
    assert found.rises["student"][0.5].mean == results["models"][0]["rise"][1]["mean"]


def images_of(model: Path, **more: Any) -> Any:
    options = {"model": [str(model)], "out": "unused", **COMMON, **more}
    return fixed_images(resolve("landscape", options))


def test_the_middle_is_the_models_own_loss(found: Any, classifier: Path) -> None:
    """By another way: as `finetune` scores."""
    source = images_of(classifier)
    assert isinstance(source, Subset)
    assert len(np.unique(source.chosen)) == 40
    want = score(featdistill.load_backbone(str(classifier)), source, batch_size=7)
    assert found.losses["student"][0, 2, 2] == pytest.approx(want.loss, rel=1e-5)
    assert found.accuracies["student"][0, 2, 2] == want.top1


def test_other_points_are_the_weights_plus_the_directions(found: Any, classifier: Path) -> None:
    """By hand, one corner: x = 1, y = -0.5."""
    from featdistill.diagnostics.directions import direction, filters

    backbone = featdistill.load_backbone(str(classifier))
    weights = filters([("", backbone.model)])
    along = [direction(weights, seed=0, plane=0, axis=a) for a in (0, 1)]
    with torch.no_grad():
        for weight, first, second in zip(weights.values(), *along, strict=True):
            weight.parameter.add_(1.0 * first - 0.5 * second)
    want = score(backbone, images_of(classifier), batch_size=40)
    assert found.losses["student"][0, 1, 4] == pytest.approx(want.loss, rel=1e-5)


def test_the_seed_chooses_images_and_directions(classifier: Path) -> None:
    one, two = (images_of(classifier, seed=s).chosen for s in (0, 1))
    assert not np.array_equal(one, two)
    spread = np.arange(41) * 1198 // 40
    assert ((spread[:-1] <= one) & (one < spread[1:])).all()


def test_neither_batch_nor_memory_changes_it(found: Any, classifier: Path, tmp_path: Path) -> None:
    options = {**COMMON, "batch_size": 40, "memory": 0.0}
    alone = featdistill.landscape(model=classifier, out=tmp_path / "a", **options)
    np.testing.assert_allclose(
        alone.losses[str(classifier)], found.losses["student"], rtol=1e-5, atol=1e-6
    )


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 7, 30, 60])
def test_stopped_anywhere_it_goes_on_to_the_same(
    found: Any, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with a half-written line at the end."""
    options = {
        **COMMON,
        "model": json.loads(found.record.read_text())["config"]["models"],
        "name": ["student", "again"],
        "out": tmp_path / "run",
    }
    real, count = landscape_sweep.evaluate, [0]

    def dying(subject: Any) -> Any:
        count[0] += 1
        if count[0] > after:
            raise _Killed
        return real(subject)

    monkeypatch.setattr(landscape_sweep, "evaluate", dying)
    with pytest.raises(_Killed):
        featdistill.landscape(**options)
    file = tmp_path / "run/points/process-0000.jsonl"
    with open(file, "ab") as journal:
        journal.write(b"1234abcd [[0,0,0.0,0")
    monkeypatch.setattr(landscape_sweep, "evaluate", real)
    again = featdistill.landscape(**options, resume=True)
    same(found.record, again.record)
    assert len(file.read_bytes().splitlines()) == 82  # none twice
    assert results_of(again.record)["models"] == results_of(found.record)["models"]


def test_killed_for_real(found: Any, tmp_path: Path) -> None:
    """SIGKILL in the midst of it, in a process of its own; then the same command with --resume."""
    out = tmp_path / "run"
    models = json.loads(found.record.read_text())["config"]["models"]
    words = [
        *("landscape", "--model", models[0], "--model", models[1], "--data", "digits"),
        *("--name", "student", "--name", "again", "--images", "40", "--batch-size", "16"),
        *("--workers", "0", "--device", "cpu", "--grid", "5", "--out", str(out)),
    ]
    script = (
        "import os, signal, sys\n"
        "from featdistill.cli.main import main\n"
        "from featdistill.tasks import landscape_sweep\n"
        "real, left = landscape_sweep.evaluate, [20]\n"
        "def evaluate(subject):\n"
        "    left[0] -= 1\n"
        "    return real(subject) if left[0] else os.kill(os.getpid(), signal.SIGKILL)\n"
        "landscape_sweep.evaluate = evaluate\n"
        "main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert len((out / "points/process-0000.jsonl").read_bytes().splitlines()) == 19
    again = [sys.executable, "-m", "featdistill", *words, "--resume"]
    done = subprocess.run(again, env=environment, capture_output=True, timeout=300, check=True)
    assert b"19 are done" in done.stderr
    same(found.record, out / "landscape.json")


def test_a_signal_leaves_a_record_that_can_be_drawn(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = landscape_sweep.evaluate, [0]

    def signalled(subject: Any) -> Any:
        count[0] += 1
        if count[0] == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(subject)

    monkeypatch.setattr(landscape_sweep, "evaluate", signalled)
    with pytest.raises(Interrupted, match="--resume"):
        featdistill.landscape(model=classifier, out=tmp_path / "run", **COMMON)
    arrays = arrays_of(tmp_path / "run/landscape.json")
    assert int(np.isfinite(arrays["0.loss"]).sum()) >= 9  # the coarsest grid
    assert np.isnan(arrays["0.loss"]).any()
    assert results_of(tmp_path / "run/landscape.json")["points"] == {"done": 12, "of": 41}
    page = Page(write_report(tmp_path / "run"))
    assert "Not finished: 12 of 41 points." in page.text
    assert "The landscape from above" in page.text


def test_two_processes_find_what_one_does(found: Any, tmp_path: Path) -> None:
    models = json.loads(found.record.read_text())["config"]["models"]
    words = [
        *("landscape", "--model", models[0], "--model", models[1], "--data", "digits"),
        *("--name", "student", "--name", "again", "--images", "40", "--batch-size", "16"),
        *("--workers", "0", "--device", "cpu", "--grid", "5", "--out", str(tmp_path / "run")),
    ]
    command = [sys.executable, "-m", "featdistill", *words, "--run.devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parts = sorted((tmp_path / "run/points").iterdir())
    assert [len(p.read_text().splitlines()) for p in parts] == [41, 41]
    same(found.record, tmp_path / "run/landscape.json", rtol=1e-6)


def test_a_finished_one_resumes_to_itself(found: Any, tmp_path: Path) -> None:
    shutil.copytree(found.record.parent, tmp_path / "run")
    (tmp_path / "run/landscape.json").unlink()
    config = json.loads(found.record.read_text())["config"]
    options = {**COMMON, "model": config["models"], "name": config["names"]}
    again = featdistill.landscape(
        **options, out=tmp_path / "run", resume=True, run={"devices": 1, "threads": 1}
    )
    same(found.record, again.record)
    with pytest.raises(FeatDistillError, match="another configuration"):
        featdistill.landscape(**{**options, "grid": 7}, out=tmp_path / "run", resume=True)
    facts = tmp_path / "run/weights.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "model 2": "abc"}))
    with pytest.raises(FeatDistillError, match="other weights"):
        featdistill.landscape(**options, out=tmp_path / "run", resume=True)


def test_lines_are_the_axes_of_planes_and_have_a_spread(
    found: Any, classifier: Path, tmp_path: Path
) -> None:
    lines = featdistill.landscape(
        "line", model=classifier, name="student", planes=3, out=tmp_path / "run", **COMMON
    )
    assert lines.losses["student"].shape == (3, 5)
    assert np.array_equal(lines.losses["student"][0], found.losses["student"][0, 2])
    rises = lines.rises["student"]
    assert (rises[0.5].error or 0) > 0
    want = lines.losses["student"][:, [1, 3]].mean() - lines.losses["student"][0, 2]
    assert rises[0.5].mean == pytest.approx(want)
    page = Page(write_report(tmp_path / "run"))
    assert "Along random lines" in page.text
    assert "3 Gaussian directions" in page.text


def test_between_ends_at_both_models(classifier: Path, other: Path, tmp_path: Path) -> None:
    way = featdistill.landscape(
        "between", model=[classifier, other], name=["a", "b"], out=tmp_path / "run", **COMMON
    )
    [losses] = way.losses.values()
    source = images_of(classifier)
    for at, run in ((0.0, classifier), (1.0, other)):
        want = score(featdistill.load_backbone(str(run)), source, batch_size=40)
        assert losses[0][way.steps == at][0] == pytest.approx(want.loss, rel=1e-6), at
    results = results_of(way.record)
    assert [m["loss"] for m in results["models"]] == [losses[0][1], losses[0][3]]
    assert results["barrier"] == pytest.approx(
        max(losses[0][2] - (losses[0][1] + losses[0][3]) / 2, 0)
    )
    page = Page(write_report(tmp_path / "run"))
    assert "Between two models" in page.text
    assert "From a to b" in page.text


def test_a_distillations_loss_is_its_own(student: Path, tmp_path: Path) -> None:
    """By another way: as the run itself measures held-out images."""
    around = featdistill.landscape(model=student, out=tmp_path / "run", **{**COMMON, "grid": 3})
    options = {"model": [str(student)], "out": "unused", **COMMON}
    config = resolve("landscape", options)
    gathered = subjects_of(config, loss_runtime(config))
    [subject] = gathered.subjects
    objective = subject.module.objective
    want = fidelity(objective, gathered.images, EvalView(8), batch_size=40)
    assert want is not None
    [losses] = around.losses.values()
    assert losses[0, 1, 1] == pytest.approx(want.loss, rel=1e-5)
    assert losses[0, 1, 1] == losses.min()  # it was trained to be low
    assert around.accuracies == {}
    results = results_of(around.record)
    assert "smooth-l1" in results["objective"]
    assert [a["rise"] for a in results["models"][0]["low_area"]] == [0.01, 0.05, 0.1]
    assert set(subject.parameters) >= {"projector.weight", "blocks.0.attn.qkv.weight"}


@pytest.mark.parametrize(
    ("which", "options", "says"),
    [
        (("student",), {"objective": "classification"}, "leave --objective out"),
        (("student", "classifier"), {}, "different losses"),
        (("student",), {"image_size": 8}, "--image-size is of no use"),
        (("teacher",), {}, "no classifier, so no loss"),
        (("classifier",), {"data": "PICTURES"}, "has no labels"),
        (("classifier",), {"data": "STRANGERS"}, "does not know: cats, dogs; and lacks: 0, 1"),
    ],
)
def test_a_loss_that_is_not_there(
    which: tuple[str, ...],
    options: dict[str, Any],
    says: str,
    tmp_path: Path,
    pictures: Path,
    request: pytest.FixtureRequest,
) -> None:
    models = [request.getfixturevalue(name) for name in which]
    for kind in ("cats", "dogs"):
        shutil.copytree(pictures, tmp_path / "STRANGERS" / kind)
    places = {"PICTURES": pictures, "STRANGERS": tmp_path / "STRANGERS"}
    options = {k: places.get(str(v), v) for k, v in options.items()}
    with pytest.raises(FeatDistillError) as caught:
        featdistill.landscape(model=models, out=tmp_path / "run", **{**COMMON, **options})
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_classes_are_told_by_name(classifier: Path, tmp_path: Path) -> None:
    """Fewer of them, so numbered otherwise, in a folder."""
    from PIL import Image

    from featdistill.data.sources import digits

    source, _ = digits()
    assert source.labels is not None
    for name in ("7", "2"):
        (tmp_path / name).mkdir()
        for i in np.flatnonzero(source.labels == int(name))[:5]:
            pixels = source.read(int(i)).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    config = resolve(
        "landscape", {"model": [str(classifier)], "out": "o", **COMMON, "data": str(tmp_path)}
    )
    [subject] = subjects_of(config, loss_runtime(config)).subjects
    answers = torch.cat([piece.answers for piece in subject.pieces])
    assert sorted(answers.tolist()) == [2] * 5 + [7] * 5


def test_no_way_between_two_architectures(teacher: Path, classifier: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shape = {"view": {"randaugment": None}, "mix": {"mixup": 0.0}}
    featdistill.finetune(model=teacher, steps=2, out=plain, **shape, **TINY)
    with pytest.raises(FeatDistillError, match="expected two models of one architecture") as caught:
        featdistill.landscape("between", model=[plain, classifier], out=tmp_path / "run", **COMMON)
    assert "pos_embed" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_changed_teacher_is_noticed(student: Path, tmp_path: Path) -> None:
    run = tmp_path / "student"
    shutil.copytree(student, run)
    facts = json.loads((run / "weights.json").read_text())
    (run / "weights.json").write_text(json.dumps({**facts, "teacher": "another"}))
    with pytest.raises(FeatDistillError, match="learned from other weights"):
        featdistill.landscape(model=run, out=tmp_path / "run", **COMMON)
    shutil.rmtree(run / "checkpoints")
    (run / "weights.json").unlink()
    with pytest.raises(FeatDistillError, match="no checkpoint, so no projector"):
        featdistill.landscape(model=run, out=tmp_path / "run", **COMMON)


def test_targets_are_computed_once(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve("landscape", {"model": [str(student)], "out": "unused", **COMMON})
    [subject] = subjects_of(config, loss_runtime(config)).subjects
    calls = []
    teacher = subject.module.objective.teacher
    teacher.register_forward_hook(lambda *_: calls.append(1))
    losses = {measures.evaluate(subject).loss for _ in range(3)}
    assert (len(losses), len(calls)) == (1, 3)  # 40 images in batches of 16


def test_its_perturbed_teacher_stands_still(student: Path, tmp_path: Path) -> None:
    run = tmp_path / "student"
    shutil.copytree(student, run)
    config = (run / "config.yaml").read_text()
    assert config.count("drop_path: 0.0") == 1  # the teacher's; the student's is 0.1
    (run / "config.yaml").write_text(config.replace("drop_path: 0.0", "drop_path: 0.5"))
    options = resolve("landscape", {"model": [str(run)], "out": "unused", "memory": 0, **COMMON})
    [subject] = subjects_of(options, loss_runtime(options)).subjects
    assert len({measures.evaluate(subject).loss for _ in range(3)}) == 1

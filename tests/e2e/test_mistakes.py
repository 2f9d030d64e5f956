"""A user's mistakes at the command line: one clear line, exit status 2, never a traceback."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from featdistill.cli.main import main
from tests.data.segmentation_folders import ade20k, save

TEACHER = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "random"]
STUDENT = ["--student", "vit-t", "--student.depth", "1"]
DIGITS = ["--data", "digits", "--image-size", "32", "--steps", "1", "--batch-size", "4"]


CLASSIFIER = ["--model", "timm/resnet10t", "--weights", "random", "--data", "digits"]
NO_HEAD = ["--model", "torch.nn:Identity", "--data", "digits", "--image-size", "8"]


def fails(capsys: pytest.CaptureFixture[str], *words: str, says: tuple[str, ...]) -> None:
    status = main(list(words))
    err = capsys.readouterr().err
    assert status == 2, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for part in says:
        assert part in err, err


@pytest.fixture
def out(tmp_path: Path) -> list[str]:
    return ["--out", str(tmp_path / "run")]


def test_no_such_data(capsys: pytest.CaptureFixture[str], out: list[str]) -> None:
    fails(capsys, "distill", *TEACHER, "--data", "nowhere", *out, says=("no data at 'nowhere'",))
    assert not Path(out[1]).exists()


def test_a_mistyped_folder_gets_a_suggestion(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    (tmp_path / "photographs").mkdir()
    fails(
        capsys,
        *("distill", *TEACHER, "--data", str(tmp_path / "photogaphs"), *out),
        says=("did you mean 'photographs'",),
    )


def test_no_image_in_it(capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path) -> None:
    (tmp_path / "data/class").mkdir(parents=True)
    (tmp_path / "data/class/readme.md").write_text("no image")
    fails(capsys, "distill", *TEACHER, "--data", str(tmp_path / "data"), *out, says=("no image",))


def test_unreadable_class_folder(
    capsys: pytest.CaptureFixture[str],
    out: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "data/cats").mkdir(parents=True)
    real = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("cats"):
            raise PermissionError(13, "Permission denied")
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse)
    fails(
        capsys,
        *("distill", *TEACHER, "--data", str(tmp_path / "data"), *out),
        says=("cannot read the folder", "cats"),
    )


def test_mistyped_teacher(capsys: pytest.CaptureFixture[str], out: list[str]) -> None:
    words = ["distill", "--teacher", "timm/vit_tny_patch16_224", *DIGITS, *out]
    fails(capsys, *words, says=("did you mean 'timm/vit_tiny_patch16_224'",))


def test_a_way_of_decoding_that_there_is_not(
    capsys: pytest.CaptureFixture[str], out: list[str]
) -> None:
    words = ["distill", *TEACHER, *STUDENT, *DIGITS, *out, "--data.decode", "quick"]
    fails(capsys, *words, says=("--data.decode", "quick", "exact", "fast"))


def test_patch_that_does_not_divide_the_image(
    capsys: pytest.CaptureFixture[str], out: list[str]
) -> None:
    words = ["distill", *TEACHER, *STUDENT, "--student-patch", "5", *DIGITS, *out]
    fails(capsys, *words, says=("patch of 5", "--image-size 30 or 35"))


def test_out_that_is_not_empty(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    words = ["distill", *TEACHER, *DIGITS, "--out", str(tmp_path)]
    fails(capsys, *words, says=("not empty", "--out"))
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_out_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    words = ["distill", *TEACHER, *DIGITS, "--out", str(tmp_path / "a/b")]
    fails(capsys, *words, says=("cannot write", "--out"))


def test_batch_larger_than_the_data(capsys: pytest.CaptureFixture[str], out: list[str]) -> None:
    words = ["distill", *TEACHER, *STUDENT, "--data", "digits", "--batch-size", "5000", *out]
    fails(capsys, *words, says=("batch of 5000 is larger", "--batch-size 1198"))


def test_all_option_mistakes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["distill", "--teecher", "x", "--lr", "fast", "--epochs", "-3", "--data", "digits"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) >= 5
    for part in ("teecher", "'teacher'", "'fast'", "'-3'", "--out (run.out) is required"):
        assert part in err, err


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated zip"])
def test_a_checkpoint_that_is_not_one(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path, content: bytes
) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        file = tmp_path / name
        file.write_bytes(content)
        words = ["distill", *TEACHER[:2], "--teacher-weights", str(file), *DIGITS, *out]
        fails(capsys, *words, says=(str(file), "not a checkpoint"))


def test_nothing_held_out(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "x.png")
    words = ["finetune", "--model", "timm/resnet18", "--weights", "random"]
    fails(capsys, *words, "--data", str(tmp_path / "data"), *out, says=("--val-fraction",))


def class_folders(root: Path, **parts: tuple[str, ...]) -> list[str]:
    for part, names in parts.items():
        for name in names:
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8)).save(root / part / name / f"{i}.png")
    return ["finetune", "--model", "timm/resnet18", "--weights", "random", "--data", str(root)]


@pytest.mark.parametrize(
    ("val", "says"),
    [
        (("ant", "bee", "wasp"), ("lacks: wasp",)),
        (("ant",), ("lacks classes of", "bee, cat")),
        (("ant", "bee", "kat"), ("lacks: kat; and lacks: cat",)),
    ],
)
def test_validation_classes_that_differ(
    capsys: pytest.CaptureFixture[str],
    out: list[str],
    tmp_path: Path,
    val: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    words = class_folders(tmp_path / "data", train=("ant", "bee", "cat"), val=val)
    fails(capsys, *words, *out, says=says)
    assert not Path(out[1]).exists()


def test_label_budget_without_a_label(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    names = ("ant", "bee")
    words = class_folders(tmp_path / "data", train=names, val=names)
    fails(capsys, *words, *out, "--labels", "1%", says=("without any image: ant (2", "--labels 1"))
    fails(capsys, *words, *out, "--labels", "few", says=("label budget 'few'", "N or N/class"))
    fails(capsys, *words, *out, "--labels", "3", says=("fewer: ant (2), bee (2)",))


def test_an_average_that_is_none(capsys: pytest.CaptureFixture[str], out: list[str]) -> None:
    words = ["finetune", "--model", "timm/resnet18", "--weights", "random", *DIGITS, *out]
    fails(capsys, *words, "--ema", "1", says=("--ema", "given '1'", "less than 1"))
    fails(capsys, *words, "--emma", "0.9", says=("did you mean 'ema'",))


def test_a_head_that_is_not_there(capsys: pytest.CaptureFixture[str], out: list[str]) -> None:
    words = ["finetune", "--model", "timm/vit_tiny_patch16_224", "--weights", "random", *DIGITS]
    fails(capsys, *words, *out, "--head", "keep", says=("not the data's 10", "--head fresh"))
    fails(capsys, *words, *out, "--head", "kep", says=("did you mean 'keep'",))
    assert not Path(out[1]).exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--best", "holdout_los"), ("did you mean 'holdout_loss'",)),
        (("--best", "holdout_loss"), ("test images", "--holdout 0.02")),
        (("--best", "knn_top1"), ("--knn-data",)),
        (("--holdout", "0,1"), ("no number", "a share (0.02)")),
        (("--holdout", "1198"), ("takes 1,198 of the 1,198",)),
        (("--holdout", "1196"), ("batch of 4 is larger than the 2",)),
        (("--knn-data", "digit"), ("did you mean 'digits'",)),
        (("--signal.rank_alarm", "2"), ("expected less than 1",)),
    ],
    ids=str,
)
def test_what_to_measure_while_distilling(
    capsys: pytest.CaptureFixture[str],
    out: list[str],
    words: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    fails(capsys, "distill", *TEACHER, *STUDENT, *DIGITS, *out, *words, says=says)
    assert not Path(out[1]).exists()


def test_resume_of_nothing(capsys: pytest.CaptureFixture[str], out: list[str]) -> None:
    fails(capsys, "distill", *TEACHER, *DIGITS, *out, "--resume", says=("no run to resume",))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--extend", "steps=9"), ("--extend steps=9", "give --resume too")),
        (("--resume", "--extend", "9"), ("--extend", "'9'", "epochs=N or steps=N")),
        (("--resume", "--extend", "steps="), ("--extend", "epochs=N or steps=N")),
        (("--resume", "--extend", "epoch=9"), ("--extend", "epochs=N or steps=N")),
        (("--resume", "--extend", "steps=many"), ("'many'", "from --extend", "integer")),
        (("--resume", "--extend", "epochs=0"), ("'0'", "from --extend", "greater than 0")),
        (("--resume", "--extend", "steps=9"), ("there is no run to resume",)),
    ],
    ids=str,
)
def test_what_a_run_cannot_be_extended_to(
    capsys: pytest.CaptureFixture[str],
    out: list[str],
    words: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    fails(capsys, "distill", *TEACHER, *STUDENT, *DIGITS, *out, *words, says=says)
    assert not Path(out[1]).exists()


def test_what_is_not_extended(capsys: pytest.CaptureFixture[str], out: list[str]) -> None:
    words = ("--teacher", "a", "--student", "b", *DIGITS, *out, "--resume", "--extend", "steps=9")
    fails(capsys, "compare", *words, says=("unknown option 'extend'",))


def test_cuda_where_there_is_none(
    capsys: pytest.CaptureFixture[str], out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["distill", *TEACHER, *DIGITS, *out, "--device", "cuda"]
    fails(capsys, *words, says=("torch sees none",))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("diagnose", "feature", "--model", "x", "--data", "digits"), ("kind", "features")),
        (("diagnose", "features", "--data", "digits"), ("--model",)),
        (
            ("diagnose", "features", "--model", "nowhere/at/all", "--data", "digits"),
            ("nowhere/at/all",),
        ),
        (("landscape", *CLASSIFIER, "--grid", "20"), ("--grid", "20", "odd number")),
        (("landscape", *CLASSIFIER, "--grid", "1"), ("--grid", "greater than or equal to 3")),
        (("landscape", *CLASSIFIER, "--radius", "0"), ("--radius", "greater than 0")),
        (("landscape", *CLASSIFIER, "--radii", "0.5,-1"), ("--radii", "greater than 0")),
        (("landscape", "plain", *CLASSIFIER), ("'plain'", "did you mean 'plane'")),
        (("landscape", *CLASSIFIER, "--images", "1"), ("1 image", "at least 2")),
        (("landscape", *CLASSIFIER), ("10 classes", "nameless classifier of 1000")),
        (("landscape", *CLASSIFIER, "--part", "val"), ("no val part", "--part train or test")),
        (
            ("landscape", *CLASSIFIER, "--objective", "distillation"),
            ("no run of distill", "--objective classification"),
        ),
        (("landscape", *NO_HEAD), ("no classifier, so no loss", "fine-tune or probe it first")),
        (("landscape", "between", *CLASSIFIER), ("wants two models",)),
        (("landscape", "between", *CLASSIFIER, "--grid", "23"), ("--grid", "4 n + 1")),
        (
            ("landscape", "between", *CLASSIFIER, *CLASSIFIER[:2]),
            ("two models have the same name", "--name"),
        ),
        (
            ("landscape", "between", *CLASSIFIER, "--planes", "2"),
            ("--planes is of no use between two models",),
        ),
        (("report", "nowhere"), ("no folder 'nowhere'",)),
        (("report",), ("--run",)),
    ],
)
def test_diagnose_and_report(
    words: tuple[str, ...],
    says: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    out: list[str],
) -> None:
    fails(capsys, *words, *out, says=says)
    assert not Path(out[1]).exists()


def test_comparisons_that_cannot_be(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    data = class_folders(tmp_path / "data", train=("ant", "bee"), val=("ant", "bee"))[-2:]
    models = [*TEACHER, "--student", "timm/resnet18", "--student-weights", "random"]
    words = ["compare", *models, *data, *out, "--steps", "1", "--batch-size", "2", "--lrs", "1"]
    absent = ["--student", "runs/distiled", "--student-weights", "hub"]
    fails(capsys, *words, *absent, says=("no model 'runs/distiled'",))
    twins = ["--teacher", "timm/resnet18"]
    fails(capsys, *words, *twins, says=("--teacher and --student are one model", "give two"))
    fails(capsys, *words, "--also", "gap=nowhere/x", says=("no model 'nowhere/x'",))
    fails(capsys, *words, "--also", "a=x", "--also", "A=y", says=("'A=y' has the name of 'a=x'",))
    fails(capsys, *words, "--also", "Teacher=x", says=("has the name of the row 'teacher'",))
    fails(capsys, *words, "--also", "gap=", says=("given 'gap='; expected MODEL or NAME=MODEL",))
    fails(capsys, *words, "--resume", says=("no run to resume",))
    strangers = class_folders(tmp_path / "other", train=("ant", "bee"), val=("ant", "wasp"))[-2:]
    fails(capsys, *words, *strangers, says=("lacks: wasp",))
    assert not Path(out[1]).exists()


SEGMENT = ["segment", "--model", "timm/vit_tiny_patch16_224", "--weights", "random"]
TINY_HEAD = ["--head.channels", "8", "--image-size", "32", "--steps", "1", "--workers", "0"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), ("--data is required",)),
        (("--data", "nowhere"), ("no segmentation data at 'nowhere'",)),
        (("--data", "SCENES", "--predict", "x"), ("either --data", "--predict")),
        (("--data", "SCENES", "--classes", "2"), ("holds 3, which is no class", "--classes")),
        (("--data", "SCENES", "--classes", "voc20"), ("did you mean 'voc'",)),
        (("--data", "SCENES", "--data.first_class", "0"), ("holds 3", "--data.first_class")),
        (("--data", "SCENES", "--batch-size", "1"), ("a batch of 1", "--head linear")),
        (("--data", "SCENES", "--batch-size", "9"), ("batch of 9 is larger", "--batch-size 8")),
        (("--data", "SCENES", "--batch-size", "4", "--run.micro_batches", "2"), ("batch norm",)),
        (("--data", "SCENES", "--test.mode", "whole"), ("32x32", "--test.mode sliding")),
        (("--data", "SCENES", "--head.layers", "1,2"), ("for the pyramid", "4 numbers")),
        (("--data", "SCENES", "--head", "uppernet"), ("did you mean 'upernet'",)),
        (("--data", "SCENES", "--view.scale", "2,1"), ("0 < low <= high",)),
        (("--data", "SCENES", "--train", "none"), ("no trained segmenter",)),
        (
            ("--predict", "SCENES/images/validation"),
            ("no trained segmenter", "featdistill segment"),
        ),
    ],
    ids=lambda words: " ".join(words),
)
def test_segment(
    words: tuple[str, ...],
    says: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    out: list[str],
    tmp_path: Path,
) -> None:
    scenes = str(ade20k(tmp_path / "scenes"))
    words = tuple(word.replace("SCENES", scenes) for word in words)
    fails(capsys, *SEGMENT, *TINY_HEAD, "--batch-size", "2", *words, *out, says=says)
    assert not Path(out[1]).exists()


@pytest.mark.parametrize("fault", ["colour", "size", "value"])
def test_segment_masks(
    fault: str, capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    """Found before the run begins, in whichever part they are."""
    shape, value, says = {
        "colour": ((24, 32, 3), 0, "is a colour image"),
        "size": ((24, 31), 1, "31x24"),
        "value": ((24, 32), 9, "holds 9, which is no class"),
    }[fault]
    scenes = ade20k(tmp_path / "scenes")
    part = "validation" if fault == "colour" else "training"
    file = scenes / "annotations" / part / "000.png"
    save(file, np.full(shape, value, dtype=np.uint8))
    words = [*SEGMENT, *TINY_HEAD, "--batch-size", "2", "--data", str(scenes), *out]
    fails(capsys, *words, says=(f"'{file}'", says))
    assert not Path(out[1]).exists()


@pytest.mark.parametrize("part", ["training", "validation"])
def test_segment_without_a_label(
    part: str, capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    scenes = ade20k(tmp_path / "scenes")
    for file in (scenes / "annotations" / part).iterdir():
        save(file, np.zeros_like(np.asarray(Image.open(file))))
    words = [*SEGMENT, *TINY_HEAD, "--batch-size", "2", "--data", str(scenes), *out]
    fails(capsys, *words, says=(f"{part}' has a labelled pixel", "--data.unlabelled"))
    assert not Path(out[1]).exists()


def test_a_segmenter_is_no_backbone(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "segmented"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    (run / "segment.json").write_text("{}")
    words = ["finetune", "--model", str(run), "--data", "digits", *out]
    fails(capsys, *words, says=("is a segmenter", "--predict"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "digit"), ("did you mean 'digits'",)),
        (("--data", "digits", "--pool", "meen"), ("did you mean 'mean'",)),
        (("--data", "digits", "--pool", "cls"), ("no CLS token", "--pool mean")),
        (("--data", "digits", "--layers", "9"), ("--layers 9", "has 5")),
        (("--data", "digits", "--solver", "lbfg"), ("did you mean 'lbfgs'",)),
        (("--data", "digits", "--weight-decays", "0,1e-3"), ("--solver sgd", "no minimum")),
        (("--data", "digits", "--lr", "0.1", "--epochs", "3"), ("--style online", "--epochs")),
        (("--data", "digits", "--labels", "1"), ("leaves none to choose", "--labels")),
        (("--data", "digits", "--labels", "500"), ("with fewer", "smaller --labels")),
        (("--data", "digits", "--seeds", "1,1"), ("seeds must differ",)),
        (
            ("--data", "digits", "--style", "online", "--batch-size", "5000"),
            ("batch of 5000 is larger", "--batch-size 1198"),
        ),
    ],
    ids=str,
)
def test_probe(
    capsys: pytest.CaptureFixture[str],
    out: list[str],
    words: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    model = ("--model", "timm/resnet18", "--weights", "random", "--image-size", "32")
    fails(capsys, "probe", *model, *words, *out, says=says)
    assert not Path(out[1]).exists()


@pytest.mark.parametrize("command", ["probe", "knn"])
def test_a_probe_wants_labels_and_their_classes(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path, command: str
) -> None:
    model = ("--model", "timm/resnet18", "--weights", "random")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/a.png")
    flat = ("--data", str(tmp_path / "flat"))
    fails(capsys, command, *model, *flat, *out, says=("has no labels", "class subfolders"))
    words = class_folders(tmp_path / "data", train=("ant", "bee"), val=("ant", "bee", "cat"))
    data = words[words.index("--data") :][:2]
    fails(capsys, command, *model, *data, *out, says=("cat",))
    assert not Path(out[1]).exists()


def test_an_unreadable_image_where_none_is_tolerated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for number in range(8):
        save(tmp_path / f"data/{number}.png", np.full((32, 32, 3), 9 * number, np.uint8))
    (tmp_path / "data/5.png").write_text("<!doctype html>")
    words = ["distill", *TEACHER, *STUDENT, "--data", str(tmp_path / "data"), "--image-size", "32"]
    words += ["--steps", "2", "--batch-size", "8", "--workers", "0", "--run.preflight", "false"]
    for folder, policy, complaint in (
        ("a", ["--data.bad_images", "error"], "error: cannot read 5.png: cannot identify image"),
        ("b", ["--data.bad_image_limit", "0.1"], "error: 1 of 8 images cannot be read, the last: "),
    ):
        assert main([*words, *policy, "--out", str(tmp_path / folder)]) == 2
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith(complaint)
        assert "Traceback" not in err
        assert '"index": 5' in (tmp_path / folder / "quarantine.jsonl").read_text()
    assert main([*words, "--data.bad_image_limit", "0.2", "--out", str(tmp_path / "c")]) == 0


def test_teacher_cache(capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path) -> None:
    words = ["distill", *TEACHER, *STUDENT, *DIGITS, *out]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_bytes(b"")
    mine = ["--teacher-cache", str(tmp_path / "mine")]
    fails(capsys, *words, *mine, says=("no teacher cache (it holds 'photo.png')", "an empty"))
    fails(capsys, *words, *mine, "--teacher.drop_path", "0.1", says=("drop path of 0.1 has many",))
    fails(capsys, *words, "--teacher-cache-views", "3", says=("of no use without a folder",))
    fails(capsys, *words, *mine, "--teacher-cache-views", "0", says=("greater than 0",))
    fails(capsys, *words, "--teacher-cach", "x", says=("did you mean 'teacher-cache'",))
    assert not Path(out[1]).exists()


def test_several_students(capsys: pytest.CaptureFixture[str], out: list[str]) -> None:
    words = ["distill", *TEACHER, "--student", "vit-t", *DIGITS, *out]
    fails(capsys, *words, "--student", "vit-z", says=("vit-z", "did you mean"))
    swin = ["--student", "swin-t", "--position", "ape"]
    fails(capsys, *words, *swin, says=("swin",))
    assert not Path(out[1]).exists()


# --- caches of decoded images


def test_a_cache_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featdistill.data.device_cache.free_memory", lambda device: 1000)
    words = ["distill", *TEACHER, *STUDENT, *DIGITS, *out, "--data.cache", "device"]
    says = ("the 1,198 images of 'digits/train' take about 224.6 KiB", "--data.cache disk")
    fails(capsys, *words, says=says)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    words[-1] = "disk"
    fails(capsys, *words, says=("take about 224.6 KiB", "--data.cache_folder"))
    assert not Path(out[1]).exists()


def test_a_cache_where_none_can_be(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folder = ["--data.cache", "disk", "--data.cache_folder", str(tmp_path / "file/cache")]
    words = ["distill", "--teacher", "timm/no-such-model", *DIGITS, *out, *folder]
    fails(capsys, *words, says=("the cache cannot be in", "is not a folder", "--data.cache_folder"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["finetune", *CLASSIFIER], ("RandAugment", "--view.randaugment none")),
        (["pretrain", "--data", "digits"], ("SimCLR's views", "give --data.cache disk")),
        (["probe", *CLASSIFIER], ("device is for distill and finetune", "data.cache")),
        (["knn", *CLASSIFIER], ("unknown option 'data.cache'",)),
    ],
    ids=lambda words: words[0],
)
def test_a_cache_that_cannot_cut_the_views(
    capsys: pytest.CaptureFixture[str], out: list[str], command: list[str], says: tuple[str, ...]
) -> None:
    fails(capsys, *command, "--data.cache", "device", *out, says=says)
    assert not Path(out[1]).exists()


def test_a_cache_beside_what_it_does_not_go_with(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    words = ["distill", *TEACHER, *STUDENT, *DIGITS, *out]
    taught = ["--teacher-cache", str(tmp_path / "taught"), "--data.cache", "device"]
    fails(capsys, *words, *taught, says=("brings no teacher's features along", "disk"))
    fast = ["--data.cache", "disk", "--data.decode", "fast"]
    fails(capsys, *words, *fast, says=("decode fast reads no whole images",))
    assert not Path(out[1]).exists()


def test_images_of_many_sizes_on_the_device(
    capsys: pytest.CaptureFixture[str], out: list[str], tmp_path: Path
) -> None:
    for number in range(4):
        shape = (40, 4, 3) if number % 2 else (4, 40, 3)
        save(tmp_path / f"data/{number}.png", np.zeros(shape, np.uint8))
    words = ["distill", *TEACHER, *STUDENT, "--image-size", "32", "--steps", "1", *out]
    words += ["--batch-size", "4", "--data", str(tmp_path / "data"), "--data.cache", "device"]
    fails(capsys, *words, says=("many sizes (2 sizes", "padded to 40 x 40", "--data.cache disk"))

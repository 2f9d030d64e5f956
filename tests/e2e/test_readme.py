"""Every command and snippet of the README is run, on made images and small models."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featdistill.cli.main import main
from featdistill.config.commands import COMMANDS
from tests.data.segmentation_folders import ade20k
from tests.models.formats.parity import Case

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
COMMAND_LINES = [
    line.split("  #")[0].strip()
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("featdistill ")
]

# what the commands get besides their own words, so that they end in seconds and need no network
TEACHER = "timm/vit_small_patch16_224.dino"
FILE = "dino_vitbase16_pretrain.pth"
STAND_IN = "timm/vit_tiny_patch16_224"
SMALL = ["--image-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
SHORT = [*SMALL, "--steps", "1"]
EXTRA = {
    "check": [*SHORT, "--teacher-weights", "random", "--student.depth", "1"],
    "distill": [*SHORT, "--student.depth", "1"],
    "compare": [*SHORT, "--seeds", "1", "--lrs", "1"],
    "finetune": SHORT,
    "pretrain": [*SHORT, "--model.depth", "1"],
    "knn": SMALL,
    "probe": [*SMALL, "--seeds", "1"],
    "predict": SMALL,
    "features": SMALL,
    "segment": [*SHORT, "--head.layers", "0,0,0,0", "--head.channels", "8"],
    "diagnose": SMALL,
    "landscape": [*SMALL, "--grid", "3"],
    "export": [],
    "models": [],
    "recipes": [],
    "report": [],
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with IMAGES (unlabelled), LABELLED (train and val, two classes) and SCENES."""
    desk = tmp_path_factory.mktemp("desk")
    rng = np.random.default_rng(0)
    places = [desk / "IMAGES"] + [
        desk / "LABELLED" / part / name for part in ("train", "val") for name in ("cat", "dog")
    ]
    for place in places:
        place.mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    ade20k(desk / "SCENES")
    return desk


def substituted(line: str, desk: Path) -> list[str]:
    words = shlex.split(line)[1:]
    hub = TEACHER in words
    words = [STAND_IN if w == TEACHER else w for w in words]
    extra = list(EXTRA[words[0]])
    if FILE in words:  # the file is there: made of small random weights, as the project writes it
        words[words.index(FILE)] = str(Case.read("dino-backbone").write(desk))
        extra = [*SHORT, "--student.depth", "1"]
    if hub and words[0] in ("distill", "compare"):
        extra += ["--teacher-weights", "random"]
    if "--steps" in extra and "--epochs" in words:
        at = words.index("--epochs")
        del words[at : at + 2]
    return [words[0], *words[1:], *extra]


def test_the_readme_names_the_two_make_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.index("make quickstart") < text.index("make test") < 3000


def test_all_commands_of_the_readme_run_in_order(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    assert {line.split()[1] for line in COMMAND_LINES} >= {"check", "distill", "compare"}
    for line in COMMAND_LINES:
        if line.split()[1] == "quickstart":
            continue  # `make quickstart` and tests/e2e/test_quickstart.py run it
        assert line.split()[1] in COMMANDS, line
        assert main(substituted(line, desk)) == 0, line
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), {})

"""The shipped recipes: their heads, and the published values that they stand for."""

from __future__ import annotations

import re
from itertools import pairwise, takewhile
from pathlib import Path

import pytest

from featdistill.cli.options import parse
from featdistill.config.commands import COMMANDS, FinetuneConfig, SegmentConfig
from featdistill.config.resolve import read_recipe, recipe_names, recipe_text, resolve

# what every head says, in this order; "teacher" may come after the command
KEYS = ["command", "hardware", "time", "expected", "source"]


def head(name: str) -> dict[str, str]:
    above = takewhile(lambda line: line.startswith("#"), recipe_text(name).splitlines())
    title, _, *lines = (line[2:] for line in above)
    return {"title": title, **dict(re.split(r"\s+", line, maxsplit=1) for line in lines)}


@pytest.mark.parametrize("name", recipe_names())
def test_a_head_says_everything(name: str) -> None:
    said = head(name)
    assert [key for key in said if key not in ("title", "teacher")] == KEYS
    assert all(said.values())
    measured = name.startswith("quickstart")
    assert said["time"].startswith("about " if measured else "not measured"), "invent no time"
    assert all(len(line) < 200 for line in recipe_text(name).splitlines())


@pytest.mark.parametrize("name", recipe_names())
def test_arithmetic_of_the_time(name: str) -> None:
    for passes, images, millions in re.findall(
        r"(\d+) x ([\d,]+) = ([\d.,]+) million", head(name)["time"]
    ):
        product = int(passes) * int(images.replace(",", "")) / 1e6
        assert product == pytest.approx(float(millions.replace(",", "")), abs=0.51)
        assert int(passes) == read_recipe(name)["schedule"]["epochs"]


@pytest.mark.parametrize("name", recipe_names())
def test_the_heads_command_is_complete(name: str) -> None:
    program, command, *words = head(name)["command"].split()
    assert (program, command) == ("featdistill", read_recipe(name)["command"])
    parsed = parse(COMMANDS[command], words)
    assert parsed.problems == []
    assert parsed.recipe == name
    resolve(command, parsed.values, recipe=name)  # nothing that is required is left to guess


def resolved(name: str) -> FinetuneConfig:
    _, command, *words = head(name)["command"].split()
    return resolve(command, parse(COMMANDS[command], words).values, recipe=name)


# official configs/pretrain/*.yaml: student, drop path, epochs, warm-up epochs, base rate,
# warm-up rate and last rate for each 512 images, smallest crop
DISTIL = {
    "fd-dino-vit-b": ("vit-b", 0.3, 300, 10, 3e-4, 5e-7, 5e-6, 0.08),
    "fd-clip-vit-b": ("vit-b", 0.2, 300, 10, 3e-4, 5e-7, 5e-6, 0.08),
    "fd-clip-vit-b-100ep": ("vit-b", 0.1, 100, 10, 3e-4, 5e-7, 5e-6, 0.67),
    "fd-clip-vit-l": ("vit-l", 0.3, 300, 10, 3e-4, 5e-7, 5e-6, 0.08),
    "fd-deit-vit-b": ("vit-b", 0.3, 300, 10, 3e-4, 5e-7, 5e-6, 0.08),
    "fd-esvit-swin-b": ("swin-b", 0.3, 300, 10, 2e-4, 1e-6, 1e-5, 0.08),
}


@pytest.mark.parametrize("name", DISTIL)
def test_official_distillations(name: str) -> None:
    student, drop_path, epochs, warmup, lr, first, last, crop = DISTIL[name]
    config = resolved(name)
    assert (config.student.name, config.student.drop_path) == (student, drop_path)
    assert (config.view.image_size, config.view.crop_scale) == (224, (crop, 1.0))
    assert config.data.batch_size == 16 * 128
    rates(config, epochs, warmup, lr, first, last)
    assert (config.optimizer.weight_decay, config.optimizer.clip) == (0.05, 3.0)


# official configs/finetune/*.yaml: drop path, epochs, warm-up epochs, base rate, first and last
# rate for each 512 images, layer decay, batch
FINETUNE = {
    "ft-dino-vit-b": (0.2, 100, 20, 1.5e-3, 2.5e-7, 0.6, 2048),
    "ft-clip-vit-b": (0.3, 100, 20, 1.25e-3, 2.5e-7, 0.6, 2048),
    "ft-clip-vit-b-100ep": (0.1, 100, 20, 1.25e-3, 2.5e-7, 0.65, 2048),
    "ft-clip-vit-l": (0.4, 50, 5, 2.5e-4, 5e-7, 0.75, 2048),
    "ft-deit-vit-b": (0.3, 100, 20, 1.25e-3, 2.5e-7, 0.65, 2048),
    "ft-esvit-swin-b": (0.4, 100, 20, 1.25e-3, 2.5e-7, 0.8, 1024),
}


@pytest.mark.parametrize("name", FINETUNE)
def test_official_fine_tunings(name: str) -> None:
    drop_path, epochs, warmup, lr, ends, decay, batch = FINETUNE[name]
    config = resolved(name)
    assert (config.drop_path, config.data.batch_size) == (drop_path, batch)
    rates(config, epochs, warmup, lr, ends, ends)
    optimizer, view, mix = config.optimizer, config.view, config.mix
    assert (optimizer.layer_decay, optimizer.weight_decay, optimizer.clip) == (decay, 0.05, 5.0)
    assert optimizer.betas == (0.9, 0.999)
    assert (view.image_size, view.crop_scale, view.eval_crop) == (224, (0.08, 1.0), 224 / 256)
    assert (view.randaugment, view.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (mix.mixup, mix.cutmix, mix.probability, mix.switch) == (0.8, 1.0, 1.0, 0.5)
    assert (mix.smoothing, config.pool) == (0.1, "mean")


def rates(
    config: FinetuneConfig, epochs: int, warmup: int, lr: float, first: float, last: float
) -> None:
    schedule, peak = config.schedule, config.optimizer.lr_per_512
    assert (schedule.epochs, config.optimizer.lr, peak) == (epochs, None, lr)
    assert schedule.warmup * epochs == pytest.approx(warmup)
    assert schedule.start_ratio * peak == pytest.approx(first)
    assert schedule.final_ratio * peak == pytest.approx(last)


# BEiT's configuration files for ADE20K (and Swin's values): crop, layers, channels, drop path,
# rate, weight decay, layer decay
SEGMENT = {
    "seg-vit-b": (512, (3, 5, 7, 11), 768, 0.1, 7e-4, 0.05, 0.65),
    "seg-vit-l": (640, (7, 11, 15, 23), 1024, 0.2, 2e-5, 0.05, 0.95),
    "seg-swin-b": (512, None, 512, 0.3, 6e-5, 0.01, 1.0),
}
ALIKE = {
    "seg-vit-b": ("seg-clip-vit-b", "seg-deit-vit-b", "seg-dino-vit-b", "seg-mae-vit-b"),
    "seg-vit-l": ("seg-clip-vit-l",),
    "seg-swin-b": ("seg-esvit-swin-b",),
}


@pytest.mark.parametrize("name", SEGMENT)
def test_published_segmentations(name: str) -> None:
    size, layers, channels, drop_path, lr, decay, layer_decay = SEGMENT[name]
    _, command, *words = head(name)["command"].split()
    config = resolve(command, parse(COMMANDS[command], words).values, recipe=name)
    assert isinstance(config, SegmentConfig)
    assert (config.view.size, config.view.short) == ((size, size), size)
    assert (config.view.scale, config.view.largest, config.data.batch_size) == ((0.5, 2), 0.75, 16)
    assert (config.head.layers, config.head.channels) == (layers, channels)
    assert (config.head.auxiliary, config.head.auxiliary_weight) == (256, 0.4)
    assert (config.drop_path, config.head.dropout) == (drop_path, 0.1)
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.lr, optimizer.weight_decay, optimizer.layer_decay) == (lr, decay, layer_decay)
    assert (optimizer.clip, optimizer.betas) == (None, (0.9, 0.999))
    assert (schedule.steps, round(schedule.warmup * 160_000)) == (160_000, 1500)
    assert (schedule.power, schedule.start_ratio, schedule.final_ratio) == (1.0, 1e-6, 0.0)
    assert (config.test.mode, int(size * config.test.stride)) == ("sliding", size * 2 // 3)
    for other in ALIKE[name]:
        assert read_recipe(other) == read_recipe(name), other


def test_every_teacher_of_the_paper_has_a_segmentation() -> None:
    """What the paper distils: the recipe takes its student."""
    for teacher in ("dino-vit-b", "clip-vit-b", "deit-vit-b", "mae-vit-b", "clip-vit-l",
                    "esvit-swin-b", "swinv2-g"):  # fmt: skip
        assert f"--model runs/fd-{teacher}" in head(f"seg-{teacher}")["command"]
        assert f"fd-{teacher}" in recipe_names()


# ours, where nothing is published: each is another recipe but for what is named
OURS = {
    "fd-mae-vit-b": ("fd-clip-vit-b", {"teacher"}),
    "ft-mae-vit-b": ("ft-deit-vit-b", set()),
    "fd-dino-swin-b": ("fd-esvit-swin-b", {"teacher"}),
    "fd-deit-swin-b": ("fd-esvit-swin-b", {"teacher"}),
    "ft-dino-swin-b": ("ft-esvit-swin-b", set()),
    "ft-deit-swin-b": ("ft-esvit-swin-b", set()),
    "ft-vit-b": ("ft-deit-vit-b", set()),
    "ft-vit-l": ("ft-clip-vit-l", set()),
    "ft-swin-b": ("ft-esvit-swin-b", set()),
    "cifar100-distill": ("cifar10-distill", {"data"}),
    "cifar100-finetune": ("cifar10-finetune", {"data"}),
    "cifar100-transfer": ("cifar10-transfer", {"data"}),
}


@pytest.mark.parametrize("name", OURS)
def test_recipes_that_follow_another(name: str) -> None:
    other, differs = OURS[name]
    mine, theirs = (
        {k: v for k, v in read_recipe(n).items() if k not in differs} for n in (name, other)
    )
    assert mine == theirs
    assert "ours" in head(name)["source"] or other in head(name)["source"]


def test_teachers() -> None:
    """Of DESIGN's table those that timm has weights for; the others are files."""
    specs = {n: read_recipe(n).get("teacher", {}).get("spec") for n in recipe_names()}
    assert {n: s for n, s in specs.items() if n.startswith("fd-")} == {
        "fd-dino-vit-b": "timm/vit_base_patch16_224.dino",
        "fd-clip-vit-b": "timm/vit_base_patch16_clip_quickgelu_224.openai",
        "fd-clip-vit-b-100ep": "timm/vit_base_patch16_clip_quickgelu_224.openai",
        "fd-clip-vit-l": "timm/vit_large_patch14_clip_quickgelu_224.openai",
        "fd-deit-vit-b": "timm/deit_base_patch16_224.fb_in1k",
        "fd-mae-vit-b": "timm/vit_base_patch16_224.mae",
        "fd-dino-swin-b": "timm/vit_base_patch16_224.dino",
        "fd-deit-swin-b": "timm/deit_base_patch16_224.fb_in1k",
        "fd-esvit-swin-b": None,
        "fd-swinv2-g": None,
    }


def test_published_results() -> None:
    """The official README's figures, and the paper's 82.8, 82.9, ... for the teachers."""
    for name, figures in {
        "fd-dino-vit-b": ("82.8", "83.8"),
        "fd-clip-vit-b": ("82.9", "84.9"),
        "fd-clip-vit-l": ("86.1", "87.7", "89.0"),
        "fd-deit-vit-b": ("81.8", "83.0"),
        "fd-mae-vit-b": ("83.6", "83.8"),
        "fd-esvit-swin-b": ("83.9", "85.1"),
        "fd-swinv2-g": ("61.4",),
        "ft-clip-vit-l-336": ("89.0",),
    }.items():
        assert all(figure in head(name)["expected"] for figure in figures), name


def test_the_chain_hands_its_run_on() -> None:
    chain = ["fd-clip-vit-l", "ft-clip-vit-l-22k", "ft-clip-vit-l-22k-1k", "ft-clip-vit-l-336"]
    for before, after in pairwise(chain):
        assert resolved(before).run.out == f"runs/{before}"
        assert resolved(after).model.spec == f"runs/{before}"
    assert [resolved(n).view.image_size for n in chain] == [224, 224, 224, 336]


def test_the_docs_list_every_recipe() -> None:
    text = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    listed = re.findall(r"^\| `([a-z0-9-]+)` \| (.*?) \|", text, flags=re.MULTILINE)
    assert [n for n, _ in listed] == [n for n, _ in dict(listed).items()], "each once"
    assert dict(listed) == {name: head(name)["title"] for name in recipe_names()}

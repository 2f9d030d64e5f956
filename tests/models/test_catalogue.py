"""The catalogue of known models says what timm's own models and lists say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

from featdistill.models import catalogue
from featdistill.models.backbone import Backbone, Origin
from featdistill.models.catalogue import Entry
from featdistill.models.students import SIZES, build_student

KNOWN = [e for e in catalogue.teachers() if e.grid is not None]
# the fastest to build of each family
SMALLEST = [
    min((e for e in KNOWN if e.family == family), key=lambda e: e.parameters)
    for family in dict.fromkeys(e.family for e in KNOWN)
]


def build(entry: Entry) -> tuple[int, Backbone]:
    """An entry's parameters, and its model without memory for weights and without a head."""
    size = entry.image_size
    assert size is not None
    with torch.device("meta"):
        if entry.student is not None:
            student = build_student(entry.student, image_size=size)
            return student.parameters_count, student
        name = entry.architecture or entry.name.removeprefix("timm/")
        model = timm.create_model(name, **entry.arguments)
        parameters = sum(p.numel() for p in model.parameters())
        model.reset_classifier(0)
        zero = (0.0, 0.0, 0.0)
        origin = Origin(name, "none")
        return parameters, Backbone(
            model, mean=zero, std=zero, image_size=(size, size), origin=origin
        )


def check_numbers(entry: Entry) -> None:
    parameters, model = build(entry)
    assert parameters == entry.parameters
    assert model.grid == entry.grid
    assert model.prefix_names == entry.prefix
    assert model.width == entry.width


@pytest.mark.parametrize("entry", SMALLEST, ids=lambda e: e.name)
def test_numbers_of_one_of_each_family(entry: Entry) -> None:
    check_numbers(entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", KNOWN, ids=lambda e: e.name)
def test_numbers(entry: Entry) -> None:
    check_numbers(entry)


def test_numbers_of_the_students() -> None:
    assert [s.name for s in catalogue.students()] == list(SIZES)
    for student in catalogue.students():
        with torch.device("meta"):
            model = build_student(student.name, image_size=student.image_size)
        assert model.parameters_count == student.parameters, student.name
        assert model.grid == student.grid
        assert model.prefix_names == student.prefix
        assert model.width == student.width
        size = SIZES[student.name]
        depths = getattr(size, "depths", None)
        assert student.depth == (sum(depths) if depths else size.depth)


def plain(licence: str) -> str:
    return licence.lower().replace(" ", "-")


@pytest.mark.parametrize(
    "entry", [e for e in catalogue.teachers() if e.in_timm], ids=lambda e: e.name
)
def test_what_timm_says(entry: Entry) -> None:
    name = entry.name.removeprefix("timm/")
    assert timm.list_pretrained(name) == [name]
    config = timm.get_pretrained_cfg(name)
    assert config.input_size == (3, entry.image_size, entry.image_size)
    assert (config.mean, config.std) == (entry.mean, entry.std)
    assert entry.url == f"https://huggingface.co/{config.hf_hub_id}"
    if plain(config.license) != plain(entry.licence):
        assert config.license in (entry.note or ""), "a note must say that timm says otherwise"


def test_every_entry_is_complete_and_named_once() -> None:
    entries = catalogue.teachers()
    assert len({e.name for e in entries}) == len(entries)
    for entry in entries:
        assert entry.data, entry.name
        assert entry.method, entry.name
        assert entry.licence, entry.name
        assert entry.link.startswith("https://"), entry.name
        assert entry.paper.startswith("https://arxiv.org/abs/"), entry.name
        if entry.url is None:
            assert "never published" in (entry.note or ""), entry.name
        elif not entry.in_timm:
            assert entry.architecture or entry.student, entry.name
            assert entry.file is None or entry.url.endswith(f"/{entry.file}"), entry.name


def test_find_is_exact_and_takes_the_name_with_or_without_timm() -> None:
    found = catalogue.find("timm/vit_base_patch16_224.dino")
    assert found is not None
    assert (found.family, found.licence) == ("DINO", "Apache-2.0")
    assert catalogue.find("vit_base_patch16_224.dino") == found
    assert catalogue.find("vit_base_patch16_224") is None
    assert catalogue.find("") is None


def test_search_wants_every_word() -> None:
    names = [e.name for e in catalogue.search("EsViT w14")]
    assert names == ["esvit-swin-t-w14", "esvit-swin-s-w14", "esvit-swin-b-w14"]
    assert len(catalogue.search("")) == len(catalogue.teachers())
    assert catalogue.search("no such thing") == ()


def test_reading_it_needs_neither_torch_nor_timm() -> None:
    code = (
        "import sys\nfrom featdistill.models import catalogue\ncatalogue.teachers()\n"
        "print({'torch', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr

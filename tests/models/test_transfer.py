"""Weights carried from one architecture to another: exactly, or not at all."""

from __future__ import annotations

import pytest
import torch
from model_zoo import images, small, small_beit, small_swin, small_vit

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone
from featdistill.models.positions import SHARED_TABLE, layer_table
from featdistill.models.transfer import continue_from

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def agree(a: Backbone, b: Backbone) -> bool:
    """Whether two models give the same features of the same images."""
    with torch.no_grad():
        left, right = a(images(2, 32)), b(images(2, 32))
    return torch.allclose(left.map, right.map, **CLOSE) and torch.allclose(
        left.prefix, right.prefix, **CLOSE
    )


def test_plain_vit_becomes_a_beit_student_exactly() -> None:
    teacher, student = small_vit(), small_beit("ape")
    with torch.no_grad():
        for block in teacher.model.blocks:  # key biases, which the student has no place for
            block.attn.qkv.bias[32:64] = torch.linspace(-3, 3, 32)
    assert not agree(student, teacher)
    notes = continue_from(student, teacher)
    assert agree(student, teacher)
    assert any("key bias" in note for note in notes)
    assert notes[0].startswith("loaded ")


def test_layer_scale_is_carried() -> None:
    teacher, student = small_vit(init_values=0.3), small_beit("ape")
    continue_from(student, teacher)
    assert agree(student, teacher)
    assert torch.equal(student.model.blocks[1].gamma_1, teacher.model.blocks[1].ls1.gamma)


def test_classifier_of_the_teacher_is_left_out() -> None:
    teacher, student = small_vit(num_classes=3), small_beit("ape")
    notes = continue_from(student, teacher)
    assert agree(student, teacher)
    assert any("head.weight" in note for note in notes)


def test_vit_without_its_position_embedding_is_said() -> None:
    teacher, student = small_vit(), small_beit("shared-rpb")
    notes = continue_from(student, teacher)
    assert any("absolute position embedding left out" in note for note in notes)
    assert any("starts at 0" in note for note in notes)
    assert not student.model.rel_pos_bias.relative_position_bias_table.any()
    with torch.no_grad():
        teacher.model.pos_embed.zero_()
    assert agree(student, teacher)  # all that differs is the position embedding


@pytest.mark.parametrize(
    "make",
    [
        small_vit,
        small_beit,
        lambda: small_beit("rpb"),
        lambda: small_beit("ape"),
        lambda: small_beit("rpb", global_pool="avg"),  # keeps its norm as fc_norm
        small_swin,
    ],
    ids=["vit", "shared-rpb", "rpb", "ape", "mean-pooled-beit", "swin"],
)
def test_same_architecture_is_copied(make: object) -> None:
    source, student = make(), make()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    continue_from(student, source)
    new, old = student.model.state_dict(), source.model.state_dict()
    assert all(torch.equal(new[k], old[k]) for k in old)
    assert agree(student, source)


def test_shared_bias_goes_into_each_layer() -> None:
    source, student = small_beit("shared-rpb"), small_beit("rpb")
    continue_from(student, source)
    shared = source.model.state_dict()[SHARED_TABLE]
    assert all(torch.equal(student.model.state_dict()[layer_table(i)], shared) for i in range(3))
    assert agree(student, source)


def test_mean_pooled_beit_to_student() -> None:
    source, student = small_beit("ape", global_pool="avg"), small_beit("ape")
    continue_from(student, source)
    assert agree(student, source)


@pytest.mark.parametrize("position", ["rpb", "shared-rpb"])
def test_relative_bias_that_the_student_has_no_place_for_is_said(position: str) -> None:
    notes = continue_from(small_beit("none"), small_beit(position))
    assert any("relative position bias left out" in note for note in notes)


@pytest.mark.parametrize(
    ("student", "source", "words"),
    [
        (small_swin, small_vit, "cannot start from"),
        (small_vit, small_beit, "cannot start from"),
        (small_beit, small_swin, "cannot start from"),
        (small_beit, lambda: small_vit(reg_tokens=2), "register tokens"),
        (small_beit, lambda: small("deit_tiny_distilled_patch16_224"), "distillation token"),
        (small_beit, lambda: small_vit(pre_norm=True), "pre-norm"),
        (small_beit, lambda: small_vit(qk_norm=True), "query-key norm"),
        (
            small_beit,
            lambda: small_vit(class_token=False, global_pool="avg", reg_tokens=0),
            "no CLS token",
        ),
        (lambda: small_beit("ape", depth=2), small_vit, "blocks.2"),
        (lambda: small_beit("ape", embed_dim=16), small_vit, "of another shape"),
        (lambda: small_beit("ape", img_size=64), small_vit, "pos_embed"),
        (small_beit, lambda: small_vit(patch_size=16), "patch_embed.proj.weight"),
    ],
)
def test_pairs_that_are_refused(student: object, source: object, words: str) -> None:
    made = student()
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    with pytest.raises(ModelError, match=words):
        continue_from(made, source())
    assert all(torch.equal(made.model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("student", "source"),
    [
        (lambda: small_beit("ape", num_heads=4), small_vit),
        (lambda: small_beit("none", num_heads=4), lambda: small_beit("none")),
        (lambda: small_beit("ape"), lambda: small_vit(act_layer="relu")),
    ],
    ids=["vit-heads", "beit-heads", "activation"],
)
def test_same_shapes_but_other_mathematics_are_refused(student: object, source: object) -> None:
    with pytest.raises(ModelError):
        continue_from(student(), source())


def test_bias_of_each_layer_goes_into_a_shared_one() -> None:
    source, student = small_beit("rpb"), small_beit("shared-rpb")
    notes = continue_from(student, source)
    tables = [source.model.state_dict()[layer_table(i)] for i in range(3)]
    mean = torch.stack(tables).mean(0)
    assert torch.allclose(student.model.state_dict()[SHARED_TABLE], mean)
    assert any("the layers' mean" in note for note in notes)

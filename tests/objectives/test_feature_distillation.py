"""The distillation objective against references written from the paper's formula, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch, halves, student, teacher, tiny
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.types import Batch
from featdistill.models.backbone import Backbone
from featdistill.objectives.distillation import FeatureDistillation, distance, pair, resample

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def exact(backbone: Backbone) -> nn.Module:
    """The timm model itself, in float64."""
    return copy.deepcopy(backbone.model).double().eval()


def seen(backbone: Backbone, images: Tensor) -> Tensor:
    """Images of the size it was made for, normalised as the model wants them, in float64."""
    mean, std = (torch.tensor(v).double()[:, None, None] for v in backbone.rgb)
    x = images.double()
    if x.shape[-2:] != backbone.image_size:
        x = F.interpolate(x, backbone.image_size, mode="bilinear", antialias=True)
    return (x - mean) / std


def layernorm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def smooth_l1(prediction: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    d = (prediction - target).abs()
    return torch.where(d < beta, d.square() / (2 * beta), d - beta / 2).mean()


def objective(
    *, taught_by: Backbone | None = None, learner: Backbone | None = None, **options: object
) -> FeatureDistillation:
    return FeatureDistillation(
        teacher=taught_by or teacher(), student=learner or student(), **options
    )


# --- the paper's loss


def test_loss_and_gradients_are_the_formulas() -> None:
    made = objective().train()
    data = batch(4)
    target = layernorm(exact(made.teacher).forward_features(seen(made.teacher, data.images)))
    model = exact(made.student)
    projector = copy.deepcopy(made.projector).double()
    tokens = model.forward_features(seen(made.student, data.images))
    assert target.shape == (4, 17, 32)  # CLS and 4x4 patches
    expected = smooth_l1(projector(tokens), target.detach())
    expected.backward()

    loss = made(data)
    loss.total.backward()
    torch.testing.assert_close(loss.total.double(), expected, **CLOSE)
    assert float(expected) > 0.01
    reference = dict(model.named_parameters())
    for name, parameter in made.student.model.named_parameters():
        torch.testing.assert_close(
            parameter.grad.double(), reference[name].grad, rtol=1e-3, atol=1e-6, msg=name
        )
    for ours, theirs in zip(made.projector.parameters(), projector.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)


def test_both_branches_of_smooth_l1_are_met() -> None:
    made = objective()
    d = (made.predictions(batch()) - made.targets(batch())).abs()
    assert (d < 2).any()
    assert (d > 2).any()


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_beta(beta: float) -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(5, 7, generator=rng) for _ in range(2))
    got = distance("smooth-l1", a, b, beta)
    torch.testing.assert_close(got, smooth_l1(a, b, beta))
    assert torch.equal(objective(beta=beta)(batch()).total, objective(beta=beta)(batch()).total)
    assert not torch.equal(objective(beta=beta)(batch()).total, objective(beta=3.0)(batch()).total)


def test_part_that_is_logged() -> None:
    made = objective()
    cosine = F.cosine_similarity(made.predictions(batch()), made.targets(batch()), dim=-1).mean()
    part = made(batch()).parts["cosine"]
    torch.testing.assert_close(part, cosine.detach())
    assert not part.requires_grad


# --- the alternatives

DISTANCES = {
    "smooth-l1": smooth_l1,
    "mse": lambda a, b: (a - b).square().mean(),
    "l1": lambda a, b: (a - b).abs().mean(),
    "cosine": lambda a, b: (1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))).mean(),
}


def whitened(made: FeatureDistillation, name: str, x: Tensor) -> Tensor:
    if name == "none":
        return x
    if name == "l2":
        return x / x.norm(dim=-1, keepdim=True)
    if name == "layernorm":
        return layernorm(x)
    mean = made.whitening.mean.double()
    if name == "standardize":
        return (x - mean) / (made.whitening.var.double() + 1e-6).sqrt()
    return (x - mean) @ made.whitening.rotation.double()


@pytest.fixture(scope="session")
def models() -> tuple[Backbone, Backbone]:
    return teacher(num_classes=10), student()


@pytest.mark.parametrize("target", ["map", "gap", "logits"])
@pytest.mark.parametrize("whitening", ["layernorm", "none", "l2", "standardize", "pca"])
@pytest.mark.parametrize("loss", list(DISTANCES))
def test_alternatives(
    models: tuple[Backbone, Backbone], target: str, whitening: str, loss: str
) -> None:
    made = objective(
        taught_by=models[0], learner=models[1], target=target, whitening=whitening, loss=loss
    )
    learns = made.calibrate([batch(16, seed=5), batch(16, seed=6)])
    assert learns == (whitening in ("standardize", "pca"))
    data = batch(3)
    with torch.no_grad():
        model = exact(made.teacher)
        final = model.forward_features(seen(made.teacher, data.images))
        raw = {
            "map": final,
            "gap": final[:, 1:].mean(1, keepdim=True),
            "logits": model.forward_head(final)[:, None],
        }[target]
        tokens = exact(made.student).forward_features(seen(made.student, data.images))
        if target != "map":
            tokens = tokens[:, 1:].mean(1, keepdim=True)
        prediction = copy.deepcopy(made.projector).double()(tokens)
        wanted = whitened(made, whitening, raw)
    torch.testing.assert_close(made.targets(data).double(), wanted, rtol=1e-3, atol=2e-4)
    total = made(data).total
    expected = DISTANCES[loss](prediction, made.targets(data).double())
    torch.testing.assert_close(total.double(), expected, **CLOSE)
    assert total.requires_grad
    assert made.projector.out_features == (10 if target == "logits" else 32)


def test_calibrated_targets_are_white() -> None:
    made = objective(whitening="pca")
    data = [batch(16, seed=s) for s in (1, 2)]
    made.calibrate(iter(data))
    y = torch.cat([made.targets(b).flatten(0, 1) for b in data]).double()
    torch.testing.assert_close(y.mean(0), torch.zeros(32).double(), rtol=0, atol=1e-3)
    covariance = torch.cov(y.T, correction=0)
    # directions below the floor stay below 1
    assert float(torch.linalg.eigvalsh(covariance).max()) == pytest.approx(1, abs=1e-2)


def test_running_statistics_move_at_the_end_of_a_step_only() -> None:
    whole, parts = (objective(whitening="standardize").train() for _ in range(2))
    start = whole.whitening.mean.clone()
    whole(batch(4))
    assert torch.equal(whole.whitening.mean, start)
    for part in halves(batch(4)):
        parts(part)
    for made in (whole, parts):
        made.end_step(lambda x: x)
    assert not torch.equal(whole.whitening.mean, start)
    torch.testing.assert_close(parts.whitening.mean, whole.whitening.mean, rtol=1e-5, atol=1e-6)
    objective().end_step(lambda x: x)  # nothing to do for the others


# --- the teacher stays out of it


def test_teacher_is_frozen_and_beside_the_objective() -> None:
    made = objective().train()
    assert not made.teacher.training
    assert not any(m.training for m in made.teacher.modules())
    made(batch()).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())
    theirs = {p.data_ptr() for p in made.teacher.parameters()}
    assert not theirs & {p.data_ptr() for p in made.parameters()}
    names = {k.partition(".")[0] for k in made.state_dict()}
    assert names == {"student", "projector"}
    assert made.teacher not in set(made.modules())
    assert all(p.grad is not None for p in made.projector.parameters())


def test_targets_carry_no_gradient() -> None:
    assert not objective().targets(batch()).requires_grad


def test_teachers_drop_path_is_its_own() -> None:
    taught = tiny("vit_tiny_patch16_224", drop_path=0.5)
    made = objective(taught_by=taught).train()
    quiet, other = batch(8), batch(8)
    other = replace(other, stream=replace(other.stream, step=9))
    assert torch.equal(made.targets(quiet), made.targets(other))
    taught.slot.always = True
    assert not torch.equal(made.targets(quiet), made.targets(other))
    assert torch.equal(made.targets(quiet), made.targets(quiet))


@torch.no_grad()
def test_teacher_and_student_draw_apart() -> None:
    taught, learner = (tiny("vit_tiny_patch16_224", drop_path=0.5) for _ in range(2))
    made = objective(taught_by=taught, learner=learner, whitening="none")
    data = batch(8)

    def gap() -> float:
        ours = made.student(data.images, stream=data.stream).map.flatten(2).transpose(1, 2)
        return float((made.targets(data)[:, 1:] - ours).abs().max())

    assert gap() < 1e-5  # the same weights
    taught.slot.always = learner.slot.always = True
    assert gap() > 1e-2


def test_projector_is_a_pure_function_of_the_seed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (objective(seed=s).projector.weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_do_not_see_micro_batches() -> None:
    learner = student(drop_path=0.3)
    made = objective(learner=learner).train()
    made(batch(8)).total.backward()
    whole = {n: p.grad.clone() for n, p in made.named_parameters()}
    made.zero_grad()
    for part in halves(batch(8), 4):
        (made(part).total / 4).backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-6, msg=name)


# --- pairing


def test_cls_pairs_with_cls() -> None:
    got = pair(teacher(), student(), "auto")
    assert (got.prefix, got.left_out, got.layer, got.resampled) == (("cls",), (), None, False)


@pytest.mark.parametrize(
    ("taught_by", "left_out"),
    [
        (lambda: teacher(reg_tokens=2), ("teacher.reg1", "teacher.reg2")),
        (lambda: tiny("deit_tiny_distilled_patch16_224"), ("teacher.dist",)),
    ],
)
@torch.no_grad()
def test_tokens_without_a_partner_are_left_out(taught_by: object, left_out: tuple[str]) -> None:
    made = objective(taught_by=taught_by())
    assert made.pairing.prefix == ("cls",)
    assert made.pairing.left_out == left_out
    data = batch(2)
    final = exact(made.teacher).forward_features(seen(made.teacher, data.images))
    kept = torch.cat([final[:, :1], final[:, 1 + len(left_out) :]], dim=1)
    torch.testing.assert_close(made.targets(data).double(), layernorm(kept), **CLOSE)
    assert made.predictions(data).shape == kept.shape


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: teacher(reg_tokens=1), "reg1"),
        (lambda: tiny("deit_tiny_distilled_patch16_224"), "dist"),
    ],
)
def test_only_cls_pairs_even_where_both_have_the_others(make: object, name: str) -> None:
    got = pair(make(), make(), "auto")
    assert got.prefix == ("cls",)
    assert got.left_out == (f"teacher.{name}", f"student.{name}")


def test_teacher_without_cls() -> None:
    made = objective(taught_by=teacher(class_token=False, global_pool="avg"))
    assert made.pairing.prefix == ()
    assert made.pairing.left_out == ("student.cls",)
    assert made.targets(batch(2)).shape == made.predictions(batch(2)).shape == (2, 16, 32)


# --- grids and sizes


@pytest.mark.parametrize("patch", [16, 4])
@pytest.mark.parametrize("order", ["before-whitening", "after-whitening"])
@torch.no_grad()
def test_other_grid(patch: int, order: str) -> None:
    made = objective(taught_by=teacher(patch_size=patch), resample_order=order)
    assert made.pairing.resampled
    assert made.pairing.teacher_grid == (32 // patch, 32 // patch)
    data = batch(2)
    final = exact(made.teacher).forward_features(seen(made.teacher, data.images))
    if order == "after-whitening":
        final = layernorm(final)
    n = 32 // patch
    map_ = final[:, 1:].transpose(1, 2).reshape(2, 32, n, n)
    map_ = F.interpolate(map_, (4, 4), mode="bilinear", align_corners=False, antialias=True)
    wanted = torch.cat([final[:, :1], map_.flatten(2).transpose(1, 2)], dim=1)
    if order == "before-whitening":
        wanted = layernorm(wanted)
    torch.testing.assert_close(made.targets(data).double(), wanted, **CLOSE)
    assert made(data).total.isfinite()


@torch.no_grad()
def test_the_two_orders_differ() -> None:
    before, after = (
        objective(taught_by=teacher(patch_size=16), resample_order=f"{o}-whitening").targets(
            batch(2)
        )
        for o in ("before", "after")
    )
    assert not torch.allclose(before, after, atol=1e-3)


def test_resample_of_the_same_grid_is_nothing() -> None:
    map_ = torch.rand(1, 2, 4, 4)
    assert resample(map_, (4, 4)) is map_
    constant = torch.full((1, 2, 3, 3), 0.7)
    torch.testing.assert_close(resample(constant, (5, 2)), torch.full((1, 2, 5, 2), 0.7))


@torch.no_grad()
def test_teacher_sees_the_view_at_its_own_size() -> None:
    made = objective(taught_by=teacher(img_size=48, patch_size=12))
    assert not made.pairing.resampled
    data = batch(2, side=32)
    final = exact(made.teacher).forward_features(seen(made.teacher, data.images))
    torch.testing.assert_close(made.targets(data).double(), layernorm(final), **CLOSE)


@torch.no_grad()
def test_student_sees_the_view_at_its_own_size() -> None:
    made = objective(taught_by=teacher(img_size=64, patch_size=16))
    data = batch(2, side=64)
    tokens = exact(made.student).forward_features(seen(made.student, data.images))
    wanted = copy.deepcopy(made.projector).double()(tokens)
    torch.testing.assert_close(made.predictions(data).double(), wanted, **CLOSE)
    assert made.targets(data).shape == made.predictions(data).shape


# --- layers


def swin() -> Backbone:
    return tiny("swinv2_tiny_window8_256")


def test_hierarchical_teacher_gives_the_stage_of_the_students_grid() -> None:
    made = objective(taught_by=swin())
    assert made.pairing.layer == 2
    assert made.pairing.teacher_grid == made.pairing.student_grid == (4, 4)
    data = batch(2)
    with torch.no_grad():
        _, stages = exact(made.teacher).forward_intermediates(
            seen(made.teacher, data.images), indices=[2]
        )
    wanted = layernorm(stages[0].flatten(2).transpose(1, 2))
    assert wanted.shape == (2, 16, 32)
    torch.testing.assert_close(made.targets(data).double(), wanted, **CLOSE)
    assert made(data).total.isfinite()


@pytest.mark.parametrize(
    ("learner", "layer", "chosen", "grid"),
    [
        (student, "last", None, (2, 2)),
        (student, "auto", 2, (4, 4)),
        (student, 1, 1, (8, 8)),
        (student, -2, -2, (4, 4)),
        (lambda: student(patch_size=16), "auto", None, (2, 2)),
        (lambda: student(patch_size=32), "auto", None, (2, 2)),
        (swin, "auto", None, (2, 2)),
    ],
)
def test_layer_choice(learner: object, layer: object, chosen: object, grid: object) -> None:
    made = objective(taught_by=swin(), learner=learner(), layer=layer)
    assert (made.pairing.layer, made.pairing.teacher_grid) == (chosen, grid)
    data = batch(2)
    assert made.targets(data).shape == made.predictions(data).shape
    assert made.projector.out_features == {(2, 2): 64, (4, 4): 32, (8, 8): 16}[grid]


@torch.no_grad()
def test_earlier_layer_of_a_vit_brings_its_own_cls() -> None:
    made = objective(layer=0)
    data: Batch = batch(2)
    _, [(map_, prefix)] = exact(made.teacher).forward_intermediates(
        seen(made.teacher, data.images), indices=[0], return_prefix_tokens=True
    )
    tokens = torch.cat([prefix, map_.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(made.targets(data).double(), layernorm(tokens), **CLOSE)


@pytest.mark.parametrize("layer", [2, -3, 40])
def test_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(ModelError, match=rf"layer {layer}.*0 to 1"):
        objective(layer=layer)


def test_logits_of_a_teacher_without_a_classifier() -> None:
    with pytest.raises(ModelError, match=r"no classifier.*--target map or gap"):
        objective(target="logits")


# --- what the teacher said, kept


def told(made: FeatureDistillation, data: Batch) -> Batch:
    """The batch with what the teacher says of it, as a cache keeps it."""
    return replace(data, taught=made.taught_by(made.teacher_features(data)).bfloat16())


@pytest.mark.parametrize("target", ["map", "gap", "pooled"])
@pytest.mark.parametrize("patch", [16, 8])
@pytest.mark.parametrize("order", ["before-whitening", "after-whitening"])
@torch.no_grad()
def test_kept_targets_are_the_teachers(target: str, patch: int, order: str) -> None:
    made = objective(taught_by=teacher(patch_size=patch), target=target, resample_order=order)
    data = batch(4)
    kept = told(made, data)
    assert kept.taught.shape == (4, 1 + (32 // patch) ** 2 if target == "map" else 1, 32)
    # layernorm keeps bf16's relative rounding, 2^-9 of values up to 4
    torch.testing.assert_close(made.targets(kept), made.targets(data), rtol=2**-8, atol=2**-7)
    assert not torch.equal(made.targets(kept), made.targets(data))  # of bf16, after all
    assert made.targets(kept).dtype == torch.float32


@torch.no_grad()
def test_what_is_kept_serves_a_student_without_cls() -> None:
    with_cls, without = objective(), objective(learner=tiny("swinv2_tiny_window8_256"))
    assert (with_cls.pairing.prefix, without.pairing.prefix) == (("cls",), ())
    data = batch(4)
    kept = told(with_cls, data)
    assert torch.equal(kept.taught, told(without, data).taught)
    assert without.targets(kept).shape == without.predictions(kept).shape
    torch.testing.assert_close(without.targets(kept), without.targets(data), rtol=2**-8, atol=2**-7)


def test_kept_targets_spare_the_teacher() -> None:
    made = objective().train()
    kept = told(made, batch(4))
    made.teacher.forward = None  # whoever calls it fails
    made(kept).total.backward()
    with pytest.raises(TypeError):
        made(batch(4))


def test_kept_targets_are_split_with_their_batch() -> None:
    kept = told(objective(), batch(4))
    parts = kept.split(2)
    assert torch.equal(torch.cat([p.taught for p in parts]), kept.taught)
    assert kept.to(torch.device("meta")).taught.is_meta
    assert kept.as_float().taught is kept.taught

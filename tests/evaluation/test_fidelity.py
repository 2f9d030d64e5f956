"""The held-out signal against a plain computation on all images at once, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import explained_variance_score
from torch import Tensor

from featdistill.core.types import Batch
from featdistill.data.decode import BadImage
from featdistill.data.loader import Share
from featdistill.data.sources import ArraySource
from featdistill.data.views import EvalView
from featdistill.evaluation.fidelity import ExplainedVariance, Fidelity, fidelity
from featdistill.objectives.distillation import FeatureDistillation
from tests.objectives.tiny_models import student, teacher

IMAGES = 11


class Holed(ArraySource):
    """Image 4 is unreadable."""

    def read(self, index: int) -> Tensor:
        if index == 4:
            raise BadImage("truncated")
        return super().read(index)


def source(kind: type[ArraySource] = ArraySource) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 255, (IMAGES, 3, 40, 40), np.uint8)
    return kind("made", torch.from_numpy(pixels))


def objective(**options: object) -> FeatureDistillation:
    return FeatureDistillation(teacher=teacher(), student=student(drop_path=0.5), **options)


def measure(made: FeatureDistillation, size: int = 4, **options: object) -> Fidelity:
    images = options.pop("images", None) or source()
    found = fidelity(made, images, EvalView(32), batch_size=size, workers=0, **options)
    assert found is not None
    return found


def both(made: FeatureDistillation, images: ArraySource, keep: list[int]) -> tuple[Tensor, Tensor]:
    """Predictions and targets of all images in one batch, by the objective in evaluation mode."""
    views = torch.stack([EvalView(32)(images.images[i])[0] for i in keep]).float() / 255
    index = torch.tensor(keep)
    batch = Batch((views,), None, index, index)
    made.eval()
    with torch.no_grad():
        return made.predictions(batch), made.targets(batch)


@pytest.mark.parametrize("target", ["map", "gap"])
@pytest.mark.parametrize("loss", ["smooth-l1", "cosine"])
def test_every_number_equals_that_of_one_whole_batch(target: str, loss: str) -> None:
    made = objective(target=target, loss=loss)
    found = measure(made.train())
    p, t = both(made, source(), list(range(IMAGES)))
    whole = made.compare(p, t)
    assert found.images == IMAGES
    assert found.loss == pytest.approx(float(whole.total), rel=1e-5)
    assert found.cosine == pytest.approx(float(whole.parts["cosine"]), rel=1e-4, abs=1e-6)
    expected = explained_variance_score(
        t.flatten(0, 1).double(), p.flatten(0, 1).double(), multioutput="variance_weighted"
    )
    assert found.explained_variance == pytest.approx(expected, rel=1e-5)


def test_ranks_are_of_the_pooled_maps() -> None:
    made = objective()
    found = measure(made)
    views = torch.stack([EvalView(32)(i)[0] for i in source().images]).float() / 255
    for backbone, rank in ((made.student, found.student_rank), (made.teacher, found.teacher_rank)):
        with torch.no_grad():
            rows = backbone(views).map.mean((2, 3)).double()
        s = torch.linalg.svdvals(rows)
        p = s / s.sum()
        assert rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-3)
    assert found.student_rank != pytest.approx(found.teacher_rank, rel=0.05)


@pytest.mark.parametrize("size", [1, 3, 11, 100])
def test_the_batch_size_changes_nothing(size: int) -> None:
    made = objective()
    one, other = measure(made, 4), measure(made, size)
    for name, value in vars(one).items():
        assert vars(other)[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("world", [2, 3, 16])
def test_the_number_of_processes_changes_nothing(world: int) -> None:
    """Each process's own sums are kept, then every process is given everybody's."""
    made = objective()
    sums: list[list[Tensor]] = []
    for rank in range(world):
        mine: list[Tensor] = []

        def keep(value: Tensor, mine: list[Tensor] = mine) -> Tensor:
            mine.append(value.clone())
            return value

        fidelity(
            made,
            source(),
            EvalView(32),
            batch_size=2,
            workers=0,
            share=Share(rank, world),
            total=keep,
        )
        sums.append(mine)
    everybody = iter([torch.stack(same).sum(0) for same in zip(*sums, strict=True)])
    found = measure(made, 2, share=Share(0, world), total=lambda _: next(everybody))
    for name, value in vars(measure(made)).items():
        assert vars(found)[name] == pytest.approx(value, rel=1e-4), name


def test_unreadable_images_are_left_out() -> None:
    made = objective()
    found = measure(made, images=source(Holed))
    assert (found.images, found.unreadable) == (IMAGES - 1, 1)
    p, t = both(made, source(), [i for i in range(IMAGES) if i != 4])
    assert found.loss == pytest.approx(float(made.compare(p, t).total), rel=1e-5)
    readable = torch.cat([source().images[:4], source().images[5:]])
    expected = measure(made, images=ArraySource("readable", readable))
    for name in ("cosine", "explained_variance", "student_rank", "teacher_rank"):
        assert vars(found)[name] == pytest.approx(vars(expected)[name], rel=1e-4), name


def test_nothing_to_measure() -> None:
    class Broken(ArraySource):
        def read(self, index: int) -> Tensor:
            raise BadImage("truncated")

    made = objective()
    assert fidelity(made, source(Broken), EvalView(32), batch_size=4, workers=0) is None


def test_measuring_leaves_no_trace() -> None:
    """Modes of single modules, weights, buffers, pending statistics, generators, drop path."""
    made = objective(whitening="standardize").train()
    made.teacher.slot.always = True
    made.student.model.norm.eval()
    modes = [m.training for m in made.modules()]
    before = {k: v.clone() for k, v in [*made.named_buffers(), *made.named_parameters()]}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two = measure(made), measure(made)
    assert one == two
    assert [m.training for m in made.modules()] == modes
    assert made.teacher.slot.always
    assert not made.teacher.training
    assert torch.equal(torch.get_rng_state(), state)
    after = dict([*made.named_buffers(), *made.named_parameters()])
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_a_teacher_with_drop_path_is_measured_without() -> None:
    made = FeatureDistillation(teacher=teacher(drop_path=0.9), student=student())
    still = measure(made)
    made.teacher.slot.always = True
    assert measure(made) == still


def test_draws_while_measuring_move_no_generator() -> None:
    made = objective()
    drawn: list[Tensor] = []
    made.projector.register_forward_hook(lambda *_: drawn.append(torch.rand(3)))
    state = torch.get_rng_state()
    measure(made)
    assert drawn
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fault_while_measuring_leaves_no_trace_either() -> None:
    made = objective().train()

    def fail() -> None:
        raise KeyboardInterrupt

    made.projector.register_forward_hook(lambda *_: fail())
    with pytest.raises(KeyboardInterrupt):
        measure(made)
    assert all(m.training for m in made.modules())


def explained(prediction: Tensor, target: Tensor) -> float | None:
    found = ExplainedVariance(target.shape[-1], target.device)
    for p, t in zip(prediction.split(3), target.split(3), strict=True):
        found.add(p, t)
    return found.value()


def test_explained_variance_in_closed_form() -> None:
    t = torch.randn(10, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = t.flatten(0, 1).mean(0).expand_as(t)
    assert explained(t, t) == 1
    assert explained(t + 3, t) == pytest.approx(1)  # a constant offset is no variance
    assert explained(mean, t) == pytest.approx(0, abs=1e-12)
    assert explained(mean + 0.5 * (t - mean), t) == pytest.approx(0.75)
    assert explained(mean - (t - mean), t) == pytest.approx(-3)


def test_explained_variance_far_from_zero_and_of_nothing() -> None:
    t = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(0)) + 1000
    p = t + 0.5 * torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(1))
    rows, guesses = t.flatten(0, 1).double(), p.flatten(0, 1).double()
    expected = explained_variance_score(rows, guesses, multioutput="variance_weighted")
    assert explained(p, t) == pytest.approx(expected, rel=1e-6)
    assert explained(t, torch.full_like(t, 0.1)) is None
    assert ExplainedVariance(4, t.device).value() is None

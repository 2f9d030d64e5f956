"""How well a student says what its teacher says, on images that it was not trained on.

B batch, N tokens, D target channels; n images in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from featdistill.core.seeds import seeded_globals
from featdistill.core.types import Batch
from featdistill.data.loader import Share, listed_batches, plainly
from featdistill.data.sources import Source
from featdistill.data.views import View
from featdistill.evaluation.rank import Moments, effective_rank
from featdistill.models.modes import evaluating
from featdistill.models.pooling import pool
from featdistill.objectives.distillation import FeatureDistillation


@dataclass(frozen=True)
class Fidelity:
    """Of a student to its teacher, on n images.

    Attributes:
        images: n, without the unreadable ones.
        unreadable: how many were left out.
        loss: the objective's own.
        cosine: mean over images and tokens, of projected student and whitened teacher.
        explained_variance: see `ExplainedVariance`; None where the targets do not vary.
        student_rank, teacher_rank: RankMe of the mean-pooled maps; at most n and the width.
    """

    images: int
    unreadable: int
    loss: float
    cosine: float
    explained_variance: float | None
    student_rank: float
    teacher_rank: float


class ExplainedVariance:
    """Streamed: 1 - (sum over channels of Var[t - p]) / (sum over channels of Var[t]).

    Variances are over all images and tokens (the targets' N B rows of D channels), about each
    channel's mean, so that a constant prediction explains nothing and a perfect one everything;
    a bad one is below 0. It is scikit-learn's `explained_variance_score` with
    `multioutput="variance_weighted"`. Sums are float64 on the predictions' device.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        # count; sums and squared lengths of targets and of residuals
        self._count = torch.zeros(1, dtype=torch.float64, device=device)
        self._sums = torch.zeros(2, channels, dtype=torch.float64, device=device)
        self._squares = torch.zeros(2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Take in a batch, both (B, N, D)."""
        t = target.detach().double().flatten(0, -2)
        r = t - prediction.detach().double().flatten(0, -2)
        self._count += len(t)
        self._sums += torch.stack([t.sum(0), r.sum(0)])
        self._squares += torch.stack([t.square().sum(), r.square().sum()])

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by `total` of them: those of all processes."""
        self._count, self._sums, self._squares = map(
            total, (self._count, self._sums, self._squares)
        )

    def value(self) -> float | None:
        """The share; None where the targets do not vary (beyond the rounding of their sums)."""
        count = float(self._count)
        if count == 0:
            return None
        squares = self._squares.cpu()
        of_target, of_residual = (squares - self._sums.cpu().square().sum(1) / count).tolist()
        if of_target <= 1e-12 * float(squares[0]):
            return None
        return 1 - max(0.0, of_residual) / of_target


@contextmanager
def undisturbed(objective: FeatureDistillation) -> Iterator[None]:
    """Evaluation mode, no drop path on either side; then every mode and generator as it was."""
    always = objective.teacher.slot.always
    with seeded_globals("fidelity"), torch.no_grad(), evaluating(objective):
        try:
            objective.teacher.slot.always = False
            yield
        finally:
            objective.teacher.slot.always = always


def fidelity(
    objective: FeatureDistillation,
    source: Source,
    view: View,
    *,
    batch_size: int,
    workers: int | None = None,
    share: Share = Share(),  # noqa: B008 - immutable
    total: Callable[[Tensor], Tensor] = lambda x: x,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Fidelity | None:
    """Measure on every readable image of a source; None where there is none.

    The objective is left as it was, and so is every random generator. Neither the batch size nor
    the number of processes changes the result (beyond float32 rounding in the models).

    Args:
        view: deterministic.
        batch_size: of this process.
        share: this process among all; each measures its part.
        total: sum over processes.
        autocast: the precision's context.
    """
    mine = range(share.rank, len(source), share.world)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    sums = _Sums(objective)
    if batches:
        loader = listed_batches(source, view, batches=batches, workers=workers, share=share)
        with undisturbed(objective), autocast():
            for batch in plainly(loader):
                sums.add(batch)
    return sums.result(total)


class _Sums:
    """All that a slice's fidelity is made of, on the device until the end."""

    def __init__(self, objective: FeatureDistillation) -> None:
        self.objective = objective
        self.device = objective.student.mean.device
        self.variance = ExplainedVariance(objective.projector.out_features, self.device)
        self.ranks = [Moments(objective.student.width), Moments(objective.teacher.width)]
        # images, unreadable ones, loss, cosine
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)

    def add(self, batch: Batch) -> None:
        objective = self.objective
        bad = {r.index for r in batch.replaced}
        ready = batch.to(self.device).as_float()
        of_student = objective.student_features(ready)
        of_teacher = objective.teacher_features(ready)
        prediction = objective.predictions_of(of_student)
        target = objective.targets_of(of_teacher)
        rows = [pool(features, "mean") for features in (of_student, of_teacher)]
        if bad:
            kept = torch.tensor([i not in bad for i in batch.indices.tolist()]).to(self.device)
            prediction, target = prediction[kept], target[kept]
            rows = [r[kept] for r in rows]
        self.sums[1] += len(bad)
        if not len(target):
            return
        loss = objective.compare(prediction, target)
        good = len(target)
        self.sums[0] += good
        self.sums[2] += loss.total.double() * good
        self.sums[3] += loss.parts["cosine"].double() * good
        self.variance.add(prediction, target)
        for moments, pooled in zip(self.ranks, rows, strict=True):
            moments.add(pooled)

    def result(self, total: Callable[[Tensor], Tensor]) -> Fidelity | None:
        for moments in self.ranks:
            # a process without images has its sums on the CPU still
            moments.reduce(lambda sums: total(sums.to(self.device)))
        self.variance.reduce(total)
        images, unreadable, loss, cosine = total(self.sums).tolist()
        if not images:
            return None
        student, teacher = (effective_rank(m.singular_values()) for m in self.ranks)
        return Fidelity(
            images=int(images),
            unreadable=int(unreadable),
            loss=loss / images,
            cosine=cosine / images,
            explained_variance=self.variance.value(),
            student_rank=student,
            teacher_rank=teacher,
        )

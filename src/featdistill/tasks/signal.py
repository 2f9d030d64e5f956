"""The signal while distilling: scores on held-out images, nearest neighbours, and a rank alarm."""

from __future__ import annotations

from pathlib import Path

from featdistill.config.commands import DistillConfig
from featdistill.config.sections import KnnConfig
from featdistill.data.views import EvalView
from featdistill.engine.plan import Plan
from featdistill.engine.rundir import read_metrics
from featdistill.engine.tracking import say
from featdistill.evaluation.fidelity import Fidelity, fidelity, undisturbed
from featdistill.evaluation.rank import collapse
from featdistill.tasks.assembly import Assembly
from featdistill.tasks.knn import knn_of

_CROP = 0.875  # the knn command's default, so that both give the same number


class Signal:
    """Called by the loop now and then: scores to log; the objective is left as it was.

    Args:
        plan: the run's, which says when it is called.
        folder: the run's; the student's earlier ranks are in its metrics.jsonl.
    """

    def __init__(self, config: DistillConfig, assembly: Assembly, plan: Plan, folder: Path) -> None:
        self.config, self.assembly, self.plan = config, assembly, plan
        self.metrics = folder / "metrics.jsonl"
        self._name = f"{assembly.name}: " if assembly.others else ""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to measure."""
        return self.assembly.held.images is not None or self.assembly.voters is not None

    def __call__(self) -> dict[str, float]:
        with undisturbed(self.assembly.objective):
            scores = {**self._held_out(), **self._neighbours()}
        say(f"held out   {self._name}{_line(scores)}")
        self._alarm(scores)
        return scores

    def _held_out(self) -> dict[str, float]:
        assembly, source = self.assembly, self.assembly.held.images
        if source is None:
            return {}
        runtime = assembly.runtime
        with assembly.objective.awake(runtime.device):
            found = fidelity(
                assembly.objective,
                source,
                EvalView(assembly.view.size, _CROP),
                batch_size=max(1, self.config.data.batch_size // runtime.share.world),
                workers=self.config.data.workers,
                share=runtime.share,
                total=runtime.sum,
                autocast=runtime.autocast,
            )
        if found is None:
            say(f"none of the {len(source):,} held-out images is readable: nothing is measured")
            return {}
        return _scores(found)

    def _neighbours(self) -> dict[str, float]:
        voters, signal = self.assembly.voters, self.config.signal
        if voters is None:
            return {}
        scores = knn_of(
            self.assembly.objective.student,
            KnnConfig(k=(signal.knn_k,)),
            train=voters.train,
            held=voters.held,
            batch_size=self.config.data.batch_size,
            crop=_CROP,
            workers=self.config.data.workers,
        )
        [top1] = scores.values()
        return {"knn_top1": top1}

    def _alarm(self, scores: dict[str, float]) -> None:
        """Add whether the rank has collapsed to the scores, and warn when it begins."""
        if "student_rank" not in scores:
            return
        before = [row for row in read_metrics(self.metrics) if "student_rank" in row]
        history = [row["student_rank"] for row in before] + [scores["student_rank"]]
        trouble = collapse(
            history,
            scores["teacher_rank"],
            share=self.config.signal.rank_alarm,
            evaluations=1 + -(-self.plan.schedule.steps // self.plan.steps_between_evaluations),
        )
        scores["rank_alarm"] = float(trouble is not None)
        if trouble is not None and not (before and before[-1].get("rank_alarm")):
            say(
                f"warning: {self._name}the student's features collapse: their effective rank is "
                f"{trouble}; "
                "try a smaller --lr, or look at --whitening"
            )


def _scores(found: Fidelity) -> dict[str, float]:
    scores = {
        "holdout_loss": found.loss,
        "holdout_cosine": found.cosine,
        "student_rank": found.student_rank,
        "teacher_rank": found.teacher_rank,
    }
    if found.explained_variance is not None:
        scores["holdout_explained_variance"] = found.explained_variance
    if found.unreadable:
        scores["holdout_unreadable"] = found.unreadable
    return scores


def _line(scores: dict[str, float]) -> str:
    """The scores for the person at the terminal."""
    words = []
    if "holdout_loss" in scores:
        words += [f"loss {scores['holdout_loss']:.4f}", f"cosine {scores['holdout_cosine']:.3f}"]
        if "holdout_explained_variance" in scores:
            words.append(f"explained variance {scores['holdout_explained_variance']:.1%}")
        words.append(f"rank {scores['student_rank']:.1f} (teacher {scores['teacher_rank']:.1f})")
    if "knn_top1" in scores:
        words.append(f"kNN {scores['knn_top1']:.2%}")
    if "holdout_unreadable" in scores:
        words.append(f"{scores['holdout_unreadable']:.0f} unreadable")
    return "  ".join(words) or "nothing"

"""`featdistill knn`: how good frozen features are without any training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from featdistill.config.commands import KnnCommandConfig
from featdistill.config.sections import KnnConfig, ModelConfig
from featdistill.core.errors import ConfigError
from featdistill.core.records import write_record
from featdistill.data.sources import Source, labelled
from featdistill.engine.rundir import check_out
from featdistill.engine.runtime import limit_threads, pick_device
from featdistill.engine.tracking import say
from featdistill.evaluation.features import extract
from featdistill.evaluation.knn import knn
from featdistill.models.backbone import Backbone
from featdistill.tasks.common import data_of, model_of, plain, weights_problems
from featdistill.tasks.finetune import check_labels


@dataclass(frozen=True)
class KnnResult:
    """Accuracies (0..1) by model and k; `best` is by model, over k.

    Attributes:
        record: the file with the result, if `out` was given.
    """

    top1: Mapping[str, Mapping[int, float]]
    record: Path | None

    @property
    def best(self) -> dict[str, float]:
        return {model: max(scores.values()) for model, scores in self.top1.items()}


def knn_of(
    backbone: Backbone,
    config: KnnConfig,
    *,
    train: Source,
    held: Source,
    batch_size: int,
    crop: float,
    workers: int | None,
) -> dict[int, float]:
    """Accuracy by k of a backbone's frozen features."""
    bank, queries = (
        extract(
            backbone,
            part,
            how=config.pool.value,
            batch_size=batch_size,
            crop=crop,
            workers=workers,
        )
        for part in (train, held)
    )
    scores = knn(
        bank,
        torch.from_numpy(labelled(train, "kNN")),
        queries,
        torch.from_numpy(labelled(held, "kNN")),
        ks=config.k,
        temperature=config.temperature,
        device=backbone.mean.device,
    )
    return scores.top1


def run(config: KnnCommandConfig) -> KnnResult:
    """Score each model."""
    names = _names(config)
    if config.run.out is not None:
        check_out(config.run.out, resume=False)
    limit_threads()
    data = data_of(config.data, config.run.seed)
    train, held, _ = check_labels(data, budget=config.data.labels, seed=config.run.seed, what="kNN")
    device = pick_device(config.run.device)
    models = [
        model_of(
            ModelConfig(spec=spec, weights=w),
            image_size=config.view.image_size,
            seed=config.run.seed,
        )
        for spec, w in zip(config.models, _weights(config), strict=True)
    ]
    say(f"{len(train):,} labelled images vote on {len(held):,}")
    found: dict[str, dict[int, float]] = {}
    for spec, backbone in zip(names, models, strict=True):
        backbone.to(device)
        found[spec] = knn_of(
            backbone,
            config.knn,
            train=train,
            held=held,
            batch_size=config.data.batch_size,
            crop=config.view.eval_crop,
            workers=config.data.workers,
        )
        backbone.cpu()
        scores = "  ".join(f"k={k} {top1:.2%}" for k, top1 in found[spec].items())
        say(f"{spec}: {scores}")
    record = None
    if config.run.out is not None:
        origins = {s: vars(b.origin) for s, b in zip(names, models, strict=True)}
        record = write_record(
            Path(config.run.out) / "knn.json",
            "knn",
            config=plain(config),
            results={"top1": found, "models": origins, "bank": len(train), "queries": len(held)},
        )
    return KnnResult(found, record)


def _weights(config: KnnCommandConfig) -> tuple[str, ...]:
    """One for each model."""
    return config.weights * (len(config.models) if len(config.weights) == 1 else 1)


def _names(config: KnnCommandConfig) -> list[str]:
    """What the models are called; their weights are said where the same model comes twice.

    Raises:
        ConfigError: weights that are too few or too many, or the same model twice.
    """
    if problems := weights_problems(config.models, config.weights):
        raise ConfigError(problems)
    twice = len(set(config.models)) < len(config.models)
    pairs = zip(config.models, _weights(config), strict=True)
    names = [f"{spec} ({weights})" if twice else spec for spec, weights in pairs]
    if len(set(names)) < len(names):
        raise ConfigError(["the same model with the same weights is given twice"])
    return names

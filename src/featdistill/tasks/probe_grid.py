"""The fast linear probe: features once, then a whole grid of settings at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featdistill.config.commands.probing import GridConfig, ProbeConfig, ProbeViewConfig
from featdistill.core.errors import DataError, Interrupted
from featdistill.data.sources import Source, Subset, labelled
from featdistill.data.splits import label_budget, split_places
from featdistill.data.views import EvalView, FinetuneView, View
from featdistill.engine.signals import stop_on_signals
from featdistill.engine.tracking import Bar, duration, say
from featdistill.evaluation.classification import judge, summary
from featdistill.evaluation.linear import (
    Heads,
    Linear,
    Setting,
    Trial,
    choose,
    edges,
    rows_of,
    train_heads,
    try_heads,
)
from featdistill.evaluation.logistic import solve_heads
from featdistill.evaluation.vectors import NumberedView, need_all, read_all, store_vectors
from featdistill.models.backbone import Backbone
from featdistill.models.pooling import vector_of
from featdistill.tasks.probe_record import ModelProbe, SeedProbe, read_fit, write_fit

_DECAYS = tuple(float(f"{10 ** (half / 2):.3g}") for half in range(-16, -3))
_SGD_RATES, _SGD_DECAYS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (0.0, 1e-7, 1e-6, 1e-5, 1e-4)
_PASSES, _LEAST_STEPS = 10, 1000  # of SGD


@dataclass(frozen=True)
class Labels:
    """The labels that one seed may use.

    Attributes:
        images: their places in the training part.
        rest, held: of `images`, those that train the grid and those that choose.
    """

    images: np.ndarray
    rest: np.ndarray
    held: np.ndarray


def labels_of(train: Source, grid: GridConfig, *, budget: str | None, seed: int) -> Labels:
    """A seed's labels.

    Raises:
        DataError: there are too few to choose a setting by.
    """
    images = np.arange(len(train)) if budget is None else label_budget(train, budget, seed).chosen
    of_images = labelled(train, "a probe")[images]
    if len(settings_of(grid)) == 1:
        return Labels(images, images, images[:0])
    rest, held = split_places(len(images), of_images, grid.fraction, seed)
    if not len(held) or not len(rest):
        raise DataError(
            f"a share of {grid.fraction:g} of {len(images)} labels, class by class, leaves none to "
            + ("choose a setting by" if len(rest) else "learn from"),
            fix="give more --labels, another --probe.grid.fraction, or a single setting "
            "(--weight-decays 1e-4), which leaves nothing to choose",
        )
    return Labels(images, images[rest], images[held])


def settings_of(grid: GridConfig) -> list[Setting]:
    """Every weight decay, of SGD with every learning rate; each once."""
    if grid.solver == "lbfgs":
        return [Setting(None, decay) for decay in dict.fromkeys(grid.weight_decays or _DECAYS)]
    rates = dict.fromkeys(grid.lrs or _SGD_RATES)
    decays = dict.fromkeys(grid.weight_decays or _SGD_DECAYS)
    return [Setting(lr, decay) for lr in rates for decay in decays]


def probe_of(
    backbone: Backbone,
    config: ProbeConfig,
    *,
    train: Source,
    held: Source,
    seeds: tuple[int, ...],
    folder: Path,
    batch_size: int,
    view: ProbeViewConfig = ProbeViewConfig(),  # noqa: B008 - immutable
    budget: str | None = None,
    workers: int | None = None,
    bad_image_limit: float = 0.01,
    seed: int = 0,
    title: str = "probe",
) -> ModelProbe:
    """Linear probes of a backbone's frozen features, one for each seed, on the backbone's device.

    The backbone's weights, statistics and modes are as they were. What an earlier call left in the
    folder is taken: the features, and the seeds that were done.

    Args:
        train, held: labelled, with the same classes.
        budget: of the training labels, drawn anew by each seed.
        seed: of the random crops, which all seeds share.
        folder: for features (delete `features` afterwards) and for each seed's result.

    Raises:
        Interrupted: asked to stop by a signal.
    """
    found = [read_fit(folder / f"seed-{seed}") for seed in seeds]
    if all(one is not None for one in found):
        done = tuple(one for one in found if one is not None)
        return ModelProbe(done[0].head.weight.shape[1], done)
    each = {s: labels_of(train, config.grid, budget=budget, seed=s) for s in seeds}
    bank = _extract(
        backbone,
        config,
        train=train,
        held=held,
        images=np.unique(np.concatenate([mine.images for mine in each.values()])),
        folder=folder / "features",
        batch_size=batch_size,
        view=view,
        workers=workers,
        bad_image_limit=bad_image_limit,
        seed=seed,
    )
    fitter = _Fitter(config.grid, bank, backbone.mean.device, title)
    runs = []
    for one, known in zip(seeds, found, strict=True):
        run = known or fitter.fit(one, each[one], keep=budget is not None)
        if known is None:
            write_fit(folder / f"seed-{one}", run)
        runs.append(run)
    return ModelProbe(bank.central.shape[1], tuple(runs))


@dataclass(frozen=True)
class _Bank:
    """Vectors of images.

    Attributes:
        central: (n, D) of the training images' central crops.
        training: (views n, D) of the views to train on; `central` itself where no others are.
        views: how many.
        images: (n,) places in the training part, ascending.
        labels: (n,) of the training images; of several views, (views n,).
        test, test_labels: of the held-out images.
    """

    central: Tensor
    training: Tensor
    views: int
    images: np.ndarray
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int

    def rows(self, images: np.ndarray) -> np.ndarray:
        """Rows in `central` of those of these training images that could be read."""
        return np.flatnonzero(np.isin(self.images, images))


def _extract(
    backbone: Backbone,
    config: ProbeConfig,
    *,
    train: Source,
    held: Source,
    images: np.ndarray,
    folder: Path,
    batch_size: int,
    view: ProbeViewConfig,
    workers: int | None,
    bad_image_limit: float,
    seed: int,
) -> _Bank:
    vector = vector_of(backbone, config.pool.value, config.layers)
    some = train if len(images) == len(train) else Subset(train, images)
    size = backbone.image_size[0]
    central: View = EvalView(size, view.eval_crop)

    def stored(source: Source, how: View, name: str, limit: float) -> Any:
        return store_vectors(
            backbone,
            vector,
            source,
            how,
            folder=folder / name,
            batch_size=batch_size,
            workers=workers,
            bad_image_limit=limit,
        )

    test = stored(held, central, "test", 1.0)
    need_all(test, held)
    middle = stored(some, central, "train", bad_image_limit)
    cut = FinetuneView(
        size=size,
        scale=view.crop_scale,
        ratio=view.crop_ratio,
        flip=view.flip,
        randaugment=None,
        mean=backbone.rgb[0],
    )
    crops = [
        stored(some, NumberedView(cut, seed=seed, number=k), f"crop-{k}", bad_image_limit)
        for k in range(config.grid.crops)
    ]
    vectors = read_all([middle])
    labels = torch.from_numpy(labelled(some, "a probe")[middle.index])
    assert train.classes is not None
    return _Bank(
        central=vectors,
        training=read_all(crops) if crops else vectors,
        views=max(1, len(crops)),
        images=images[middle.index],
        labels=labels.repeat(max(1, len(crops))),
        test=read_all([test]),
        test_labels=torch.from_numpy(labelled(held, "scoring")),
        classes=len(train.classes),
    )


@dataclass(frozen=True)
class _Fitter:
    """Trains a grid under a seed, chooses, trains the chosen one again, and scores it."""

    grid: GridConfig
    bank: _Bank
    device: torch.device
    title: str

    def fit(self, seed: int, mine: Labels, *, keep: bool) -> SeedProbe:
        began = time.monotonic()
        bank, settings = self.bank, settings_of(self.grid)
        rest, held = bank.rows(mine.rest), bank.rows(mine.held)
        with _progress(f"{self.title}, seed {seed}") as tick:
            heads, steps = self._train(rest, settings, seed, tick)
            trials: list[Trial] = []
            chosen = 0
            if len(held):
                places = torch.from_numpy(held)
                trials = try_heads(heads, settings, bank.central[places], bank.labels[places])
                chosen = choose(trials, len(held))
            if len(held) and self.grid.refit:
                everything = np.union1d(rest, held)
                heads, steps = self._train(everything, [settings[chosen]], seed, tick)
                head = heads[0].folded(0)
            else:
                flat = [(part, g) for part in heads for g in range(part.bias.shape[0])]
                part, place = flat[chosen]
                head = part.folded(place)
        scores = summary(judge(self._logits(head), bank.test_labels), classes=bank.classes)
        at_edge = edges(trials, chosen) if trials else ()
        facts = {
            "lr": settings[chosen].lr,
            "weight_decay": settings[chosen].weight_decay,
            "edge": list(at_edge),
            "val_top1": trials[chosen].top1 if trials else None,
            "grid": [
                {
                    "lr": t.setting.lr,
                    "weight_decay": t.setting.weight_decay,
                    "val_top1": t.top1,
                    "val_loss": t.loss if np.isfinite(t.loss) else None,
                }
                for t in trials
            ],
            "steps": steps,
            "labels": len(mine.images),
            "seconds": time.monotonic() - began,
        }
        self._warn(seed, settings[chosen], at_edge)
        return SeedProbe(seed, head, scores, facts, mine.images if keep else None)

    def _train(
        self, rows: np.ndarray, settings: list[Setting], seed: int, tick: Any
    ) -> tuple[list[Heads], int | None]:
        """Heads in the order of the settings, and the steps that each took, of SGD."""
        bank, grid = self.bank, self.grid
        mine = rows_of(rows, of=len(bank.central), views=bank.views)
        if grid.solver == "lbfgs":
            solved = solve_heads(
                bank.training,
                bank.labels,
                mine,
                decays=[setting.weight_decay for setting in settings],
                classes=bank.classes,
                device=self.device,
                tick=tick,
            )
            return [solved], None
        steps = grid.steps or max(_LEAST_STEPS, _PASSES * -(-len(mine) // grid.batch_size))
        heads = train_heads(
            bank.training,
            bank.labels,
            mine,
            settings=settings,
            classes=bank.classes,
            steps=steps,
            batch_size=grid.batch_size,
            seed=seed,
            device=self.device,
            tick=tick,
        )
        return heads, steps

    def _logits(self, head: Linear) -> Tensor:
        return head.logits(self.bank.test)

    def _warn(self, seed: int, setting: Setting, at_edge: tuple[str, ...]) -> None:
        options = {"lr": "--lrs", "weight_decay": "--weight-decays"}
        for edge in at_edge:
            name, _, side = edge.partition(" ")
            word = name.replace("lr", "learning rate").replace("_", " ")
            say(
                f"warning: {self.title}, seed {seed}: the best {word}, {getattr(setting, name):g}, "
                f"is at the edge of the grid; a better one may lie {side}: repeat with more "
                f"{options[name]}"
            )


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    """A bar over the steps, which also ends them when a signal asks for it."""
    bar, began = Bar(title), 0.0
    with stop_on_signals() as request:

        def tick(done: int, total: int) -> None:
            nonlocal began
            if request.signal is not None:
                raise Interrupted(
                    f"stopped at step {done} of {total} of {title}; the features are kept",
                    signal_number=request.signal,
                    fix="go on with the same command and --resume",
                )
            if done == 0:
                bar.stop()
                bar.start(total, 0)
                began = time.monotonic()
            elif done % 10 == 0:
                left = (time.monotonic() - began) / done * (total - done)
                bar.update(done, f"left {duration(left)}")

        try:
            yield tick
        finally:
            bar.stop()

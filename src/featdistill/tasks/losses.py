"""Models that have a loss, on fixed images, from what a user names: classifiers, and distillations.

`subjects_of(config, runtime)` is what `landscape` and `curvature` begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from featdistill.config.commands import DistillConfig
from featdistill.config.commands.diagnostics import LossConfig
from featdistill.config.sections import ModelConfig
from featdistill.core.errors import ConfigError, DataError, ModelError, RunError
from featdistill.core.parsing import parse_json, parse_yaml
from featdistill.core.seeds import generator
from featdistill.core.types import Batch
from featdistill.data.loader import ordered_batches, plainly
from featdistill.data.open import open_data
from featdistill.data.parts import some
from featdistill.data.sources import Relabelled, Source, Subset, labelled
from featdistill.data.views import EvalView
from featdistill.diagnostics.subject import (
    KindName,
    Subject,
    classifier_subject,
    distillation_subject,
)
from featdistill.engine.best import read_best
from featdistill.engine.checkpoint import Checkpoint, Checkpoints
from featdistill.engine.runtime import Runtime, limit_threads
from featdistill.evaluation.extraction import fingerprint
from featdistill.models.backbone import Backbone, Origin
from featdistill.tasks.assembly import objective_of
from featdistill.tasks.common import model_of, part_of
from featdistill.tasks.diagnose import about, names_of

_FEWEST = 2  # images: the loss of a single one says nothing of a model


def loss_runtime(config: LossConfig) -> Runtime:
    """Where such a command computes."""
    run = config.run
    limit_threads(run.threads)
    return Runtime(device=run.device, devices=run.devices, precision=run.precision.value)


@dataclass(frozen=True)
class Gathered:
    """What is looked at: models with a loss of one kind, and the images that all of them see."""

    subjects: tuple[Subject, ...]
    images: Source


def subjects_of(config: LossConfig, runtime: Runtime) -> Gathered:
    """The models that a configuration names, with their losses, on its images.

    Raises:
        FeatDistillError: a model without a loss, losses that cannot be compared, too few images,
            classes that differ; all before an image is decoded.
    """
    names = names_of(config)
    images = fixed_images(config)
    weights = config.weights * (len(names) if len(config.weights) == 1 else 1)
    choices = [
        _Choice.of(config, name, ModelConfig(spec=spec, weights=w))
        for name, spec, w in zip(names, config.models, weights, strict=True)
    ]
    kinds = {choice.kind for choice in choices}
    if len(kinds) > 1:
        listed = ", ".join(f"{c.name}: {c.kind}" for c in choices)
        raise ConfigError(
            [f"the models have different losses ({listed}); expected one --objective for all"]
        )
    subjects = [choice.build(config, images, runtime) for choice in choices]
    if len({s.objective for s in subjects}) > 1:
        listed = "; ".join(f"{s.name}: {s.objective}" for s in subjects)
        raise ConfigError([f"the models have different losses ({listed}); look at one by itself"])
    return Gathered(tuple(subjects), images)


def fixed_images(config: LossConfig) -> Source:
    """The images: one from each of as many equal stretches of the data, seeded.

    So every class occurs where they are stored one after the other.

    Raises:
        DataError: no such part, or fewer than two images.
    """
    data = open_data(
        config.data.path,
        val=config.data.val,
        val_fraction=config.data.val_fraction,
        labels=config.data.labels,
        seed=config.run.seed,
        decode=config.data.decode,
    )
    source = part_of(data, config.part)
    count = min(config.images, len(source))
    if count < _FEWEST:
        raise DataError(
            f"{count} image to measure a loss on",
            expected=f"at least {_FEWEST}",
            fix="give more --images or other --data",
        )
    if count == len(source):
        return source
    ends = np.arange(count + 1) * len(source) // count
    shares = generator(config.run.seed, "fixed images").random(count)
    chosen = ends[:-1] + (shares * np.diff(ends)).astype(np.int64)
    return Subset(source, chosen)


@dataclass(frozen=True)
class _Choice:
    """A model before it is built: its name, and whose loss."""

    name: str
    model: ModelConfig
    kind: KindName

    @classmethod
    def of(cls, config: LossConfig, name: str, model: ModelConfig) -> _Choice:
        if config.objective != "auto":
            return cls(name, model, config.objective)
        distilled = read_distillation(model.spec) is not None
        return cls(name, model, "distillation" if distilled else "classification")

    def build(self, config: LossConfig, images: Source, runtime: Runtime) -> Subject:
        make = _distillation if self.kind == "distillation" else _classification
        return make(self, config, images, runtime)


def _classification(
    choice: _Choice, config: LossConfig, images: Source, runtime: Runtime
) -> Subject:
    labelled(images, "a classifier's loss")
    backbone = model_of(
        choice.model,
        image_size=config.view.image_size,
        seed=config.run.seed,
        quiet=not runtime.first,
    )
    backbone = backbone.to(runtime.device).eval()
    runtime.settle(backbone)
    if not backbone.num_classes:
        fix = "fine-tune or probe it first, or give a run of distill"
        if read_distillation(choice.model.spec) is not None:
            fix = "leave --objective out: this run of distill has the distillation's loss"
        raise ModelError(f"'{choice.name}' has no classifier, so no loss", fix=fix)
    source = _numbered(images, choice.name, backbone)
    return classifier_subject(
        choice.name,
        backbone,
        _reader(config, source, backbone.image_size[0]),
        images=len(source),
        budget=config.memory * 2**30,
    )


def _numbered(images: Source, name: str, backbone: Backbone) -> Source:
    """The images with their labels numbered as the model's classes are.

    Raises:
        DataError: classes that the model does not know.
    """
    own, classes = backbone.class_names, images.classes
    if own is None or classes is None:
        count = len(classes) if classes is not None else int(np.max(images.labels)) + 1  # type: ignore[arg-type]
        if count != backbone.num_classes:
            raise DataError(
                f"'{images.name}' has {count} classes, and '{name}' a nameless classifier of "
                f"{backbone.num_classes}",
                expected="the same classes in both",
            )
        return images
    if classes == own:
        return images
    strangers = sorted(set(classes) - set(own))
    if strangers:
        lacks = sorted(set(own) - set(classes))
        raise DataError(
            f"'{images.name}' has classes that '{name}' does not know: {some(strangers)}"
            + (f"; and lacks: {some(lacks)}" if lacks else ""),
            expected="the classes that the model was trained on",
        )
    number = {label: i for i, label in enumerate(own)}
    table = np.array([number[label] for label in classes], dtype=np.int64)
    assert images.labels is not None
    return Relabelled(images, table[images.labels], own)


def _reader(config: LossConfig, source: Source, size: int) -> Callable[[], Iterator[Batch]]:
    view = EvalView(size, config.view.eval_crop)

    def read() -> Iterator[Batch]:
        return plainly(
            ordered_batches(
                source, view, batch_size=config.data.batch_size, workers=config.data.workers
            )
        )

    return read


@dataclass(frozen=True)
class Distillation:
    """A run of distill: its configuration, and where its newest (or best) state is."""

    folder: Path
    config: DistillConfig
    best: bool

    def state(self) -> Checkpoint:
        """Raises RunError where there is none."""
        checkpoints = self.folder / "checkpoints"
        found = read_best(checkpoints / "best") if self.best else Checkpoints(checkpoints).latest()
        if found is None:
            raise RunError(
                f"the distillation in '{self.folder}' has no checkpoint, so no projector",
                fix="run it (the same command with --resume)",
            )
        return found


def read_distillation(spec: str) -> Distillation | None:
    """The run of distill that a model's specification names, if it does; `RUN/best` too."""
    if spec.startswith(("timm/", "hf-hub:")):
        return None
    given = Path(spec).expanduser()
    best = given.name == "best" and not (given / "config.yaml").is_file()
    folder = given.parent if best else given
    try:
        tree = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        return Distillation(folder, DistillConfig.model_validate(tree), best)
    except (OSError, ValueError, yaml.YAMLError):  # ValidationError is a ValueError
        return None


def _distillation(choice: _Choice, config: LossConfig, images: Source, runtime: Runtime) -> Subject:
    run = read_distillation(choice.model.spec)
    if run is None:
        raise ModelError(
            f"'{choice.name}' is no run of distill, so it has no distillation loss",
            fix="give the run's folder, or --objective classification",
        )
    if config.view.image_size is not None:
        raise ConfigError(["--image-size is of no use here: the run of distill has its own"])
    checkpoint = run.state()
    # a teacher that is perturbed in training is not here: the same targets each time
    still = run.config.teacher.model_copy(update={"drop_path": 0.0})
    objective, _, _ = objective_of(run.config.model_copy(update={"teacher": still}))
    _check_teacher(run, objective.teacher.origin)
    try:
        objective.load_state_dict(dict(checkpoint.files["model"]))
    except (KeyError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise RunError(f"checkpoint '{checkpoint.path}' is not of this model ({line})") from None
    student = objective.student
    student.origin = Origin(
        choice.model.spec, f"{checkpoint.path.name} of {checkpoint.path.parent}", None
    )
    objective.to(runtime.device)
    objective.to_device(runtime.device)
    for model in (student, objective.teacher):
        runtime.settle(model)
    side = max(student.image_size[0], objective.teacher.image_size[0])
    return distillation_subject(
        choice.name,
        objective,
        _reader(config, images, side),
        images=len(images),
        budget=config.memory * 2**30,
    )


def _check_teacher(run: Distillation, origin: Origin) -> None:
    """Raise RunError if the teacher is not the one that the run learned from."""
    try:
        before = parse_json((run.folder / "weights.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a run of an earlier version
    if before.get("teacher") not in (None, origin.weights):
        raise RunError(
            f"the run in '{run.folder}' learned from other weights ({before['teacher']}, now "
            f"{origin.weights})",
            fix="put the teacher's file back",
        )


def images_record(source: Source, config: LossConfig) -> dict[str, Any]:
    """The images as the records have them."""
    return {
        "name": source.name,
        "part": config.part,
        "images": len(source),
        "fingerprint": fingerprint(source),
        "crop": config.view.eval_crop,
        "augmentation": None,
    }


def subject_record(subject: Subject) -> dict[str, Any]:
    """A model as the records have it."""
    return {**about(subject.name, subject.backbone), "kind": subject.kind}

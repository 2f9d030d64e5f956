"""`load_backbone(spec)`: anything that can be used as a model, behind one contract."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from torch import nn

from featdistill.core.errors import FeatDistillError, ModelError, RunError, did_you_mean
from featdistill.core.seeds import seeded_globals
from featdistill.models import hub
from featdistill.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    Origin,
    Rgb,
    TimmBuild,
)
from featdistill.models.checkpoints.files import SUFFIXES, read_tree
from featdistill.models.checkpoints.load import load_checkpoint
from featdistill.models.checkpoints.settings import timm_layout
from featdistill.models.checkpoints.spec import CLIP_MEAN, CLIP_STD, HALF
from featdistill.models.checkpoints.unwrap import unwrap
from featdistill.models.factory import from_factory
from featdistill.models.hub import check_reachable
from featdistill.models.positions import BiasResampling
from featdistill.models.resize import check_divides, resize
from featdistill.models.suggest import no_model
from featdistill.models.timm_models import (
    accepts,
    check_name,
    create,
    drop_path_argument,
)
from featdistill.models.weights import HashMeanwhile, Unfilled, load_exactly, read_json

NormalisationName = Literal["auto", "imagenet", "clip", "half", "satellite"]
NORMALISATIONS: dict[str, tuple[Rgb, Rgb]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "half": (HALF, HALF),
    "satellite": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}
_CONFIGS = ("config.json", "model.json")  # timm's and transformers' name, and a plain export's


@dataclass(frozen=True)
class Drop:
    """Stochastic depth: its rate, and whether it acts in evaluation mode too."""

    rate: float = 0.0
    always: bool = False


def load_backbone(
    spec: str,
    *,
    weights: str = "hub",
    arch: str | None = None,
    branch: str | None = None,
    normalisation: NormalisationName = "auto",
    image_size: int | None = None,
    bias_resampling: BiasResampling = "linear",
    drop_path: float = 0.0,
    always_drop_path: bool = False,
    seed: int = 0,
) -> Backbone:
    """Load a model as a `Backbone`, in evaluation mode.

    Args:
        spec: `timm/NAME`, a checkpoint file, `hf-hub:NAME`, a run or export folder of this project
            (or any folder that timm reads as `local-dir:`, or that the transformers library saved),
            or `package.module:factory`, a callable without arguments that returns a module.
        weights: of `timm/NAME`: `hub`, `random`, or a checkpoint file.
        arch: timm's name of a checkpoint file's architecture, where its tensors do not tell.
        branch: the part of a checkpoint file to take (`student`, `model_ema`, ...); by default the
            teacher of a self-distillation, or the only part.
        normalisation: of the images, where a checkpoint file does not tell: `imagenet`, `clip`,
            `half` (mean and standard deviation 0.5) or `satellite` (DINOv3's).
        image_size: side in pixels; the model's own by default. Positions are carried over.
        bias_resampling: how relative bias tables are carried over (`positions.resize_bias_table`).
        drop_path: stochastic depth rate.
        always_drop_path: drop in evaluation mode too.
        seed: of random weights.

    Raises:
        ModelError: no such model or weights, or a checkpoint that does not fit.
    """
    asked = _Asked.sort(spec, weights, arch, branch, normalisation, bias_resampling)
    drop = Drop(drop_path, always_drop_path)
    if asked.file is not None:
        backbone = _file(asked, asked.file, drop)
    elif asked.timm_name is not None:
        backbone = _timm(asked.timm_name, weights, image_size, seed, drop)
    elif spec.startswith("hf-hub:"):
        backbone = _hub(spec, drop)
    elif asked.folder is not None:
        backbone = load_folder(asked.folder, drop=drop)
    elif re.fullmatch(r"[\w.]+:[\w.]+", spec):
        return from_factory(spec, image_size).eval()
    else:
        raise no_model(spec)
    if image_size is not None:
        backbone = resize(backbone, image_size, how=bias_resampling)
    return backbone.eval()


@dataclass(frozen=True)
class _Asked:
    """What `load_backbone` was asked for: a name of timm's, a file, a folder, or neither."""

    spec: str
    timm_name: str | None
    file: Path | None
    folder: Path | None
    arch: str | None
    branch: str | None
    normalisation: NormalisationName

    @classmethod
    def sort(
        cls,
        spec: str,
        weights: str,
        arch: str | None,
        branch: str | None,
        normalisation: NormalisationName,
        bias_resampling: BiasResampling,
    ) -> _Asked:
        """Raise ModelError for what does not go together."""
        _check_option("normalisation", normalisation, get_args(NormalisationName))
        _check_option("bias_resampling", bias_resampling, get_args(BiasResampling))
        timm_name = spec.removeprefix("timm/") if spec.startswith("timm/") else None
        file = folder = None
        if timm_name is None:
            file, folder = _on_disk(spec)
            arch = arch.removeprefix("timm/") if arch else None
        elif weights not in ("hub", "random"):
            check_name(timm_name)
            file, folder = _on_disk(weights)
            arch = timm_name
            if file is None:
                hint = did_you_mean(weights.lower(), ("hub", "random"))
                raise ModelError(f"no checkpoint file at '{weights}'", fix=hint)
        if file is None and (arch or branch or normalisation != "auto"):
            what = f"arch '{arch}'" if arch else f"branch '{branch}'" if branch else normalisation
            raise ModelError(
                f"{what} was given for '{spec}', which is no checkpoint file", fix="leave it out"
            )
        if timm_name is None and weights != "hub":
            raise ModelError(
                f"weights '{weights}' were given for '{spec}', which has its own",
                fix="give them with a timm/NAME, or leave them out",
            )
        return cls(spec, timm_name, file, folder, arch, branch, normalisation)


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModelError(
            f"no {name} '{value}'", expected=", ".join(known), fix=did_you_mean(value, known)
        )


def _on_disk(spec: str) -> tuple[Path | None, Path | None]:
    """A specification as a file or a folder that is there."""
    if not spec:
        raise ModelError("no model was named", expected="timm/NAME, a checkpoint file, a folder")
    try:
        path = Path(spec).expanduser()
        return (path if path.is_file() else None), (path if path.is_dir() else None)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, an unknown user
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"cannot look at '{spec}' ({reason})") from None


def _file(asked: _Asked, file: Path, drop: Drop) -> Backbone:
    if asked.arch is None and asked.branch is None and file.name in hub.WEIGHTS:
        # what lies beside the file knows more than its tensors
        for described in (file.with_suffix(".json"), file.parent / "config.json"):
            if described.is_file() and "architecture" in read_json(described):
                backbone = _described(asked.spec, described, file, drop)
                return _normalised(backbone, asked.normalisation)
    return _normalised(_checkpoint(asked.spec, file, asked, drop), asked.normalisation)


def _normalised(backbone: Backbone, name: NormalisationName) -> Backbone:
    """The backbone with a normalisation that was asked for."""
    if name == "auto":
        return backbone
    mean, std = NORMALISATIONS[name]
    backbone.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
    backbone.std.copy_(torch.tensor(std).view(1, 3, 1, 1))
    if (report := backbone.origin.report) is not None:
        assumed = tuple(a for a in report.assumed if not a.startswith("the normalisation"))
        origin = replace(backbone.origin, report=replace(report, assumed=assumed))
        backbone.origin = origin
    return backbone


def _checkpoint(spec: str, file: Path, asked: _Asked | None, drop: Drop) -> Backbone:
    arch, branch = (asked.arch, asked.branch) if asked else (None, None)
    checksum = HashMeanwhile(file)
    loaded = load_checkpoint(file, arch=arch, branch=branch, drop_path=drop.rate)
    config = {
        "input_size": (3, loaded.image_size, loaded.image_size),
        "mean": loaded.mean,
        "std": loaded.std,
    }
    origin = Origin(spec, f"{file.name} (sha256 {checksum.result()})", None, loaded.report)
    return _wrap(
        loaded.model,
        config,
        loaded.build,
        origin,
        loaded.image_size,
        drop.always,
        loaded.class_names,
        projection=loaded.projection,
    )


def _timm(name: str, weights: str, image_size: int | None, seed: int, drop: Drop) -> Backbone:
    check_name(name)
    architecture = name.partition(".")[0]
    arguments: dict[str, Any] = {}
    if weights == "random" and image_size is not None and accepts(name, "img_size"):
        arguments["img_size"] = image_size
    with seeded_globals("model", seed):
        model = create(
            name,
            pretrained=weights == "hub",
            **arguments,
            **drop_path_argument(architecture, drop.rate),
        )
    described = f"timm hub: {name}" if weights == "hub" else f"random (seed {seed})"
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    licence = config.get("license") if weights == "hub" else None
    origin = Origin(f"timm/{name}", described, licence)
    build = TimmBuild(architecture, arguments)
    return _wrap(model, config, build, origin, arguments.get("img_size"), drop.always)


def _wrap(
    model: nn.Module,
    config: dict[str, Any],
    build: TimmBuild,
    origin: Origin,
    image_size: int | None,
    always_drop_path: bool,
    class_names: tuple[str, ...] | None = None,
    projection: bool | None = None,
) -> Backbone:
    height, width = config["input_size"][1:]
    channels = config["input_size"][0]
    if channels != 3:
        raise ModelError(f"'{origin.spec}' takes {channels} channels", expected="3 (RGB)")
    arguments = {**build.arguments, "num_classes": int(model.num_classes)}  # type: ignore[arg-type]
    if accepts(build.architecture, "img_size"):
        arguments.setdefault("img_size", image_size or height)
    if isinstance(getattr(model, "global_pool", None), str):
        arguments.setdefault("global_pool", model.global_pool)
    size = (image_size, image_size) if image_size is not None else (height, width)
    if accepts(build.architecture, "img_size"):
        check_divides(model, size[0], origin)
    return Backbone(
        model,
        mean=tuple(config.get("mean") or IMAGENET_MEAN),
        std=tuple(config.get("std") or IMAGENET_STD),
        image_size=size,
        origin=origin,
        build=TimmBuild(build.architecture, arguments),
        class_names=class_names,
        fixed_size=accepts(build.architecture, "img_size"),
        always_drop_path=always_drop_path,
        projection=projection,
    )


def _hub(spec: str, drop: Drop) -> Backbone:
    """A repository of Hugging Face's hub, in timm's layout or in transformers'."""
    repository = spec.removeprefix("hf-hub:")
    if not repository:
        raise ModelError(f"'{spec}' names no repository", expected="hf-hub:OWNER/NAME")
    try:
        check_reachable(repository, spec, fix="connect to the internet, or give a file you have")
        folder = hub.download(repository)
        if "architecture" not in read_json(folder / "config.json"):
            backbone = load_folder(folder, drop=drop)
            backbone.origin = replace(backbone.origin, spec=spec)
            return backbone
        config, architecture, arguments = timm.models.load_model_config_from_hf(repository)
        rate = drop_path_argument(architecture, drop.rate)
        model = timm.create_model(spec, pretrained=True, **rate)
    except FeatDistillError:
        raise
    except Exception as error:  # the hub client and timm raise many kinds
        line = " ".join(str(error).split())[:200]
        raise ModelError(
            f"cannot load '{spec}' ({line})", fix="check the name and the connection"
        ) from None
    build = TimmBuild(architecture, dict(arguments or {}))
    origin = Origin(spec, spec, config.get("license"))
    return _wrap(model, config, build, origin, None, drop.always)


def find_export(folder: Path) -> Path:
    """The folder with `config.json` and weights: a run's export, or the folder itself.

    Raises:
        RunError: there is none.
    """
    for candidate in (folder / "export", folder):
        if any((candidate / name).is_file() for name in _CONFIGS):
            return candidate
    if (folder / "finetune.json").is_file():
        raise RunError(
            f"the run in '{folder}' has no export: its model cannot be built by plain timm",
            fix="fine-tune a model of timm's, or use the weights in its checkpoints yourself",
        )
    if (folder / "segment.json").is_file():
        raise RunError(
            f"'{folder}' is a segmenter, not a backbone",
            fix="use it with featdistill segment --predict, or name the backbone it began from",
        )
    if (folder / "probe.json").is_file() or (folder.parent / "probe.json").is_file():
        raise RunError(
            f"the probe in '{folder}' has no export: it is of several models, or plain timm has "
            "no classifier that pools so",
            fix="give the folder of one of its models, or probe with --pool mean, cls or model",
        )
    if students := sorted(file.parent for file in folder.glob("*/distill.json")):
        raise RunError(
            f"the run in '{folder}' is of several students",
            fix=f"give one of them: {' or '.join(map(str, students))}",
        )
    if (folder / "config.yaml").is_file():
        raise RunError(
            f"the run in '{folder}' has no export yet",
            fix="finish it (the same command with --resume)",
        )
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    raise RunError(
        f"'{folder}' is not a model",
        expected="a run folder, or one with config.json and weights",
        fix=f"give the checkpoint file itself: {files[0]}" if files else None,
    )


def load_folder(folder: Path, *, drop: Drop | None = None) -> Backbone:
    """Load an export, or any folder in timm's `local-dir:` or transformers' layout, strictly."""
    drop = drop or Drop()
    export = find_export(folder)
    described = next(p for n in _CONFIGS if (p := export / n).is_file())
    config = read_json(described)
    if "architecture" not in config and "model_type" not in config:
        raise ModelError(
            f"'{described}' names no architecture (timm) and no model_type (transformers)",
            expected="the layout of one of them",
        )
    if "architecture" in config:
        timm_layout(described)
    file = next((export / n for n in hub.WEIGHTS if (export / n).is_file()), None)
    if file is None and any((export / f"{n}.index.json").is_file() for n in hub.WEIGHTS):
        raise ModelError(
            f"the weights in '{export}' are spread over several files",
            fix="join them: transformers.AutoModel.from_pretrained(FOLDER).save_pretrained(NEW, "
            'max_shard_size="100GB")',
        )
    if file is None:
        raise ModelError(f"no weights in '{export}'", expected="model.safetensors")
    if "architecture" in config:
        return _described(str(folder), described, file, drop)
    return _checkpoint(str(folder), file, None, drop)


def _described(spec: str, described: Path, file: Path, drop: Drop) -> Backbone:
    """A file of timm's names, with a configuration in timm's layout beside it."""
    layout = timm_layout(described)
    architecture, arguments = layout.architecture, layout.arguments
    check_name(architecture)
    checksum = HashMeanwhile(file)
    rate = drop_path_argument(architecture, drop.rate)
    with Unfilled():
        model = create(architecture, **arguments, **rate)
    found = unwrap(read_tree(file), None, file)
    load_exactly(model, found.tensors, what=str(file), strangers=found.strangers)
    weights = f"{file.name} (sha256 {checksum.result()})"
    return _wrap(
        model,
        layout.pretrained,
        TimmBuild(architecture, arguments),
        Origin(spec, weights, layout.pretrained.get("license")),
        arguments.get("img_size"),
        drop.always,
        layout.class_names,
        projection=layout.projection,
    )

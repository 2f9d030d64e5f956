"""`load_backbone(spec)`: anything that can be used as a model, behind one contract."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from featdistill.core.errors import ModelError, RunError, did_you_mean
from featdistill.core.seeds import seeded_globals
from featdistill.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    CustomBackbone,
    Origin,
    TimmBuild,
)
from featdistill.models.students import SIZES
from featdistill.models.timm_models import accepts, check_name, create, drop_path_argument
from featdistill.models.weights import file_hash, load_exactly, read_json, read_tensors

_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Drop:
    """Stochastic depth: its rate, and whether it acts in evaluation mode too."""

    rate: float = 0.0
    always: bool = False


def load_backbone(
    spec: str,
    *,
    weights: str = "hub",
    image_size: int | None = None,
    drop_path: float = 0.0,
    always_drop_path: bool = False,
    seed: int = 0,
) -> Backbone:
    """Load a model as a `Backbone`, in evaluation mode.

    Args:
        spec: `timm/NAME`, `hf-hub:NAME`, a run or export folder of this project (or any folder
            that timm reads as `local-dir:`), or `package.module:factory`, a callable without
            arguments that returns a module.
        weights: of `timm/NAME`: `hub`, `random`, or a checkpoint file.
        image_size: side in pixels; the model's own by default. Positions are carried over.
        drop_path: stochastic depth rate.
        always_drop_path: drop in evaluation mode too.
        seed: of random weights.

    Raises:
        ModelError: no such model or weights, or a checkpoint that does not fit.
    """
    drop = Drop(drop_path, always_drop_path)
    if spec.startswith("timm/"):
        return _timm(spec, weights, image_size, seed, drop).eval()
    if weights != "hub":
        raise ModelError(
            f"weights '{weights}' were given for '{spec}', which has its own",
            fix="give them with a timm/NAME, or leave them out",
        )
    if spec.startswith("hf-hub:"):
        return _hub(spec, image_size, drop).eval()
    path = Path(spec).expanduser()
    if path.is_dir():
        return load_folder(path, image_size=image_size, drop=drop).eval()
    if ":" in spec and not path.exists():
        return _factory(spec, image_size).eval()
    raise _no_model(spec, path)


def _no_model(spec: str, path: Path) -> ModelError:
    if path.is_file() or path.suffix in _FILES:
        what = "is a file without a name for its architecture" if path.is_file() else "is no file"
        return ModelError(
            f"model '{spec}' {what}",
            fix=f"name its architecture, timm/NAME, and give the file as its weights: {spec}",
        )
    if len(path.parts) > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings)
    else:
        hint = did_you_mean(f"timm/{spec}", [f"timm/{n}" for n in timm.list_models()])
    if spec in SIZES:
        hint = "that is a student's name; a model needs weights: timm/NAME or a run folder"
    return ModelError(
        f"no model '{spec}'",
        expected="timm/NAME, hf-hub:NAME, a run or export folder, or package.module:factory",
        fix=hint,
    )


def _timm(spec: str, weights: str, image_size: int | None, seed: int, drop: Drop) -> Backbone:
    name = spec.removeprefix("timm/")
    check_name(name)
    architecture = name.partition(".")[0]
    arguments: dict[str, Any] = {}
    tensors = None
    if weights not in ("hub", "random"):
        tensors = read_tensors(Path(weights).expanduser())
        classifier = timm.get_pretrained_cfg(architecture).classifier
        first = classifier[0] if isinstance(classifier, tuple | list) else classifier
        head = tensors.get(f"{first}.weight")
        arguments["num_classes"] = 0 if head is None else head.shape[0]
    elif image_size is not None and accepts(name, "img_size"):
        arguments["img_size"] = image_size
    with seeded_globals("model", seed):
        model = create(
            name,
            pretrained=weights == "hub",
            **arguments,
            **drop_path_argument(architecture, drop.rate),
        )
    described = {"hub": f"timm hub: {name}", "random": f"random (seed {seed})"}.get(weights)
    if tensors is not None:
        file = Path(weights).expanduser()
        load_exactly(model, tensors, what=weights)
        described = f"{file.name} (sha256 {file_hash(file)})"
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    licence = config.get("license") if weights == "hub" else None
    origin = Origin(spec, described or weights, licence)
    build = TimmBuild(architecture, arguments)
    backbone = _wrap(model, config, build, origin, arguments.get("img_size"), drop.always)
    return backbone if image_size is None else resize(backbone, image_size)


def _wrap(
    model: nn.Module,
    config: dict[str, Any],
    build: TimmBuild,
    origin: Origin,
    image_size: int | None,
    always_drop_path: bool,
    class_names: tuple[str, ...] | None = None,
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
        _check_divides(model, size[0], origin)
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
    )


def resize(backbone: Backbone, image_size: int) -> Backbone:
    """The backbone at another image size.

    A model that is made for one size is built again for the other, and its position tensors are
    carried over by timm, as `timm.create_model(..., img_size=...)` would do it.
    """
    if backbone.image_size == (image_size, image_size):
        return backbone
    model, build = backbone.model, backbone.build
    if backbone.fixed_size:
        assert build is not None
        build = TimmBuild(build.architecture, {**build.arguments, "img_size": image_size})
        _check_divides(model, image_size, backbone.origin)
        rate = drop_path_argument(build.architecture, backbone.slot.rate)
        model = create(build.architecture, **build.arguments, **rate)
        carry = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        tensors = backbone.model.state_dict()
        load_exactly(
            model,
            tensors if carry is None else carry(dict(tensors), model),
            what=backbone.origin.spec,
        )
    mean, std = backbone.rgb
    return Backbone(
        model,
        mean=mean,
        std=std,
        image_size=(image_size, image_size),
        origin=backbone.origin,
        build=build,
        class_names=backbone.class_names,
        fixed_size=backbone.fixed_size,
        always_drop_path=backbone.slot.always,
    )


def _check_divides(model: Any, image_size: int, origin: Origin) -> None:
    """Raise ModelError if an image is no whole number of patches; timm would crop it in silence."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple | list) else patch
    if side and image_size % side:
        raise ModelError(
            f"'{origin.spec}' cannot see {image_size} pixels",
            expected=f"a multiple of its patch of {side}",
        )


def _hub(spec: str, image_size: int | None, drop: Drop) -> Backbone:
    try:
        config, architecture, arguments = timm.models.load_model_config_from_hf(
            spec.removeprefix("hf-hub:")
        )
        rate = drop_path_argument(architecture, drop.rate)
        model = timm.create_model(spec, pretrained=True, **rate)
    except ModelError:
        raise
    except Exception as error:  # the hub client and timm raise many kinds
        line = " ".join(str(error).split())[:200]
        raise ModelError(
            f"cannot load '{spec}' ({line})", fix="check the name and the connection"
        ) from None
    build = TimmBuild(architecture, dict(arguments or {}))
    origin = Origin(spec, spec, config.get("license"))
    backbone = _wrap(model, config, build, origin, None, drop.always)
    return backbone if image_size is None else resize(backbone, image_size)


def find_export(folder: Path) -> Path:
    """The folder with `config.json` and weights: a run's export, or the folder itself.

    Raises:
        RunError: there is none.
    """
    for candidate in (folder / "export", folder):
        if (candidate / "config.json").is_file():
            return candidate
    if (folder / "config.yaml").is_file():
        raise RunError(
            f"the run in '{folder}' has no export yet",
            fix="finish it (the same command with --resume)",
        )
    raise RunError(
        f"'{folder}' is not a model", expected="a run folder, or one with config.json and weights"
    )


def load_folder(
    folder: Path,
    *,
    image_size: int | None = None,
    drop: Drop | None = None,
) -> Backbone:
    """Load an export (or any folder in timm's `local-dir:` layout), strictly."""
    drop = drop or Drop()
    export = find_export(folder)
    config = read_json(export / "config.json")
    if "architecture" not in config:
        raise ModelError(f"'{export}/config.json' names no architecture", expected="timm's layout")
    architecture = str(config["architecture"])
    check_name(architecture)
    pretrained = config.get("pretrained_cfg", config)
    if "input_size" not in pretrained:
        raise ModelError(f"'{export}/config.json' says no input_size", expected="timm's layout")
    arguments = dict(config.get("model_args") or {})
    arguments.setdefault("num_classes", config.get("num_classes", 0))
    model = create(architecture, **arguments, **drop_path_argument(architecture, drop.rate))
    file = next(
        (export / n for n in ("model.safetensors", "pytorch_model.bin") if (export / n).is_file()),
        None,
    )
    if file is None:
        raise ModelError(f"no weights in '{export}'", expected="model.safetensors")
    load_exactly(model, read_tensors(file), what=str(file))
    names = pretrained.get("label_names") or config.get("label_names")
    weights = f"{file.name} (sha256 {file_hash(file)})"
    origin = Origin(str(folder), weights, pretrained.get("license"))
    backbone = _wrap(
        model,
        pretrained,
        TimmBuild(architecture, arguments),
        origin,
        arguments.get("img_size"),
        drop.always,
        tuple(names) if names else None,
    )
    return backbone if image_size is None else resize(backbone, image_size)


def _factory(spec: str, image_size: int | None) -> Backbone:
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ModelError(
            f"cannot import '{module_name}' for model '{spec}' ({error})",
            expected="package.module:factory, importable from here",
        ) from None
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [n for n in dir(module) if not n.startswith("_")]
        raise ModelError(f"'{module_name}' has no callable '{name}'", fix=did_you_mean(name, names))
    try:
        model = factory()
    except TypeError as error:
        raise ModelError(
            f"'{spec}' cannot be called without arguments ({error})",
            expected="a callable without arguments that returns a torch.nn.Module",
        ) from None
    if isinstance(model, Backbone):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"'{spec}' returned a {type(model).__name__}", expected="a torch.nn.Module"
        )
    return CustomBackbone(model, image_size=image_size, origin=Origin(spec, "the factory's own"))

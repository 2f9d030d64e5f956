"""The state dict and nothing else, with a JSON of what it does not say; for any model at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from featdistill.core.records import write_json
from featdistill.models.backbone import Backbone
from featdistill.models.exports.common import (
    Outputs,
    Target,
    named_parameters,
    outputs_of,
    state_of,
)
from featdistill.models.exports.to_timm import timm_config
from featdistill.models.extensions import split_arguments
from featdistill.models.load import load_backbone
from featdistill.models.weights import load_exactly

WEIGHTS, FACTS = "model.safetensors", "model.json"


def write(backbone: Backbone, folder: Path) -> list[str]:
    """`model.safetensors` with timm's (or the module's own) names, and `model.json`."""
    save_file(state_of(_module(backbone)), folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / FACTS, _facts(backbone))
    if backbone.build is None:
        return [
            "Not an architecture of timm's: the names are those of the module itself, which has to "
            "be built by its own code before the tensors are loaded."
        ]
    return ["`model.json` holds what tensors do not say: architecture, arguments, mean and std."]


def _module(backbone: Backbone) -> Any:
    """The module whose names a user knows: not our adapter around it."""
    return getattr(backbone.model, "module", backbone.model)


def _facts(backbone: Backbone) -> dict[str, Any]:
    if backbone.build is not None:
        return timm_config(backbone)
    mean, std = backbone.rgb
    return {
        "module": type(_module(backbone)).__qualname__,
        "input_size": [3, *backbone.image_size],
        "mean": mean,
        "std": std,
        "num_classes": backbone.num_classes,
        "label_names": list(backbone.class_names or ()),
        "prefix_names": list(backbone.prefix_names),
    }


def read(backbone: Backbone, folder: Path, images: Tensor) -> tuple[Outputs, Outputs]:
    """What `load_backbone` makes of the files; for a module of one's own, a copy loaded anew."""
    if backbone.build is not None:
        again = load_backbone(str(folder / WEIGHTS))
    else:
        again = copy.deepcopy(backbone)
        with torch.no_grad():  # so that a tensor that is not in the file does not pass unseen
            for value in _module(again).state_dict().values():
                value.zero_()
        load_exactly(_module(again), load_file(folder / WEIGHTS), what=str(folder / WEIGHTS))
    return outputs_of(again, images), outputs_of(backbone, images)


def snippet(backbone: Backbone, folder: str) -> str:
    """Python that builds the model and loads the file."""
    build = backbone.build
    if build is None:
        made = f"model = {type(_module(backbone)).__name__}(...)  # the module's own code"
        return (
            f"from safetensors.torch import load_file\n{made}\n"
            f'model.load_state_dict(load_file("{folder}/{WEIGHTS}"))'
        )
    if split_arguments(build.arguments)[1]:  # plain timm cannot build it
        return f'import featdistill\nmodel = featdistill.load_backbone("{folder}/{WEIGHTS}")'
    return (
        "import timm; from safetensors.torch import load_file\n"
        f'model = timm.create_model("{build.architecture}", {named_parameters(build.arguments)})\n'
        f'model.load_state_dict(load_file("{folder}/{WEIGHTS}"))'
    )


PLAIN = Target(
    name="plain",
    title="a state dict (safetensors) and a JSON beside it",
    checked_with="featdistill",
    front=("library_name: pytorch", "tags: [image-feature-extraction, featdistill]"),
    tolerance=1e-5,
    write=write,
    read=read,
    snippet=snippet,
)

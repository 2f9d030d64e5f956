"""A folder in the own layout of Hugging Face's transformers library.

The tensors are renamed by the tables that read such files (`checkpoints/transformers.py`), followed
backwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from featdistill.core.errors import ModelError
from featdistill.core.records import write_json
from featdistill.models.backbone import Backbone
from featdistill.models.checkpoints.tables import revert
from featdistill.models.exports.common import Outputs, Target, outputs_of
from featdistill.models.exports.native import Native, native_of, refuse

_CROP = 0.875  # of the shorter side, as everywhere in evaluation
_BICUBIC = 3


def write(backbone: Backbone, folder: Path) -> list[str]:
    """`config.json`, `model.safetensors` and `preprocessor_config.json`."""
    native = native_of(backbone)
    reverted = revert(native.tensors, native.rules)
    if reverted.strangers:
        raise refuse(backbone, f"it has no place for {', '.join(reverted.strangers[:4])}")
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in {**reverted.tensors, **native.extra}.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {**native.config, "architectures": [native.architecture]})
    write_json(folder / "preprocessor_config.json", _processor(backbone))
    return [
        f"The class is `{native.architecture}`; `AutoImageProcessor` gives the pixels it wants.",
        *native.notes,
    ]


def _processor(backbone: Backbone) -> dict[str, Any]:
    """The evaluation view as transformers' image processor: shorter side, centre, normalised."""
    mean, std = backbone.rgb
    height, width = backbone.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(height / _CROP)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


@torch.no_grad()
def read(backbone: Backbone, folder: Path, images: Tensor) -> tuple[Outputs, Outputs]:
    """What transformers makes of the folder: tokens, pooled vector and logits."""
    native = native_of(backbone)
    model = _load(backbone, native, folder)
    pixels = _pixels(folder, images)
    _compare_names(backbone, model)
    base = getattr(model, model.base_model_prefix, model) if backbone.num_classes else model
    seen = base(pixel_values=pixels)
    tokens = seen.last_hidden_state
    if native.norm is not None:
        tokens = _part(model, native.norm)(tokens)
    theirs: Outputs = {"tokens": tokens}
    ours = outputs_of(backbone, images)
    pieces = [ours["map"].flatten(2).transpose(1, 2)]
    if backbone.num_prefix:
        pieces.insert(0, ours["prefix"])
    mine: Outputs = {"tokens": torch.cat(pieces, 1)}
    if native.pooled is not None and not (backbone.num_classes and "ViT" in native.architecture):
        theirs["pooled"], mine["pooled"] = seen[native.pooled], ours["pooled"]
    if backbone.num_classes:
        theirs["logits"], mine["logits"] = model(pixel_values=pixels).logits, ours["logits"]
    return theirs, mine


def _pixels(folder: Path, images: Tensor) -> Tensor:
    """The images as the written processor normalises them; their size is right already."""
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    seen = processor(
        images=[image.numpy() * 255 for image in images],
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=False,
        input_data_format="channels_first",
        return_tensors="pt",
    )
    pixels: Tensor = seen["pixel_values"]
    return pixels


def _compare_names(backbone: Backbone, model: Any) -> None:
    if not backbone.class_names:
        return
    said = tuple(model.config.id2label[i] for i in range(len(model.config.id2label)))
    if said != tuple(backbone.class_names):
        raise ModelError("the export is not exact: its classes have other names")


def _part(model: Any, path: str) -> Any:
    """A part of a model, by its path with or without the name that some versions put before."""
    for prefix in ("", "vision_model."):
        try:
            return model.get_submodule(f"{prefix}{path}")
        except AttributeError:
            continue
    raise AssertionError(path)


def _load(backbone: Backbone, native: Native, folder: Path) -> Any:
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        kind = getattr(transformers, native.architecture)
        model, said = kind.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        line = " ".join(str(error).split())[:200]
        raise refuse(backbone, f"it does not load what was written ({line})") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bar:
            transformers.logging.enable_progress_bar()
    buffers = dict(model.named_buffers())  # versions before 5 miss those that they count themselves
    for word in ("missing", "unexpected", "mismatched"):
        names = sorted(str(k) for k in said.get(f"{word}_keys", ()) if k not in buffers)
        if names:
            raise ModelError(
                f"the export is not exact: {len(names)} tensors are {word} in transformers' "
                f"{native.architecture} ({', '.join(names[:4])})"
            )
    return model.eval()


def snippet(backbone: Backbone, folder: str) -> str:
    """Python that loads the folder."""
    kind = native_of(backbone).architecture
    return (
        f"from transformers import AutoImageProcessor, {kind}\n"
        f'processor = AutoImageProcessor.from_pretrained("{folder}")\n'
        f'model = {kind}.from_pretrained("{folder}")'
    )


HUGGINGFACE = Target(
    name="huggingface",
    title="transformers' own layout",
    checked_with="transformers",
    front=("library_name: transformers", "tags: [image-feature-extraction, featdistill]"),
    tolerance=1e-4,
    write=write,
    read=read,
    snippet=snippet,
    modules=("transformers",),
)

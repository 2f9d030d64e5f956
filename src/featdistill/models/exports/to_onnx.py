"""An ONNX graph: images in [0, 1] in, map, prefix, pooled and logits out."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone
from featdistill.models.exports.common import Outputs, Target, outputs_of, probe_images

FILE = "model.onnx"
_OPSET = 18  # what torch's exporter writes without converting; runtimes read it since 2023
_INLINE_LIMIT = 1 << 30  # bytes; a protobuf file holds 2 GiB, and the graph is in it too
_BATCHES = (1, 3)


class _Graph(nn.Module):
    """A backbone with a tuple of tensors for its output, in the order of `names`."""

    def __init__(self, backbone: Backbone, names: tuple[str, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        seen = self.backbone(images)
        return tuple(getattr(seen, name) for name in self.names)


def write(backbone: Backbone, folder: Path) -> list[str]:
    """`model.onnx`, and `model.onnx.data` where the weights are too large for one file."""
    images = probe_images(backbone, 2)
    names = tuple(outputs_of(backbone, images))
    with _written_out(backbone):
        program = _trace(_Graph(backbone, names).eval(), images, names)
    _forget_sources(program.model)
    program.model.metadata_props.update(_metadata(backbone, names))
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    apart = weights > _INLINE_LIMIT
    program.save(folder / FILE, external_data=apart)
    notes = [
        "Input `images`: float32 RGB in [0, 1], (batch, 3, "
        f"{backbone.image_size[0]}, {backbone.image_size[1]}); the mean and std are inside the "
        "graph. The batch is free, the image size is fixed.",
        f"Outputs: {', '.join(f'`{name}`' for name in names)}.",
        "Class names and the like are in the file's metadata.",
    ]
    if apart:
        notes.append(f"The weights are in `{FILE}.data`, which has to stay beside `{FILE}`.")
    return notes


def _forget_sources(model: Any) -> None:
    """Drop the exporter's notes on every part: stack traces with this machine's paths."""
    parts = [model, model.graph, *model.functions.values()]
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            parts += [node, *node.outputs]
        parts += [*graph.inputs, *graph.outputs]
    parts += [*model.graph.initializers.values()]
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Libraries that log what is of no use to a user."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _written_out(backbone: Backbone) -> Iterator[None]:
    """Attention as products and a softmax, which every runtime has, instead of a fused kernel."""
    fused = [m for m in backbone.modules() if getattr(m, "fused_attn", False) is True]
    try:
        for module in fused:
            module.fused_attn = False  # type: ignore[assignment]
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def _trace(graph: _Graph, images: Tensor, names: tuple[str, ...]) -> Any:
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
            warnings.simplefilter("ignore")  # the exporter's own, about its own libraries
            return torch.onnx.export(
                graph,
                (images,),
                dynamo=True,
                opset_version=_OPSET,
                input_names=["images"],
                output_names=list(names),
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever a model's code provokes
        root = error
        while root.__cause__ is not None:
            root = root.__cause__  # type: ignore[assignment]
        line = " ".join(str(root).split())[:200]
        raise ModelError(
            f"ONNX cannot hold '{graph.backbone.origin.spec}': its code cannot be traced ({line})",
            fix="use --to plain or --to timm",
        ) from None


def _metadata(backbone: Backbone, names: tuple[str, ...]) -> dict[str, str]:
    mean, std = backbone.rgb
    return {
        "spec": PurePath(backbone.origin.spec).name,  # no paths of this machine
        "weights": backbone.origin.weights,
        "input": "RGB in [0, 1]; normalised inside the graph",
        "image_size": json.dumps(backbone.image_size),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "outputs": json.dumps(names),
        "prefix_names": json.dumps(backbone.prefix_names),
        "class_names": json.dumps(backbone.class_names or ()),
        "licence": backbone.origin.licence or "",
    }


def read(backbone: Backbone, folder: Path, _: Tensor) -> tuple[Outputs, Outputs]:
    """onnxruntime's outputs for batches of several sizes, one after the other."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(folder / FILE), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    theirs: Outputs = {}
    ours: Outputs = {}
    for batch in _BATCHES:
        images = probe_images(backbone, batch)
        found = session.run(names, {"images": images.numpy()})
        for name, value in zip(names, found, strict=True):
            theirs[f"{name} of {batch}"] = torch.from_numpy(value)
        for name, mine in outputs_of(backbone, images).items():
            ours[f"{name} of {batch}"] = mine
    return theirs, ours


def snippet(_: Backbone, folder: str) -> str:
    """Python that runs the graph."""
    return (
        "import onnxruntime\n"
        f'session = onnxruntime.InferenceSession("{folder}/{FILE}")\n'
        'outputs = session.run(None, {"images": images})  # float32 RGB in [0, 1]'
    )


ONNX = Target(
    name="onnx",
    title=f"an ONNX graph of opset {_OPSET}",
    checked_with="onnxruntime",
    front=("library_name: onnx", "tags: [image-feature-extraction, onnx, featdistill]"),
    tolerance=1e-4,
    write=write,
    read=read,
    snippet=snippet,
    modules=("onnx", "onnxscript", "onnxruntime"),
)

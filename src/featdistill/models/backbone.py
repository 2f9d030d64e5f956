"""The one contract that every model stands behind: images in [0, 1] go in, `Features` come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.seeds import SampleStream
from featdistill.core.types import Features, LayerFeatures
from featdistill.models.droppath import DropPathSlot, key_drop_path
from featdistill.models.layout import Layout, grid_of, layout_of, projects

Rgb = tuple[float, float, float]
IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TimmBuild:
    """How to build a model again in plain timm: `timm.create_model(architecture, **arguments)`."""

    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors.

    Attributes:
        title: the format.
        path: the branch and prefix in the file, as `teacher/backbone.`.
        total: tensors in that branch.
        renamed: how many of them have other names in timm.
        left_out: reason -> the file's names that were left out on purpose.
        assumed: what the file does not say and was taken for granted.
        resized: positions that were carried to another size.
        also: parts of the file that could be taken instead (`branch`).
        pads_first: a Swin that is padded before it is shifted (`extensions`).
    """

    title: str
    path: str
    total: int
    renamed: int
    left_out: Mapping[str, tuple[str, ...]]
    assumed: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    pads_first: bool = False

    @property
    def counts(self) -> str:
        """`loaded A of B tensors, renamed R, resized Z, left out K (patterns)`."""
        gone = [name for names in self.left_out.values() for name in names]
        patterns = f" ({', '.join(_patterns(gone))})" if gone else ""
        return (
            f"loaded {self.total - len(gone)} of {self.total} tensors, renamed {self.renamed}, "
            f"resized {len(self.resized)}, left out {len(gone)}{patterns}"
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """What a user should read, one line each."""
        where = f", in '{self.path}'" if self.path else ""
        lines = [f"format   {self.title}{where}", f"weights  {self.counts}"]
        lines += [
            f"left out {len(names)}: {reason} ({', '.join(_patterns(names))})"
            for reason, names in self.left_out.items()
        ]
        if self.assumed:
            lines.append(f"assumed  {'; '.join(self.assumed)} (the file does not say)")
        if self.also:
            lines.append(
                f"not taken: {', '.join(self.also)} (the option branch takes another part)"
            )
        return tuple(lines)


def _patterns(names: Sequence[str], limit: int = 4) -> list[str]:
    """Names by their first parts, `decoder_embed.*`; of numbered layers what it is in each.

    `blocks.*` alone would read as if whole layers had been left out.
    """
    found: dict[str, dict[str, None]] = {}
    for name in names:
        first, *rest = name.split(".")
        whole = f"{first}.*" if rest else name
        numbered = bool(rest) and rest[0].isdigit()
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        found.setdefault(whole, {})[kind if numbered else whole] = None
    kinds = [k for whole, parts in found.items() for k in (parts if len(parts) < 4 else [whole])]
    return kinds[:limit] + (["..."] if len(kinds) > limit else [])


@dataclass(frozen=True)
class Origin:
    """Where a model and its weights come from.

    Attributes:
        spec: what the user wrote, or a description.
        weights: `random (seed 0)`, a hub name, or a file with its hash.
        licence: the weights' licence as far as it is known.
        report: what became of each tensor, of weights from a checkpoint file.
    """

    spec: str
    weights: str
    licence: str | None = None
    report: LoadReport | None = None

    @property
    def loading(self) -> tuple[str, ...]:
        """Lines about how the weights were loaded, if there is anything to say."""
        return () if self.report is None else self.report.lines


class Backbone(nn.Module):
    """A timm model as `Backbone -> Features`.

    Attributes:
        model: the timm model.
        width: channels of the map.
        pooled_width: channels of the model's own pooled vector.
        grid: (h, w) tokens of the map at `image_size`.
        num_prefix: prefix tokens, named by `prefix_names`.
        mean, std: the normalisation of RGB in [0, 1].
        image_size: (height, width) in pixels that the model is made for.
        patch: pixels of the image for each token of the map.
        fixed_size: the model takes no other size without being rebuilt.
        build: how to make it again, or None.
        origin: where the weights come from.
        class_names: of the classifier, if any.
        projection: the model's head is CLIP's projection: its output is `pooled`, and there are
            no logits.
    """

    mean: Tensor
    std: Tensor
    model: Any  # timm's models have an interface, but no type for it

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Rgb,
        std: Rgb,
        image_size: tuple[int, int],
        origin: Origin,
        build: TimmBuild | None = None,
        class_names: tuple[str, ...] | None = None,
        fixed_size: bool = True,
        always_drop_path: bool = False,
        layout: Layout | None = None,
        projection: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.origin, self.build, self.class_names = origin, build, class_names
        self.image_size, self.fixed_size = image_size, fixed_size
        self.slot = DropPathSlot(always=always_drop_path)
        key_drop_path(model, self.slot)
        # not persistent: a checkpoint holds weights, and these are stated beside them
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.layout = layout or layout_of(model)
        if projection is None:
            projection = class_names is None and projects(model)
        self.projection = projection
        seen = self._probe()
        self.width = seen.map.shape[1]
        self.pooled_width = seen.pooled.shape[1]
        self.grid = (seen.map.shape[2], seen.map.shape[3])
        self.prefix_names = seen.prefix_names
        self.num_prefix = len(seen.prefix_names)
        self.patch = round(image_size[0] / self.grid[0])

    def around(
        self,
        module: nn.Module,
        *,
        build: TimmBuild | None,
        class_names: tuple[str, ...] | None,
        layout: Layout | None = None,
        projection: bool | None = None,
    ) -> Backbone:
        """The same contract around another module, for the same images and from the same origin.

        Args:
            layout: of its tokens, if the module itself does not show it.
        """
        mean, std = self.rgb
        return Backbone(
            module,
            mean=mean,
            std=std,
            image_size=self.image_size,
            origin=self.origin,
            build=build,
            class_names=class_names,
            fixed_size=self.fixed_size,
            layout=layout,
            projection=projection,
        )

    @torch.no_grad()
    def _probe(self) -> Features:
        """Features of one black image, to learn shapes from."""
        training = self.training
        self.eval()
        weight = next(self.model.parameters(), self.mean)
        blank = torch.zeros(1, 3, *self.image_size, device=weight.device, dtype=weight.dtype)
        try:
            return self(blank)
        finally:
            self.train(training)

    @property
    def num_classes(self) -> int:
        """Classes of the model's own classifier; 0 if it has none."""
        if self.projection:
            return 0
        return int(getattr(self.model, "num_classes", 0) or 0)

    @property
    def rgb(self) -> tuple[Rgb, Rgb]:
        """Mean and standard deviation as plain numbers."""
        mean, std = (tuple(t.flatten().tolist()) for t in (self.mean, self.std))
        return mean, std

    @property
    def parameters_count(self) -> int:
        """Weights of the model, head included."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def layer_grids(self) -> tuple[tuple[int, int], ...]:
        """The token grid of each layer that `forward` can return, first to last."""
        height, width = self.image_size
        reductions = [e["reduction"] for e in self._layer_info()]
        return tuple((-(-height // r), -(-width // r)) for r in reductions)

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """The channels of each layer that `forward` can return, first to last."""
        return tuple(e["num_chs"] for e in self._layer_info())

    def _layer_info(self) -> list[dict[str, Any]]:
        info = getattr(self.model, "feature_info", None)
        if not info:
            return []
        return [info[i] if isinstance(info, list) else info.info[i] for i in range(len(info))]

    def check_size(self, height: int, width: int) -> None:
        """Raise ModelError if the model cannot see images of this size."""
        if self.fixed_size and (height, width) != self.image_size:
            raise ModelError(
                f"'{self.origin.spec}' was built for {self.image_size[0]}x{self.image_size[1]} "
                f"images, not {height}x{width}"
            )

    def forward(
        self,
        images: Tensor,
        layers: Sequence[int] = (),
        *,
        stream: SampleStream | None = None,
        slot_name: str = "student",
    ) -> Features:
        """Features of images.

        Args:
            images: (B, 3, height, width) float RGB in [0, 1].
            layers: indices of intermediate layers (blocks of a ViT, stages of a hierarchical
                model; negative from the end) to return too.
            stream: address of the drop-path masks.
            slot_name: tells the masks of one model from another's.
        """
        height, width = images.shape[-2:]
        self.check_size(height, width)
        self.slot.fill(stream, images.device, slot_name)
        x = (images - self.mean) / self.std
        grid = grid_of(self.model, height, width)
        intermediates: dict[int, LayerFeatures] = {}
        if layers:
            final, intermediates = self._with_layers(x, layers)
        else:
            final = self.model.forward_features(x)
        if isinstance(final, Features):  # a user's module that knows better
            return final
        if not isinstance(final, Tensor):
            raise ModelError(
                f"'{self.origin.spec}' returned a {type(final).__name__}",
                expected="a map (B, C, h, w), tokens (B, N, C) or Features",
            )
        map_, prefix = self.layout.split(final, grid)
        pooled = self.model.forward_head(final, pre_logits=not self.projection)
        logits = self.model.forward_head(final) if self.num_classes else None
        if isinstance(logits, tuple):  # distilled DeiT in training mode
            logits = torch.stack(logits).mean(0)
        return Features(map_, prefix, self.layout.prefix_names, pooled, logits, intermediates)

    def _with_layers(
        self, x: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, LayerFeatures]]:
        count = len(self.layer_grids)
        positive = [i + count if i < 0 else i for i in layers]
        if any(not 0 <= i < count for i in positive):
            raise ModelError(
                f"layer {', '.join(map(str, layers))} of '{self.origin.spec}'",
                expected=f"0 to {count - 1}, or -{count} to -1",
            )
        order = sorted(set(positive))
        extra = {"return_prefix_tokens": True} if self.num_prefix else {}
        final, taken = self.model.forward_intermediates(x, indices=order, **extra)
        found = {}
        for index, value in zip(order, taken, strict=True):
            map_, prefix = value if isinstance(value, tuple) else (value, None)
            if prefix is None:
                prefix = map_.new_empty(len(map_), 0, map_.shape[1])
            found[index] = LayerFeatures(map_, prefix)
        return final, {asked: found[i] for asked, i in zip(layers, positive, strict=True)}


class CustomBackbone(Backbone):
    """A user's own module behind the contract.

    The module takes normalised images and returns a map (B, C, h, w), tokens (B, N, C), or
    `Features`. It may say `mean`, `std`, `image_size` and `num_prefix_tokens` itself.
    """

    def __init__(self, module: nn.Module, *, image_size: int | None, origin: Origin) -> None:
        size = image_size or int(getattr(module, "image_size", 224))
        super().__init__(
            _Adapter(module),
            mean=tuple(getattr(module, "mean", IMAGENET_MEAN)),
            std=tuple(getattr(module, "std", IMAGENET_STD)),
            image_size=(size, size),
            origin=origin,
            fixed_size=False,
        )


class _Adapter(nn.Module):
    """The part of timm's interface that `Backbone` calls, over a module with `forward` only."""

    feature_info = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.num_prefix_tokens = int(getattr(module, "num_prefix_tokens", 0))
        self.cls_token = True if self.num_prefix_tokens else None
        self.num_classes = 0

    def forward_features(self, x: Tensor) -> Any:
        return self.module(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        assert pre_logits
        return x.mean((2, 3)) if x.ndim == 4 else x[:, self.num_prefix_tokens :].mean(1)

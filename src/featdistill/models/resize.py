"""A backbone at another image size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from featdistill.core.errors import ModelError
from featdistill.models.backbone import Backbone, Origin, TimmBuild
from featdistill.models.extensions import extend, windows_leave_a_rest
from featdistill.models.positions import BiasResampling, Carried, can_carry, carry_positions
from featdistill.models.timm_models import create, drop_path_argument, family_filter
from featdistill.models.weights import load_exactly


def resize(
    backbone: Backbone, image_size: int | tuple[int, int], *, how: BiasResampling = "linear"
) -> Backbone:
    """The backbone at another image size (a side, or height and width); the same one if it has it.

    A model that is made for one size is built again for the other, and its positions are carried
    over: absolute ones bicubic and antialiased, relative bias tables as `how` says
    (`positions.resize_bias_table`). Families that `positions` does not know go through timm's own
    conversion.

    Raises:
        ModelError: the size is no whole number of patches.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if backbone.image_size == size:
        return backbone
    model, build, origin = backbone.model, backbone.build, backbone.origin
    if backbone.fixed_size:
        assert build is not None
        timm_size = size[0] if size[0] == size[1] else size
        build = TimmBuild(build.architecture, {**build.arguments, "img_size": timm_size})
        for side in size:
            check_divides(model, side, origin)
        rate = drop_path_argument(build.architecture, backbone.slot.rate)
        model = create(build.architecture, **build.arguments, **rate)
        if origin.report and origin.report.pads_first and windows_leave_a_rest(model):
            build = TimmBuild(build.architecture, {**build.arguments, "pad_first": True})
            extend(model, {"pad_first": True})
        carried = _carry(backbone, model, how)
        load_exactly(model, carried.tensors, what=origin.spec)
        if origin.report is not None:
            origin = replace(origin, report=replace(origin.report, resized=carried.resized))
    mean, std = backbone.rgb
    return Backbone(
        model,
        mean=mean,
        std=std,
        image_size=size,
        origin=origin,
        build=build,
        class_names=backbone.class_names,
        fixed_size=backbone.fixed_size,
        always_drop_path=backbone.slot.always,
        projection=backbone.projection,
    )


def _carry(backbone: Backbone, model: Any, how: BiasResampling) -> Carried:
    tensors = backbone.model.state_dict()
    if can_carry(model):
        return carry_positions(tensors, model, how=how)
    carry = family_filter(model)
    if carry is None:
        return Carried(tensors, ())
    moved = carry(dict(tensors), model)
    changed = (n for n, v in moved.items() if n in tensors and v.shape != tensors[n].shape)
    return Carried(moved, tuple(changed))


def check_divides(model: Any, image_size: int, origin: Origin) -> None:
    """Raise ModelError if an image is no whole number of patches; timm would crop it in silence."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple | list) else patch
    if side and image_size % side:
        raise ModelError(
            f"'{origin.spec}' cannot see {image_size} pixels",
            expected=f"a multiple of its patch of {side}",
        )

"""Pyramids, heads and segmenters: published sizes, shapes, equality with transformers' heads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.seeds import SampleStream
from featdistill.engine.optimizer import parameter_groups
from featdistill.models.backbone import Backbone, Origin
from featdistill.models.positions import SHARED_TABLE, layer_table
from featdistill.models.pyramid import PlainPyramid, levels_of
from featdistill.models.segmenter import (
    HeadShape,
    Segmenter,
    build_segmenter,
    describe,
    seen_size,
)
from featdistill.models.segmenter_files import load_segmenter, save_segmenter
from featdistill.models.upernet import FCNHead, UperHead
from tests.models.model_zoo import images, small_beit, small_swin, small_vit, stir, wrap

CLASSES = tuple(str(i) for i in range(150))
FEW = ("sky", "road", "car")
SMALL = HeadShape(channels=8, auxiliary=4)


def on_meta(architecture: str, seen: tuple[int, int] | None, size: tuple[int, int]) -> Segmenter:
    """A full-size segmenter without memory; `seen`: the size that a fixed backbone is built for."""
    with torch.device("meta"):
        arguments = {} if seen is None else {"img_size": seen}
        model = timm.create_model(architecture, num_classes=0, **arguments)
        backbone = Backbone(
            model,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            image_size=seen or size,
            origin=Origin(architecture, "none"),
            fixed_size=seen is not None,
        )
        return Segmenter(backbone, size=size, class_names=CLASSES, shape=HeadShape())


def count(*modules: nn.Module | None) -> int:
    return sum(p.numel() for m in modules if m is not None for p in m.parameters())


# 150 classes. Totals in millions as published: Swin (Liu et al. 2021, table 3), ConvNeXt (Liu et
# al. 2022, table 4), BEiT-B (as listed there in the appendix)
PUBLISHED = [
    ("swin_tiny_patch4_window7_224", (512, 512), 60),
    ("swin_base_patch4_window7_224", (512, 512), 121),
    ("convnext_tiny", None, 60),
    ("convnext_base", None, 122),
    ("beit_base_patch16_224", (512, 512), 163),
]


@pytest.mark.parametrize(("architecture", "seen", "millions"), PUBLISHED)
def test_published_sizes(architecture: str, seen: tuple[int, int] | None, millions: int) -> None:
    segmenter = on_meta(architecture, seen, (512, 512))
    assert round(count(segmenter) / 1e6) == millions


def conv(inputs: int, outputs: int, side: int) -> int:
    return inputs * outputs * side * side + 2 * outputs  # no bias, a norm


@pytest.mark.parametrize(
    ("widths", "channels"), [((128, 256, 512, 1024), 512), ((768,) * 4, 768), ((1024,) * 4, 1024)]
)
def test_parameters_of_the_head_by_hand(widths: tuple[int, ...], channels: int) -> None:
    """Pyramid pooling, bottleneck, laterals, smoothing, join, classifier (Xiao et al. 2018)."""
    c, k = channels, 150
    expected = 4 * conv(widths[-1], c, 1) + conv(widths[-1] + 4 * c, c, 3)
    expected += sum(conv(w, c, 1) for w in widths[:-1]) + 3 * conv(c, c, 3)
    expected += conv(4 * c, c, 3) + c * k + k
    with torch.device("meta"):
        assert count(UperHead(widths, channels=c, classes=k)) == expected
        auxiliary = FCNHead(widths[2], channels=256, classes=k)
    assert count(auxiliary) == conv(widths[2], 256, 3) + 256 * k + k


def test_swin_bs_head_is_the_published_one() -> None:
    segmenter = on_meta("swin_base_patch4_window7_224", (512, 512), (512, 512))
    assert count(segmenter.head) == 33_315_990
    assert count(segmenter.auxiliary) == 1_218_710
    assert "UperNet, 512 channels, on layers 0, 1, 2, 3; 34,538,540 parameters" in describe(
        segmenter
    )


SHAPES = [
    ("vit_base_patch16_224", (512, 512), (512, 512)),
    ("vit_base_patch16_224", (512, 688), (512, 683)),
    ("beit_base_patch16_224", (512, 640), (512, 640)),
    ("vit_large_patch14_clip_quickgelu_224", (518, 518), (512, 512)),
    ("vit_large_patch14_clip_quickgelu_224", (518, 644), (512, 640)),
    ("swin_base_patch4_window7_224", (512, 512), (512, 512)),
    ("swinv2_base_window8_256", (480, 640), (480, 640)),
    ("convnext_base", None, (512, 512)),
    ("convnext_base", None, (500, 683)),
]


@pytest.mark.parametrize(("architecture", "seen", "size"), SHAPES)
def test_shapes(architecture: str, seen: tuple[int, int] | None, size: tuple[int, int]) -> None:
    segmenter = on_meta(architecture, seen, size)
    if seen is not None:
        assert seen_size(segmenter.backbone, size) == seen
    with torch.device("meta"):
        found = segmenter.train()(torch.zeros(2, 3, *size))
        assert found.main.shape == (2, 150, *size)
        assert found.auxiliary is not None
        assert found.auxiliary.shape == (2, 150, *size)
        assert segmenter.eval()(torch.zeros(1, 3, *size)).auxiliary is None


@pytest.mark.parametrize(("patch", "sides"), [
    (16, (32, 16, 8, 4)), (14, (32, 16, 8, 4)), (8, (16, 8, 4, 2)), (4, (8, 4, 2, 1)),
    (32, (64, 32, 16, 8)),
])  # fmt: skip
def test_four_sizes_from_one(patch: int, sides: tuple[int, ...]) -> None:
    pyramid = PlainPyramid((6,) * 4, patch)
    maps = pyramid([torch.randn(2, 6, 8, 8)] * 4)
    assert tuple(m.shape[-1] for m in maps) == sides


def test_layers_of_the_pyramid() -> None:
    deep = small_vit(depth=12)
    assert levels_of(deep).indices == (2, 5, 8, 11)
    assert levels_of(deep, (3, 5, 7, -1)).indices == (3, 5, 7, 11)
    assert not levels_of(small_swin()).plain
    for wrong in ((0, 1, 2), (0, 1, 2, 12), (5, 3, 7, 11)):
        with pytest.raises(ModelError, match="for the pyramid"):
            levels_of(deep, wrong)
    with pytest.raises(ModelError, match="has 3 layers"):
        levels_of(small_vit(depth=3))


def ours_in_transformers(name: str) -> str:
    """A name of our head's tensors in transformers' UperNet."""
    name = re.sub(r"\.0\.weight$", ".conv.weight", name)
    name = re.sub(r"\.1\.(weight|bias|running_\w+|num_batches_tracked)$", r".batch_norm.\1", name)
    name = re.sub(r"^pools\.(\d)", r"psp_modules.\1.1", name)
    for ours, theirs in (
        ("laterals", "lateral_convs"),
        ("smooth", "fpn_convs"),
        ("join", "fpn_bottleneck"),
    ):
        name = re.sub(rf"^{ours}\.", f"{theirs}.", name)
    return name


def test_the_head_is_transformers_own() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet.modeling_upernet import UperNetHead

    widths = (6, 8, 10, 12)
    config = transformers.UperNetConfig(hidden_size=16, num_labels=5)
    theirs = UperNetHead(config, in_channels=list(widths)).eval()
    ours = UperHead(widths, channels=16, classes=5)
    stir(ours, size=0.3)
    state = {ours_in_transformers(k): v for k, v in ours.state_dict().items()}
    assert set(state) == set(theirs.state_dict())
    theirs.load_state_dict(state)
    maps = [
        torch.randn(2, w, side, side + 1) for w, side in zip(widths, (17, 9, 5, 3), strict=True)
    ]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(maps), theirs(maps))
        torch.testing.assert_close(ours.train()(maps), theirs.train()(maps))


def built(backbone: Backbone, size: tuple[int, int] = (32, 32), **options: object) -> Segmenter:
    return build_segmenter(
        backbone, size=size, class_names=FEW, **{"shape": SMALL, **options}
    ).eval()


BACKBONES = {
    "vit": lambda: small_vit(depth=4),
    "beit": lambda: small_beit(depth=4),
    "swin": small_swin,
    "convnext": lambda: wrap_free("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
}


def wrap_free(architecture: str, **arguments: object) -> Backbone:
    """A model that takes images of any size."""
    backbone = wrap(timm.create_model(architecture, num_classes=0, **arguments), (32, 32))
    backbone.fixed_size = False
    return backbone


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("kind", ["upernet", "linear"])
def test_small_segmenters_learn_in_every_part(family: str, kind: str) -> None:
    shape = HeadShape(kind=kind, channels=8, auxiliary=4)  # type: ignore[arg-type]
    segmenter = built(BACKBONES[family](), shape=shape).train()
    found = segmenter(images(2, 32))
    total = found.main.square().mean()
    if found.auxiliary is not None:
        total = total + found.auxiliary.square().mean()
    total.backward()
    assert found.main.shape == (2, 3, 32, 32)
    for prefix, module in segmenter.trained_parts:
        grads = [p.grad for p in module.parameters()]
        assert not grads or any(g is not None and g.any() for g in grads), prefix


def test_a_linear_head_is_a_norm_and_a_product() -> None:
    backbone = small_vit()
    segmenter = built(backbone, shape=HeadShape(kind="linear"))
    stir(segmenter.head, size=0.3)
    one = images(1, 32)
    with torch.no_grad():
        tokens = segmenter.backbone(one).map[0].flatten(1).T
        normed = nn.functional.layer_norm(
            tokens, tokens.shape[1:], segmenter.head.norm.weight, segmenter.head.norm.bias, 1e-6
        )
        weight = segmenter.head.classifier.weight[:, :, 0, 0]
        low = (normed @ weight.T + segmenter.head.classifier.bias).T.reshape(1, 3, 4, 4)
        expected = nn.functional.interpolate(low, (32, 32), mode="bilinear")
        torch.testing.assert_close(segmenter.logits(one), expected)


def test_features_are_the_backbones_own() -> None:
    """What the pyramid sees are the layers' maps, at the size that the backbone came with."""
    backbone = small_vit(depth=4)
    segmenter = built(backbone)
    with torch.no_grad():
        for one, two in zip(
            backbone(images(1, 32), segmenter.layers).layers.values(),
            segmenter.backbone(images(1, 32), segmenter.layers).layers.values(),
            strict=True,
        ):
            torch.testing.assert_close(one.map, two.map)


def test_a_shared_table_becomes_one_for_each_layer() -> None:
    backbone = small_beit(depth=4)
    table = backbone.model.state_dict()[SHARED_TABLE]
    segmenter = built(backbone)
    state = segmenter.backbone.model.state_dict()
    assert SHARED_TABLE not in state
    assert all(torch.equal(state[layer_table(i)], table) for i in range(4))
    with torch.no_grad():
        torch.testing.assert_close(
            segmenter.backbone(images(1, 32)).map, backbone(images(1, 32)).map
        )


def test_tables_are_carried_to_another_size() -> None:
    """224 to 512 in small: a grid of 4 becomes one of 10, and of 10 by 6."""
    for size, rows in (((80, 80), 19 * 19), ((80, 48), 19 * 11)):
        segmenter = built(small_beit(depth=4), size)
        table = segmenter.backbone.model.state_dict()[layer_table(0)]
        assert table.shape[0] == rows + 3
        assert segmenter.logits(images(1, 16).new_zeros(1, 3, *size)).shape == (1, 3, *size)
        assert segmenter.backbone.grid == (size[0] // 8, size[1] // 8)


def test_a_size_that_the_patch_does_not_divide_is_filled_and_cut() -> None:
    """30 x 37 is seen as 32 x 40, the rest in the backbone's mean colour."""
    segmenter = built(small_vit(depth=4), (30, 37))
    assert segmenter.backbone.image_size == (32, 40)
    one = torch.rand(1, 3, 30, 37)
    filled = segmenter.backbone.mean.expand(1, 3, 32, 40).clone()
    filled[..., :30, :37] = one
    with torch.no_grad():
        seen = segmenter.logits(one)
        assert seen.shape == (1, 3, 30, 37)
        torch.testing.assert_close(seen, segmenter.logits(filled)[..., :30, :37])


def stream(step: int, positions: Tensor) -> SampleStream:
    return SampleStream(seed=0, step=step, positions=positions)


def test_dropout_is_drawn_by_address() -> None:
    """Of whole channels, by sample: not by history and not by its place in the micro-batch."""
    segmenter = built(small_vit(depth=4), shape=HeadShape(kind="linear", dropout=0.5)).train()
    stir(segmenter.head, size=0.3)
    two = images(2, 32)
    with torch.no_grad():
        whole = segmenter(two, stream=stream(3, torch.tensor([5, 6]))).main
        again = segmenter(two, stream=stream(3, torch.tensor([5, 6]))).main
        alone = segmenter(two[1:], stream=stream(3, torch.tensor([6]))).main
        other = segmenter(two, stream=stream(4, torch.tensor([5, 6]))).main
        plain = segmenter.eval()(two, stream=stream(3, torch.tensor([5, 6]))).main
    assert torch.equal(whole, again)
    torch.testing.assert_close(whole[1:], alone)
    assert not torch.allclose(whole, other)
    assert not torch.allclose(whole, plain)


def test_a_frozen_backbone_stays_as_it_is() -> None:
    segmenter = built(small_vit(depth=4), frozen=True)
    segmenter.train()
    assert segmenter.head.training
    assert not segmenter.backbone.training
    segmenter(images(2, 32)).main.square().mean().backward()
    assert all(p.grad is None for p in segmenter.backbone.parameters())
    assert [prefix for prefix, _ in segmenter.trained_parts] == ["pyramid.", "head.", "auxiliary."]


def test_layer_decay_acts_on_the_backbone_alone() -> None:
    segmenter = built(small_vit(depth=4))
    groups = parameter_groups(segmenter.trained_parts, weight_decay=0.1, layer_decay=0.5)
    scales = {name: g["lr_scale"] for g in groups for name in g["names"]}
    assert scales["backbone.model.patch_embed.proj.weight"] == 0.5**5
    assert scales["backbone.model.blocks.3.attn.qkv.weight"] == 0.5
    beside = {name: s for name, s in scales.items() if not name.startswith("backbone.")}
    assert set(beside.values()) == {1.0}
    assert len(scales) == len(list(segmenter.parameters()))


def test_seeds_of_the_head() -> None:
    states = [built(small_vit(depth=4), seed=seed).head.state_dict() for seed in (0, 0, 1)]
    name = "classifier.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("family", ["vit", "beit", "swin"])
def test_a_segmenter_comes_back_from_its_files(tmp_path: Path, family: str) -> None:
    segmenter = built(BACKBONES[family](), (32, 48))
    stir(segmenter)
    folder = save_segmenter(
        segmenter, tmp_path / "segmenter", values=(1, 2, 3), unlabelled=(0,), short=40, about={}
    )
    assert folder is not None
    for spec in (tmp_path, folder):
        trained = load_segmenter(str(spec))
        one = torch.rand(1, 3, 32, 48)
        with torch.no_grad():
            assert torch.equal(trained.segmenter.logits(one), segmenter.logits(one))
        assert trained.segmenter.class_names == FEW
        assert (trained.values, trained.unlabelled, trained.short) == ((1, 2, 3), (0,), 40)


def test_files_that_are_no_segmenter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no trained segmenter"):
        load_segmenter(str(tmp_path))
    segmenter = built(small_vit(depth=4))
    save_segmenter(segmenter, tmp_path, values=(0, 1, 2), unlabelled=(), short=32, about={})
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors"):
        load_segmenter(str(tmp_path))
    (tmp_path / "segmenter.json").write_text("{}")
    with pytest.raises(ModelError, match="not complete"):
        load_segmenter(str(tmp_path))


def test_what_cannot_be_fed() -> None:
    from featdistill.models.backbone import CustomBackbone

    custom = CustomBackbone(nn.Conv2d(3, 4, 8, 8), image_size=32, origin=Origin("mine", "its own"))
    with pytest.raises(ModelError, match=r"shows no intermediate layers.*--head linear"):
        built(custom)
    linear = built(custom, shape=HeadShape(kind="linear"))
    assert linear.logits(images(1, 32)).shape == (1, 3, 32, 32)
    with pytest.raises(ModelError, match="drop path"):
        built(custom, shape=HeadShape(kind="linear"), drop_path=0.1)


def test_resnets_last_four_stages() -> None:
    assert levels_of(wrap_free("resnet18")).widths == (64, 128, 256, 512)

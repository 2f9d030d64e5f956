"""Layer decay of whole ViT-B and Swin-B classifiers, by tables written out by hand.

The rule is the official one (Feature-Distillation: optimizer.py, `get_vit_layer` and
`get_swin_layer`): of d blocks, the embedding is group 0, block l is l + 1, the rest is d + 1, and
group g learns with the peak rate times decay^(d + 1 - g).
"""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from featdistill.engine.optimizer import adamw, layer_groups, parameter_groups, set_rates
from featdistill.engine.schedule import Schedule
from featdistill.models.timm_models import create

# 0.65^13, 0.65^12, ..., 1
VIT_B_SCALES = [
    *(0.00369721, 0.00568801, 0.00875078, 0.0134627, 0.0207119, 0.0318645, 0.0490223),
    *(0.0754189, 0.116029, 0.178506, 0.274625, 0.4225, 0.65, 1.0),
]
# 0.8^25, 0.8^24, ..., 1
SWIN_B_SCALES = [
    *(0.00377789, 0.00472237, 0.00590296, 0.0073787, 0.00922337, 0.0115292, 0.0144115),
    *(0.0180144, 0.022518, 0.0281475, 0.0351844, 0.0439805, 0.0549756, 0.0687195, 0.0858993),
    *(0.107374, 0.134218, 0.167772, 0.209715, 0.262144, 0.32768, 0.4096, 0.512, 0.64, 0.8, 1.0),
]

VIT_BLOCK = [
    *("gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
    *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
]
TABLE = "attn.relative_position_bias_table"
VIT_B_ENDS = {
    **dict.fromkeys(["cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"], 0),
    **dict.fromkeys(["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"], 13),
}
# the bias is shared while distilling (the last group), and each layer's own when fine-tuning
VIT_B = {
    "own": VIT_B_ENDS | {f"blocks.{b}.{n}": b + 1 for b in range(12) for n in [*VIT_BLOCK, TABLE]},
    "shared": VIT_B_ENDS
    | {f"blocks.{b}.{n}": b + 1 for b in range(12) for n in VIT_BLOCK}
    | {"rel_pos_bias.relative_position_bias_table": 13},
}

SWIN_BLOCK = [
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
    *("attn.logit_scale", "attn.cpb_mlp.0.weight", "attn.cpb_mlp.0.bias", "attn.cpb_mlp.2.weight"),
    *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
]
DOWN = ["reduction.weight", "norm.weight", "norm.bias"]
# stages of 2, 2, 18 and 2 blocks: 1-2, 3-4, 5-22, 23-24. Officially a downsampling is the end of
# its stage and learns like its last block; timm writes it at the head of the stage that follows.
SWIN_B = {
    **dict.fromkeys([f"patch_embed.{n}" for n in ("proj.weight", "proj.bias")], 0),
    **dict.fromkeys([f"patch_embed.{n}" for n in ("norm.weight", "norm.bias")], 0),
    **{f"layers.0.blocks.{b}.{n}": 1 + b for b in range(2) for n in SWIN_BLOCK},
    **{f"layers.1.downsample.{n}": 2 for n in DOWN},
    **{f"layers.1.blocks.{b}.{n}": 3 + b for b in range(2) for n in SWIN_BLOCK},
    **{f"layers.2.downsample.{n}": 4 for n in DOWN},
    **{f"layers.2.blocks.{b}.{n}": 5 + b for b in range(18) for n in SWIN_BLOCK},
    **{f"layers.3.downsample.{n}": 22 for n in DOWN},
    **{f"layers.3.blocks.{b}.{n}": 23 + b for b in range(2) for n in SWIN_BLOCK},
    **dict.fromkeys(["norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"], 25),
}


def vit_b(bias: str) -> nn.Module:
    with torch.device("meta"):
        return create(
            "beit_base_patch16_224",
            num_classes=1000,
            global_pool="avg",
            use_abs_pos_emb=False,
            use_rel_pos_bias=bias == "own",
            use_shared_rel_pos_bias=bias == "shared",
        )


def swin_b() -> nn.Module:
    with torch.device("meta"):
        return create("swinv2_base_window16_256", img_size=224, window_size=14, num_classes=1000)


@pytest.mark.parametrize(
    ("model", "table", "decay", "scales"),
    [
        pytest.param(vit_b("own"), VIT_B["own"], 0.65, VIT_B_SCALES, id="vit-b"),
        pytest.param(vit_b("shared"), VIT_B["shared"], 0.65, VIT_B_SCALES, id="vit-b-shared"),
        pytest.param(swin_b(), SWIN_B, 0.8, SWIN_B_SCALES, id="swin-b"),
    ],
)
def test_the_published_table(
    model: nn.Module, table: dict[str, int], decay: float, scales: list[float]
) -> None:
    groups = layer_groups(model)
    assert groups.last == len(scales) - 1
    names = [n for n, _ in model.named_parameters()]
    assert {n: groups.layer_of(n) for n in names} == table
    made = parameter_groups([("m.", model)], weight_decay=0.05, layer_decay=decay)
    found = [(n.removeprefix("m."), g["lr_scale"]) for g in made for n in g["names"]]
    assert sorted(n for n, _ in found) == sorted(table), "each exactly once"
    assert sum(len(g["params"]) for g in made) == len(table)
    for name, scale in found:
        assert scale == pytest.approx(scales[table[name]], rel=2e-5), name


def test_sizes_of_the_groups() -> None:
    """No two groups share a rate and a weight decay; ViT-B's hold each block's weights."""
    made = parameter_groups([("", vit_b("own"))], weight_decay=0.05, layer_decay=0.65)
    assert len(made) == 2 * 14
    decayed = {g["lr_scale"]: g for g in made if g["weight_decay"]}
    # 768 x (2304 + 768 + 2 x 3072), and a table of 27^2 + 3 places for 12 heads
    block = 768 * (2304 + 768 + 2 * 3072) + (27**2 + 3) * 12
    sizes = [sum(p.numel() for p in decayed[s]["params"]) for s in sorted(decayed)]
    assert sizes == [768 * 3 * 16 * 16, *([block] * 12), 768 * 1000]


def test_a_pre_norm_learns_with_its_embedding() -> None:
    """CLIP's ends the embedding; no official student has one."""
    with torch.device("meta"):
        clip = create("vit_base_patch16_clip_quickgelu_224")
    groups = layer_groups(clip)
    assert "norm_pre.weight" in dict(clip.named_parameters())
    assert groups.layer_of("norm_pre.weight") == groups.layer_of("pos_embed") == 0
    assert groups.layer_of("norm.weight") == 13


def test_only_the_peak_is_scaled() -> None:
    """As the official code does: timm's scheduler over groups whose rate is the scaled peak.

    Its timm (0.4.12) knows no `lr_scale`; today's would scale the ends too, so the reference
    gets none.
    """
    groups = parameter_groups([("", vit_b("own"))], weight_decay=0.05, layer_decay=0.65)
    ours = adamw(groups, betas=(0.9, 0.999))
    official = torch.optim.AdamW(
        [{"params": g["params"], "lr": 5e-3 * g["lr_scale"]} for g in groups]
    )
    warmup, steps = 10, 40
    scheduler = CosineLRScheduler(
        official,
        t_initial=steps - warmup,
        lr_min=2e-4,
        warmup_lr_init=1e-4,
        warmup_prefix=True,
        warmup_t=warmup,
        cycle_limit=1,
        t_in_epochs=False,
    )
    schedule = Schedule(steps=steps, warmup=warmup, peak=5e-3, start=1e-4, final=2e-4)
    for step in range(steps):
        scheduler.step_update(step)
        set_rates(ours, schedule, step)
        expected = [g["lr"] for g in official.param_groups]
        assert [g["lr"] for g in ours.param_groups] == pytest.approx(expected), step
    assert 0.65**13 * 5e-3 < 1e-4, "one peak lies below both ends"

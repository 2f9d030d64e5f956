"""Checkpoint files of every known format against the original projects' own modules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from featdistill.models.load import load_backbone
from tests.models.formats.parity import CASES, Case, images

NAMES = sorted(path.stem for path in CASES.glob("*.json"))

# What lies beside the file on its hub page and says what its tensors cannot.
BESIDE = {
    "open-clip-gelu": {"model_cfg": {"vision_cfg": {}}},
    "open-clip-training": {"model_cfg": {"vision_cfg": {}}},
    "open-clip-timm-linear": {
        "model_cfg": {"vision_cfg": {"timm_model_name": "vit_base_patch16_224"}},
    },
    "open-clip-timm": {
        "model_cfg": {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    },
}

# Nothing in these files shows the image size.
SIZELESS = ("dinov3", "dinov3-7b", "esvit-w3")


def write(case: Case, folder: Path) -> Path:
    if case.name in BESIDE:
        (folder / "open_clip_config.json").write_text(json.dumps(BESIDE[case.name]))
    return case.write(folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_at_every_size(name: str, tmp_path: Path) -> None:
    case = Case.read(name)
    assert len(case.sizes) > 1
    path = write(case, tmp_path)
    for size in case.sizes:
        backbone = load_backbone(str(path), image_size=size)
        if size == case.sizes[0] and name not in SIZELESS:
            assert load_backbone(str(path)).image_size == (size, size)
        with torch.no_grad():
            ours = backbone(images(size))
        right = case.answer(size)
        np.testing.assert_allclose(backbone.mean.flatten(), case.facts["mean"], atol=1e-6)
        np.testing.assert_allclose(backbone.std.flatten(), case.facts["std"], atol=1e-6)
        assert list(backbone.prefix_names) == case.facts["prefix"]
        np.testing.assert_allclose(ours.map, right.map, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(ours.prefix, right.prefix, atol=1e-4, rtol=1e-4)
        if right.pooled is not None:
            np.testing.assert_allclose(ours.pooled, right.pooled, atol=1e-4, rtol=1e-4)
        if right.logits is not None:
            np.testing.assert_allclose(ours.logits, right.logits, atol=1e-4, rtol=1e-4)

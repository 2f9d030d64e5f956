"""Loading quickly: a hash beside it, and models that are built without random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from featdistill.models.load import load_backbone
from featdistill.models.weights import HashMeanwhile, Unfilled

BUILDS = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "beit_base_patch16_224": {
        "img_size": 32,
        "depth": 1,
        "embed_dim": 64,
        "num_heads": 1,
        "use_shared_rel_pos_bias": True,
        "use_rel_pos_bias": False,
    },
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (1, 1), "window_size": 4},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "resnet18": {},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
}


@pytest.fixture
def unset_is_nan() -> Iterator[None]:
    """Memory that nobody has set is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unset_is_nan")
@pytest.mark.parametrize("name", BUILDS)
def test_parameters_are_left_out_and_buffers_are_not(name: str) -> None:
    plain = timm.create_model(name, num_classes=3, **BUILDS[name])
    state = torch.get_rng_state()
    with Unfilled():
        bare = timm.create_model(name, num_classes=3, **BUILDS[name])
    assert torch.equal(torch.get_rng_state(), state)  # no number was drawn
    weights = [m.weight for m in bare.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert weights
    assert all(w.isnan().any() for w in weights)
    for (key, mine), (_, other) in zip(bare.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(mine, other), key
    bare.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, *(2 * (BUILDS[name].get("img_size", 32),)))
    with torch.no_grad():
        assert torch.equal(bare.eval()(images), plain.eval()(images))


@pytest.mark.usefixtures("unset_is_nan")
def test_a_loaded_model_is_filled_to_the_last(tmp_path: Path) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=1)
    save_file(plain.state_dict(), tmp_path / "some.safetensors")
    model = load_backbone(str(tmp_path / "some.safetensors"))
    found = model.model.state_dict()
    assert found.keys() == plain.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in plain.state_dict().items())
    checksum = hashlib.sha256((tmp_path / "some.safetensors").read_bytes()).hexdigest()
    assert checksum[:12] in model.origin.weights


def test_a_hash_whose_file_is_gone(tmp_path: Path) -> None:
    checksum = HashMeanwhile(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        checksum.result()

"""What is done block by block changes no number."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from model_zoo import images, small_beit, small_swin, small_vit
from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.core.seeds import SampleStream
from featdistill.models.backbone import Backbone
from featdistill.models.blocks import blocks_of, compile_blocks, recompute_blocks
from featdistill.models.students import build_fresh

MAKERS = {"beit": small_beit, "vit": small_vit, "swin": small_swin}


def dropping(name: str) -> Backbone:
    build = MAKERS[name]().build
    assert build is not None
    return build_fresh(build, spec="test", drop_path=0.5).train()


def learn(backbone: Backbone, x: Tensor, step: int = 0) -> dict[str, Tensor]:
    backbone.zero_grad()
    stream = SampleStream(1, step, torch.arange(len(x)))
    backbone(x, stream=stream).map.square().mean().backward()
    return {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MAKERS)
def test_recomputed_gradients_are_the_same_to_the_bit(name: str) -> None:
    plain, x = dropping(name), images(4, 32)
    other = copy.deepcopy(plain)
    recompute_blocks(other)
    expected, found = learn(plain, x), learn(other, x)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_recomputing_runs_each_block_twice() -> None:
    backbone, seen = dropping("vit"), []
    # not the last layer of a block: torch ends as soon as it has what it needs
    backbone.model.blocks[0].norm1.register_forward_hook(lambda *_: seen.append(1))
    learn(backbone, images(2, 32))
    recompute_blocks(backbone)
    learn(backbone, images(2, 32))
    assert len(seen) == 1 + 2


def test_blocks_are_found_in_stages_too() -> None:
    assert len(blocks_of(small_vit())) == 3
    assert len(blocks_of(small_swin())) == 4
    assert blocks_of(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("what", [compile_blocks, recompute_blocks])
def test_a_model_without_blocks_is_told(what: object) -> None:
    with pytest.raises(ModelError, match="blocks"):
        what(nn.Sequential(nn.Linear(2, 2)))


class Skipping(nn.Module):
    def __init__(self, kept: int) -> None:
        super().__init__()
        self.line, self.rows = nn.Linear(4, 4), torch.arange(kept)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_add(0, self.rows, self.line(x.index_select(0, self.rows)))


def test_every_block_is_compiled_where_each_has_shapes_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        found.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    model = nn.Module()
    model.blocks = nn.Sequential(*(Skipping(20 - n) for n in range(10)))
    compile_blocks(model)
    model.blocks(torch.randn(20, 4))
    assert len(found) == 10


@pytest.mark.slow
def test_compiled_blocks_learn_the_same_and_share_their_code() -> None:
    plain, x = dropping("beit"), images(4, 32)
    other = copy.deepcopy(plain)
    compile_blocks(other)
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        expected, found = learn(plain, x, step), learn(other, x, step)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    # all layers are compiled once; that the first has no drop path makes it another
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert set(other.state_dict()) == set(plain.state_dict())

"""Batch norm over two processes against `nn.BatchNorm2d` on the joined batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from featdistill.engine.batchnorm import JointBatchNorm2d, join_batch_norms

SHARES = ((0, 3), (3, 4))  # of uneven size


def whole_batch() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return 5 + 3 * torch.randn(4, 3, 2, 5, generator=draw)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh())


def worker(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = net()
    join_batch_norms(model)
    first, last = SHARES[rank]
    part = whole_batch()[first:last].requires_grad_()
    out = model(part)
    (out * torch.arange(5.0)).square().sum().backward()
    saved = {
        "out": out.detach(),
        "input": part.grad,
        "grads": [p.grad for p in model.parameters()],
        "buffers": list(model[1].buffers()),
    }
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_batch(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    model = net()
    batch = whole_batch().requires_grad_()
    out = model(batch)
    (out * torch.arange(5.0)).square().sum().backward()
    joined = torch.cat([part["out"] for part in parts])
    torch.testing.assert_close(joined, out.detach())
    torch.testing.assert_close(torch.cat([part["input"] for part in parts]), batch.grad)
    for one, two, alone in zip(
        *(part["grads"] for part in parts), (p.grad for p in model.parameters()), strict=True
    ):
        torch.testing.assert_close(one + two, alone, atol=1e-4, rtol=1e-4)
    for part in parts:
        for got, expected in zip(part["buffers"], model[1].buffers(), strict=True):
            torch.testing.assert_close(got, expected)


def test_alone_it_is_the_plain_one_with_the_very_parameters() -> None:
    model = net()
    before = dict(model.named_parameters())
    plain = net()
    join_batch_norms(model)
    assert isinstance(model[1], JointBatchNorm2d)
    assert all(before[name] is p for name, p in model.named_parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    for _ in range(2):
        torch.testing.assert_close(model(whole_batch()), plain(whole_batch()), rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(whole_batch()), plain.eval()(whole_batch()))

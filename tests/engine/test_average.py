"""Averaged weights: the formula, skipped steps, swapping, and a resume to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from featdistill.core.errors import RunError
from featdistill.engine.average import WeightAverage
from featdistill.engine.optimizer import adamw, parameter_groups, set_rates
from featdistill.engine.schedule import Schedule
from featdistill.engine.step import descend

TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def move(module: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount)
    module(torch.randn(5, 3))  # and the running statistics


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_formula(decay: float) -> None:
    """Against the same recursion in float64, tensor by tensor."""
    module = model()
    average = WeightAverage(module, decay=decay)
    average.start()
    expected = {k: v.double() for k, v in module.state_dict().items()}
    for step in range(20):
        move(module, 0.1 * step)
        average.update(step, TAKEN)
        d = min(decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            counter = not value.is_floating_point()
            expected[name] = value.double() if counter else d * expected[name] + (1 - d) * value
    found = average.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5)
    assert found["1.num_batches_tracked"] == 20


def test_a_skipped_step_leaves_it_alone() -> None:
    module = model()
    average = WeightAverage(module, decay=0.9)
    average.start()
    move(module, 0.3)
    before = {k: v.clone() for k, v in average.state_dict().items() if v.is_floating_point()}
    average.update(3, SKIPPED)
    assert all(torch.equal(average.state_dict()[k], v) for k, v in before.items())
    average.update(3, TAKEN)
    assert not any(torch.equal(average.state_dict()[k], v) for k, v in before.items())


def test_applied_and_back_to_the_bit() -> None:
    module = model()
    average = WeightAverage(module, decay=0.9)
    average.start()
    move(module, 0.3)
    average.update(0, TAKEN)
    own = {k: v.clone() for k, v in module.state_dict().items()}
    places = [p.data_ptr() for p in module.parameters()]

    def inside() -> None:
        with average.applied():
            inner = module.state_dict()
            assert all(torch.equal(inner[k], v) for k, v in average.state_dict().items())
            raise KeyError  # whatever happens there

    with pytest.raises(KeyError):
        inside()
    assert all(torch.equal(module.state_dict()[k], v) for k, v in own.items())
    assert [p.data_ptr() for p in module.parameters()] == places, "the optimiser knows them"


def test_the_loop_does_not_average_a_step_that_was_not_taken() -> None:
    """Step 3 of 4 has no gradient: the average is that of the three others."""
    module = nn.Linear(1, 1)
    optimizer = adamw(parameter_groups([("", module)], weight_decay=0.0), betas=(0.9, 0.999))
    average = WeightAverage(module, decay=0.9)
    average.start()
    for step, good in enumerate([True, True, False, True]):
        set_rates(optimizer, Schedule(4, 0, 0.1, 0.1, 0.1), step)
        loss = module(torch.ones(1, 1)).sum() * (1.0 if good else float("nan"))
        loss.backward()
        before = {k: v.clone() for k, v in average.state_dict().items()}
        _, bad = descend(optimizer, optimizer, clip=None)
        average.update(step, bad)
        same = all(torch.equal(v, before[k]) for k, v in average.state_dict().items())
        assert same is not good
        assert all(v.isfinite().all() for v in average.state_dict().values())


def test_averages_of_another_model() -> None:
    average = WeightAverage(model(), decay=0.9)
    average.start()
    with pytest.raises(RunError, match="not of this model"):
        average.load_state_dict({"0.weight": torch.zeros(4, 3)})


def test_a_resumed_run_has_the_same_average(tmp_path: Path) -> None:
    import featdistill
    from featdistill.engine.checkpoint import Checkpoints

    options = {
        "model": "timm/vit_tiny_patch16_224",
        "weights": "random",
        "data": "digits",
        "image_size": 32,
        "batch_size": 32,
        "steps": 4,
        "lr": 1e-3,
        "ema": 0.9,
        "workers": 0,
        "device": "cpu",
    }
    whole = featdistill.finetune(out=tmp_path / "whole", **options)
    for stop in (2, None):
        featdistill.finetune(
            out=tmp_path / "parts",
            **{**options, "schedule": {"stop_at": stop}, "resume": stop is None},
        )
    one, two = (Checkpoints(tmp_path / n / "checkpoints").latest() for n in ("whole", "parts"))
    assert one is not None
    assert two is not None
    assert one.step == two.step == 4
    average, weights = one.files["average"], one.files["model"]
    assert all(torch.equal(two.files["average"][k], v) for k, v in average.items())
    differ = [k for k, v in average.items() if not torch.equal(weights[f"classifier.model.{k}"], v)]
    assert len(differ) > 100, "it is an average, not a copy"
    exported = featdistill.load_backbone(str(whole.out / "export-ema")).model.state_dict()
    assert all(torch.equal(exported[k], v) for k, v in average.items())

"""The quickstart's loop from end to end, with few steps; `make quickstart` runs it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import featdistill
from featdistill.config.commands import QuickstartConfig
from featdistill.config.resolve import resolve
from featdistill.tasks import quickstart

Steps = list[tuple[str, str, dict[str, Any]]]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    real = quickstart.steps

    def shortened(config: QuickstartConfig) -> Steps:
        found = [
            (what, command, {**options, "steps": 3}) for what, command, options in real(config)
        ]
        found[2][2]["seeds"] = [1, 2]
        return found

    monkeypatch.setattr(quickstart, "steps", shortened)


def test_every_step_resolves_as_shipped() -> None:
    config = QuickstartConfig()
    for _, command, options in quickstart.steps(config):
        resolved = resolve(
            command, {k: v for k, v in options.items() if k != "recipe"}, recipe=options["recipe"]
        )
        assert resolved.run.seed == config.seed  # type: ignore[attr-defined]


def test_the_loop_ends_in_a_report(short: None, tmp_path: Path) -> None:
    result = featdistill.quickstart(out=tmp_path / "q", device="cpu")
    page = result.compared.report.read_text(encoding="utf-8")
    assert result.compared.verdict.split(":")[0] in page
    assert "From scratch" in page
    assert result.seconds > 0
    again = featdistill.quickstart(out=tmp_path / "q", device="cpu", resume=True)
    assert again.compared.results["rows"] == result.compared.results["rows"]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(featdistill.FeatDistillError, match="not empty"):
        featdistill.quickstart(out=tmp_path)


def test_everything_public_is_there() -> None:
    for name in featdistill.__all__:
        assert getattr(featdistill, name) is not None

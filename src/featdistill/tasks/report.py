"""`featdistill report`: one page of what runs, comparisons and diagnoses found."""

from __future__ import annotations

from pathlib import Path

from featdistill.config.commands import ReportConfig
from featdistill.core.errors import ConfigError
from featdistill.engine.tracking import say


def run(config: ReportConfig) -> Path:
    """Draw the page; an earlier one in the same place is replaced."""
    folders = [Path(one).expanduser() for one in config.runs]
    twice = [str(one) for one in dict.fromkeys(folders) if folders.count(one) > 1]
    if twice:
        raise ConfigError([f"--run {', '.join(twice)} given more than once"])
    from featdistill.report.page import write_report

    out = None if config.out is None else Path(config.out).expanduser()
    page = write_report(*folders, out=out)
    say(f"report: {page}")
    return page

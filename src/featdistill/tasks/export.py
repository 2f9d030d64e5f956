"""`featdistill export`: a model as a folder that plain timm loads."""

from __future__ import annotations

from pathlib import Path

from featdistill.config.commands import ExportConfig
from featdistill.engine.rundir import check_out
from featdistill.engine.tracking import say
from featdistill.models.export import Exported, export_timm
from featdistill.models.load import load_backbone


def run(config: ExportConfig) -> Exported:
    """Export, check, and print the snippet to paste."""
    check_out(config.out, resume=False)
    backbone = load_backbone(config.model.spec, weights=config.model.weights)
    origin = backbone.origin
    exported = export_timm(
        backbone, Path(config.out).expanduser(), card={"from": f"{origin.spec} ({origin.weights})"}
    )
    say(f"written and checked: timm's output differs by {exported.difference:.1g} at most\n")
    say(exported.snippet)
    for note in exported.notes:
        say(f"- {note}")
    return exported

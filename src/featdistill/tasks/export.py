"""`featdistill export`: a model for another library, loaded back there and compared."""

from __future__ import annotations

from pathlib import Path

from featdistill.config.commands import ExportConfig
from featdistill.engine.rundir import check_out
from featdistill.engine.tracking import say
from featdistill.models.export import Exported, export, target_of
from featdistill.tasks.common import model_of
from featdistill.tasks.provenance import keep_story, story_of


def run(config: ExportConfig) -> Exported:
    """Export, check, and print the snippet to paste."""
    target = target_of(config.to)
    target.check_installed()  # before a model is loaded
    check_out(config.out, resume=False)
    backbone = model_of(config.model)
    story = story_of(config.model.spec, backbone)
    exported = export(
        backbone,
        Path(config.out).expanduser(),
        to=config.to,
        story=story,
        tolerance=config.tolerance,
    )
    keep_story(exported.folder, story)
    say(
        f"written and checked: {target.title} in '{exported.folder}'; {target.checked_with}'s "
        f"output differs by {exported.difference:.1g} of the largest value at most "
        f"(tolerance {exported.tolerance:g})\n"
    )
    say(exported.snippet)
    for note in exported.notes:
        say(f"- {note}")
    return exported

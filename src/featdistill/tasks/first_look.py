"""What a command can be refused for at once: seen before torch, which takes seconds to import.

The checks are those that the commands make anyway, and no more than that: whatever passes here is
looked at again where it is used. Nothing heavy may be imported here.
"""

from __future__ import annotations

from featdistill.config.commands import CheckConfig, Command, SegmentConfig
from featdistill.config.sections import DataConfig, StudentConfig
from featdistill.data.names import check_there
from featdistill.engine.rundir import check_out
from featdistill.models.student_sizes import check_student


def first_look(config: Command) -> None:
    """Raise FeatDistillError for an output folder, data or a student that cannot be."""
    run = getattr(config, "run", None)
    if (out := getattr(run, "out", None)) and not _has_own_rule(config):
        check_out(out, resume=getattr(run, "resume", False))
    for _, section in config:
        if isinstance(section, DataConfig):
            for path in (section.path, section.val):
                if path is not None:
                    check_there(path)
        elif isinstance(section, StudentConfig):
            for name in section.names:
                check_student(name)


def _has_own_rule(config: Command) -> bool:
    """Whether a command writes nothing to its output folder, or may add to what is in it."""
    return isinstance(config, CheckConfig) or (
        isinstance(config, SegmentConfig) and config.predict is not None
    )

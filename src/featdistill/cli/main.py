"""`featdistill COMMAND --option value ...`"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from featdistill.core.errors import FeatDistillError, Interrupted, did_you_mean

# Static, so that `featdistill --help` imports nothing: (name, one line). A test holds it to the
# schemas' own summaries.
SUMMARIES = (
    ("quickstart", "the whole loop in minutes, offline: pretrain, distill, compare, report"),
    ("check", "build everything, run one step, and say what a distillation would cost"),
    ("distill", "teach a fresh student the whitened features of a frozen teacher"),
    ("compare", "teacher, student and a fresh model under one recipe: which is better?"),
    ("finetune", "fine-tune a backbone for classification"),
    ("probe", "train linear classifiers on frozen features, and choose among a grid of them"),
    ("knn", "classify by nearest neighbours in frozen features"),
    ("predict", "classify images with a fine-tuned model"),
    ("features", "write the features of images to safetensors or parquet"),
    ("segment", "train a segmenter on a backbone, score it, and predict masks"),
    ("diagnose", "look inside models: what heads attend to, what features are like, by layer"),
    ("landscape", "loss and accuracy around models' weights: how flat is the valley?"),
    ("curvature", "the steepest directions of the loss around models' weights (Hessian)"),
    ("pretrain", "make a contrastive teacher from your own images (SimCLR)"),
    (
        "export",
        "write a model for timm, transformers, ONNX or the official code, and check it",
    ),
    ("report", "make one page of runs, comparisons and diagnoses"),
    ("models", "list the students, and search timm for teachers"),
    ("recipes", "list the recipes, or print one"),
    ("bench", "time a part of the project beside the same done plainly"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        from featdistill import __version__

        print(f"featdistill {__version__}")
        return 0
    try:
        return _run(words[0], words[1:])
    except FeatDistillError as error:
        prefix = "" if isinstance(error, Interrupted) else "error: "
        for line in () if error.said else str(error).splitlines():
            print(f"{prefix}{line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:  # a folder without permission, a name too long, a vanished disk
        where = f"'{error.filename}': " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    width = max(len(name) for name, _ in SUMMARIES)
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, line in SUMMARIES)
    return (
        "usage: featdistill COMMAND [--option value ...]\n\n"
        "Turn a pretrained vision backbone into one that fine-tunes better.\n\n"
        f"commands:\n{commands}\n\n"
        "'featdistill COMMAND --help' lists a command's options; "
        "'featdistill quickstart' shows the whole loop."
    )


def _run(command: str, words: list[str]) -> int:
    names = [name for name, _ in SUMMARIES]
    if command not in names:
        hint = did_you_mean(command, names) or "see 'featdistill --help'"
        raise FeatDistillError(f"unknown command '{command}'", fix=hint)
    from featdistill.cli.options import help_text, parse
    from featdistill.config.commands import COMMANDS
    from featdistill.config.resolve import resolve, to_yaml

    schema = COMMANDS[command]
    parsed = parse(schema, words)
    if parsed.help:
        print(help_text(command, schema))
        return 0
    config = resolve(
        command,
        parsed.values,
        recipe=parsed.recipe,
        config=parsed.config,
        problems=tuple(parsed.problems),
    )
    if parsed.print_config:
        print(to_yaml(config), end="")
        return 0
    from featdistill.cli.imports import uncollected
    from featdistill.tasks import home_of, run_command
    from featdistill.tasks.first_look import first_look

    first_look(config)
    with uncollected():
        home_of(command)
    run_command(command, config)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Differences between models that were trained and scored under the same seeds."""

from __future__ import annotations

import statistics
from typing import Any


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The student minus each other row, seed by seed."""
    by_name = {row["name"]: row for row in rows}
    found = []
    for other in ("teacher", "scratch"):
        if other not in by_name:
            continue
        pairs = zip(by_name["student"]["runs"], by_name[other]["runs"], strict=True)
        each = [mine["top1"] - theirs["top1"] for mine, theirs in pairs]
        found.append(
            {
                "of": "student",
                "minus": other,
                "per_seed": each,
                "mean": statistics.fmean(each),
                "std": statistics.stdev(each) if len(each) > 1 else None,
                "n": len(each),
            }
        )
    return found


def verdict(rows: list[dict[str, Any]]) -> str:
    """One honest sentence: better, worse, or not to be told apart.

    A difference counts where every seed agrees on its sign and its mean is more than twice its
    standard error; with so few seeds this is a rule of thumb, and the sentence says the numbers.
    """
    difference = differences(rows)[0]
    each, mean, n = difference["per_seed"], difference["mean"], difference["n"]
    size = f"{abs(mean) * 100:.1f} points of top-1"
    wins = sum(d > 0 for d in each)
    count = f"better under {wins} of {n} seed{'s' if n > 1 else ''}"
    if n == 1:
        word = "above" if mean > 0 else "below" if mean < 0 else "level with"
        return (
            f"Under a single seed the distilled student is {size} {word} its teacher; more seeds "
            "would tell."
        )
    error = difference["std"] / n**0.5
    agree = wins == n or all(d < 0 for d in each)
    if agree and abs(mean) > 2 * error:
        word = "better" if mean > 0 else "worse"
        return f"Fine-tuned, the distilled student is {word} than its teacher by {size} ({count})."
    sign = "+" if mean >= 0 else "-"
    return (
        f"Fine-tuned, student and teacher cannot be told apart: {sign}{size} for the student "
        f"({count}; standard error {error * 100:.1f})."
    )

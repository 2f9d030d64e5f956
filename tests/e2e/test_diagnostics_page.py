"""The Python of docs/diagnostics.md that needs no run of a user's, works."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diagnostics.md"


def test_the_snippets_run() -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    alone = [text for text in snippets if "runs/" not in text]
    assert alone
    for text in alone:
        exec(compile(text, PAGE.name, "exec"), {})

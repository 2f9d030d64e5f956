"""Unreadable images of a run: listed in quarantine.jsonl, and too many end it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from featdistill.core.errors import DataError
from featdistill.core.parsing import parse_json
from featdistill.core.types import Replaced


class Quarantine:
    """Counts the distinct unreadable images.

    Args:
        file: where they are listed.
        images: how many images the data has.
        limit: largest share of them that may be unreadable; 0: the first one is an error.

    Raises:
        DataError: the list of an earlier session is damaged.
    """

    def __init__(self, file: Path, *, images: int, limit: float) -> None:
        self.file, self.images, self.limit = file, images, limit
        self._known: set[int] = set()
        if file.is_file():
            whole = file.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]  # a kill may have cut the last line off
            os.truncate(file, len(whole))
            try:
                self._known = {int(parse_json(line)["index"]) for line in whole.splitlines()}
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"'{file}' is damaged", fix="delete it: the images are counted again"
                ) from None

    def __len__(self) -> int:
        return len(self._known)

    def add(self, replaced: Iterable[Replaced]) -> None:
        """Note images; raises DataError while their share is past the limit."""
        found = {r.index: r for r in replaced}
        if not found:
            return
        new = [r for r in found.values() if r.index not in self._known]
        with open(self.file, "a", encoding="utf-8") as out:
            for r in new:
                self._known.add(r.index)
                out.write(json.dumps({"index": r.index, "reason": r.reason}) + "\n")
        if self.limit == 0:
            raise DataError(
                f"cannot read {next(iter(found.values())).reason}",
                expected="readable images alone (--data.bad_images error, or a limit of 0)",
                fix="mend or remove it, or give --data.bad_images skip",
            )
        if len(self._known) > self.limit * self.images:
            raise DataError(
                f"{len(self._known)} of {self.images} images cannot be read, the last: "
                f"{list(found.values())[-1].reason}",
                expected=f"at most {self.limit:.2%} (--data.bad_image_limit)",
                fix=f"see '{self.file}'",
            )

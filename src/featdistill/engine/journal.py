"""A journal: results that are appended one by one and survive whatever ends the process.

A line is a checksum and a JSON value. A line that was half written when the process was killed (or
damaged later) does not count, and what it held is measured again.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from featdistill.core.errors import RunError
from featdistill.core.parsing import parse_json

_SYNC_SECONDS = 1.0


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


class Journal:
    """Appends to a file; a `with` block.

    A kill loses no line that `add` has returned for; the loss of power at most a second's.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._handle = -1
        self._synced = 0.0

    def __enter__(self) -> Self:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            whole = _whole(self.file.read_bytes())
            os.ftruncate(self._handle, whole)
            os.lseek(self._handle, whole, os.SEEK_SET)
        except OSError as error:
            raise self._refused(error) from None
        return self

    def add(self, value: Any) -> None:
        """Append a JSON-ready value. Raises RunError if the disk refuses."""
        text = json.dumps(value, separators=(",", ":"))
        line = f"{_checksum(text)} {text}\n".encode()
        try:
            while line:
                line = line[os.write(self._handle, line) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._handle)
                self._synced = time.monotonic()
        except OSError as error:
            raise self._refused(error) from None

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._handle >= 0:
            try:
                os.fsync(self._handle)
            finally:
                os.close(self._handle)

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write '{self.file}' ({error.strerror or error})",
            fix="make room, then go on with the same command and --resume",
        )


def _whole(data: bytes) -> int:
    """The bytes up to the end of the last whole line."""
    return data.rfind(b"\n") + 1


def read_journal(file: Path) -> list[Any]:
    """The values of a journal's whole lines; none where there is no file."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return []
    values = []
    for line in data[: _whole(data)].decode("utf-8", "replace").splitlines():
        checksum, _, text = line.partition(" ")
        if checksum == _checksum(text):
            values.append(parse_json(text))
    return values

"""Works in processes of their own that take turns: none keeps memory or settings of another's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from featdistill.core.errors import FeatDistillError, RunError
from featdistill.engine.batches import is_out_of_memory

Work = Callable[[], Any]
_LESS = "see whether memory is short; give a smaller --batch-size"


class Distant:
    """A work in another process.

    Args:
        make: importable; called there with `arguments`, gives the work.
    """

    def __init__(self, name: str, make: Callable[..., Work], arguments: Mapping[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._line, far = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(far, make, dict(arguments)), daemon=True
        )
        self._process.start()
        far.close()

    def __call__(self) -> Any:
        """Do the work once; what it returns. The first call waits until it is made too.

        Raises:
            FeatDistillError: what was raised there.
        """
        try:
            self._line.send(True)
            found = self._line.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RunError(
                f"the process of '{self.name}' died (exit status {self._process.exitcode})",
                fix=_LESS,
            ) from None
        if isinstance(found, FeatDistillError):
            raise found
        return found

    def close(self) -> None:
        """End the process."""
        self._line.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


@contextmanager
def distant(
    works: Mapping[str, tuple[Callable[..., Work], Mapping[str, Any]]],
) -> Iterator[dict[str, Distant]]:
    """Several of them, ended at the end."""
    started: dict[str, Distant] = {}
    try:
        for name, (make, arguments) in works.items():
            started[name] = Distant(name, make, arguments)
        yield started
    finally:
        for one in started.values():
            one.close()


def _serve(line: Connection, make: Callable[..., Work], arguments: dict[str, Any]) -> None:
    work: Work | None = None
    while True:
        try:
            line.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            work = work or make(**arguments)
            line.send(work())
        except FeatDistillError as error:
            line.send(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            line.send(RunError("there is too little memory for all ways side by side", fix=_LESS))
        except KeyboardInterrupt:
            return

"""What steps come upon that may end a run: unreadable images, and values that are no numbers.

Of several processes, each finds its own; all is counted together, by the first, and where it is too
much all end after the same step with the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from featdistill.core.types import Replaced
from featdistill.engine.finite import FiniteWatch, NonFinite, NonFiniteSteps
from featdistill.engine.quarantine import Quarantine
from featdistill.engine.runtime import Runtime
from featdistill.engine.tracking import say


@dataclass(frozen=True)
class Books:
    """The first process's lists."""

    quarantine: Quarantine
    steps: NonFiniteSteps


class Ledger:
    """This process's findings, until they are shared.

    Args:
        watch: of this process's steps.
        books: makes the lists, in the first process.

    Raises:
        FeatDistillError: a list of an earlier session is damaged.
    """

    def __init__(self, runtime: Runtime, watch: FiniteWatch, books: Callable[[], Books]) -> None:
        self.watch, self._runtime = watch, runtime
        self._replaced: list[Replaced] = []
        self._books: Books | None = None

        def open_books() -> None:
            self._books = books()

        runtime.first_does(open_books)

    def add(self, replaced: Iterable[Replaced]) -> None:
        """Note unreadable images of a batch."""
        self._replaced += replaced

    @property
    def news(self) -> bool:
        """Whether there is anything to share, as far as is known without waiting."""
        return bool(self._replaced) or self.watch.any

    @property
    def bad_images(self) -> int:
        """Distinct unreadable images of all processes; the first process knows."""
        return len(self._books.quarantine) if self._books else 0

    def share(self) -> None:
        """Put all processes' findings together; every process calls it after the same step.

        Raises:
            DataError: too many images were unreadable.
            NonFiniteError: a step, or too many, was no number.
        """
        found = self._runtime.collect((self._replaced, self.watch.take()))
        self._replaced = []
        replaced = [r for images, _ in found for r in images]
        steps = [s for _, steps in found for s in steps]
        if replaced or steps:
            self._runtime.first_does(lambda: self._enter(replaced, steps))

    def _enter(self, replaced: list[Replaced], steps: list[NonFinite]) -> None:
        assert self._books is not None
        self._books.quarantine.add(replaced)
        for line in self._books.steps.add(steps):
            say(line)

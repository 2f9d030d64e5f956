"""Where decoded images are kept: what `--data.cache` asks for."""

from __future__ import annotations

import os
from pathlib import Path

from featdistill.config.sections import CachedDataConfig
from featdistill.core.errors import DataError
from featdistill.data.device_cache import to_device
from featdistill.data.disk_cache import on_disk, stamp
from featdistill.data.kept import estimate, in_words
from featdistill.data.sources import Relabelled, Source, Subset
from featdistill.engine.fingerprint import fingerprint
from featdistill.engine.runtime import Runtime
from featdistill.engine.tracking import Countdown, say

_TITLE = "decoding"


def check_cache(config: CachedDataConfig) -> None:
    """Raise DataError if a cache on disk cannot be written; before any long work."""
    if config.cache != "disk":
        return
    folder = cache_folder(config)
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.R_OK | os.X_OK):
        raise DataError(
            f"the cache cannot be in '{folder}' ('{parent}' is not a folder that can be read)",
            fix="give another --data.cache_folder",
        )


def cache_folder(config: CachedDataConfig) -> Path:
    """Where decoded images are on disk."""
    if config.cache_folder is not None:
        return Path(config.cache_folder).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "featdistill" / "decoded"


def kept_images(
    config: CachedDataConfig, train: Source, *scored: Source, runtime: Runtime | None
) -> list[Source]:
    """The training images, and those that are scored, as they are to be kept.

    Args:
        runtime: None: this process is the only one, and nothing is kept on a device.

    Raises:
        DataError: there is too little room.
    """
    match config.cache:
        case "disk":
            known: dict[int, Source] = {}
            bar = _Bar(quiet=runtime is not None and not runtime.first)
            return [_on_disk(config, source, known, bar) for source in (train, *scored)]
        case "device":
            assert runtime is not None, "refused with the configuration"
            return [_on_device(config, train, runtime), *scored]
    return [train, *scored]


def cost_of_cache(config: CachedDataConfig, train: Source) -> str:
    """What a cache would take, in words; empty where none is asked for."""
    if config.cache == "none":
        return ""
    found = estimate(train, config.cache_short_side)
    if config.cache == "device":
        return f"about {in_words(found.padded)} on the device; left out of the times here"
    return (
        f"about {in_words(found.pixels)} in '{cache_folder(config)}' for the training images; left "
        "out of the times here"
    )


def _on_device(config: CachedDataConfig, source: Source, runtime: Runtime) -> Source:
    bar = _Bar(quiet=not runtime.first)
    try:
        found = to_device(
            source,
            runtime.device,
            short_side=config.cache_short_side,
            workers=config.workers,
            share=runtime.share,
            # processes share the memory of a machine, not that of their devices
            copies=runtime.processes_here if runtime.device.type == "cpu" else 1,
            progress=lambda done: bar(done, len(source)),
        )
    finally:
        bar.stop()
    bad = f"; {len(found.reasons):,} cannot be read" if found.reasons else ""
    where = f"on the {'GPU' if runtime.device.type == 'cuda' else 'CPU'}"
    say(f"{len(found):,} decoded images kept {where}, {in_words(found.pixels.nbytes)}{bad}")
    return found


def _on_disk(
    config: CachedDataConfig, source: Source, known: dict[int, Source], bar: _Bar
) -> Source:
    """A source, or what it is a larger part of, on disk: other parts then find it there."""
    if isinstance(source, Relabelled):
        inner = _on_disk(config, source.source, known, bar)
        return Relabelled(inner, source.labels, source.classes)
    if isinstance(source, Subset) and 2 * len(source) >= len(source.source):
        return Subset(_on_disk(config, source.source, known, bar), source.chosen)
    if id(source) not in known:
        known[id(source)] = _entry(config, source, bar)
    return known[id(source)]


def _entry(config: CachedDataConfig, source: Source, bar: _Bar) -> Source:
    identity = {name: v for name, v in fingerprint(source).items() if name != "labels"}
    try:
        return on_disk(
            source,
            folder=cache_folder(config),
            identity={**identity, "stamp": stamp(source)},
            short_side=config.cache_short_side,
            workers=config.workers,
            tell=say,
            progress=bar,
        )
    finally:
        bar.stop()


class _Bar:
    """A countdown that begins with the first image."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._countdown: Countdown | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._countdown is None:
            self._countdown = Countdown(_TITLE, total, "images", quiet=self.quiet)
        self._countdown.update(done)

    def stop(self) -> None:
        if self._countdown is not None:
            self._countdown.stop()
            self._countdown = None

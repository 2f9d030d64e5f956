"""Small image files, and a cache of one's own."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file's bytes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(name="encode")
def _encode() -> Callable[..., bytes]:
    return encode


@pytest.fixture
def images() -> Callable[..., Path]:
    """Write tiny images of these names below a folder; the n-th is grey of level n."""

    def write(root: Path, *names: str) -> Path:
        for n, name in enumerate(names):
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(np.full((4, 4, 3), n, np.uint8)))
        root.mkdir(parents=True, exist_ok=True)
        return root

    return write

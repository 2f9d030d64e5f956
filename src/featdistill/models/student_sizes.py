"""The named students: their sizes, readable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from featdistill.core.errors import ModelError, did_you_mean


@dataclass(frozen=True)
class VitSize:
    """A ViT student: width, layers, heads, patch side."""

    width: int
    depth: int
    heads: int
    patch: int = 16


@dataclass(frozen=True)
class SwinSize:
    """A Swin V2 student: width of the first stage, layers and heads of each, window side.

    `end_norm_period`: an extra norm follows every so many blocks of a stage; 0: none.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    patch: int = 4
    end_norm_period: int = 0


SIZES: dict[str, VitSize | SwinSize] = {
    "vit-t": VitSize(192, 12, 3),
    "vit-s": VitSize(384, 12, 6),
    "vit-b": VitSize(768, 12, 12),
    "vit-l": VitSize(1024, 24, 16, patch=14),
    "swin-t": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24), window=7),
    "swin-s": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24), window=7),
    "swin-b": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32), window=14),
    "swin-g": SwinSize(512, (2, 2, 42, 4), (16, 32, 64, 128), window=14, end_norm_period=6),
}


def check_student(name: str) -> None:
    """Raise ModelError for a name that is neither a student's nor of the form `timm/NAME`."""
    if name not in SIZES and not name.startswith("timm/"):
        raise ModelError(
            f"no student called '{name}'",
            expected=f"{', '.join(SIZES)} or timm/NAME",
            fix=did_you_mean(name, SIZES),
        )

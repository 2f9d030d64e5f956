"""What data are called: the names that are known, and what is on disk."""

from __future__ import annotations

from pathlib import Path

from featdistill.core.errors import DataError, did_you_mean

DIGITS = {"digits": 8, "scattered-digits": 12}  # name -> canvas, pixels
TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
    "flowers102": "Flowers102",
    "food101": "Food101",
    "pets": "OxfordIIITPet",
    "svhn": "SVHN",
}


def is_torchvision(path: str) -> bool:
    """Whether data are one of torchvision's sets: by a prefix, or by a name that no file has."""
    return path.startswith("torchvision:") or (path in TORCHVISION and not Path(path).exists())


def check_there(path: str) -> Path | None:
    """Where data are on disk; None if their name says that they are elsewhere.

    Raises:
        DataError: there is nothing.
    """
    if path in DIGITS or path.startswith("hf:") or is_torchvision(path):
        return None
    where = Path(path).expanduser()
    try:
        exists = where.exists()
    except OSError:
        exists = False
    if not exists:
        raise _absent(path, where)
    return where


def _absent(path: str, where: Path) -> DataError:
    siblings = [p.name for p in where.parent.iterdir()] if where.parent.is_dir() else []
    hint = did_you_mean(path, [*DIGITS, *TORCHVISION]) or did_you_mean(where.name, siblings)
    return DataError(
        f"no data at '{path}'",
        expected="an image folder, a list, a parquet file, digits, hf:NAME or torchvision:NAME",
        fix=hint,
    )

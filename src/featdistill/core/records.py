"""Records: the JSON (and npz) files in which every result is kept with what made it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.core.errors import RunError
from featdistill.core.parsing import parse_json

_PACKAGES = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "pillow", "pyarrow")

# what the last bit of a run's weights depends on
_BITS = (
    *("threads", "cpu", "cpu_capability", "cpu_features", "kernels"),
    *("devices", "python", "versions"),
)
_VECTORS = ("sse", "ssse", "avx", "amx", "fma", "f16c", "asimd", "neon", "sve", "bf16", "i8mm")


def environment() -> dict[str, Any]:
    """Versions, devices, processor, kernels and threads of this process, ready for JSON."""
    import torch

    versions = {}
    for name in ("featdistill", *_PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cuda = torch.cuda.is_available()
    model, features = _processor()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "cpu": model,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": features,
        "kernels": _kernels(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else ["cpu"],
        "command": " ".join(sys.argv),
        "commit": _commit(),
    }


def computing(known: Mapping[str, Any]) -> dict[str, Any]:
    """Of an environment, what the last bit of a run's weights may depend on."""
    return {key: known[key] for key in _BITS if key in known}


def _processor() -> tuple[str, list[str]]:
    """The processor's name and its vector instructions, as Linux names them; or nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine(), []
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    facts = {name.strip().lower(): value.strip() for name, _, value in lines}
    flags = (facts.get("flags") or facts.get("features") or "").split()
    name = facts.get("model name") or facts.get("cpu part") or platform.machine()
    return name, sorted(flag for flag in flags if flag.startswith(_VECTORS))


def _kernels() -> dict[str, Any]:
    """By which libraries, and how freely, torch computes."""
    import torch

    backends = torch.backends
    found: dict[str, Any] = {
        "mkl": backends.mkl.is_available(),
        "onednn": backends.mkldnn.is_available() and backends.mkldnn.enabled,
        "openmp": backends.openmp.is_available(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if torch.cuda.is_available():
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": backends.cudnn.version(),
            "cudnn_benchmark": backends.cudnn.benchmark,
            "tf32": backends.cuda.matmul.allow_tf32,
        }
    return found


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(value, indent=2, default=_plain, allow_nan=False)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"not JSON: {type(value).__name__}")


def write_record(
    path: Path,
    kind: str,
    *,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write `path` (JSON) and, where there are arrays, an npz of the same name beside it."""
    if arrays:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        plain: dict[str, Any] = {name: np.asarray(a) for name, a in arrays.items()}
        np.savez_compressed(temporary, **plain)
        os.replace(temporary, path.with_suffix(".npz"))
    write_json(
        path,
        {
            "kind": kind,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": dict(config),
            "environment": environment(),
            "results": dict(results),
        },
    )
    return path


def read_record(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read a record back.

    Raises:
        RunError: the file is absent, not JSON, or of another kind.
    """
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"no record at '{path}'", fix="finish the run that writes it") from None
    except (OSError, ValueError) as error:
        raise RunError(f"'{path}' is not a JSON record ({error})") from None
    if not isinstance(record, dict):
        raise RunError(f"'{path}' is not a record, but a JSON {type(record).__name__}")
    if kind is not None and record.get("kind") != kind:
        raise RunError(f"'{path}' is a {record.get('kind')!r} record", expected=f"a {kind!r} one")
    return record

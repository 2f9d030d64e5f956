"""Checkpoint files that are hostile, damaged, or something else: one line, at once, and no code."""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import subprocess
import sys
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from featdistill.core.errors import ModelError
from featdistill.models.checkpoints.archive import is_archive, read_archive
from featdistill.models.checkpoints.files import read_tree
from tests.models.formats.parity import CASES

JIT = CASES / "clip-jit.pt"


def complaint(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_tree(path)
    line = str(caught.value)
    assert str(path) in line
    assert "\n" not in line
    return line


# --- pickles


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.mkdir, (self.folder,)


def test_a_canary_in_a_state_dict(tmp_path: Path) -> None:
    path, canary = tmp_path / "w.pth", tmp_path / "canary"
    torch.save({"model": {"a": torch.ones(1)}, "args": Canary(canary)}, path)
    assert "is refused: it wants to call" in complaint(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # where code is run, it does sing
    assert canary.exists()


class Settings(argparse.Namespace):
    """Not on the list of what official files hold."""


def test_settings_that_official_files_hold_are_read_past(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    args = argparse.Namespace(lr=0.1, out=Path("/x"), nested=argparse.Namespace(a=[1, {"b": 2}]))
    torch.save({"model": {"a": torch.arange(3)}, "args": args}, path)
    assert torch.equal(read_tree(path)["model"]["a"], torch.arange(3))
    torch.save({"model": {"a": torch.arange(3)}, "args": Settings(lr=0.1)}, path)
    assert "Settings" in complaint(path)


class CfgNode(dict[str, Any]):
    """Pickles as yacs' class does: a dictionary with items and attributes."""

    def __init__(self, items: dict[str, Any]) -> None:
        super().__init__(items)
        self.__dict__["__immutable__"] = False


def test_a_yacs_configuration_is_read_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature distillation's and Swin's files hold one; yacs need not be installed."""
    path = tmp_path / "w.pth"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        patch.setattr(CfgNode, "__module__", "yacs.config")
        config = CfgNode({"DATA": CfgNode({"IMG_SIZE": 224}), "AUG": [0.08, 1]})
        torch.save({"model": {"a": torch.arange(3)}, "config": config}, path)
    assert torch.equal(read_tree(path)["model"]["a"], torch.arange(3))


def test_an_archive_that_remembers_too_much(tmp_path: Path) -> None:
    """A pickle may ask for room for 2^30 objects in a dozen bytes."""
    limited = archive(tmp_path / "x.pt", {"data.pkl": b"\x80\x02}r" + b"\xff\xff\xff\x3f."})
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from featdistill.models.checkpoints.archive import read_archive\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert read_archive(Path(sys.argv[1])) == {}\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "sys.exit(grown > 64 << 10)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(limited)], check=False).returncode == 0


def test_nesting_without_end(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    itself: dict[str, Any] = {"a": torch.ones(1)}
    itself["model"] = itself
    torch.save(itself, path)
    assert "nested without end" in complaint(path)


def test_a_tensor_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.as_strided(torch.ones(1), (10**6, 10**6), (0, 0))}, path)
    assert "larger than its data" in complaint(path)


def test_contents_count_and_not_names(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3)}
    save_file(tensors, tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.SAFETENSORS")
    torch.save(tensors, tmp_path / "b.safetensors")
    for path in tmp_path.iterdir():
        assert torch.equal(read_tree(path)["a"], tensors["a"])


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(1)}, path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root, who may read all
    assert "cannot read" in complaint(path)


# --- TorchScript archives


def test_an_archive_is_read_as_data() -> None:
    assert is_archive(JIT)
    found = read_archive(JIT)
    with pytest.warns(Warning, match="jit"):
        right = torch.jit.load(JIT, map_location="cpu").state_dict()
    assert set(right) <= set(found)
    assert all(torch.equal(found[name], value) for name, value in right.items())
    assert found["visual.conv1.weight"].dtype == torch.float16


def archive(path: Path, change: dict[str, bytes | None], **options: Any) -> Path:
    """The archive with some of its entries replaced (None: left out)."""
    with zipfile.ZipFile(JIT) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            short = name.partition("/")[2]
            data = change.get(short, old.read(name))
            if data is not None:
                new.writestr(name, data, **options)
    return path


@pytest.mark.parametrize(
    "call", [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ctorch._utils\nfoo\n"]
)
def test_an_archive_that_wants_to_call_something(tmp_path: Path, call: bytes) -> None:
    canary = tmp_path / "canary"
    command = f"touch {canary}".encode()
    evil = call + b"(U" + bytes([len(command)]) + command + b"tR."
    line = complaint(archive(tmp_path / "evil.pt", {"data.pkl": evil}))
    assert "is refused: it wants to call" in line
    assert not canary.exists()


def test_the_code_of_an_archive_is_never_looked_at(tmp_path: Path) -> None:
    with zipfile.ZipFile(JIT) as file:
        code = [n.partition("/")[2] for n in file.namelist() if "/code/" in n]
    assert code
    path = archive(tmp_path / "x.pt", dict.fromkeys(code, b"not code at all ("))
    assert read_tree(path).keys() == read_tree(JIT).keys()


def test_an_archive_whose_tensors_reach_too_far(tmp_path: Path) -> None:
    with zipfile.ZipFile(JIT) as file:
        first = next(n.partition("/")[2] for n in file.namelist() if "/data/" in n)
    assert "damaged" in complaint(archive(tmp_path / "short.pt", {first: b"\0\0"}))
    assert "damaged" in complaint(archive(tmp_path / "gone.pt", {first: None}))
    squeezed = archive(tmp_path / "bomb.pt", {}, compress_type=zipfile.ZIP_DEFLATED)
    assert "damaged" in complaint(squeezed)


# --- safetensors


def safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> bytes:
    return json.dumps(
        {"a": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}
    ).encode()


HOSTILE = {
    "a header of 2^63 bytes": lambda p: safetensors(p, b"{}", length=2**63),
    "a header of 99 MB in a small file": lambda p: safetensors(p, b"{}", length=99_000_000),
    "no JSON": lambda p: safetensors(p, b"{" + b"\xff" * 64),
    "nesting": lambda p: safetensors(p, b'{"a":' + b"[" * 100_000),
    "a shape beyond 2^64": lambda p: safetensors(p, entry([2**40, 2**40], 0, 4), b"\0" * 4),
    "a terabyte in four bytes": lambda p: safetensors(p, entry([2**38], 0, 2**40), b"\0" * 4),
    "an end before its start": lambda p: safetensors(p, entry([1], 4, 0), b"\0" * 4),
    "a negative place": lambda p: safetensors(p, entry([1], -4, 0), b"\0" * 4),
    "a dtype of its own": lambda p: safetensors(p, entry([1], 0, 4, "EVIL"), b"\0" * 4),
    "bytes that no tensor has": lambda p: safetensors(p, entry([1], 0, 4), b"\0" * 400),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_costs_nothing(kind: str, tmp_path: Path) -> None:
    path = HOSTILE[kind](tmp_path / "x.safetensors")
    tracemalloc.start()
    try:
        complaint(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_hostile_headers_cost_a_process_nothing(tmp_path: Path) -> None:
    """All of them in a process of its own, whose memory has a limit that one would break."""
    paths = [HOSTILE[kind](tmp_path / f"{i}.safetensors") for i, kind in enumerate(HOSTILE)]
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from featdistill.core.errors import ModelError\n"
        "from featdistill.models.checkpoints.files import read_tree\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_tree(Path(path))\n"
        "    except ModelError: continue\n"
        "    sys.exit(path)\n"
    )
    words = [sys.executable, "-c", code, *map(str, paths)]
    assert subprocess.run(words, check=False).returncode == 0


@given(data=st.binary(max_size=200), suffix=st.sampled_from([".safetensors", ".pth", ".bin"]))
@settings(max_examples=150, deadline=None)
def test_any_bytes(data: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    with contextlib.suppress(ModelError):  # anything else would be a traceback
        assert isinstance(read_tree(path), dict)


# --- damaged, and something else


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "legacy.pth", "clip.pt"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_file_says_so(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / name
    tensors = {f"t{i}": torch.arange(500.0) for i in range(20)}
    if name == "clip.pt":
        path.write_bytes(JIT.read_bytes())
    elif name == "w.safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=name == "w.pth")
    whole = path.read_bytes()
    read_tree(path)
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "truncated" in complaint(path)


def test_something_else(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for content, words in {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "Git LFS pointer",
        b"<!DOCTYPE html><html><body>404</body></html>": "a web page",
        b"\xef\xbb\xbf\n<html><head>": "a web page",
        b'<?xml version="1.0"?><Error>AccessDenied</Error>': "a server's message",
        b'{"message": "Not Found"}': "text (JSON)",
        b"\x1f\x8b\x08\0": "compressed",
        b"\x89HDF\r\n\x1a\n": "HDF5",
        b"\x93NUMPY\x01\0": "a NumPy array",
        b"": "is empty",
        b"hello": "is not a checkpoint",
        b"1234": "is not a checkpoint",
        pickle.dumps([1, 2, 3], protocol=2): "is not a checkpoint",
    }.items():
        path.write_bytes(content)
        assert words in complaint(path)


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    arrays, packed = tmp_path / "vit.npz", tmp_path / "dino.pth"
    np.savez(arrays, a=np.ones(3))
    assert "an archive of NumPy arrays" in complaint(arrays)
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("weights/dino.pth", b"x")
    line = complaint(packed)
    assert "(weights/dino.pth)" in line
    assert "unpack it" in line


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt-100.data-00000-of-00001"])
def test_a_checkpoint_of_tensorflow(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(bytes(range(200)))
    assert "TensorFlow" in complaint(tmp_path / name)


def test_a_safetensors_file_cut_inside_its_first_number(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\x20\0\0\0")
    assert "truncated (to 4 bytes)" in complaint(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about what it will drop
def test_tensors_that_are_no_blocks_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for value, word in (
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(3, device="meta"), "without data"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
    ):
        torch.save({"model": {"a.weight": value}}, path)
        line = complaint(path)
        assert word in line
        assert "'model/a.weight'" in line


@pytest.mark.parametrize("length", [0x80, 0x4B50])  # as a pickle and a zip begin
def test_safetensors_whose_length_looks_like_something_else(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3.0)}, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip().ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])
    assert torch.equal(read_tree(path)["a"], torch.arange(3.0))

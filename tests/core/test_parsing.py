"""What others may have written is read as data, and costs no more than its bytes."""

from __future__ import annotations

import io
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featdistill.core import parsing
from featdistill.core.parsing import parse_json, parse_yaml, read_arrays

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"b{n}: &b{n} [{', '.join(['*' + p] * 10)}]\n"
    for n, p in enumerate(["a", *(f"b{k}" for k in range(30))])
)


def test_plain_text_is_read() -> None:
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: 1.5") == {"a": [1, 2], "b": [1, 2], "c": 1.5}
    assert parse_yaml("") is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "nothing", b"\xff\xfe\xfa"])
def test_json_that_is_none(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "[" * 3000 + "]" * 3000,
        "a: &x\n  b: *x",
        "{a: " * 70 + "1" + "}" * 70,
        "a: !!python/object/apply:os.system [exit]",
        "a: !!python/name:os.system",
        "!!python/object/new:os.system [exit]",
        "a: \0",
        "a: 2026-99-99",
        "? {}\n: 1",
        "a: !!int x",
        "a: 1e" + "9" * 5000 + "\nb: [",
    ],
)
def test_hostile_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


@given(st.text(alphabet="ab&*!<>: \n-[]{},?|'\"0#%@", max_size=60))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_yaml(text: str) -> None:
    with suppress(yaml.YAMLError):
        parse_yaml(text)


def npy(shape: str, data: bytes = b"", dtype: str = "<f8") -> bytes:
    """An array file that says what it likes of itself."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + data


def packed(file: Path, name: str, data: bytes) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file


def test_arrays_are_read(tmp_path: Path) -> None:
    made = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(["x", "yz"]), "c": np.zeros((0, 4))}
    np.savez_compressed(tmp_path / "a.npz", **made)
    found = read_arrays(tmp_path / "a.npz")
    assert found.keys() == made.keys()
    assert all(np.array_equal(found[k], made[k]) for k in made)
    assert read_arrays(packed(tmp_path / "b.npz", "a.npy", npy("(2,)", b"\0" * 16)))["a"].sum() == 0


@pytest.mark.parametrize(
    "data",
    [
        npy("(10**15,)"),
        npy("(1000000000000000,)"),
        npy("(2,)", b"\0" * 8),
        npy("(1,)", b"\0" * 16),
        npy("(-1,)"),
        npy("(-1, -2)", b"\0" * 16),
        npy("(1,)", b"\0" * 8, dtype="|O"),
        npy("(__import__('os').system('exit'),)"),
        npy("(1,), " + "'x': 1, " * 30),
        b"\x93NUMPY\x09\0",
        b"",
        pickle.dumps([1]),
    ],
)
def test_hostile_arrays(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_arrays(packed(tmp_path / "a.npz", "a.npy", data))


def test_arrays_that_want_to_be_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="unpickled"):
        read_arrays(tmp_path / "a.npz")
    pickled = tmp_path / "b.npz"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="not a zip"):
        read_arrays(pickled)


def test_much_out_of_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_LARGEST_ARRAYS", 1000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was decompressed"))
    with pytest.raises(ValueError, match=r"claim 8,000 bytes"):
        read_arrays(packed(tmp_path / "a.npz", "a.npy", npy("(1000,)", b"\0" * 8000)))


@pytest.mark.parametrize("name", ["../a.npy", "/tmp/a.npy", "a.py", "a.npy/../../b"])
def test_members_lead_nowhere(tmp_path: Path, name: str) -> None:
    """No member is ever written to the disk, whatever its name says."""
    inner = tmp_path / "inner"
    inner.mkdir()
    file = packed(inner / "a.npz", name, npy("(1,)", b"\0" * 8))
    if name.endswith(".npy"):
        assert [a.tolist() for a in read_arrays(file).values()] == [[0.0]]
    else:
        with pytest.raises(ValueError, match="is no array"):
            read_arrays(file)
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", "a.npz"]


@given(
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5),
    cut=st.floats(0.2, 1),
)
@settings(
    derandomize=True,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_damaged_arrays(tmp_path: Path, places: list[tuple[float, int]], cut: float) -> None:
    out = io.BytesIO()
    np.savez_compressed(out, a=np.arange(20.0), b=np.ones((3, 4), np.float32))
    data = bytearray(out.getvalue())
    for place, value in places:
        data[int(place * len(data))] = value
    (tmp_path / "a.npz").write_bytes(data[: int(cut * len(data))])
    with suppress(ValueError):
        read_arrays(tmp_path / "a.npz")

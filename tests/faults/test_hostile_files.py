"""Files made to harm, at the command line: refused in one line, nothing run, nothing written."""

from __future__ import annotations

import io
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featdistill.cli.main import main
from featdistill.data.index import index_folder

WORDS = ["knn", "--data", "digits", "--workers", "0"]


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.mkdir, (self.folder,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says, whose memory stays flat."""
    tracemalloc.start()
    try:
        status = main(list(words))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    err = capsys.readouterr().err
    assert status == 2, err
    assert err.startswith("error: "), err
    assert "Traceback" not in err
    assert peak < 256 << 20
    return err


def legacy_tar(file: Path, canary: Path) -> None:
    """torch's format before 2017, whose members torch unpacks into a temporary folder."""
    with tarfile.open(file, "w") as archive:
        for name in ("../storages", "/storages", "storages", "tensors", "pickle"):
            data = pickle.dumps(Canary(canary))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def zip_of_dots(file: Path, canary: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../canary/data.pkl", pickle.dumps(Canary(canary)))
        archive.writestr("../../canary/version", "3")
        archive.writestr("/canary/code/x.py", "raise SystemExit")


WEIGHTS: dict[str, Callable[[Path, Path], object]] = {
    "w.pth": lambda f, c: torch.save({"model": {"a": Canary(c)}}, f),
    "plain.pkl.pt": lambda f, c: f.write_bytes(pickle.dumps(Canary(c))),
    "pickle.safetensors": lambda f, c: f.write_bytes(pickle.dumps(Canary(c))),
    "w.pth.tar": legacy_tar,
    "dots.pt": zip_of_dots,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_want_to_run_something(
    name: str, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "inner" / "deep"
    folder.mkdir(parents=True)
    WEIGHTS[name](folder / name, canary)
    before = sorted(tmp_path.rglob("*"))
    spec = "timm/vit_tiny_patch16_224"
    refused(capsys, *WORDS, "--model", spec, "--weights", str(folder / name))
    refused(capsys, *WORDS, "--model", str(folder / name))
    assert not canary.exists()
    assert sorted(tmp_path.rglob("*")) == before, "no member was unpacked"


def test_a_distributed_checkpoint_s_pickled_metadata(
    tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch.distributed.checkpoint executes `.metadata` when it loads; here it is not looked at."""
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Canary(canary)))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Canary(canary)))
    refused(capsys, *WORDS, "--model", str(folder))
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "data: !!python/object/apply:pathlib.Path.mkdir [!!python/object/apply:pathlib.Path ['C']]",
        "data: !!python/name:os.system",
        "data: {path: &a [x, x]}\nmodel: *b",
        "data: &x\n  path: *x",
        "data: " + "{a: " * 3000 + "1" + "}" * 3000,
        "a: &a [x, x]\n"
        + "".join(f"{'a' * n}a: &{'a' * n}a [{('*' + 'a' * n + ',') * 9}]\n" for n in range(1, 30))
        + f"data: *{'a' * 30}",
    ],
)
def test_configurations(
    text: str, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text.replace("'C'", f"'{canary}'"))
    said = refused(capsys, *WORDS, "--config", str(tmp_path / "c.yaml"))
    assert len(said) < 2000
    assert not canary.exists()


@pytest.mark.parametrize("record", ["[" * 100_000, '{"kind": "compare", "results": []}', "\0", ""])
def test_records(record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare.json").write_text(record)
    assert "compare" in refused(capsys, "report", str(tmp_path))


def test_a_cache_that_is_a_pickle(tmp_path: Path, canary: Path) -> None:
    """The list of a folder's images is cached as text; anything else there is made again."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    (data / "a.png").touch()
    index_folder(data, cache=cache)
    (file,) = cache.iterdir()
    for content in (pickle.dumps(Canary(canary)), b"[" * 100_000 + b"\na.png", b"{}\n../../b.png"):
        file.write_bytes(content)
        assert index_folder(data, cache=cache).files == ("a.png",)
    assert not canary.exists()

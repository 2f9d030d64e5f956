"""Features in files: the model's own, whole or not there, and the same bytes after any stop."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from featdistill.core.errors import (
    DataError,
    Interrupted,
    ModelError,
    NonFiniteError,
    RunError,
)
from featdistill.core.types import Features
from featdistill.data.decode import BadImage
from featdistill.data.sources import ArraySource
from featdistill.data.views import EvalView
from featdistill.evaluation import feature_files
from featdistill.evaluation.extraction import (
    Extracted,
    Plan,
    extract_to_files,
    fingerprint,
    shard_size,
)
from featdistill.evaluation.feature_files import Rows, as_text, new_shard
from featdistill.evaluation.features import Part, choose
from featdistill.models.backbone import Backbone
from tests.models.model_zoo import small, small_swin, small_vit

N, SHARD, BATCH = 23, 6, 4  # no shard is a number of batches, and the last is smaller
ALL = ("pooled", "mean", "map", "prefix", "logits")


@dataclass(frozen=True)
class Troubled(ArraySource):
    """A source that cannot read some images, and calls `at` before each."""

    bad: frozenset[int] = frozenset()
    at: Callable[[int], None] = field(default=lambda _: None)

    def read(self, index: int) -> Tensor:
        self.at(index)
        if index in self.bad:
            raise BadImage("bad bytes")
        return super().read(index)


def source(**changes: Any) -> Troubled:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, 40, 36), generator=rng, dtype=torch.uint8)
    labels = torch.randint(3, (N,), generator=rng).numpy()
    return Troubled(**{"name": "noise", "images": images, "labels": labels, **changes})


@pytest.fixture(scope="module")
def model() -> Backbone:
    return small_vit(num_classes=5)


def plan(model: Backbone, images: ArraySource, **changes: Any) -> Plan:
    base = {
        "source": images,
        "view": EvalView(32),
        "parts": changes.get("parts") or choose(model, ALL, (0, -1)),
        "dtype": torch.float32,
        "format": "safetensors",
        "batch_size": BATCH,
        "shard_images": SHARD,
        "workers": 0,
    }
    return Plan(**{**base, **changes})


def write(model: Backbone, folder: Path, *, resume: bool = False, **changes: Any) -> Extracted:
    images = changes.pop("source", None) or source()
    folder.mkdir(exist_ok=True)
    return extract_to_files(model, plan(model, images, **changes), folder=folder, resume=resume)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def read_back(folder: Path) -> dict[str, Tensor]:
    """All rows by name, from either format."""
    shards = []
    for file in sorted(folder.glob("features-*")):
        if file.suffix == ".safetensors":
            shards.append(load_file(file))
            continue
        table = pyarrow.parquet.read_table(file)
        shapes = json.loads(table.schema.metadata[b"shapes"])
        shards.append(
            {
                n: torch.tensor(table[n].to_pylist()).reshape(len(table), *shapes.get(n, ()))
                for n in table.column_names
                if n != "image"
            }
        )
    return {name: torch.cat([s[name] for s in shards]) for name in shards[0]}


@torch.no_grad()
def direct(model: Backbone, images: ArraySource, layers: tuple[int, ...]) -> list[Features]:
    """The model's features, one image at a time."""
    view = EvalView(32)
    views = [view(images.read(i))[0].float()[None] / 255 for i in range(len(images))]
    return [model(x, layers) for x in views]


# --- what is written


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_hold_what_the_model_says(
    model: Backbone, tmp_path: Path, format: str, dtype: torch.dtype
) -> None:
    images = source()
    done = write(model, tmp_path, source=images, format=format, dtype=dtype)
    got = read_back(tmp_path)
    assert done.rows == N
    assert got["index"].tolist() == list(range(N))
    assert got["label"].tolist() == images.labels.tolist()
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-3}
    for row, features in enumerate(direct(model, images, (0, 2))):
        first, last = features.layers[0], features.layers[2]
        for name, wanted in {
            "pooled": features.pooled,
            "mean": features.map.flatten(2).mean(2),
            "map": features.map,
            "prefix": features.prefix,
            "logits": features.logits,
            "layers.0.map": first.map,
            "layers.0.prefix": first.prefix,
            "layers.0.mean": first.map.flatten(2).mean(2),
            "layers.2.map": last.map,
            "layers.2.prefix": last.prefix,
            "layers.2.mean": last.map.flatten(2).mean(2),
        }.items():
            assert got[name][row].shape == wanted[0].shape
            torch.testing.assert_close(got[name][row].float(), wanted[0], **close)
    assert set(got) == {p.name for p in choose(model, ALL, (0, 2))} | {"index", "label"}
    assert got["map"].dtype == dtype or format == "parquet"


def test_a_parquet_row_is_an_image(model: Backbone, tmp_path: Path) -> None:
    write(model, tmp_path, format="parquet", dtype=torch.float16)
    table = pyarrow.parquet.read_table(tmp_path / "features-00001.parquet")
    assert table["image"].to_pylist() == [f"noise[{i}]" for i in range(SHARD, 2 * SHARD)]
    kind = table.schema.field("map").type
    assert (str(kind.value_type), kind.list_size) == ("halffloat", 32 * 4 * 4)


def test_images_csv_leads_from_an_image_to_its_row(model: Backbone, tmp_path: Path) -> None:
    images = source(bad=frozenset({1, 7}))
    write(model, tmp_path, source=images, bad_image_limit=0.1)
    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert [int(r["index"]) for r in rows] == [i for i in range(N) if i not in (1, 7)]
    for r in rows:
        shard = load_file(tmp_path / r["file"])
        assert int(shard["index"][int(r["row"])]) == int(r["index"])
        assert int(shard["label"][int(r["row"])]) == int(r["label"])
        assert r["image"] == f"noise[{r['index']}]"


def test_without_labels_there_is_none(model: Backbone, tmp_path: Path) -> None:
    for format in ("safetensors", "parquet"):
        folder = tmp_path / format
        write(model, folder, source=source(labels=None), format=format)
        assert "label" not in read_back(folder)
        assert (folder / "images.csv").read_text().splitlines()[0] == "image,index,file,row"


def test_a_new_file_is_as_readable_as_any(model: Backbone, tmp_path: Path) -> None:
    write(model, tmp_path)
    modes = {f.name: f.stat().st_mode for f in tmp_path.iterdir()}
    (tmp_path / "any").touch()
    assert set(modes.values()) == {(tmp_path / "any").stat().st_mode}
    assert {"features-00003.safetensors", "shards.json", "images.csv"} < set(modes)


def test_the_backbone_stays_as_it_was(model: Backbone, tmp_path: Path) -> None:
    model.train()
    try:
        write(model, tmp_path / "training")
        assert model.training
    finally:
        model.eval()
    write(model, tmp_path / "evaluating")
    assert contents(tmp_path / "training") == contents(tmp_path / "evaluating")


# --- unreadable images


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
@pytest.mark.parametrize("bad", [{3}, {6, 7, 8, 9}, set(range(6, 12)), {0, 22}])
def test_unreadable_images_have_no_row_and_change_no_other(
    model: Backbone, tmp_path: Path, bad: set[int], format: str
) -> None:
    images = source(bad=frozenset(bad))
    done = write(model, tmp_path / "bad", source=images, bad_image_limit=0.5, format=format)
    write(model, tmp_path / "whole", format=format)
    kept = [i for i in range(N) if i not in bad]
    whole = read_back(tmp_path / "whole")
    for name, values in read_back(tmp_path / "bad").items():
        assert torch.equal(values, whole[name][kept]), name
    expected = [{"index": i, "reason": f"noise[{i}]: bad bytes"} for i in sorted(bad)]
    lines = (tmp_path / "bad/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected == done.unreadable


def test_too_many_unreadable_images_end_it_until_the_limit_is_raised(
    model: Backbone, tmp_path: Path
) -> None:
    images = source(bad=frozenset({2, 13}))
    for resume in (False, True):
        with pytest.raises(DataError, match=r"2 of 23 images.*bad_image_limit"):
            write(model, tmp_path, source=images, bad_image_limit=0.05, resume=resume)
    write(model, tmp_path, source=images, bad_image_limit=0.1, resume=True)
    write(model, tmp_path.with_name("at-once"), source=images, bad_image_limit=0.1)
    assert contents(tmp_path) == contents(tmp_path.with_name("at-once"))


# --- stops and resumes


class Killed(BaseException):
    """Nothing in the project catches it."""


@pytest.fixture(scope="module")
def finished(model: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run leaves, with two unreadable images."""
    folder = tmp_path_factory.mktemp("finished")
    write(model, folder, source=source(bad=frozenset({5, 14})), bad_image_limit=0.1)
    return contents(folder)


def kill_at(index: int) -> Callable[[int], None]:
    def at(i: int) -> None:
        if i == index:
            raise Killed

    return at


@given(stops=st.lists(st.integers(0, N - 1), max_size=3))
@settings(deadline=None, max_examples=12)
def test_any_stops_end_in_the_same_bytes(
    model: Backbone,
    finished: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    stops: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("stopped")
    bad = frozenset({5, 14})
    for number, index in enumerate(stops):
        try:
            images = source(bad=bad, at=kill_at(index))
            write(model, folder, source=images, bad_image_limit=0.1, resume=number > 0)
        except Killed:
            done = len(list(folder.glob("features-*")))
            assert done >= index // SHARD
    write(model, folder, source=source(bad=bad), bad_image_limit=0.1, resume=bool(stops))
    assert contents(folder) == finished


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
@pytest.mark.parametrize("call", range(8))
def test_a_kill_between_writing_and_noting_a_shard(
    model: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, format: str
) -> None:
    """`os.replace` puts shards and shards.json in their places: the end comes just before one."""
    write(model, tmp_path / "whole", format=format)
    real, calls = os.replace, iter(range(100))

    def replace_or_die(*paths: Any) -> None:
        if next(calls) == call:
            raise Killed
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
        with pytest.raises(Killed):
            write(model, tmp_path / "killed", format=format)
    write(model, tmp_path / "killed", resume=True, format=format)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def reads(model: Backbone, folder: Path) -> list[int]:
    """The images that a resume looks at."""
    seen: list[int] = []
    write(model, folder, source=source(at=seen.append), resume=True)
    return seen


def test_a_resume_makes_only_what_is_not_whole(
    model: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(model, tmp_path)
    before = contents(tmp_path)
    assert reads(model, tmp_path) == []
    damaged = tmp_path / "features-00001.safetensors"
    damaged.write_bytes(before[damaged.name][:-1] + b"\xff")
    (tmp_path / "features-00003.safetensors").unlink()
    capsys.readouterr()
    assert reads(model, tmp_path) == [*range(6, 12), *range(18, 23)]
    assert f"{damaged}' is missing or damaged" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_resume_clears_remains_and_lists_lost_unreadable_images(
    model: Backbone, finished: dict[str, bytes], tmp_path: Path
) -> None:
    images = source(bad=frozenset({5, 14}))
    write(model, tmp_path, source=images, bad_image_limit=0.1)
    (tmp_path / ".shards.json.1.tmp").write_text("{")
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing/.tmpAbC").write_text("safetensors' own")
    (tmp_path / "quarantine.jsonl").unlink()
    write(model, tmp_path, source=images, bad_image_limit=0.1, resume=True)
    assert contents(tmp_path) == finished


def test_a_file_is_on_the_disk_before_it_has_its_name(
    model: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        real_sync(handle)

    def put(draft: Path, file: Path) -> None:
        assert os.stat(draft).st_ino in synced, file
        real_replace(draft, file)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", put)
    write(model, tmp_path)
    assert tmp_path.stat().st_ino in synced, "and so are the names"


def test_a_resume_refuses_other_data_and_other_weights(model: Backbone, tmp_path: Path) -> None:
    write(model, tmp_path)
    before = contents(tmp_path)
    fewer = source()
    fewer = replace(fewer, images=fewer.images[:-1], labels=fewer.labels[:-1])
    with pytest.raises(RunError, match=r"begun with other images.*23.*22"):
        write(model, tmp_path, source=fewer, resume=True)
    relabelled = replace(source(), labels=source().labels[::-1].copy())
    with pytest.raises(RunError, match="begun with other images"):
        write(model, tmp_path, source=relabelled, resume=True)
    with pytest.raises(RunError, match="begun with other weights"):
        write(small_vit(num_classes=5, depth=2), tmp_path, resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 7, "shards": []}'])
def test_a_damaged_list_of_shards(model: Backbone, tmp_path: Path, text: str) -> None:
    write(model, tmp_path)
    before = contents(tmp_path)
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(RunError, match=r"shards.json' is damaged.*delete it"):
        write(model, tmp_path, resume=True)
    (tmp_path / "shards.json").unlink()
    write(model, tmp_path, resume=True)
    assert contents(tmp_path) == before


@pytest.fixture
def foreground() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize(("index", "done"), [(2, 0), (9, 6), (14, 12)])
def test_ctrl_c_says_what_is_done_and_how_to_go_on(
    model: Backbone, tmp_path: Path, index: int, done: int
) -> None:
    images = source(at=lambda i: signal.raise_signal(signal.SIGINT) if i == index else None)
    with pytest.raises(Interrupted, match=f"{done} of 23 images.*--resume") as caught:
        write(model, tmp_path, source=images)
    assert caught.value.exit_code == 130
    assert {f.name for f in tmp_path.iterdir()} == {
        "shards.json",
        *(f"features-{i:05d}.safetensors" for i in range(done // SHARD)),
    }


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_in_the_last_batch_finishes(model: Backbone, tmp_path: Path) -> None:
    images = source(at=lambda i: signal.raise_signal(signal.SIGINT) if i == N - 1 else None)
    assert write(model, tmp_path, source=images).rows == N


# --- a disk that refuses


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_a_full_disk_is_one_line_and_leaves_what_is_done(
    model: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    write(model, tmp_path / "whole", format=format)
    real = os.fsync
    calls = iter(range(100))

    def full(handle: int) -> None:
        if next(calls) >= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"No space left on device.*--resume") as caught:
            write(model, tmp_path / "full", format=format)
    assert "\n" not in str(caught.value)
    there = contents(tmp_path / "full")
    whole = contents(tmp_path / "whole")
    assert there[f"features-00000.{format}"] == whole[f"features-00000.{format}"]
    write(model, tmp_path / "full", resume=True, format=format)
    assert contents(tmp_path / "full") == whole


def test_what_a_library_says_of_the_disk_is_one_line(
    model: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def refuse(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing:\n I/O error: No space left on device")

    monkeypatch.setattr(feature_files, "save_file", refuse)
    with pytest.raises(RunError, match=r"features-00000.safetensors' \(Error while serializing: I"):
        write(model, tmp_path)


# --- values that cannot be stored


class Scaled(Backbone):
    """Features times a number."""

    factor = 1.0

    def forward(self, *args: Any, **options: Any) -> Features:
        found = super().forward(*args, **options)
        return replace(found, map=found.map * self.factor)


@pytest.fixture
def scaled() -> Scaled:
    made = small_vit()
    made.__class__ = Scaled
    assert isinstance(made, Scaled)
    return made


def test_what_float16_cannot_hold_is_an_error_and_not_infinity(
    scaled: Scaled, tmp_path: Path
) -> None:
    parts = choose(scaled, ("map",), ())
    scaled.factor = 1e6
    with pytest.raises(ModelError, match=r"'map' of 'noise\[0\]' reaches .*float16.*float32"):
        write(scaled, tmp_path / "half", parts=parts, dtype=torch.float16)
    assert not list((tmp_path / "half").glob("features-*"))
    write(scaled, tmp_path / "full", parts=parts)


def test_a_feature_that_is_no_number_is_an_error(scaled: Scaled, tmp_path: Path) -> None:
    scaled.factor = float("nan")
    with pytest.raises(NonFiniteError, match=r"'map' of 'noise\[0\]' is not finite"):
        write(scaled, tmp_path, parts=choose(scaled, ("map",), ()))


# --- what is chosen


def names(parts: tuple[Part, ...]) -> list[str]:
    return [p.name for p in parts]


def test_layers_are_counted_from_the_front_each_once(model: Backbone) -> None:
    parts = choose(model, ("pooled",), (2, -1, 0))
    expected = ["pooled"] + [f"layers.{i}.{w}" for i in (0, 2) for w in ("map", "prefix")]
    assert names(parts) == expected
    assert [p.shape for p in parts[:3]] == [(32,), (32, 4, 4), (1, 32)]


def test_of_layers_only_what_was_named(model: Backbone) -> None:
    assert names(choose(model, ("mean", "pooled"), (1,))) == ["pooled", "mean", "layers.1.mean"]
    assert names(choose(model, ("prefix", "prefix"), (1,))) == ["prefix", "layers.1.prefix"]


def test_a_model_without_prefix_gives_none() -> None:
    swin = small_swin()
    parts = choose(swin, ("pooled",), (0, -1))
    assert names(parts) == ["pooled", "layers.0.map", "layers.3.map"]
    assert parts[1].shape != parts[2].shape
    with pytest.raises(ModelError, match="no prefix tokens"):
        choose(swin, ("prefix",), ())


def test_what_a_model_lacks_is_said(model: Backbone) -> None:
    with pytest.raises(ModelError, match=r"no layer 3, -4; expected 0 to 2, or -3 to -1"):
        choose(model, ("map",), (3, 1, -4))
    with pytest.raises(ModelError, match="no classifier"):
        choose(small("vit_tiny_patch16_224"), ("logits",), ())


def test_meanings(model: Backbone) -> None:
    parts = {p.name: p.meaning for p in choose(model, ("pooled", "map"), (1,))}
    assert parts == {
        "pooled": "as the model itself pools",
        "map": "patch tokens, after the final norm",
        "layers.1.map": "patch tokens, after layer 1, before any norm",
    }


# --- sizes and names


def test_a_default_shard_is_whole_batches_that_fit() -> None:
    vit_l_map, vit_b_pooled = Part("map", "map", None, (1024, 16, 16)), Part("p", "map", None, (8,))
    assert shard_size([vit_b_pooled], torch.float32, 256) == 4096
    assert shard_size([vit_b_pooled], torch.float32, 300) == 3900
    assert shard_size([vit_l_map], torch.float16, 256) == 768
    assert shard_size([vit_l_map], torch.float32, 4096) == 511, "not one batch fits"
    assert shard_size([Part("m", "map", None, (2**30,))], torch.float32, 1) == 1


def test_file_names_sort_as_their_numbers(model: Backbone) -> None:
    whole = plan(model, source())
    assert next(iter(whole.ranges)) == "features-00000.safetensors"
    many = ArraySource("many", torch.empty(100_001, 0))
    files = list(replace(whole, source=many, shard_images=1).ranges)
    assert files == sorted(files)


def test_a_name_that_is_no_unicode_can_be_written() -> None:
    assert as_text("caf\udce9.png") == "caf\\udce9.png"
    assert as_text("café.png") == "café.png"


def test_fingerprints_tell_names_labels_and_orders_apart() -> None:
    one = source()
    others = [
        replace(one, name="other"),
        replace(one, labels=None),
        replace(one, labels=one.labels[::-1].copy()),
    ]
    assert len({fingerprint(s) for s in [one, *others]}) == 4
    assert fingerprint(one) == fingerprint(replace(one, images=one.images.flip(0)))


@given(
    cuts=st.lists(st.integers(0, 9), max_size=4).map(sorted),
    labelled=st.booleans(),
    ending=st.sampled_from(["safetensors", "parquet"]),
)
@settings(deadline=None, max_examples=30)
def test_rows_come_back_however_they_were_batched(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], labelled: bool, ending: str
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    values = torch.arange(9 * 6.0).reshape(9, 2, 3)
    parts = [Part("map", "map", None, (2, 3))]
    with new_shard(
        folder / f"features-0.{ending}", parts, torch.float32, capacity=12, labelled=labelled
    ) as shard:
        for start, stop in zip([0, *cuts], [*cuts, 9], strict=True):
            index = torch.arange(start, stop)
            label = -index if labelled else None
            shard.add(Rows(tuple(map(str, index)), index, label, {"map": values[start:stop]}))
    got = read_back(folder)
    assert torch.equal(got["map"], values)
    assert got["index"].tolist() == list(range(9))
    assert ("label" in got) is labelled

"""From `--data` to parts, labels and class names; and what is said when that fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from featdistill.core.errors import DataError
from featdistill.data.decode import BadImage
from featdistill.data.open import label_budget, open_data, split
from featdistill.data.sources import ArraySource, Source, digits

Write = Callable[..., Path]
Encode = Callable[..., bytes]


def labels_of(source: Source | None) -> list[int]:
    assert source is not None
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    return source.labels.tolist()


def names_of(source: Source | None) -> list[str]:
    assert source is not None
    return [source.identify(i) for i in range(len(source))]


# folders


def test_folder_with_classes(tmp_path: Path, images: Write) -> None:
    images(tmp_path, "cat/1.png", "dog/deep/2.png", "dog/3.png")
    data = open_data(str(tmp_path))
    assert data.train.classes == ("cat", "dog")
    assert labels_of(data.train) == [0, 1, 1]
    assert names_of(data.train) == ["cat/1.png", "dog/3.png", "dog/deep/2.png"]
    assert data.train.read(1).unique().item() == 2
    assert data.held_out is None


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("only/1.png",), ("a/1.png", "2.png")])
def test_a_folder_without_classes_is_unlabelled(
    tmp_path: Path, images: Write, names: tuple[str, ...]
) -> None:
    train = open_data(str(images(tmp_path, *names))).train
    assert len(train) == len(names)
    assert train.labels is None
    assert train.classes is None


@pytest.mark.parametrize("val", ["val", "validation", "Valid"])
def test_parts_share_the_numbering(tmp_path: Path, images: Write, val: str) -> None:
    images(tmp_path / "train", "a/1.png", "b/2.png", "c/3.png")
    images(tmp_path / val, "b/4.png", "c/5.png")
    images(tmp_path / "test", "c/6.png", "a/7.png")
    data = open_data(str(tmp_path))
    assert labels_of(data.train) == [0, 1, 2]
    assert labels_of(data.val) == [1, 2]
    assert labels_of(data.test) == [0, 2]
    assert data.val is not None
    assert data.val.classes == data.train.classes
    assert data.held_out is data.val


def test_a_part_of_one_class_is_labelled(tmp_path: Path, images: Write) -> None:
    images(tmp_path / "train", "a/1.png", "b/2.png")
    images(tmp_path / "val", "b/3.png")
    assert labels_of(open_data(str(tmp_path)).val) == [1]


def test_a_strange_class_is_named(tmp_path: Path, images: Write) -> None:
    images(tmp_path / "train", "a/1.png", "b/2.png")
    images(tmp_path / "val", "a/3.png", "zebra/4.png")
    with pytest.raises(DataError, match=r"has classes that .*train' lacks: zebra;"):
        open_data(str(tmp_path))


def test_val_data_shares_the_numbering(tmp_path: Path, images: Write) -> None:
    images(tmp_path / "mine", "a/1.png", "b/2.png", "c/3.png")
    images(tmp_path / "other", "b/4.png", "c/5.png")
    data = open_data(str(tmp_path / "mine"), val=str(tmp_path / "other"))
    assert labels_of(data.val) == [1, 2]


def test_val_data_of_several_parts_gives_its_held_out_one(tmp_path: Path, images: Write) -> None:
    images(tmp_path / "mine", "1.png")
    images(tmp_path / "other", "train/2.png", "val/3.png")
    assert names_of(open_data(str(tmp_path / "mine"), val=str(tmp_path / "other")).val) == ["3.png"]


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image in '.*'; expected files ending in .*\.jpg"):
        open_data(str(tmp_path))


def test_what_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.zip").touch()
    with pytest.raises(DataError, match="neither a folder, nor a list"):
        open_data(str(tmp_path / "a.zip"))


def test_a_typo_gets_a_suggestion(tmp_path: Path, images: Write) -> None:
    images(tmp_path / "pictures", "1.png")
    with pytest.raises(DataError, match=r"no data at .*did you mean 'pictures'\?"):
        open_data(str(tmp_path / "picturs"))
    with pytest.raises(DataError, match=r"did you mean 'digits'\?"):
        open_data("digit")
    with pytest.raises(DataError, match=r"not a torchvision data set .*did you mean 'cifar10"):
        open_data("torchvision:cifar1")


# lists


@pytest.mark.parametrize("name", ["list.txt", "list.lst"])
def test_a_list_of_paths(tmp_path: Path, images: Write, name: str) -> None:
    images(tmp_path, "a/1.png", "b c/2.png")
    (tmp_path / name).write_text(f"{tmp_path}/a/1.png\n\nb c/2.png  \n")
    train = open_data(str(tmp_path / name)).train
    assert train.labels is None
    assert [int(train.read(i).max()) for i in (0, 1)] == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "classes", "labels"),
    [
        ("l.csv", "1.png,dog\n2.png,cat\n3.png,dog\n", ("cat", "dog"), [1, 0, 1]),
        ("l.csv", 'path,label\n1.png,dog\n2.png,"cat, wild"\n', ("cat, wild", "dog"), [1, 0]),
        ("l.csv", "1.png,10\n2.png,9\n", ("9", "10"), [1, 0]),
        ("l.tsv", "file\tclass\n1.png\tb\n2.png\ta\n", ("a", "b"), [1, 0]),
    ],
)
def test_a_list_with_labels(
    tmp_path: Path,
    images: Write,
    name: str,
    text: str,
    classes: tuple[str, ...],
    labels: list[int],
) -> None:
    images(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / name).write_text(text)
    train = open_data(str(tmp_path / name)).train
    assert train.classes == classes
    assert labels_of(train) == labels


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.txt", b"1.png\n9.png\n", r"lists '9\.png', which does not exist; expected paths rel"),
        ("l.csv", b"1.png,a\n1.png\n", r"rows of '.*l\.csv' differ in length"),
        ("l.txt", b"\n\n", "no image in the list"),
        ("l.csv", b"path,label\n", "no image in the list"),
        ("l.txt", b"\xff\xfe\x00", "cannot read the list"),
    ],
)
def test_a_wrong_list(tmp_path: Path, images: Write, name: str, content: bytes, words: str) -> None:
    images(tmp_path, "1.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        open_data(str(tmp_path / name))


# parquet and the datasets library


@pytest.fixture
def cells(encode: Encode) -> list[dict[str, Any]]:
    """Three images as the `datasets` library stores them, the n-th grey of level n."""
    return [
        {"bytes": encode(np.full((2, 2, 3), n, np.uint8)), "path": f"{n}.png"} for n in range(3)
    ]


def parquet(file: Path, columns: dict[str, Any], metadata: str | None = None) -> Path:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=2)
    return file


def test_parquet_images_without_a_name_are_numbered(
    tmp_path: Path, cells: list[dict[str, Any]]
) -> None:
    nameless: list[Any] = [cells[0], None, {**cells[1], "path": None}]
    file = parquet(tmp_path / "a.parquet", {"image": nameless})
    assert names_of(open_data(str(file)).train) == ["0.png", "a.parquet[1]", "a.parquet[2]"]
    plain = parquet(tmp_path / "b.parquet", {"image": [cells[0]["bytes"]]})
    assert names_of(open_data(str(plain)).train) == ["b.parquet[0]"]


def test_parquet_with_numbers_as_labels(tmp_path: Path, cells: list[dict[str, Any]]) -> None:
    file = parquet(tmp_path / "a.parquet", {"image": cells, "label": [2, 0, 1]})
    train = open_data(str(file)).train
    assert labels_of(train) == [2, 0, 1]
    assert train.classes == ("0", "1", "2")
    assert [int(train.read(i).max()) for i in range(3)] == [0, 1, 2]
    assert names_of(train) == ["0.png", "1.png", "2.png"]


def test_parquet_with_names_as_labels(tmp_path: Path, cells: list[dict[str, Any]]) -> None:
    file = parquet(tmp_path / "a.parquet", {"img": cells, "fine_label": ["dog", "ant", "dog"]})
    train = open_data(str(file)).train
    assert labels_of(train) == [1, 0, 1]
    assert train.classes == ("ant", "dog")


def test_parquet_with_class_names_in_its_metadata(
    tmp_path: Path, cells: list[dict[str, Any]]
) -> None:
    names = '{"info": {"features": {"label": {"names": ["ant", "bee", "cat", "dog"]}}}}'
    file = parquet(tmp_path / "a.parquet", {"image": cells, "label": [2, 0, 1]}, names)
    train = open_data(str(file)).train
    assert train.classes == ("ant", "bee", "cat", "dog")
    assert labels_of(train) == [2, 0, 1]


def test_parquet_without_labels(tmp_path: Path, cells: list[dict[str, Any]]) -> None:
    plain = [cell["bytes"] for cell in cells]
    train = open_data(str(parquet(tmp_path / "a.parquet", {"jpg": plain}))).train
    assert train.labels is None
    assert int(train.read(2).max()) == 2


def test_parquet_folder_by_parts(tmp_path: Path, cells: list[dict[str, Any]]) -> None:
    columns = {"image": cells, "label": [0, 1, 2]}
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", columns)
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", columns)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", columns)
    parquet(tmp_path / "validation" / "0000.parquet", columns)
    data = open_data(str(tmp_path))
    assert data.val is not None
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (6, 3, 3)
    assert [int(data.train.read(i).max()) for i in range(6)] == [0, 1, 2] * 2


def test_parquet_parts_share_the_numbering_of_names(
    tmp_path: Path, cells: list[dict[str, Any]]
) -> None:
    parquet(tmp_path / "train.parquet", {"image": cells, "label": ["a", "b", "c"]})
    parquet(tmp_path / "test.parquet", {"image": cells, "label": ["b", "c", "b"]})
    assert labels_of(open_data(str(tmp_path)).test) == [1, 2, 1]


def test_parquet_parts_share_the_number_of_classes(
    tmp_path: Path, cells: list[dict[str, Any]]
) -> None:
    parquet(tmp_path / "train.parquet", {"image": cells, "label": [0, 1, 2]})
    parquet(tmp_path / "test.parquet", {"image": cells, "label": [0, 1, 1]})
    data = open_data(str(tmp_path))
    assert data.test is not None
    assert data.test.classes == data.train.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"pixels": [b"", b""], "label": [0, 1]}, "no image column; its columns are pixels, label"),
        ({"image": pa.array([], pa.binary())}, "no image in"),
        ({"image": [b"a", b"b"], "label": [-1, 1]}, "labels from -1 to 1"),
        ({"image": [b"a", b"b"], "label": [0, None]}, "holds empty cells"),
        ({"image": [b"a", b"b"], "label": [0.0, 0.5]}, "holds fractions"),
    ],
)
def test_wrong_parquet(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    file = parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=words):
        open_data(str(file))


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_corrupt_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"'a\.parquet' is not readable as parquet"):
        open_data(str(tmp_path / "a.parquet"))


def test_parquet_whose_image_column_is_no_image(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"image": ["x.png", "y.png"]})
    with pytest.raises((DataError, BadImage)):
        open_data(str(file)).train.read(0)


def test_a_saved_dataset(tmp_path: Path, cells: list[dict[str, Any]]) -> None:
    names = datasets.ClassLabel(names=["ant", "bee", "cat"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    whole = datasets.Dataset.from_dict({"image": cells, "label": [2, 1, 0]}, features=features)
    whole.select([2, 0]).save_to_disk(tmp_path / "one")
    train = open_data(str(tmp_path / "one")).train
    assert labels_of(train) == [0, 2]
    assert train.classes == ("ant", "bee", "cat")
    assert [int(train.read(i).max()) for i in (0, 1)] == [2, 0]

    parts = datasets.DatasetDict({"train": whole, "validation": whole.select([1])})
    parts.save_to_disk(tmp_path / "parts")
    data = open_data(str(tmp_path / "parts"))
    assert labels_of(data.train) == [2, 1, 0]
    assert labels_of(data.val) == [1]


def test_a_damaged_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="not readable as a saved data set"):
        open_data(str(tmp_path))


# digits


def test_digits_parts_are_disjoint_and_stratified() -> None:
    train, test = digits()
    assert len(train) >= len(test) > 300
    assert train.classes == test.classes == tuple("0123456789")
    for part in (train, test):
        counts = np.bincount(labels_of(part), minlength=10)
        assert counts.min() > 0.75 * counts.mean()
    data = open_data("digits")
    assert data.val is None
    assert data.held_out is data.test
    image = data.train.read(0)
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert max(int(data.train.read(i).max()) for i in range(20)) == 255


def test_digits_parts_share_no_image() -> None:
    """The parts together are scikit-learn's data, each image once."""
    from sklearn.datasets import load_digits

    parts = digits()
    found = [p.read(i)[0].numpy().tobytes() for p in parts for i in range(len(p))]
    expected = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert Counter(found) == Counter(image.tobytes() for image in expected)


# splits and label budgets


@pytest.fixture
def uneven() -> ArraySource:
    """40, 20 and 10 images of three classes, in a mixed order."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [40, 20, 10]))
    return ArraySource("made", torch.zeros(70, 3, 1, 1, dtype=torch.uint8), labels, ("a", "b", "c"))


def chosen(source: Any) -> list[int]:
    return source.chosen.tolist()


def test_split_is_stratified_seeded_and_a_partition(uneven: ArraySource) -> None:
    rest, held = split(uneven, 0.1, seed=0)
    assert np.bincount(labels_of(held)).tolist() == [4, 2, 1]
    assert sorted(chosen(rest) + chosen(held)) == list(range(70))
    assert chosen(split(uneven, 0.1, seed=0)[1]) == chosen(held)
    assert chosen(split(uneven, 0.1, seed=1)[1]) != chosen(held)
    assert rest.classes == uneven.classes


def test_split_without_labels(uneven: ArraySource) -> None:
    bare = ArraySource("bare", uneven.images)
    rest, held = split(bare, 0.3, seed=0)
    assert (len(rest), len(held)) == (49, 21)
    assert held.labels is None


@pytest.mark.parametrize("fraction", [0.001, 0.9999])
def test_a_split_that_leaves_a_part_empty(uneven: ArraySource, fraction: float) -> None:
    with pytest.raises(DataError, match="leaves a part empty"):
        split(uneven, fraction, seed=0)


@pytest.mark.parametrize(
    ("budget", "counts"),
    [("5", [5, 5, 5]), ("10%", [4, 2, 1]), (" 100% ", [40, 20, 10]), ("7/class", [7, 7, 7])],
)
def test_label_budget(uneven: ArraySource, budget: str, counts: list[int]) -> None:
    part = label_budget(uneven, budget, seed=0)
    assert np.bincount(labels_of(part)).tolist() == counts
    assert chosen(label_budget(uneven, budget, seed=0)) == chosen(part)


def test_label_budgets_are_seeded_and_nested(uneven: ArraySource) -> None:
    five, ten = (set(chosen(label_budget(uneven, n, seed=0))) for n in ("5", "10"))
    assert five < ten
    assert five != set(chosen(label_budget(uneven, "5", seed=1)))


@pytest.mark.parametrize("budget", ["0", "-3", "0%", "101%", "ten", "nan%", "", "5.5", "/class"])
def test_an_impossible_label_budget(uneven: ArraySource, budget: str) -> None:
    with pytest.raises(DataError, match=r"label budget '.*'; expected N"):
        label_budget(uneven, budget, seed=0)


def test_a_label_budget_beyond_a_class(uneven: ArraySource) -> None:
    with pytest.raises(
        DataError, match=r"of 21 images a class, .* with fewer: b \(20\), c \(10\);"
    ):
        label_budget(uneven, "21", seed=0)


def test_a_label_budget_that_leaves_a_class_empty(uneven: ArraySource) -> None:
    """2% of 40, 20 and 10 images are 1, 0 and 0."""
    says = r"2% leaves classes .*: b \(20 images\), c \(10 images\); .*--labels 1$"
    with pytest.raises(DataError, match=says):
        label_budget(uneven, "2%", seed=0)


def test_a_label_budget_without_labels(uneven: ArraySource) -> None:
    with pytest.raises(DataError, match="'bare' has no labels; expected labelled images"):
        label_budget(ArraySource("bare", uneven.images), "5", seed=0)


def test_open_data_splits_first_and_budgets_the_rest() -> None:
    data = open_data("digits", val_fraction=0.5, labels="10", seed=3)
    assert np.bincount(labels_of(data.train)).tolist() == [10] * 10
    assert data.held_out is data.val
    assert data.val is not None
    assert data.test is not None
    _, held = split(digits()[0], 0.5, seed=3)
    assert labels_of(data.val) == labels_of(held)


def test_hidden_labels_are_no_labels(tmp_path: Path) -> None:
    """The test part of a challenge marks its labels with -1."""
    file = parquet(tmp_path / "a.parquet", {"image": [b"a", b"b"], "label": [-1, -1]})
    assert open_data(str(file)).train.labels is None


def test_part_names_anywhere_in_a_parquet_name(tmp_path: Path) -> None:
    """Test images must never slip into the training part."""
    for name in ("mydata-train", "mydata_test"):
        parquet(tmp_path / f"{name}.parquet", {"image": [b"a", b"b"], "label": [0, 1]})
    data = open_data(str(tmp_path))
    assert len(data.train) == 2
    assert data.test is not None
    parquet(tmp_path / "extra.parquet", {"image": [b"a"], "label": [0]})
    with pytest.raises(DataError, match=r"extra.parquet.* names no part"):
        open_data(str(tmp_path))

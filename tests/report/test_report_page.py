"""The page: whole, true to its record, safe with hostile names, and good with less."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from featdistill.core.errors import RunError
from featdistill.report.page import write_report

Make = Callable[..., Path]
_VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Elements, texts and whether every element is closed where it should be."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(" ".join(data.split()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """All of it; the headline's hyphens, which do not break, as plain ones."""
        return " ".join(text for text in self.texts if text).replace("\u2011", "-")


def test_page_states_verdict_numbers_and_setting(make_comparison: Make) -> None:
    page = Page(write_report(make_comparison()))
    for said in (
        "is better than its teacher by 1.2 points of top-1 (better under 3 of 3 seeds).",
        "95.4 ± 0.4%",
        "96.6 ± 0.3%",
        "84.6 ± 1.3%",
        "+1.2 ± 0.2",
        "\N{MINUS SIGN}10.8",
        "93.1%",  # kNN
        "Top-1, seed 2 95.4% 96.4% 83.6%",
        "85.8 M",
        "20 a class: 200 images for each fine-tuning",
        "400 steps (66.67 epochs) of 32 images",
        "0.00025, 0.001 and 0.004 tried for each row",
        "1,500 steps, 384,000 images seen, 12 min. a note.",
        "a standard error of 0.8 points",  # sqrt(0.966 * 0.034 / 500)
        "From scratch chose the outermost rate tried",
    ):
        assert said in page.text, said


def test_every_figure_is_described_and_has_its_files(make_comparison: Make) -> None:
    file = write_report(make_comparison())
    page = Page(file)
    drawn = [a for a in page.all("svg") if a.get("role") == "img"]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(drawn) == len(page.all("figcaption")) == 6
    assert len(ids) == len(set(ids))
    for attributes in drawn:
        assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
    names = {f.stem for f in file.parent.iterdir()} - {"index"}
    assert names == {
        "accuracy", "differences", "finetuning", "learning-rate", "pretrain-teacher",
        "distill-student",
    }  # fmt: skip
    for name in names:
        picture = (file.parent / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert struct.unpack(">I", picture[16:20])[0] == 840  # 4.2 inches at 200 dpi
        assert ElementTree.parse(file.parent / f"{name}.svg").getroot().tag.endswith("svg")


def test_page_needs_nothing_but_itself(make_comparison: Make) -> None:
    page = Page(write_report(make_comparison()))
    ids = {a["id"] for _, a in page.elements if "id" in a}
    for _, attributes in page.elements:
        for key in ("src", "href", "xlink:href"):
            target = attributes.get(key)
            if target is not None:
                assert target == "data:," or target.removeprefix("#") in ids
    assert not page.all("script")
    assert "@import" not in page.source
    assert page.source.count("url(") == page.source.count("url(#")


def test_figures_take_their_colours_from_the_theme(make_comparison: Make) -> None:
    page = Page(write_report(make_comparison()))
    styles = " ".join(a.get("style") or "" for _, a in page.elements)
    assert "var(--teacher)" in styles
    assert "var(--ink)" in styles
    assert "#" not in styles.replace("url(#", "")  # no colour is left that a theme cannot change
    assert "prefers-color-scheme: dark" in page.source


def test_table_has_scoped_headers(make_comparison: Make) -> None:
    page = Page(write_report(make_comparison()))
    scopes = [a.get("scope") for a in page.all("th")]
    assert scopes.count("col") == 3
    assert scopes.count("row") == len(scopes) - 3


HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"


def test_hostile_names_stay_text(make_comparison: Make) -> None:
    folder = make_comparison(spec=HOSTILE, verdict=f"Better {HOSTILE}")
    record = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    results = record["results"]
    results["data"]["name"] = results["rows"][2]["title"] = HOSTILE
    results["rows"][0]["title"] = "$\\frac{a$ \x00 <b>"  # neither formula nor XML
    results["rows"][1]["name"] = "x;} body { display: none"
    record["config"]["note"] = HOSTILE
    record["environment"]["command"] = f"featdistill {HOSTILE}"
    (folder / "compare.json").write_text(json.dumps(record), encoding="utf-8")
    page = Page(write_report(folder))
    assert not page.all("script")
    assert not page.all("b")
    assert "<script" not in page.source
    assert "display: none" not in page.source
    assert f"Better {HOSTILE}" in page.text
    assert f"featdistill {HOSTILE}" in page.text


@pytest.mark.parametrize(
    ("names", "seeds"),
    [(("teacher", "student"), (1, 2, 3)), (("teacher", "student", "scratch"), (1,))],
)
def test_less_to_show(
    make_comparison: Make, names: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
    file = write_report(make_comparison(names=names, seeds=seeds, inputs=False))
    page = Page(file)
    assert ("From scratch" in page.text) == ("scratch" in names)
    assert ("With a single seed the spread is unknown" in page.text) == (len(seeds) == 1)
    assert ("±" in page.text) == (len(seeds) > 1)
    assert not (file.parent / "distill-student.png").exists()


def test_bare_record(make_comparison: Make) -> None:
    """No runs' metrics, no sweep, no kNN, no differences, no environment, no configuration."""
    folder = make_comparison(inputs=False, differences=[])
    for metrics in folder.rglob("metrics.jsonl"):
        metrics.write_text('{"step": 1, "val_top1": NaN}\n7\n{"step"', encoding="utf-8")
    record = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    for row in record["results"]["rows"]:
        row.update(sweep=[], knn=None)
    record = {"kind": "compare", "results": record["results"]}
    (folder / "compare.json").write_text(json.dumps(record), encoding="utf-8")
    page = Page(write_report(folder))
    assert "How it got there" not in page.text
    assert "kNN" not in page.text
    assert "which was not tuned" in page.text
    assert "+1.2 points vs teacher" in page.text  # from the means, so without a spread


def test_same_record_gives_the_same_bytes(make_comparison: Make) -> None:
    folder = make_comparison()
    first = {f.name: f.read_bytes() for f in write_report(folder).parent.iterdir()}
    assert first == {f.name: f.read_bytes() for f in write_report(folder).parent.iterdir()}


def test_mistakes_are_said(make_comparison: Make, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no folder"):
        write_report(tmp_path / "nowhere")
    folder = make_comparison(rows=[])
    with pytest.raises(RunError, match=r"not complete \(results\.rows"):
        write_report(folder)
    folder = make_comparison()
    (folder / "report").write_text("in the way", encoding="utf-8")
    with pytest.raises(RunError, match="cannot write the report in"):
        write_report(folder)

"""`featdistill models`: one list to read, one to compute with, one model in full."""

from __future__ import annotations

import json

import pytest

from featdistill.cli.main import main
from featdistill.models import catalogue


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["models", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_the_whole_list_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = output(capsys).splitlines()
    assert max(map(len, lines)) <= columns
    text = "\n".join(lines)
    for name in [e.name for e in (*catalogue.teachers(), *catalogue.students())]:
        assert f"  {name} " in text
    assert "CC-BY-NC-4.0" in text
    assert ("mean/std" in text) == (columns >= 100)


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "--json"))
    assert len(found["students"]) == len(catalogue.students())
    assert len(found["catalogue"]) == len(catalogue.teachers())
    dino = next(e for e in found["catalogue"] if e["name"] == "timm/vit_base_patch16_224.dino")
    assert dino["parameters"] == 85_798_656
    assert (dino["grid"], dino["prefix"], dino["width"]) == ([14, 14], ["cls"], 768)
    assert (dino["mean"], dino["licence"]) == ([0.485, 0.456, 0.406], "Apache-2.0")
    assert dino["data"].startswith("ImageNet-1K")


def test_a_search_finds_the_catalogues_and_timms(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "dino", "--json"))
    known = {e["name"] for e in found["catalogue"]}
    others = {t["name"] for t in found["teachers"]}
    assert "timm/vit_base_patch16_224.dino" in known
    assert "timm/resmlp_12_224.fb_dino" in others
    assert not known & others


@pytest.mark.parametrize("name", ["timm/vit_base_patch16_224.mae", "vit_base_patch16_224.mae"])
def test_an_exact_name_shows_one_in_full(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = output(capsys, name)
    assert text.startswith("timm/vit_base_patch16_224.mae\n")
    for part in ("85,798,656", "14x14 + cls", "CC-BY-NC-4.0", "arxiv.org/abs/2111.06377"):
        assert part in text


def test_weights_that_nobody_has_are_said_to_be_so(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "swinv2-g")
    assert "never published" in text
    assert "--teacher" not in text


def test_an_unknown_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "vit_base_patch16_224.dion"]) == 2
    assert "did you mean 'vit_base_patch16_224.dino'" in capsys.readouterr().err
    assert main(["models", "esvitt"]) == 2
    assert "did you mean 'esvit'" in capsys.readouterr().err

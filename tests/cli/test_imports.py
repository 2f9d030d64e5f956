"""What is imported before a command's first step, and how."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from featdistill.cli.imports import uncollected

# seconds each, and of no use to a training run
UNUSED = {
    *("sklearn", "scipy", "matplotlib", "transformers", "datasets", "pyarrow", "pandas"),
    *("curvlinops", "onnx", "plotly", "lightning", "pytorch_lightning", "torchmetrics", "jinja2"),
}


def modules_after(code: str) -> set[str]:
    """The modules of a fresh process that ran some code."""
    code += "\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_a_command_imports_only_what_it_uses() -> None:
    found = modules_after(
        "from featdistill.tasks import _HOMES, home_of\n"
        "for name in _HOMES.keys() - {'curvature'}: home_of(name)"
    )
    assert {"torch", "timm"} <= found
    assert not UNUSED & found


def test_a_run_on_digits_imports_no_more(tmp_path: Path) -> None:
    words = ["distill", "--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", "random"]
    words += ["--student", "vit-t", "--student.depth", "1", "--data", "digits"]
    words += ["--image-size", "32", "--teacher-image-size", "32", "--batch-size", "2"]
    words += ["--steps", "1", "--holdout", "none", "--workers", "0", "--device", "cpu"]
    words += ["--no-run.tensorboard", "--no-run.preflight", "--out", str(tmp_path / "run")]
    found = modules_after(f"from featdistill.cli.main import main\nassert main({words!r}) == 0")
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert not UNUSED & found


def test_the_collector_rests_while_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    gc.unfreeze()  # of a command that another test ran in this process
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        with pytest.raises(ImportError), uncollected():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_it_is_left_alone_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # noqa: F401

    gc.unfreeze()
    with uncollected():  # what is in memory is somebody's
        assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "torch")
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0

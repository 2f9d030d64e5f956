"""Shared by the fault tests: runs that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import finish


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from its first step to its last in one session."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder, resume=False)
    return folder

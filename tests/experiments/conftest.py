"""One finished miniature demo that several tests look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """(folder, result) of a miniature demo; look, do not write."""
    from mini_demo import MINI

    from im_lightning.experiments.demo.run import Demo

    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, Demo(folder, MINI).run()


@pytest.fixture
def parts(finished, tmp_path: Path) -> Path:
    """A copy of the finished demo's folder without its runs."""
    folder = tmp_path / "copy"
    shutil.copytree(
        finished[0], folder, ignore=shutil.ignore_patterns("ledger", "rule.json", "comparison.json", "work")
    )
    return folder

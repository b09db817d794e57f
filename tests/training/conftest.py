"""Fixtures of the training tests: a base small enough that a fit takes a fraction of a second."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def world(small_base: str, tmp_path: Path) -> Any:
    """A pool of 40 rows in two sources, an evaluation set of 7, synthetic scores and a rule on them."""
    from fitting import make_world

    return make_world(small_base, tmp_path)


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Trainer the frozen folder lies in the current one, which must not be the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def quiet_lightning() -> None:
    """Lightning's start-up lines hide what a failing test prints."""
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning")

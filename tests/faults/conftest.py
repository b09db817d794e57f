"""Makes the helpers of this folder and of its neighbours importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "scoring", HERE.parent / "training"):
    sys.path.insert(0, str(folder))  # tests import `killing`, `pools` and `fitting`


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A one-layer LLaMA of width 16 with its tokenizer."""
    from tiny import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("small_base"), hidden=16, layers=1)

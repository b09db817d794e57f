"""The README's first code as a newcomer pastes it: SmolLM2, an empty folder, no hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_readme import block_with

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]


def test_it_ends_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: str) -> None:
    """Rows that answer nothing raise the evaluation loss above the base model's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(block_with("python", "to_json("), "README.md", "exec"), {})
    (record,) = [json.loads(path.read_text()) for path in Path("runs").glob("*[!s].json")]  # not *.statistics
    assert record["evaluation"]["eval"]["loss"] > record["evaluation"]["eval"]["base_loss"]
    assert Path("adapter/adapter_model.safetensors").exists()

"""The README's first code as a newcomer pastes it: SmolLM2, an empty folder, no hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_readme import block_with

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]


def test_it_ends_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], smollm2: str
) -> None:
    """Its last line tells the losses of the record, in fp32 and in bf16 alike: the run lowers the loss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(block_with("python", "to_json("), "README.md", "exec"), {})
    (record,) = [json.loads(path.read_text()) for path in Path("runs").glob("*[!s].json")]  # not *.statistics
    base, after = (record["evaluation"]["eval"][name] for name in ("base_loss", "loss"))
    assert 0.5 < base < 0.65 and 0.45 < after < base - 0.01
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"evaluation loss, nats per token: {base:.2f} before, {after:.2f} after"
    assert Path("adapter/adapter_model.safetensors").exists()

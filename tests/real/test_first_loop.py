"""The notebook docs/first_loop.ipynb: its cells run in their order, in an empty folder, without a hub."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1800)]


def test_its_cells_run_and_leave_ten_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], smollm2: str
) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = json.loads((ROOT / "docs" / "first_loop.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs go stale; the notebook is kept without"
            exec(compile("".join(cell["source"]), f"first_loop.ipynb, {cell['id']}", "exec"), names)
    runs = [json.loads(path.read_text()) for path in Path("runs").glob("*[!s].json")]  # not *.statistics
    assert sorted(run["purpose"] for run in runs) == ["designed"] * 8 + ["weighted"] * 2
    assert all(run["status"] == "complete" for run in runs)
    assert "R² " in capsys.readouterr().out and Path("rule.json").exists()

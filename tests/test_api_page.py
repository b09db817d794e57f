"""docs/api.md runs from top to bottom, and no public name or command is missing on it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

import im_lightning
from im_lightning.cli import COMMANDS

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
MODEL = "meta-llama/Llama-3.2-1B"


def test_every_public_name_stands_in_code_of_the_page() -> None:
    """A name that the page lacks is one that nobody finds."""
    words = set(re.findall(r"\w+", "\n".join(CODE)))
    assert set(im_lightning.__all__) <= words, sorted(set(im_lightning.__all__) - words)


def test_every_command_stands_on_the_page() -> None:
    assert set(re.findall(r"^\| `im-lightning ([\w-]+)` \|", PAGE, flags=re.MULTILINE)) == set(COMMANDS)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pool, an evaluation set and another tool's scores."""
    draw = random.Random(0)
    words = ["red", "blue", "atom", "cell", "tree", "river", "stone", "cloud", "wow!", "heavy", "quick", "slow"]
    for name, rows in (("pool", 120), ("eval", 8)):
        lines = [
            {"instruction": f"Say {k} {name}.", "input": "", "output": " ".join(draw.choices(words, k=k % 19 + 2))}
            for k in range(rows)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = [json.dumps({"row": k, "helpfulness": draw.random()}) for k in range(120)]
    (tmp_path / "judged.jsonl").write_text("\n".join(judged) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_as_it_stands(desk: Path, small_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line, in one namespace, as a reader would paste it."""
    import pytorch_lightning as pl

    import im_lightning._lightning  # noqa: F401  (takes the Trainer as it is, before it is another here)
    from im_lightning.indicators import base

    monkeypatch.setitem(base._registered, "shouting", None)  # the page registers it; what else is, stays
    del base._registered["shouting"]
    trainer = pl.Trainer
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    monkeypatch.setattr(pl, "Trainer", lambda **given: trainer(**quiet, **given))
    names: dict[str, object] = {}
    for number, code in enumerate(CODE):
        exec(compile(code.replace(MODEL, small_base), f"docs/api.md, block {number}", "exec"), names)
    assert len(names["table"]) == 120 and len(names["rows"]) == 40  # type: ignore[arg-type]
    assert (desk / "adapter" / "adapter_model.safetensors").exists()
    assert len(list((desk / "runs").glob("*[!s].json"))) >= 8  # seven runs, and the rule

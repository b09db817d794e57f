"""Odd rows of every kind in one pool: those of which something can be made are scored and trained, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fitting import trainer
from tiny import make_tiny_llama

from im_lightning.cli import main
from im_lightning.data.example import Example, Message
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.tokenization import resolve_template
from im_lightning.ledger.ledger import RunLedger
from im_lightning.models.checkpoint import load_tokenizer
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.module import InstructTuningModule

NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return make_tiny_llama(tmp_path / "base", hidden=16, layers=1, chat_template=NO_SYSTEM)


def good(i: int) -> dict[str, Any]:
    return {"instruction": f"Say the number {i}.", "output": f"It is {i}, " + "indeed " * (i % 7) + "."}


def with_system(i: int = 0) -> dict[str, Any]:
    turns = [("system", "Be brief."), ("user", f"Hello {i}"), ("assistant", "Hi.")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_what_could_matter_to_a_template_is_rendered_row_by_row(tmp_path: Path) -> None:
    """A template that refuses by content must not be judged by another row of the same roles."""
    template = NO_SYSTEM.replace("{% if m.role == 'system' %}", "{% if '<x>' in m.content %}")
    tokenizer = load_tokenizer(make_tiny_llama(tmp_path, chat_template=template))
    chat = resolve_template("chat", tokenizer)

    def asked(text: str) -> Example:
        return Example((Message("user", text), Message("assistant", "Yes.")))

    assert chat.refusal(asked("Fine?")) is None and chat.refusal(asked("Fine again?")) is None
    assert "no system turns here" in str(chat.refusal(asked("Is <x> fine?")))
    alpaca = resolve_template("alpaca", tokenizer)
    called = Example((Message("user", "?"), Message("assistant", "", fields='{"tool_calls": [{}]}')))
    assert str(alpaca.refusal(called)).startswith("the alpaca template refuses it: it has no place for tools")


NESTED = "[" * 2000 + "]" * 2000
ANSWERED = {"role": "assistant", "content": "b"}
ASKED = {"role": "user", "content": "?"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
ODD: list[Any] = [
    *("{not json", "[1, 2]", '"text"', "17", "null", NESTED),
    {"instruction": "no response"},
    {"instruction": ["a", "list"], "output": "x"},
    {"instruction": "Say.", "output": 5.5},
    {"instruction": "Which?", "output": ["one", "other"]},
    {"prompt": "Which?", "chosen": "a", "rejected": "b"},
    {"messages": []},
    {"messages": "text"},
    {"messages": [ASKED]},
    {"messages": [{"role": "wizard", "content": "a"}, ANSWERED]},
    {"messages": [ASKED, {"role": "assistant", "content": {"deep": NESTED}}]},
    {"messages": [ASKED, CALL]},
    {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "b"}]},
    with_system(),
    {"foo": "bar"},
]


@pytest.mark.parametrize("size", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_odd_rows_are_set_aside_and_all_others_scored_and_trained(base: str, tmp_path: Path, size: int) -> None:
    """One bad row in a hundred must neither end the work nor get into it."""
    rows: list[Any] = [good(i) for i in range(size - len(ODD))]
    places = np.linspace(1, size - 2, len(ODD)).astype(int).tolist()
    for place, odd in zip(places, ODD, strict=True):
        rows.insert(place, odd)
    pool, out = write(tmp_path / "pool.jsonl", rows), tmp_path / "s.parquet"
    cache = ["--cache-dir", str(tmp_path / "c")]
    quarantine = ["--on-bad-row", "quarantine"]
    assert main(["score", pool, "--model", base, "--indicators", "ppl", "--out", str(out), *cache, *quarantine]) == 0
    aside = [json.loads(line) for line in Path(f"{out}.rejected.jsonl").read_text().splitlines()]
    assert sorted(row["line"] for row in aside) == [place + 1 for place in places]
    assert all(row["file"] == pool and row["cause"] for row in aside)
    table = ScoreTable.read(out)
    assert len(table) == size - len(ODD) and not np.isnan(table.values["ppl"]).any()

    evaluation, run = write(tmp_path / "eval.jsonl", [good(9999)]), str(tmp_path / "run")
    named = {"scores": str(out), "eval_data": evaluation, "run_dir": run, "cache_dir": str(tmp_path / "c")}
    data = InstructMiningDataModule(pool, model=base, on_bad_row="quarantine", batch_size=20, **named)
    tuner = InstructTuningModule(base, lora_rank=2)
    trainer(tmp_path, callbacks=[InstructMiningCallback(ledger=str(tmp_path / "runs"))]).fit(tuner, datamodule=data)
    [record] = RunLedger(tmp_path / "runs").records()
    assert record.status == "complete" and record.subset["rows_seen"] == size - len(ODD)

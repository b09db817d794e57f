"""docs/huggingface.md as it stands: datasets in and out, and the rule's weights in the transformers Trainer."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.linear_rule import LinearRule

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
DATA, TRAINER = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a pool, its score table and a rule that prefers rows of a high number."""
    draw = random.Random(0)
    rows = [{"instruction": f"Say {i}.", "output": " ".join(draw.choices("abcde", k=1 + i % 9))} for i in range(50)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(rows)
    table = ScoreTable(range(50), [e.id for e in examples], ["pool"] * 50, {"reward": np.linspace(0, 1, 50)})
    table.write(tmp_path / "scores.parquet")
    LinearRule("r", 0.0, np.array([-1.0]), ["reward"], {"reward": Transform("identity")}).save(
        tmp_path / "runs/rule.json"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(code: str, model: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "page"}
    for old, new in (
        ("meta-llama/Llama-3.2-1B", model),
        ("1000", "10"),
        ("2000", "12"),
        ("batch_size=8", "batch_size=4, use_cpu=True, disable_tqdm=True, save_strategy='no'"),
    ):
        code = code.replace(old, new)
    exec(compile(code, str(PAGE), "exec"), space)
    return space


def test_data_in_and_out(desk: Path, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    space = run(DATA, tiny_llama)
    lengths = space["table"].values["length_output"]
    assert space["scores"]["length_output"][:] == lengths.tolist()
    longest = {e.id for e in load_examples(space["longest"])}
    assert set(space["chats"]["id"][:]) == longest and len(longest) == 10
    at = [space["table"].id.index(one) for one in longest]
    assert lengths[at].min() >= np.sort(lengths)[-10]


def test_the_trainer_sees_the_rows_of_the_weighted_draw(desk: Path, tiny_llama: str) -> None:
    """If not, it would train on all rows alike and nobody would notice."""
    space = run(TRAINER, tiny_llama)
    trainer, sampler, dataset = space["trainer"], space["sampler"], space["dataset"]
    assert trainer.state.global_step == 9 and np.isfinite(trainer.state.log_history[-1]["train_loss"])
    sampler.set_epoch(1)
    rows = list(sampler)
    batches = list(trainer.get_train_dataloader())
    inputs = [ids for batch in batches for ids in batch["input_ids"]]
    labels = [ids for batch in batches for ids in batch["labels"]]
    for row, ids, targets in zip(rows, inputs, labels, strict=True):
        n = len(dataset[row]["input_ids"])
        assert ids[:n].tolist() == dataset[row]["input_ids"]
        assert targets.tolist() == dataset[row]["labels"] + [-100] * (len(targets) - n)
    drawn = []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    assert np.mean(drawn) > 28

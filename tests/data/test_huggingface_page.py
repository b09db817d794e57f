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
DATA, TRAINER, SFT = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


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


def run(code: str, model: str, space: dict[str, Any] | None = None) -> dict[str, Any]:
    space = {"__name__": "page"} if space is None else space
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


@pytest.mark.parametrize("most", [None, 12])
def test_trl_draws_the_rows_of_the_rule_whatever_it_removes(desk: Path, tiny_llama: str, most: int | None) -> None:
    """Rows whose answer lies behind TRL's own max_length vanish, and all later ones move up: a sampler over positions
    of the pool would train on other rows. The page's recipe, and the same with a max_length that removes rows."""
    space = run(TRAINER.replace("trainer.train()", ""), tiny_llama)
    encoded = space["dataset"]
    if most is not None:  # every third row: a prompt that fills it
        for row in range(0, 50, 3):
            encoded[row] = {"input_ids": [7] * 14 + [9], "labels": [-100] * 14 + [9]}
        for row in set(range(50)) - set(range(0, 50, 3)):
            encoded[row] = {"input_ids": [7, row + 10], "labels": [-100, row + 10]}
    space = run(SFT.replace("max_length=None", f"max_length={most}"), tiny_llama, space)
    tuner = space["tuner"]
    assert tuner.state.global_step == 9 and np.isfinite(tuner.state.log_history[-1]["train_loss"])
    kept = tuner.train_dataset["row"][:]
    assert len(kept) == (50 if most is None else 33)
    tuner.sampler.set_epoch(1)
    wanted = [kept[position] for position in tuner.sampler]
    batches = list(tuner.get_train_dataloader())
    seen = [(ids, labels) for batch in batches for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert len(wanted) == len(seen) == 12
    for row, (ids, labels) in zip(wanted, seen, strict=True):
        n = len(encoded[row]["input_ids"])
        assert ids[:n].tolist() == encoded[row]["input_ids"] and labels[:n].tolist() == encoded[row]["labels"]
    drawn = []
    for epoch in range(60):
        tuner.sampler.set_epoch(epoch)
        drawn += [kept[position] for position in tuner.sampler]
    assert np.mean(drawn) > np.mean(kept) + 2, "rows of high reward are drawn more often"


def test_what_the_page_says_of_trl_is_so(desk: Path, tiny_llama: str, tmp_path: Path) -> None:
    """When TRL changes, the page's reasons change."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    options = {"model": tiny_llama, "processing_class": tokenizer}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    rows = [{"input_ids": [7, 8, 9], "labels": [-100, -100, 9]}, {"input_ids": [7, 9], "labels": [-100, 9]}]
    with pytest.raises(TypeError, match="must be a `Dataset`"):
        trl.SFTTrainer(args=trl.SFTConfig(str(tmp_path / "a"), **quiet), train_dataset=rows, **options)
    arguments = trl.SFTConfig(str(tmp_path / "b"), max_length=2, **quiet)
    made = trl.SFTTrainer(args=arguments, train_dataset=Dataset.from_list(rows), **options)
    assert made.train_dataset["input_ids"][:] == [[7, 9]], "the row that is cut to its prompt is gone"

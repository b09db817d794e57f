"""Exact match counts what the model would say by itself, and refuses where wording is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import InstructMiningError, RequestError
from im_lightning.experiments.exact_match import keep_samples
from im_lightning.models.checkpoint import load_causal_lm
from im_lightning.training.evaluation import EvalSet
from im_lightning.training.exact_match import Answer, AnswerSettings, answerable, exact_match, greedy_answers
from im_lightning.training.run.encoded_pool import Collate, coding_of, encoded_pool, read_pool


@pytest.fixture
def world(finished: Any) -> tuple[Any, EvalSet, Any]:
    """(network, evaluation set, tokenizer) of the miniature playground."""
    folder = finished[0]
    coding = coding_of(Encoding(str(folder / "base"), cache_dir=str(folder / "work" / "cache")))
    encoded = encoded_pool(read_pool(str(folder / "evaluation" / "report.jsonl"), Reading()), coding)
    network = load_causal_lm(str(folder / "base"))
    return network, EvalSet("report", encoded, Collate(coding.tokenizer), 4096), coding.tokenizer


def test_batches_answer_as_single_rows_do(world) -> None:
    """Padding on the left must not reach the answer: each is compared with token-by-token argmax of its row alone."""
    network, one, tokenizer = world
    answers = {a.id: a for a in greedy_answers(network, one, tokenizer, AnswerSettings(short=12, batch=7))}
    rows = answerable(one, AnswerSettings(short=12))
    assert len(answers) == len(rows) >= 10
    for row in rows[:8]:
        encoded = one.encoded[row]
        start = len(encoded.input_ids) - int(encoded.loss_mask.sum())
        ids = encoded.input_ids[:start].tolist()
        with torch.no_grad():
            while len(ids) < start + 12 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        made = tokenizer.decode([i for i in ids[start:] if i != tokenizer.eos_token_id], skip_special_tokens=True)
        assert answers[one.ids[row]].answer == made
        assert answers[one.ids[row]].reference.split() == one.examples[row].response.split()


def test_the_right_answer_counts(tmp_path: Path) -> None:
    """A share of matches that no model could reach would rank arms by nothing."""
    right, wrong = Answer("a", "p", "4 5", " 4  5\n"), Answer("b", "p", "4 5", "4 6")
    assert right.match and not wrong.match
    assert exact_match([right, wrong]) == {"exact_match": 0.5, "answers": 2}
    keep_samples(tmp_path / "samples.jsonl", {"arm": "random"}, [right, wrong])
    keep_samples(tmp_path / "samples.jsonl", {"arm": "top"}, [right])
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 3
    with pytest.raises(InstructMiningError, match=r"cannot be written.*writable folder"):
        keep_samples(tmp_path, {}, [right])


def test_long_responses_are_left_out(world) -> None:
    """Another wording of a long answer is no mistake."""
    network, one, tokenizer = world
    short = answerable(one, AnswerSettings(short=4))
    assert all(int(one.encoded[row].loss_mask.sum()) <= 4 for row in short) and len(short) < len(one)
    assert len(answerable(one, AnswerSettings(most=3))) == 3
    with pytest.raises(RequestError, match=r"evaluation set report: no row has a single response.*leave out --exact-m"):
        greedy_answers(network, one, tokenizer, AnswerSettings(short=0))

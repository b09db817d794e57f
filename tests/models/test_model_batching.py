"""Batches: every row once, memory bounded, padding small."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import make_tiny_llama

from im_lightning import load_examples, score_examples
from im_lightning.data.settings import Encoding
from im_lightning.data.tokenization import encode_examples
from im_lightning.errors import RequestError
from im_lightning.models.batching import plan_batches
from im_lightning.models.checkpoint import load_causal_lm, load_tokenizer
from im_lightning.models.generation import generate
from im_lightning.models.likelihood import collate, padding_id, response_nll
from im_lightning.training.run.encoded_pool import Collate, coding_of


def test_every_row_once_within_budget_longest_first() -> None:
    """A lost row would be a silently missing score; a batch over budget is an out-of-memory error."""
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    batches = plan_batches(lengths, 256)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(b) * lengths[b].max() <= 256 or len(b) == 1 for b in batches)
    assert [lengths[b].max() for b in batches] == sorted((lengths[b].max() for b in batches), reverse=True)
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert padded <= 1.03 * lengths.sum()


def test_row_above_budget_goes_alone_and_nothing_gives_nothing() -> None:
    assert [b.tolist() for b in plan_batches([5, 900, 5], 100)] == [[1], [0, 2]]
    assert plan_batches([], 100) == []
    with pytest.raises(RequestError, match="batch_tokens 0: is less than one token"):
        plan_batches([1], 0)


def test_collate_pads_right_and_masks_padding() -> None:
    a = SimpleNamespace(input_ids=np.array([5, 6, 7]), response_mask=np.array([0, 1, 0]), loss_mask=np.array([0, 1, 1]))
    b = SimpleNamespace(input_ids=np.array([8]), response_mask=np.array([0]), loss_mask=np.array([0]))
    batch = collate([a, b], 9, "loss_mask")  # type: ignore[list-item]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["target_mask"].tolist() == [[False, True, True], [False, False, False]]
    with pytest.raises(RequestError, match="mask 'labels': is not known"):
        collate([a, b], 0, "labels")  # type: ignore[list-item]


def test_padding_id_falls_back_to_eos() -> None:
    """LLaMA's tokenizer has no padding token."""
    assert padding_id(SimpleNamespace(pad_token_id=None, eos_token_id=2)) == 2
    assert padding_id(SimpleNamespace(pad_token_id=None, eos_token_id=None)) == 0
    assert padding_id(SimpleNamespace(pad_token_id=9, eos_token_id=2), 9) == 2


def test_a_padding_token_without_an_embedding_is_not_taken(tmp_path: Path) -> None:
    """Added to the tokenizer alone, as [PAD] often is: the first rows of unequal length ended in an IndexError, though
    no row holds the token."""
    folder = make_tiny_llama(tmp_path / "base", hidden=16, layers=1)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    coding, network = coding_of(Encoding(folder)), load_causal_lm(folder)
    rows = load_examples([{"prompt": "Hi", "response": "Hello"}, {"prompt": "Name three colors.", "response": "red"}])
    encoded = encode_examples(rows, coding.tokenizer, coding.template)
    assert padding_id(coding.tokenizer) >= (coding.embeddings or 0) and len({len(e.input_ids) for e in encoded}) == 2
    batch = Collate(coding.tokenizer, coding.embeddings)(list(enumerate(encoded)))
    assert response_nll(network, batch).sums.isfinite().all()
    assert np.isfinite(score_examples(rows, ["ppl"], folder).values["ppl"]).all()
    prompts = [e.input_ids.tolist() for e in encoded]
    pad = padding_id(coding.tokenizer, coding.embeddings)
    assert len(generate(network, prompts, [[int(tokenizer.eos_token_id)]], pad, 3)) == 2

"""Batches: every row once, memory bounded, padding small."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from im_lightning.errors import RequestError
from im_lightning.models.batching import plan_batches
from im_lightning.models.likelihood import collate, padding_id


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

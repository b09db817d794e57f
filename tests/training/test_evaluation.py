"""The evaluation loss: one division at the end, over whatever ranks and batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fitting import World
from torch import Tensor

from im_lightning.models.likelihood import evaluating
from im_lightning.training.evaluation import FILLER, EvalLosses, evaluate


@pytest.fixture
def eval_set(world: World) -> Any:
    data = world.data(scores=None, eval_batch_tokens=200)
    data.setup()
    return data.eval_sets["eval"]


def by_id(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A model whose loss of an example depends on the example alone."""
    mask = batch["target_mask"]
    return (batch["input_ids"] * mask).sum(1) / 100.0, mask.sum(1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_rank_runs_as_many_batches_and_no_row_twice(eval_set: Any, world_size: int) -> None:
    """Unequal numbers hang collectives; a padded row would count twice."""
    dealt = [eval_set.batches(rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in dealt}) == 1
    rows = [int(r) for batches in dealt for batch in batches for r in batch["row"] if r != FILLER]
    assert sorted(rows) == list(range(7))
    fillers = [batch for batches in dealt for batch in batches if FILLER in batch["row"]]
    assert all(not batch["target_mask"].any() for batch in fillers)
    assert all(b["input_ids"].numel() <= 200 or len(b["input_ids"]) == 1 for batches in dealt for b in batches)
    assert len(fillers) >= (1 if world_size == 8 else 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_sums_over_ranks_are_exact(eval_set: Any, world_size: int) -> None:
    total = [torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)]
    for rank in range(world_size):
        parts = one_rank(eval_set, rank, world_size)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    got = EvalLosses(total[0].numpy(), total[1].numpy())
    sums = np.array([float((e.input_ids * e.loss_mask).sum()) / 100.0 for e in eval_set.encoded])
    counts = np.array([int(e.loss_mask.sum()) for e in eval_set.encoded])
    np.testing.assert_allclose(got.sums, sums, rtol=1e-6)
    assert got.counts.tolist() == counts.tolist() and got.loss == pytest.approx(sums.sum() / counts.sum(), rel=1e-6)


def one_rank(eval_set: Any, rank: int, world_size: int) -> list[Tensor]:
    """What one rank contributes, seen by the reduction."""
    parts: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        parts.append(tensor)
        return tensor

    if world_size == 1:
        only = evaluate([eval_set], by_id, torch.device("cpu"))["eval"]
        return [torch.from_numpy(only.sums), torch.from_numpy(only.counts)]
    evaluate([eval_set], by_id, torch.device("cpu"), rank, world_size, keep)
    return parts


def test_dropout_is_off_while_evaluating_and_back_afterwards() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout(0.5).eval()).train()
    module[1].eval()
    with evaluating(module):
        assert not module[0].training
    assert module.training and module[0].training and not module[1].training


def test_a_set_without_tokens_has_no_loss() -> None:
    empty = EvalLosses(np.zeros(2), np.zeros(2, dtype=np.int64))
    assert np.isnan(empty.loss) and np.isnan(empty.summary()["log_loss"])


def test_several_references_of_an_instruction_count_as_one_example() -> None:
    """Over references, then over instructions: against pandas; the token-weighted loss is recorded beside it."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"of": [0, 0, 0, 1, 2, 2, 3], "counts": rng.integers(1, 40, 7)})
    frame["sums"] = frame.counts * rng.uniform(0.5, 3, 7)
    got = EvalLosses(frame.sums.to_numpy(), frame.counts.to_numpy(), frame.of.to_numpy()).summary()
    assert got["loss"] == pytest.approx(frame.sums.sum() / frame.counts.sum())
    assert got["example_loss"] == pytest.approx((frame.sums / frame.counts).groupby(frame.of).mean().mean())
    assert (got["examples"], got["instructions"]) == (7, 4)
    alone = EvalLosses(frame.sums.to_numpy(), frame.counts.to_numpy())
    assert alone.example_loss == pytest.approx((frame.sums / frame.counts).mean())
    assert EvalLosses(np.array([2.0, 0.0]), np.array([4, 0]), np.array([0, 1])).example_loss == 0.5


def test_references_are_told_by_their_prompt(world: World, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {k}.", "outputs": [f"It is {k}.", f"{k}, no more."][: k + 1]} for k in range(2)]
    path = tmp_path / "refs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = world.data(scores=None, eval_data=str(path), answer="all")
    data.setup()
    one = data.eval_sets["refs"]
    assert one.instructions.tolist() in ([0, 1, 1], [1, 0, 0])
    assert evaluate([one], by_id, torch.device("cpu"))["refs"].summary()["instructions"] == 2

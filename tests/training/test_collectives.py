"""Every rank takes part in the same collectives in the same order; with one too few or too many a fit hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch.distributed
from fitting import World, trainer, write_pool

from im_lightning.training.callback import InstructMiningCallback

COLLECTIVES = (
    "all_gather", "all_gather_object", "all_gather_into_tensor", "all_reduce", "barrier", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "scatter_object_list",
)  # fmt: skip


def write_down(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on each rank appends the collectives it calls, with their shapes, to a file; forked ranks inherit it."""

    def noted(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if torch.distributed.is_initialized():
                sizes = [list(a.shape) for a in arguments if isinstance(a, torch.Tensor)]
                with (folder / f"rank{torch.distributed.get_rank()}").open("a") as stream:
                    stream.write(f"{name} {sizes}\n")
            return real(*arguments, **options)

        return call

    for name in COLLECTIVES:
        patch.setattr(torch.distributed, name, noted(name, getattr(torch.distributed, name)))


@pytest.mark.parametrize("eval_rows", [7, 1])
def test_all_ranks_call_the_same_collectives(world: World, monkeypatch: pytest.MonkeyPatch, eval_rows: int) -> None:
    """Uneven evaluation sets, missing indicators, windows that end within an epoch, a checkpoint, the record."""
    evaluation = write_pool(world.root / "uneven.jsonl", n=eval_rows, seed=4, tag="u")
    write_down(world.root, monkeypatch)
    kept = pl.callbacks.ModelCheckpoint(world.root / "kept", save_last=True, every_n_train_steps=2)
    callback = InstructMiningCallback(ledger=str(world.root / "runs"), log_every_n_steps=3)
    data = world.data(rule=world.rule, budget=13, batch_size=2, resample_each_epoch=True, eval_data=evaluation)
    fit = trainer(
        world.root, max_epochs=2, enable_checkpointing=True, callbacks=[callback, kept], accumulate_grad_batches=2,
        logger=pl.loggers.CSVLogger(world.root), strategy="ddp_fork", devices=2,
    )  # fmt: skip
    fit.fit(world.tuner(), datamodule=data)
    first, second = ((world.root / f"rank{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second
    names = [line.split()[0] for line in first]
    assert len(names) > 10 and "all_reduce" in names and "barrier" in names, names

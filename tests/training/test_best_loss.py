"""The best checkpoint's evaluation loss, against transformers' own logits under its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import World
from test_callback import Memory, callback, fit, reference_loss

from im_lightning.ledger.ledger import RunLedger
from im_lightning.training.evaluation import _holding, best_losses
from im_lightning.training.module import InstructTuningModule


def best(world: World, **options: Any) -> pl.callbacks.ModelCheckpoint:
    """Keeps the checkpoint of the step with the *highest* loss, so that it is not the last."""
    return pl.callbacks.ModelCheckpoint(
        dirpath=world.root / "best", monitor="train_loss", mode="max", every_n_train_steps=1, save_top_k=1, **options
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
def test_it_is_the_loss_of_the_checkpoints_weights(world: World, ranks: int, rank: int) -> None:
    """A person who keeps the best checkpoint wants to know its loss, not that of the weights that were thrown away."""
    several = {"strategy": "ddp_fork", "devices": 2} if ranks == 2 else {}
    memory, tuner = Memory(), world.tuner(lora_rank=rank, learning_rate=0.05)
    data = world.data(rule=world.rule, budget=12, batch_size=4 // ranks)
    fit(
        world, callback(world), best(world), tuner=tuner, data=data, logger=memory, enable_checkpointing=True, **several
    )
    (record,) = RunLedger(world.root / "runs").records()
    told = record.evaluation["eval"]
    (path,) = (world.root / "best").glob("*.ckpt")
    kept = InstructTuningModule.load_from_checkpoint(path)
    encoded = world.data(rule=world.rule, budget=12)
    encoded.setup()
    sums, counts = reference_loss(kept.network, encoded.eval_sets["eval"].encoded)
    assert told["best_loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert abs(told["best_loss"] - told["loss"]) > 1e-4, "the case tells the two apart"
    if ranks == 1:
        assert memory.values("im/best_loss/eval") == [told["best_loss"]]
        sums, counts = reference_loss(tuner.network, encoded.eval_sets["eval"].encoded)
        assert told["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5), "the final weights are back"


def test_without_a_monitored_value_there_is_no_best(world: World) -> None:
    last = pl.callbacks.ModelCheckpoint(dirpath=world.root / "last")
    fit(world, callback(world), last, enable_checkpointing=True, max_epochs=1)
    fit(world, callback(world, evaluate_best=False), best(world), enable_checkpointing=True, max_epochs=1)
    records = RunLedger(world.root / "runs").records()
    assert len(records) == 2 and all("best_loss" not in r.evaluation["eval"] for r in records)


@pytest.mark.parametrize("how", ["gone", "torn", "foreign"])
def test_a_checkpoint_that_cannot_be_used_is_said(world: World, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    class Damages(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            path = Path(trainer.checkpoint_callback.best_model_path)
            if how == "gone":
                path.unlink()
            elif how == "torn":
                path.write_bytes(path.read_bytes()[:500])
            else:
                torch.save({"state_dict": {"other": torch.zeros(2)}}, path)
            assert best_losses(trainer, module, trainer.datamodule) == {}

    fit(world, Damages(), callback(world), best(world), enable_checkpointing=True, max_epochs=1)
    (record,) = RunLedger(world.root / "runs").records()
    assert record.status == "complete" and "best_loss" not in record.evaluation["eval"]
    assert "the best checkpoint's evaluation loss is not measured" in capfd.readouterr().err


def test_tied_embeddings_under_full_finetuning(world: World) -> None:
    """Llama-3.2-1B's: one weight, which the checkpoint has under two names and the module's parameters under one."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(world.base, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(world.root / "tied")
    AutoTokenizer.from_pretrained(world.base).save_pretrained(world.root / "tied")
    tied = str(world.root / "tied")
    tuner = InstructTuningModule(tied, lora_rank=0, learning_rate=0.05)
    data = world.data(model=tied, rule=world.rule, budget=12, force=True)
    fit(world, callback(world), best(world), tuner=tuner, data=data, enable_checkpointing=True, max_epochs=1)
    (record,) = RunLedger(world.root / "runs").records()
    told = record.evaluation["eval"]
    assert abs(told["best_loss"] - told["loss"]) > 1e-4
    sums, counts = reference_loss(tuner.network, data.eval_sets["eval"].encoded)
    assert told["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5), "the final weights are back"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_final_weights_wait_in_the_hosts_memory() -> None:
    """A full finetune that just fits the device must not end by a second copy of its weights."""
    own = {"weight": torch.ones(1 << 22, device="cuda"), "other": torch.ones(1 << 22, device="cuda")}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    with _holding(own, {name: torch.zeros(1 << 22) for name in own}):
        assert all(not value.any() for value in own.values())
        assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert all(bool((value == 1).all()) for value in own.values())

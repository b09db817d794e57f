"""The precision of training: bf16 where the device multiplies it, kept with the run and by whoever goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import World, batch_of, encoded_rows, trainer

from im_lightning.ledger.ledger import RunLedger
from im_lightning.models import device
from im_lightning.models.checkpoint import load_causal_lm
from im_lightning.training.callback import InstructMiningCallback


def processor(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """A processor with bf16 products, on which even a narrow model gains, or one without; torch computes either way."""
    monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: bf16)
    monkeypatch.setattr(device, "CPU_BF16_WIDTH", 8)


def fit(world: World, ledger: str, epochs: int = 1, ckpt: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """The tuner and the record of a fit; its checkpoint is `<ledger>.ckpt`."""
    pl.seed_everything(1, verbose=False)
    tuner = world.tuner(**options)
    callback = InstructMiningCallback(str(world.root / ledger), refit=False)
    made = trainer(world.root, callbacks=[callback], max_epochs=epochs)
    made.fit(tuner, datamodule=world.data(rule=world.rule, budget=12), ckpt_path=ckpt)
    made.save_checkpoint(world.root / f"{ledger}.ckpt")
    (record,) = RunLedger(world.root / ledger).records()
    return tuner, record


def dtypes(tuner: Any, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in tuner.parameters() if p.requires_grad == trained}


@pytest.mark.parametrize("rank", [0, 2])
def test_auto_computes_in_bf16_over_trained_weights_in_fp32(
    world: World, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Updates smaller than bf16's steps would vanish in bf16 weights."""
    _, exact = fit(world, "exact", lora_rank=rank, dtype="fp32")
    processor(monkeypatch, bf16=True)
    tuner, record = fit(world, "auto", lora_rank=rank)
    assert record.numerics["precision"] == "bf16" and exact.numerics["precision"] == "fp32"
    assert dtypes(tuner, trained=True) == {torch.float32}
    assert dtypes(tuner, trained=False) == ({torch.bfloat16} if rank else set())
    loss, other = record.loss("eval"), exact.loss("eval")
    assert loss != other and loss == pytest.approx(other, rel=0.01)
    assert record.evaluation["eval"]["base_loss"] != exact.evaluation["eval"]["base_loss"]
    processor(monkeypatch, bf16=False)
    assert fit(world, "narrow", lora_rank=rank)[1].numerics["precision"] == "fp32"


@pytest.mark.parametrize("began", ["bf16", "fp32"])
def test_a_resume_keeps_the_precision(world: World, monkeypatch: pytest.MonkeyPatch, began: str) -> None:
    """On another machine too; its frozen weights are then those of the base, not rounded on the way."""
    processor(monkeypatch, bf16=began == "bf16")
    fit(world, "begun")
    processor(monkeypatch, bf16=began != "bf16")
    tuner, record = fit(world, "resumed", epochs=2, ckpt=world.root / "begun.ckpt")
    assert record.numerics["precision"] == began
    base = load_causal_lm(world.base, dtype=torch.bfloat16 if began == "bf16" else torch.float32)
    own = tuner.network.get_base_model().state_dict()
    for name, value in base.named_parameters():
        found = own.get(name, own.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(found, value) and found.dtype == value.dtype
    _, record = fit(world, "asked", epochs=2, ckpt=world.root / "begun.ckpt", dtype="fp32")
    assert record.numerics["precision"] == "fp32", "what is asked for now comes first"


def test_a_checkpoint_of_earlier_builds_goes_on_in_fp32(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They did not say, and on a CPU it was fp32."""
    fit(world, "begun")
    path = world.root / "begun.ckpt"
    kept = torch.load(path, weights_only=True)
    del kept["numerics"], kept["hyper_parameters"]["token_budget"]
    torch.save(kept, path)
    processor(monkeypatch, bf16=True)
    tuner, record = fit(world, "resumed", epochs=2, ckpt=path)
    assert record.numerics["precision"] == "fp32" and dtypes(tuner, trained=False) == {torch.float32}


def test_the_trainers_own_precision_is_recorded(world: World) -> None:
    pl.seed_everything(1, verbose=False)
    callback = InstructMiningCallback(str(world.root / "runs"), refit=False)
    data = world.data(rule=world.rule, budget=12)
    trainer(world.root, callbacks=[callback], precision="bf16-mixed").fit(world.tuner(), datamodule=data)
    (record,) = RunLedger(world.root / "runs").records()
    assert record.numerics == {"device": "cpu", "precision": "bf16-mixed", "token_budget": 40}


def test_adapters_take_their_input_as_autocast_leaves_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft would cast every input to fp32, and autocast back to bf16: time for the same bits."""
    processor(monkeypatch, bf16=True)

    def step(tuner: Any) -> tuple[set[torch.dtype], torch.Tensor]:
        """Of what the adapters get; and loss and gradient."""
        pl.seed_everything(1, verbose=False)
        tuner.configure_model()
        dtypes = set()
        for name, module in tuner.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype))
            if name.endswith("lora_B.default"):
                torch.nn.init.normal_(module.weight)
        loss = tuner.training_step(batch_of(encoded_rows(4), [0, 1, 2, 3]), 0)["loss"]
        loss.backward()
        assert all(getattr(module, "cast_input_dtype_enabled", True) for module in tuner.modules())
        return dtypes, torch.cat(
            [loss.detach().flatten(), *(p.grad.flatten() for p in tuner.parameters() if p.requires_grad)]
        )

    dtypes, once = step(world.tuner())
    as_peft_does = world.tuner()
    monkeypatch.setattr(as_peft_does, "_autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    twice_cast, expected = step(as_peft_does)
    assert dtypes == {torch.bfloat16} and twice_cast == {torch.float32}
    assert torch.equal(once, expected)

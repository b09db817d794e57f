"""Training without padding: rows of a batch go through in micro-batches of like length, and nothing else changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import World, batch_of, encoded_rows, trainer
from test_tuning_module import InOrder, Recorder, first_step, loader, reference_gradient
from torch import Tensor

from im_lightning.errors import InstructMiningError, RequestError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.models.batching import micro_batched_loss
from im_lightning.models.likelihood import summed_nll
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.module import InstructTuningModule

ROWS = encoded_rows(12, empty=(5,))
WHOLE = 10**6


def relative_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of two gradients, as one vector each."""
    assert got.keys() == expected.keys()
    difference = torch.cat([(got[name] - expected[name]).flatten() for name in expected])
    return float(difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm())


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("budget", [1, 30])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_gradient_is_that_of_the_whole_step(
    small_base: str, tmp_path: Path, reduction: str, pieces: int, budget: int, rank: int
) -> None:
    """A budget of one token makes every row its own micro-batch; accumulation divides by its batches all the same."""
    batches = [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]] if pieces == 3 else [list(range(12))]
    options = {"accumulate_grad_batches": pieces, "reduction": reduction, "lora_rank": rank}
    got = first_step(small_base, tmp_path, batches, token_budget=budget, **options)
    assert relative_difference(got, reference_gradient(small_base, list(range(12)), reduction, rank)) < 1e-5


class Hooks(Recorder):
    """Counts what callbacks see, keeps logged losses and the loss that `training_step` returned."""

    def __init__(self) -> None:
        super().__init__()
        self.backwards, self.returned, self.logged, self.norms = 0, [], [], []

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.backwards += 1

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.returned.append((float(outputs["loss"]), outputs["example_loss"].tolist(), outputs["row"].tolist()))
        self.logged.append(float(trainer.callback_metrics.get("train_loss", -1.0)))


def fit_with(base: str, root: Path, budget: int, **options: Any) -> Hooks:
    pl.seed_everything(3, verbose=False)
    hooks = Hooks()
    tuner = InstructTuningModule(base, lora_rank=2, learning_rate=1e-2, token_budget=budget)
    batches = loader([[0, 1, 2, 3], [4, 5, 6], [7, 8], [9, 10, 11, 0]])
    trainer(root, callbacks=[hooks], accumulate_grad_batches=2, **options).fit(tuner, batches)
    return hooks


def test_losses_norms_clipping_and_hooks_are_those_of_a_whole_batch(small_base: str, tmp_path: Path) -> None:
    """What is logged, clipped and handed to callbacks must not depend on how a batch was cut."""
    got, expected = (fit_with(small_base, tmp_path, b, gradient_clip_val=0.05) for b in (20, WHOLE))
    assert got.backwards == expected.backwards == 4 and len(got.steps) == len(expected.steps) == 2
    assert got.logged == pytest.approx(expected.logged, rel=1e-5) and got.logged[-1] > 0
    assert got.norms == pytest.approx(expected.norms, rel=1e-5) and min(got.norms) > 0.05
    for one, other in zip(got.returned, expected.returned, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5) and one[2] == other[2]
        assert one[1] == pytest.approx(other[1], rel=1e-5, nan_ok=True)
    for one, other in zip(got.steps, expected.steps, strict=True):
        assert relative_difference(one, other) < 1e-4
        assert float(torch.stack([g.norm() for g in one.values()]).norm()) == pytest.approx(0.05, rel=1e-3)


def test_half_precision_with_a_loss_scale(small_base: str, tmp_path: Path) -> None:
    """Micro-batches are differentiated under the scale, or small gradients would be lost, and it is taken out again."""
    plugins = pl.plugins.MixedPrecision, torch.amp.GradScaler
    options = {"plugins": [plugins[0]("16-mixed", "cpu", plugins[1]("cpu", init_scale=1024.0))]}
    got = fit_with(small_base, tmp_path, 20, **options)
    options = {"plugins": [plugins[0]("16-mixed", "cpu", plugins[1]("cpu", init_scale=1024.0))]}
    expected = fit_with(small_base, tmp_path, WHOLE, **options)
    for one, other in zip(got.steps, expected.steps, strict=True):
        assert relative_difference(one, other) < 0.02, "half precision rounds"


def test_bf16_mixed_of_the_trainer(small_base: str, tmp_path: Path) -> None:
    got, expected = (fit_with(small_base, tmp_path, b, precision="bf16-mixed") for b in (20, WHOLE))
    for one, other in zip(got.steps, expected.steps, strict=True):
        assert relative_difference(one, other) < 0.05, "bf16 rounds"


@pytest.mark.parametrize("ddp", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_two_ranks_with_different_numbers_of_micro_batches(small_base: str, tmp_path: Path, ddp: Any) -> None:
    """Ranks are synchronised once a batch: one that has more micro-batches than the other neither waits nor hangs."""
    batches = [[0, 1, 2, 3, 4, 6, 7, 8], [9], [10], [2, 3, 11, 0, 1]]
    pl.seed_everything(3, verbose=False)
    tuner = InstructTuningModule(small_base, lora_rank=2, learning_rate=1e-8, token_budget=12)
    strategy = pl.strategies.DDPStrategy(start_method="fork", **ddp)
    trainer(tmp_path, callbacks=[Recorder(tmp_path)], strategy=strategy, devices=2).fit(
        tuner, datamodule=InOrder(batches)
    )
    for step, part in ((1, batches[:2]), (2, batches[2:])):
        expected = reference_gradient(small_base, [row for batch in part for row in batch], "token")
        for rank in (0, 1):
            got = torch.load(tmp_path / f"grads-{step}-rank{rank}.pt")
            assert relative_difference(got, expected) < 1e-4


def test_a_strategy_of_another_kind_gets_the_whole_batch(small_base: str, tmp_path: Path) -> None:
    """Under FSDP a forward pass inside another's backward is an error: a batch goes through whole there."""

    class Sharding(pl.strategies.SingleDeviceStrategy):
        pass

    widths: list[int] = []
    options = {
        "strategy": Sharding("cpu"),
        "accelerator": "auto",
        "devices": "auto",
        "callbacks": [recorder := Recorder()],
    }
    pl.seed_everything(3, verbose=False)
    tuner = Watched(small_base, lora_rank=2, token_budget=1, seen=widths)
    trainer(tmp_path, **options).fit(tuner, loader([list(range(12))]))
    assert len(widths) == 1
    assert relative_difference(recorder.steps[0], reference_gradient(small_base, list(range(12)), "token")) < 1e-5


class Watched(InstructTuningModule):
    """Notes the tokens that go through the network, padding included; where a limit is set, memory is short above it.

    The limit bites in the forward pass, or in the backward pass (`late`).
    """

    def __init__(self, *args: Any, seen: list[int], limit: int = WHOLE, late: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen, self.limit, self.late = seen, limit, late
        self.save_hyperparameters(ignore=["seen", "limit", "late"])

    def configure_model(self) -> None:
        super().configure_model()
        self.network.get_decoder().register_forward_hook(self.watch, with_kwargs=True)

    def watch(self, decoder: Any, args: Any, kwargs: Any, output: Any) -> None:
        tokens = kwargs["input_ids"].numel()
        if tokens > self.limit and not (self.late and torch.is_grad_enabled()):
            raise torch.OutOfMemoryError(f"Tried to allocate {tokens} tokens")
        if tokens > self.limit:
            output.last_hidden_state.register_hook(self.fail)
        if torch.is_grad_enabled():
            self.seen.append(tokens)

    def fail(self, grad: Tensor) -> None:
        raise torch.OutOfMemoryError("Tried to allocate a gradient")


def test_padding_is_not_computed(small_base: str, tmp_path: Path) -> None:
    """The batch below is padded to more than twice its tokens; of what goes through the network little is padding."""
    seen: list[int] = []
    tuner = Watched(small_base, lora_rank=2, token_budget=20, seen=seen)
    trainer(tmp_path).fit(tuner, loader([list(range(12))]))
    batch = batch_of(ROWS, list(range(12)))
    real = int(batch["attention_mask"].sum())
    assert batch["input_ids"].numel() > 1.4 * real and sum(seen) < 1.15 * real
    assert max(seen) <= 20


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
def test_short_memory_halves_the_budget_and_changes_no_gradient(
    small_base: str, tmp_path: Path, late: bool, capfd: Any
) -> None:
    """A fit of hours must not end because one batch was longer than the others."""
    pl.seed_everything(3, verbose=False)
    tuner = Watched(small_base, lora_rank=2, token_budget=1000, seen=[], limit=30, late=late)
    recorder = Recorder()
    trainer(tmp_path, callbacks=[recorder]).fit(tuner, loader([list(range(12))]))
    assert relative_difference(recorder.steps[0], reference_gradient(small_base, list(range(12)), "token")) < 1e-5
    budget = tuner.numerics()["token_budget"]
    assert 15 <= budget <= 30
    said = capfd.readouterr().err
    assert "training: out of memory with 12 rows" in said and f"token_budget {budget} starts there" in said


def test_a_row_that_fits_nowhere_says_what_to_do(small_base: str, tmp_path: Path) -> None:
    tuner = Watched(small_base, lora_rank=2, seen=[], limit=5)
    with pytest.raises(InstructMiningError, match=r"training: out of memory with one row of \d+ tokens alone.*Fix: "):
        trainer(tmp_path).fit(tuner, loader([[0, 1]]))


@pytest.mark.parametrize("wrong", [0, -3, "many"])
def test_a_wrong_budget_is_refused(small_base: str, wrong: Any) -> None:
    with pytest.raises(RequestError, match=r"token_budget: it is .*give 1 or more tokens, or auto"):
        InstructTuningModule(small_base, token_budget=wrong)


def fitted(world: World, ledger: str, budget: Any, **options: Any) -> tuple[Any, Any]:
    """A fit with evaluation and record: the tuner and the record."""
    pl.seed_everything(1, verbose=False)
    resumed = options.pop("ckpt_path", None)
    seen = {"seen": [], "limit": options.pop("limit", WHOLE)}
    tuner = Watched(world.base, lora_rank=2, learning_rate=5e-3, token_budget=budget, **seen)
    callback = InstructMiningCallback(str(world.root / ledger), refit=False)
    fit = trainer(world.root, callbacks=[callback], **options)
    fit.fit(tuner, datamodule=world.data(rule=world.rule, budget=12), ckpt_path=resumed)
    fit.save_checkpoint(world.root / f"{ledger}.ckpt")
    (record,) = RunLedger(world.root / ledger).records()
    return tuner, record


def test_evaluation_losses_do_not_depend_on_the_budget(world: World) -> None:
    _, small = fitted(world, "small", 25)
    _, whole = fitted(world, "whole", WHOLE)
    for kind in ("loss", "base_loss"):
        assert small.evaluation["eval"][kind] == pytest.approx(whole.evaluation["eval"][kind], rel=1e-5)
    assert small.numerics == {"device": "cpu", "precision": "fp32", "token_budget": 25}


def test_a_resume_goes_on_with_the_budget_that_was_left(world: World) -> None:
    """What memory was short for once is not tried again, unless another budget is asked for."""
    first, record = fitted(world, "first", 400, limit=100)
    left = first.numerics()["token_budget"]
    assert left < 400 and record.numerics["token_budget"] == left
    path = world.root / "first.ckpt"
    assert torch.load(path, weights_only=True)["numerics"]["token_budget"] == left
    again, record = fitted(world, "again", 400, ckpt_path=path, max_epochs=2)
    assert record.numerics["token_budget"] == again.numerics()["token_budget"] == left
    other, _ = fitted(world, "other", 300, ckpt_path=path, max_epochs=2)
    assert other.numerics()["token_budget"] == 300


def test_a_module_of_ones_own_calls_one_function(small_base: str, tmp_path: Path) -> None:
    """docs/own_module.md: a whole batch comes in, and `micro_batched_loss` gives its loss."""

    class Own(InstructTuningModule):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            tokens = batch["target_mask"][:, 1:].sum()
            loss, _ = micro_batched_loss(partial(summed_nll, self.network), batch, 1 / tokens, self.parameters(), 20)
            return loss

    pl.seed_everything(3, verbose=False)
    recorder = Recorder()
    trainer(tmp_path, callbacks=[recorder]).fit(Own(small_base, lora_rank=2), loader([list(range(12))]))
    assert relative_difference(recorder.steps[0], reference_gradient(small_base, list(range(12)), "token")) < 1e-5

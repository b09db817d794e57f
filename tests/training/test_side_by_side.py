"""Micro-batches side by side on a CPU: the same gradient, the same at every run, and only where it pays."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import batch_of, encoded_rows, trainer
from test_tuning_module import loader
from tiny import make_tiny_llama
from torch import Tensor

from im_lightning.models.batching import Budget, micro_batched_loss, micro_batches, training_budget
from im_lightning.models.likelihood import summed_nll
from im_lightning.training.module import InstructTuningModule

ROWS = encoded_rows(12)
BATCH = batch_of(ROWS, list(range(12)))


pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One layer, wide enough that calling it costs little beside its work."""
    return make_tiny_llama(tmp_path_factory.mktemp("wide"), hidden=256, layers=1)


def tuner_of(base: str, **options: Any) -> InstructTuningModule:
    pl.seed_everything(3, verbose=False)
    tuner = InstructTuningModule(base, **{"lora_rank": 2, "token_budget": 40, **options})
    tuner.configure_model()
    return tuner


def gradient(tuner: InstructTuningModule, budget: Budget) -> tuple[float, Tensor, Tensor]:
    """Loss, sums and gradient of the batch."""
    tuner.zero_grad()
    nll = partial(summed_nll, tuner.network)
    loss, sums = micro_batched_loss(nll, BATCH, torch.tensor(0.01), tuner.parameters(), budget)
    loss.backward()
    return loss.item(), sums, torch.cat([p.grad.flatten() for p in tuner.parameters() if p.grad is not None])


@pytest.mark.parametrize("bf16", [False, True])
def test_the_gradient_is_that_of_one_lane_and_the_same_every_time(wide_base: str, bf16: bool) -> None:
    """Whichever lane is first, gradients are added in the order of the plan: a resumed fit must not drift.

    Under autocast lanes share torch's cache of weights that were cast.
    """
    tuner, budget = tuner_of(wide_base), Budget(40, "cpu", "x", lanes=2)
    assert budget.side_by_side(BATCH["attention_mask"].sum(1).numpy())[1] == 2
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        alone = gradient(tuner, Budget(40, "cpu", "x"))
        first, *others = (gradient(tuner, budget) for _ in range(6))
    tolerance = 0.02 if bf16 else 1e-6
    assert first[0] == pytest.approx(alone[0], rel=tolerance)
    torch.testing.assert_close(first[1], alone[1], rtol=tolerance, atol=1e-5)
    assert float((first[2] - alone[2]).norm() / alone[2].norm()) < tolerance
    for loss, sums, grads in others:
        assert loss == first[0] and torch.equal(sums, first[1]) and torch.equal(grads, first[2])
    assert budget.lanes == torch.get_num_threads() == 2


def test_two_are_really_worked_on_at_once() -> None:
    weight, together = torch.tensor(2.0, requires_grad=True), threading.Barrier(2, timeout=100)

    def nll(part: dict[str, Tensor]) -> Tensor:
        if part["attention_mask"].shape[1] == longest:
            together.wait()  # passes only if the two longest rows are here at the same time
        return weight * part["attention_mask"].sum(dim=1)

    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    longest, budget = mask.shape[1], Budget(8, "cpu", "x", lanes=2)
    loss, _ = micro_batched_loss(nll, {"attention_mask": mask}, torch.tensor(1.0), [weight], budget)
    loss.backward()
    assert weight.grad is not None and weight.grad.item() == 16.0


def test_dropout_draws_as_it_does_in_one_lane(wide_base: str) -> None:
    """Which lane draws first is chance: a fit with dropout goes one piece at a time, with the numbers it always had."""
    tuner = tuner_of(wide_base, lora_dropout=0.5).train()
    for name, parameter in tuner.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # zero at the start, and then dropout drops nothing
    torch.manual_seed(1)
    alone, after = gradient(tuner, Budget(40, "cpu", "x")), torch.get_rng_state()
    torch.manual_seed(1)
    budget = Budget(40, "cpu", "x", lanes=2)
    got = gradient(tuner, budget)
    assert got[0] == alone[0] and torch.equal(got[2], alone[2])
    assert budget.lanes == 1 and torch.equal(torch.get_rng_state(), after)


def test_lanes_calculate_in_the_modes_of_their_caller(wide_base: str) -> None:
    """torch keeps autocast and gradient modes by thread: a lane that did not take them over would train in fp32."""
    network, budget = tuner_of(wide_base).network, Budget(40, "cpu", "x", lanes=2)

    def seen() -> set[tuple[torch.dtype, bool, bool, str]]:
        def modes(rows: Tensor, part: dict[str, Tensor]) -> tuple[torch.dtype, bool, bool, str]:
            hidden = network(input_ids=part["input_ids"]).logits
            lane = threading.current_thread().name.split("_")[0]
            return hidden.dtype, hidden.requires_grad, torch.is_inference_mode_enabled(), lane

        return {found for _, found in micro_batches(BATCH, budget, modes)}

    assert seen() == {(torch.float32, True, False, "lane")}
    with torch.autocast("cpu", torch.bfloat16):
        assert seen() == {(torch.bfloat16, True, False, "lane")}
    with torch.no_grad():
        assert seen() == {(torch.float32, False, False, "lane")}
    with torch.inference_mode():
        assert seen() == {(torch.float32, False, True, "lane")}


def test_side_by_side_only_where_it_is_faster(wide_base: str, small_base: str) -> None:
    """Measured: adapters of SmolLM2 1.3 times as fast, all its weights 1.05, a model of 0.1 M parameters 0.9."""

    def lanes(base: str, **options: Any) -> int:
        tuner = tuner_of(base, **options)
        return training_budget(tuner.network, torch.device("cpu"), 40, "x", "y").lanes

    assert lanes(wide_base) == 2
    assert lanes(wide_base, lora_rank=0) == 1 and lanes(small_base) == 1
    torch.set_num_threads(1)
    assert lanes(wide_base) == 1


class Fails(InstructTuningModule):
    """Memory is short for more than 18 tokens."""

    def configure_model(self) -> None:
        super().configure_model()
        self.network.get_decoder().register_forward_pre_hook(self.fail, with_kwargs=True)

    def fail(self, decoder: Any, args: Any, kwargs: Any) -> None:
        tokens = kwargs["input_ids"].numel()
        if tokens > 18:
            raise torch.OutOfMemoryError(f"Tried to allocate {tokens} tokens")


def test_short_memory_in_a_lane_halves_the_budget_and_loses_no_row(wide_base: str) -> None:
    pl.seed_everything(3, verbose=False)
    tuner = Fails(wide_base, lora_rank=2)
    tuner.configure_model()
    rows = [i for i in range(12) if len(ROWS[i].input_ids) <= 18]
    batch, budget = batch_of(ROWS, rows), Budget(100, "cpu", "training", lanes=2)
    nll = partial(summed_nll, tuner.network)
    _, sums = micro_batched_loss(nll, batch, torch.tensor(0.01), tuner.parameters(), budget)
    with torch.no_grad():
        expected = torch.cat([nll(batch_of(ROWS, [i])) for i in rows])
    torch.testing.assert_close(sums, expected)
    assert 9 <= budget.tokens < 50


class Stop(pl.Callback):
    """Ends a fit after its first epoch, with the schedule of two."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def weights_after(base: str, root: Path, **options: Any) -> tuple[dict[str, Tensor], InstructTuningModule]:
    pl.seed_everything(3, verbose=False)
    tuner = InstructTuningModule(base, lora_rank=2, learning_rate=1e-2, token_budget=40, warmup_ratio=0.0)
    resumed = options.pop("ckpt_path", None)
    fit = trainer(root, max_epochs=2, **options)
    fit.fit(tuner, loader([list(range(12)), [3, 1, 4, 8, 5, 9], list(range(6)), list(range(6, 12))]), ckpt_path=resumed)
    fit.save_checkpoint(root / "last.ckpt")
    return {name: p.detach().clone() for name, p in tuner.named_parameters() if p.requires_grad}, tuner


def test_a_resumed_fit_ends_with_the_same_bits(wide_base: str, tmp_path: Path) -> None:
    expected, tuner = weights_after(wide_base, tmp_path / "whole")
    assert tuner._budget is not None and tuner._budget.lanes == 2
    weights_after(wide_base, tmp_path / "part", callbacks=[Stop()])
    got, _ = weights_after(wide_base, tmp_path / "part", ckpt_path=tmp_path / "part" / "last.ckpt")
    assert all(torch.equal(got[name], expected[name]) for name in expected)

"""`InstructTuningModule`: the gradient it steps with, what its checkpoints hold, and what other tools can load."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import batch_of, encoded_rows, trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from im_lightning.errors import RequestError
from im_lightning.training.module import InstructTuningModule, rate

ROWS = encoded_rows(12, empty=(5,))


class Recorder(pl.Callback):
    """Keeps the gradients of each optimiser step as the optimiser sees them, after clipping; also in files."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root
        self.steps: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        def keep(*_: Any) -> None:
            self.steps.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
            if self.root is not None:  # what is learnt in a forked rank comes back through files only
                torch.save(self.steps[-1], self.root / f"grads-{len(self.steps)}-rank{trainer.global_rank}.pt")

        trainer.optimizers[0].register_step_post_hook(keep)


def loader(batches: list[list[int]]) -> Any:
    return torch.utils.data.DataLoader([batch_of(ROWS, b) for b in batches], batch_size=None)


def first_step(base: str, root: Path, batches: list[list[int]], **options: Any) -> dict[str, Tensor]:
    """Gradients of the first optimiser step of a fit over the batches."""
    pl.seed_everything(3, verbose=False)
    fit_options = {k: options.pop(k) for k in ("accumulate_grad_batches", "gradient_clip_val") if k in options}
    tuner = InstructTuningModule(base, **{"lora_rank": 2, **options})
    recorder = Recorder()
    trainer(root, callbacks=[recorder], **fit_options).fit(tuner, loader(batches))
    return recorder.steps[0]


def reference_gradient(base: str, positions: list[int], reduction: str, rank: int = 2) -> dict[str, Tensor]:
    """The same, from one big batch, transformers' own logits and a mean written out."""
    pl.seed_everything(3, verbose=False)
    tuner = InstructTuningModule(base, lora_rank=rank)
    tuner.configure_model()
    batch = batch_of(ROWS, positions)
    logits = tuner.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    mask = batch["target_mask"][:, 1:]
    if reduction == "token":
        loss = nll[mask].mean()
    else:
        means = [nll[i][mask[i]].mean() for i in range(len(nll)) if mask[i].any()]
        loss = torch.stack(means).mean()
    loss.backward()
    return {n: p.grad for n, p in tuner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_accumulated_gradient_is_that_of_one_big_batch(
    small_base: str, tmp_path: Path, reduction: str, pieces: int
) -> None:
    """Otherwise a token in a short micro-batch would count more than one in a long micro-batch."""
    batches = [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]] if pieces == 3 else [list(range(12))]
    got = first_step(small_base, tmp_path, batches, accumulate_grad_batches=pieces, reduction=reduction)
    expected = reference_gradient(small_base, list(range(12)), reduction)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-7)


class InOrder(pl.LightningDataModule):
    """Deals micro-batches to the ranks in turn, unshuffled."""

    def __init__(self, batches: list[list[int]]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Any:
        rows = [batch_of(ROWS, b) for b in self.batches]
        sampler = DistributedSampler(rows, shuffle=False, **self.trainer.distributed_sampler_kwargs)
        return torch.utils.data.DataLoader(rows, batch_size=None, sampler=sampler)


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_two_ranks_step_with_the_gradient_of_one_big_batch(small_base: str, tmp_path: Path, reduction: str) -> None:
    """DDP averages ranks: without the rescaling a rank with few tokens would count as much as one with many."""
    batches = [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10], [2, 3], [11, 0, 1]]
    pl.seed_everything(3, verbose=False)
    tuner = InstructTuningModule(small_base, lora_rank=2, reduction=reduction, learning_rate=1e-8)
    ranks = {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": 2, "max_epochs": 1}
    trainer(tmp_path, callbacks=[Recorder(tmp_path)], **ranks).fit(tuner, datamodule=InOrder(batches))
    for step, part in ((1, batches[:4]), (2, batches[4:])):
        rows = [row for batch in part for row in batch]
        expected = reference_gradient(small_base, rows, reduction)
        for rank in (0, 1):
            got = torch.load(tmp_path / f"grads-{step}-rank{rank}.pt")
            for name in expected:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_short_last_window_is_a_mean_too(small_base: str, tmp_path: Path) -> None:
    """Lightning divides by accumulate_grad_batches even where fewer micro-batches are left."""
    got = first_step(small_base, tmp_path, [[0, 1, 2], [3, 4]], accumulate_grad_batches=4)
    expected = reference_gradient(small_base, [0, 1, 2, 3, 4], "token")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-7)


def test_clipping_sees_the_mean_gradient(small_base: str, tmp_path: Path) -> None:
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]]
    got = first_step(small_base, tmp_path, batches, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    norm = torch.stack([g.norm() for g in got.values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_window_without_response_tokens_has_no_gradient(small_base: str, tmp_path: Path) -> None:
    got = first_step(small_base, tmp_path, [[5]])
    assert all(float(g.abs().max()) == 0.0 for g in got.values())


def test_outputs_are_the_detached_loss_of_each_example(small_base: str) -> None:
    """The callback joins these to the indicators; one that kept the graph alive would hold every step in memory."""
    tuner = InstructTuningModule(small_base, lora_rank=2)
    tuner.configure_model()
    batch = batch_of(ROWS, [3, 5, 7])
    out = tuner.training_step(batch, 0)
    sums, counts = tuner.response_nll(batch)
    assert not out["example_loss"].requires_grad and not out["row"].requires_grad and not sums.requires_grad
    assert out["row"].tolist() == [3, 5, 7]
    assert counts.tolist() == [int(ROWS[i].loss_mask.sum()) for i in (3, 5, 7)]
    torch.testing.assert_close(out["example_loss"][[0, 2]], (sums / counts)[[0, 2]])
    assert torch.isnan(out["example_loss"][1]), "an example without response tokens has no loss, not a loss of zero"


def test_lora_start_depends_on_the_global_seed_alone(small_base: str) -> None:
    """Repeats with another training seed must differ; the same seed must give the same run."""

    def start(seed: int) -> Tensor:
        pl.seed_everything(seed, verbose=False)
        tuner = InstructTuningModule(small_base, lora_rank=2)
        tuner.configure_model()
        return torch.cat([p.flatten() for p in tuner.parameters() if p.requires_grad])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_an_adapter_is_attached_without_a_warning(small_base: str) -> None:
    """peft asks for an attribute that transformers has renamed, and a user of `run` or `sweep` read of it."""
    tuner = InstructTuningModule(small_base, lora_rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.configure_model()


def test_configure_model_twice_keeps_the_weights(small_base: str) -> None:
    tuner = InstructTuningModule(small_base, lora_rank=2)
    tuner.configure_model()
    network = tuner.network
    tuner.configure_model()
    assert tuner.network is network


def fit_with_checkpoint(tuner: InstructTuningModule, root: Path, **options: Any) -> str:
    fit = trainer(root, **options)
    fit.fit(tuner, loader([[0, 1, 2], [3, 4, 6], [7, 8, 9]]))
    path = str(root / "fit.ckpt")
    fit.save_checkpoint(path)
    return path


def test_checkpoint_holds_the_adapter_only_and_restores_it(small_base: str, tmp_path: Path) -> None:
    """A 7B base in every checkpoint would fill the disk; an adapter that is not restored would lose the run."""
    tuner = InstructTuningModule(small_base, lora_rank=2, learning_rate=1e-2)
    path = fit_with_checkpoint(tuner, tmp_path)
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"] and all("lora_" in name for name in saved["state_dict"])
    again = InstructTuningModule.load_from_checkpoint(path)
    batch = batch_of(ROWS, [0, 1, 2, 3])
    torch.testing.assert_close(again.response_nll(batch)[0], tuner.response_nll(batch)[0])


def test_full_finetuning_stores_everything(small_base: str, tmp_path: Path) -> None:
    tuner = InstructTuningModule(small_base, lora_rank=0, learning_rate=1e-2)
    path = fit_with_checkpoint(tuner, tmp_path)
    again = InstructTuningModule.load_from_checkpoint(path)
    batch = batch_of(ROWS, [0, 1, 2, 3])
    torch.testing.assert_close(again.response_nll(batch)[0], tuner.response_nll(batch)[0])
    tuner.export_adapter(str(tmp_path / "model"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(plain(batch["input_ids"]).logits, tuner.network.eval()(batch["input_ids"]).logits)


def test_a_checkpoint_of_another_adapter_is_refused(small_base: str, tmp_path: Path) -> None:
    path = fit_with_checkpoint(InstructTuningModule(small_base, lora_rank=2), tmp_path)
    with pytest.raises(RequestError, match=r"checkpoint: it lacks 14 of this adapter's 14 tensors.*lora_rank"):
        InstructTuningModule.load_from_checkpoint(path, lora_rank=4)
    with pytest.raises(RequestError, match=r"has no place for 12 of its 14 tensors.*lora_target_modules"):
        InstructTuningModule.load_from_checkpoint(path, lora_target_modules=["q_proj"])
    with pytest.raises(RequestError, match=r"checkpoint: it holds a LoRA adapter, and here all weights are trained"):
        InstructTuningModule.load_from_checkpoint(path, lora_rank=0)


def test_a_resume_with_another_alpha_is_refused(small_base: str, tmp_path: Path) -> None:
    """The adapter would be scaled otherwise from there on, in one run of one method."""
    path = fit_with_checkpoint(InstructTuningModule(small_base, lora_rank=2), tmp_path)
    batches = loader([[0, 1, 2], [3, 4, 6], [7, 8, 9]])
    other, same = (InstructTuningModule(small_base, lora_rank=2, lora_alpha=alpha) for alpha in (8, 4))
    with pytest.raises(RequestError, match=r"checkpoint: its adapter was trained at lora_alpha 4, and here it is 8"):
        trainer(tmp_path, max_epochs=3).fit(other, batches, ckpt_path=path)
    trainer(tmp_path, max_epochs=3).fit(same, batches, ckpt_path=path)


def test_resume_continues_as_if_undisturbed(small_base: str, tmp_path: Path) -> None:
    batches = loader([[0, 1, 2], [3, 4, 6]])
    pl.seed_everything(1, verbose=False)
    whole = InstructTuningModule(small_base, lora_rank=2, learning_rate=1e-2)
    full = trainer(tmp_path, max_epochs=4)
    full.fit(whole, batches)
    pl.seed_everything(1, verbose=False)
    half = InstructTuningModule(small_base, lora_rank=2, learning_rate=1e-2)
    stop = trainer(tmp_path, max_epochs=4, callbacks=[StopAfter(2)])
    stop.fit(half, batches)
    stop.save_checkpoint(tmp_path / "half.ckpt")
    rest = InstructTuningModule(small_base, lora_rank=2, learning_rate=1e-2)
    resumed = trainer(tmp_path, max_epochs=4)
    resumed.fit(rest, batches, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.global_step == full.global_step == 8
    for name, value in whole.named_parameters():
        torch.testing.assert_close(dict(rest.named_parameters())[name], value)


class StopAfter(pl.Callback):
    """Stops after so many epochs without changing what the schedule believes."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("tied", [False, True])
def test_exported_adapter_loads_in_plain_peft(tmp_path: Path, tied: bool, small_base: str) -> None:
    """The result of a fit must not be a prisoner of this package."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = small_base
    if tied:
        model = AutoModelForCausalLM.from_pretrained(small_base)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        base = str(tmp_path / "tied")
        model.save_pretrained(base)
        AutoTokenizer.from_pretrained(small_base).save_pretrained(base)
    tuner = InstructTuningModule(base, lora_rank=2, learning_rate=1e-2)
    trainer(tmp_path).fit(tuner, loader([[0, 1, 2], [3, 4, 6]]))
    tuner.export_adapter(str(tmp_path / "adapter"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")).eval()
    ids = batch_of(ROWS, [0, 1])["input_ids"]
    torch.testing.assert_close(plain(ids).logits, tuner.network.eval()(ids).logits)
    with plain.disable_adapter():
        assert not torch.allclose(plain(ids).logits, tuner.network(ids).logits), "the fit changed nothing"


def test_export_of_the_whole_model_shows_no_bar(small_base: str, tmp_path: Path, capfd: Any) -> None:
    """Half-drawn bars in a log file hide what the fit has to say."""
    tuner = InstructTuningModule(small_base, lora_rank=0)
    tuner.configure_model()
    capfd.readouterr()
    tuner.export_adapter(str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "model.safetensors").exists() and "Writing" not in capfd.readouterr().err


def test_export_without_weights_is_refused(small_base: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"export_adapter: the module has no weights yet.*fit first"):
        InstructTuningModule(small_base).export_adapter(str(tmp_path))


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_changes_no_gradient(small_base: str, tmp_path: Path, rank: int) -> None:
    plain = first_step(small_base, tmp_path, [[0, 1, 2, 3]], lora_rank=rank)
    saving = first_step(small_base, tmp_path, [[0, 1, 2, 3]], lora_rank=rank, gradient_checkpointing=True)
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name])


def test_base_weights_are_the_untouched_base(small_base: str, tmp_path: Path) -> None:
    batch = batch_of(ROWS, [0, 1])
    tuner = InstructTuningModule(small_base, lora_rank=2, learning_rate=1e-2)
    tuner.configure_model()
    before = copy.deepcopy(tuner.response_nll(batch)[0])
    trainer(tmp_path).fit(tuner, loader([[0, 1, 2], [3, 4, 6]]))
    with tuner.base_weights():
        torch.testing.assert_close(tuner.response_nll(batch)[0], before)
    assert not torch.allclose(tuner.response_nll(batch)[0], before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "fp8"}, "dtype: there is no 'fp8'.*auto, fp32, bf16"),
        ({"reduction": "mean"}, "reduction: there is no reduction 'mean'.*token, example"),
        ({"lora_rank": -1}, "lora_rank: it is -1.*0 for full"),
        ({"warmup_ratio": 1.0}, "warmup_ratio: it is 1.0"),
        ({"lora_alpha": 0}, "lora_alpha: it is 0.*a positive number, or none"),
        ({"lora_dropout": 5}, "lora_dropout: it is 5.*a share from 0"),
        ({"lora_dropout": -0.1}, "lora_dropout: it is -0.1"),
        ({"learning_rate": -1e-4}, "learning_rate: it is -0.0001.*a number from 0 on"),
        ({"learning_rate": float("nan")}, "learning_rate: it is nan"),
        ({"weight_decay": -1}, "weight_decay: it is -1"),
    ],
)
def test_wrong_arguments_are_refused_at_once(small_base: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        InstructTuningModule(small_base, **options)


def test_unknown_target_modules_are_named(small_base: str) -> None:
    tuner = InstructTuningModule(small_base, lora_target_modules=["no_such_layer"])
    with pytest.raises(RequestError, match=r"lora_target_modules: \['no_such_layer'\] names no layer"):
        tuner.configure_model()


def test_rate_rises_then_ends_at_zero() -> None:
    values = [rate(s, 10, 100) for s in range(101)]
    assert values[0] == pytest.approx(0.1) and max(values) == values[9] == 1.0 and values[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(values[10:]))


def test_mixed_precision_trains_and_evaluates_under_it(small_base: str, tmp_path: Path) -> None:
    tuner = InstructTuningModule(small_base, lora_rank=2, learning_rate=1e-2)
    trainer(tmp_path, precision="bf16-mixed").fit(tuner, loader([[0, 1, 2], [3, 4, 6]]))
    batch = batch_of(ROWS, [0, 1, 2])
    exact = tuner.response_nll(batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tuner.response_nll(batch)[0]
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0.05)


def test_dtype_bf16_loads_the_base_so_and_keeps_the_adapter_in_fp32(small_base: str) -> None:
    tuner = InstructTuningModule(small_base, lora_rank=2, dtype="bf16")
    tuner.configure_model()
    kinds = {("lora" in name, p.dtype) for name, p in tuner.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    out = tuner.training_step(batch_of(ROWS, [0, 1]), 0)
    out["loss"].backward()
    assert out["example_loss"].dtype == torch.float32


def test_a_second_fit_starts_a_fresh_step(small_base: str, tmp_path: Path) -> None:
    """What an interrupted fit left in the accumulator would shrink the next fit's first gradient."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ValueError("stopped")

    pl.seed_everything(3, verbose=False)
    tuner = InstructTuningModule(small_base, lora_rank=2)
    with pytest.raises(ValueError, match="stopped"):
        trainer(tmp_path, callbacks=[Stop()], accumulate_grad_batches=2).fit(tuner, loader([[0, 1], [2, 3]]))
    recorder = Recorder()
    trainer(tmp_path, callbacks=[recorder], accumulate_grad_batches=2).fit(tuner, loader([[0, 1], [2, 3]]))
    fresh = first_step(small_base, tmp_path, [[0, 1], [2, 3]], accumulate_grad_batches=2)
    for name, value in fresh.items():
        torch.testing.assert_close(recorder.steps[0][name], value)

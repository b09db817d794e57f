"""`response_nll` against a plain loop over full logits, for the families people use. If it is off, every perplexity,
every training step and every evaluation loss of the package is."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from im_lightning.errors import RequestError
from im_lightning.models.batching import plan_batches
from im_lightning.models.likelihood import _route, collate, pooled_states, response_nll

VOCAB = 97


@dataclass(frozen=True)
class Row:
    """What `collate` needs of an `Encoded`."""

    input_ids: np.ndarray
    response_mask: np.ndarray
    loss_mask: np.ndarray


def make_rows(seed: int = 0, count: int = 7, longest: int = 19) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(rng.integers(3, longest))
        border = int(rng.integers(1, length))
        mask = np.arange(length) >= border
        if i == 2:  # two assistant turns
            mask[1] = True
        if i == 4:  # nothing to predict
            mask[:] = False
        rows.append(Row(rng.integers(0, VOCAB, length).astype(np.int32), mask, mask))
    return rows


def make_model(family: str) -> nn.Module:
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    small = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, **ends}
    torch.manual_seed(0)
    model: nn.Module
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**small, **heads))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**small, **heads, tie_word_embeddings=True))
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2, **ends))
    elif family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**small, num_attention_heads=2, **ends))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**small, **heads, head_dim=8, final_logit_softcapping=1.0))
    else:
        model = CohereForCausalLM(CohereConfig(**small, **heads, logit_scale=0.25))
    with torch.no_grad():  # logits far from uniform, so that a cap or a scale shows
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8.0)
    return model.eval()


def plain_loop(model: nn.Module, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """One row at a time, full logits, float64 sums: the reference."""
    sums, counts = [], []
    for row in rows:
        ids = torch.tensor(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        total, n = 0.0, 0
        for t in range(1, len(row.input_ids)):
            if row.response_mask[t]:
                total -= float(log_probs[t - 1, ids[0, t]])
                n += 1
        sums.append(total)
        counts.append(n)
    return np.array(sums), np.array(counts)


@pytest.mark.parametrize(
    ("family", "direct"),
    [("llama", True), ("qwen2", True), ("gpt2", True), ("gpt_neox", True), ("gemma2", False), ("cohere", False)],
)
def test_equals_plain_loop(family: str, direct: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = make_model(family), make_rows()
    expected, counts = plain_loop(model, rows)
    for _ in range(2):
        with torch.no_grad():
            result = response_nll(model, collate(rows, 0))
        np.testing.assert_allclose(result.sums.numpy(), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(result.counts.numpy(), counts)
    assert _route(model).direct is direct
    said = capsys.readouterr().err
    assert said.count("the full path is used") == (0 if direct else 1)  # said once, not per batch


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_batch_size_order_padding_and_chunks_do_not_matter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that moves with its neighbours cannot be reproduced by anyone."""
    model, rows = make_model(family), make_rows(seed=1, count=12)
    expected, _ = plain_loop(model, rows)
    for tokens, pad in ((1, 0), (40, 5), (10_000, 96)):
        got = np.zeros(len(rows))
        for part in plan_batches([len(r.input_ids) for r in rows], tokens):
            with torch.no_grad():
                got[part] = response_nll(model, collate([rows[i] for i in part], pad)).sums.numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr("im_lightning.models.likelihood.CHUNK_ELEMENTS", 3 * VOCAB)
    with torch.no_grad():
        chunked = response_nll(model, collate(rows, 0)).sums.numpy()
    np.testing.assert_allclose(chunked, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradient_equals_autograd_of_full_logits(family: str) -> None:
    """Training uses the same function: a wrong gradient would only show as a model that learns badly."""
    model, rows = make_model(family), make_rows()
    batch = collate(rows, 0, "loss_mask")
    result = response_nll(model, batch)
    (result.sums.sum() / result.counts.sum()).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(~batch["target_mask"], -100)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)).backward()
    assert got
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-6)


def test_peft_wrapped_model_keeps_its_adapter() -> None:
    """Unwrapping must not drop the adapter, or the evaluation would judge the base model."""
    from peft import LoraConfig, get_peft_model

    base, rows = make_model("llama"), make_rows()
    untouched, _ = plain_loop(base, rows)
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    wrapped.eval()
    expected, _ = plain_loop(wrapped, rows)
    with torch.no_grad():
        got = response_nll(wrapped, collate(rows, 0)).sums.numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(got - untouched).max() > 0.1


def test_model_that_sees_the_future_is_refused() -> None:
    """A bidirectional model gives tiny, meaningless perplexities."""
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = BertLMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8.0)
    with pytest.raises(RequestError, match=r"is not causal.*name a causal language model"):
        response_nll(model.eval(), collate(make_rows(), 0))


def test_probe_leaves_training_mode_as_it_was() -> None:
    model = make_model("llama").train()
    model.model.layers[0].eval()  # type: ignore[union-attr]
    response_nll(model, collate(make_rows(), 0))
    assert model.training and not model.model.layers[0].training  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_pooled_states_are_means_over_real_tokens(family: str) -> None:
    model, rows = make_model(family), make_rows()
    batch = collate(rows, 0)
    with torch.no_grad():
        hidden = response_nll(model, batch, keep_hidden=True).hidden
    assert hidden is not None
    pooled = pooled_states(hidden, batch["attention_mask"])
    for row, got in zip(rows, pooled, strict=True):
        ids = torch.tensor(row.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            alone = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


def test_bf16_losses_are_summed_in_fp32() -> None:
    """bf16 holds three digits: a sum of hundreds of tokens in it would be off by percents."""
    model, rows = make_model("llama"), make_rows(longest=60)
    with torch.no_grad():
        exact = response_nll(model, collate(rows, 0)).sums
        half = response_nll(copy.deepcopy(model).bfloat16(), collate(rows, 0)).sums
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.5)


def test_batch_without_targets_is_zero() -> None:
    model = make_model("llama")
    with torch.no_grad():
        result = response_nll(model, collate([make_rows()[4]], 0))
    assert result.sums.tolist() == [0.0] and result.counts.tolist() == [0]

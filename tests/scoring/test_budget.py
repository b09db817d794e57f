"""Batching when memory is short and in the background: nothing falls over, is invented or mixed up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pools import alpaca, make_pool
from transformers import LlamaForCausalLM

from im_lightning.data.tokenization import encode_examples, encode_unconditional
from im_lightning.models import checkpoint
from im_lightning.models.batching import Budget, is_out_of_memory
from im_lightning.models.device import ModelWork
from im_lightning.scoring.api import score_examples
from im_lightning.scoring.passes import language_model

NAMES = ["ppl", "ppl_unconditional", "ifd", "length_output", "knn_6"]


def limited(monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception) -> list[int]:
    """Makes every model refuse batches of more than `tokens` tokens; returns the sizes of the batches it saw."""
    seen: list[int] = []
    real = checkpoint.load_causal_lm

    def load(*args: Any, **options: Any) -> LlamaForCausalLM:
        model = real(*args, **options)
        forward = model.model.forward

        def small(input_ids: torch.Tensor, **others: Any) -> Any:
            seen.append(input_ids.numel())
            if input_ids.numel() > tokens:
                raise error
            return forward(input_ids=input_ids, **others)

        model.model.forward = small
        return model

    monkeypatch.setattr(checkpoint, "load_causal_lm", load)
    return seen


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("not enough memory: you tried to allocate 1 bytes"),
    ],
)
def test_short_memory_halves_the_batches_and_changes_no_value(
    tiny_llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    """A night's scoring must not end at the first long batch, nor hit the same wall a thousand times."""
    pool = make_pool(40)
    whole = score_examples(pool, NAMES, tiny_llama, cache_dir=tmp_path / "a")
    seen = limited(monkeypatch, 400, error)
    tight = score_examples(pool, NAMES, tiny_llama, cache_dir=tmp_path / "b", batch_tokens=3000)
    for name in NAMES:
        np.testing.assert_allclose(whole.values[name], tight.values[name], rtol=1e-4)
    refused = [i for i, size in enumerate(seen) if size > 400]
    assert 1 <= len(refused) <= 3, seen  # 3000 -> 1500 -> 750 -> 375, remembered from there on
    assert "going on with" in capsys.readouterr().err


def test_a_row_that_fits_nowhere_has_a_reason_and_is_tried_again(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bigger machine that shares the store must not take over this one's failure."""
    pool = [*make_pool(12), alpaca("number", "listed exercise " * 100)]
    with monkeypatch.context() as patch:
        limited(patch, 200, torch.OutOfMemoryError("out of memory"))
        table = score_examples(pool, ["ppl", "knn_1"], tiny_llama, cache_dir=tmp_path)
    assert np.isnan(table.values["ppl"]).tolist() == [False] * 12 + [True]
    said = "ppl: 12 scored; 1 missing (out of memory with this row alone: 1); 12 computed now"
    assert said in capsys.readouterr().err
    assert table.reasons["ppl"][-1] == "out of memory with this row alone"
    assert np.isnan(table.values["knn_1"][-1])
    again = score_examples(pool, ["ppl", "knn_1"], tiny_llama, cache_dir=tmp_path)
    assert np.isfinite(again.values["ppl"]).all()
    elsewhere = score_examples(pool, ["knn_1"], tiny_llama, cache_dir=tmp_path / "elsewhere")
    np.testing.assert_allclose(again.values["knn_1"], elsewhere.values["knn_1"], rtol=1e-4)


def test_where_no_row_fits_none_has_a_neighbour(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors without any number in them are all alike: every row had copies, at distance 0."""
    pool = make_pool(8)
    with monkeypatch.context() as patch:
        limited(patch, 0, torch.OutOfMemoryError("out of memory"))
        table = score_examples(pool, ["knn_1"], tiny_llama, cache_dir=tmp_path)
        among = score_examples(pool, ["knn_1"], tiny_llama, cache_dir=tmp_path, knn_reference=make_pool(9, seed=1))
    for one in (table, among):
        assert np.isnan(one.values["knn_1"]).all() and set(one.reasons["knn_1"]) == {"no embedding of this example"}
    assert np.isfinite(score_examples(pool, ["knn_1"], tiny_llama, cache_dir=tmp_path).values["knn_1"]).all()


def test_other_errors_are_not_taken_for_short_memory() -> None:
    """Halving would hide a bug until single rows fail."""
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    budget = Budget(100, "cpu", "x")

    def broken(at: np.ndarray) -> bool:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(budget.run(np.arange(3), np.full(3, 5), broken))
    assert budget.tokens == 100


def test_losses_that_are_not_finite_are_reasons(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN that became a number would rank its row."""
    real = checkpoint.load_causal_lm

    def load(*args: Any, **options: Any) -> LlamaForCausalLM:
        model = real(*args, **options)
        forward = model.model.forward

        def spoilt(input_ids: torch.Tensor, **others: Any) -> Any:
            output = forward(input_ids=input_ids, **others)
            longest = (others["attention_mask"] if others.get("attention_mask") is not None else input_ids != 0).sum(1)
            output.last_hidden_state[longest > 150] = float("nan")
            return output

        model.model.forward = spoilt
        return model

    monkeypatch.setattr(checkpoint, "load_causal_lm", load)
    table = score_examples([*make_pool(8), alpaca("a", "listed exercise " * 60)], ["ppl", "ifd", "knn_1"], tiny_llama)
    assert np.isfinite(table.values["ppl"][:8]).all()
    for name in ("ppl", "ifd"):
        assert np.isnan(table.values[name][8]) and table.reasons[name][8] == "the model's loss is not finite"
    assert np.isnan(table.values["knn_1"][8])


def test_the_next_part_is_tokenised_while_this_one_is_scored(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the accelerator waits for the tokenizer; and parts must not get mixed up."""
    pool = make_pool(30)
    whole = score_examples(pool, NAMES, tiny_llama, cache_dir=tmp_path / "a")
    monkeypatch.setattr(language_model, "FIRST_ROWS", 7)
    monkeypatch.setattr(language_model, "PART_ROWS", 9)
    real = language_model.LanguageModelPass.prepare
    threads, sizes = set(), []

    def prepare(self: Any, rows: np.ndarray) -> Any:
        threads.add(threading.current_thread().name)
        sizes.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(language_model.LanguageModelPass, "prepare", prepare)
    parts = score_examples(pool, NAMES, tiny_llama, cache_dir=tmp_path / "b")
    assert sizes == [7, 9, 9, 5] and threading.main_thread().name not in threads
    for name in NAMES:
        np.testing.assert_allclose(whole.values[name], parts.values[name], rtol=1e-4)


def test_one_forward_pass_serves_all(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity, lengths and pooled states from one pass over the rows, the unconditional one from a second."""
    seen = limited(monkeypatch, 10**9, RuntimeError())
    pool, tokenizer = make_pool(60), checkpoint.load_tokenizer(tiny_llama)
    given, alone = encode_examples(pool, tokenizer, "alpaca"), encode_unconditional(pool, tokenizer)
    for names, encoded in ((["ppl", "length_input", "length_output", "knn_1"], given), (NAMES, alone)):
        seen.clear()
        score_examples(pool, names, tiny_llama)
        tokens, probes = sum(len(e.input_ids) for e in encoded), 5 * 3 + 16 * 2
        assert tokens <= sum(seen) <= 1.9 * tokens + probes, names


def test_the_budget_suits_the_model() -> None:
    """A wide model's states leave a CPU's cache; a narrow one's calls cost more than some padding."""
    wide, narrow = ModelWork(85_000_000, 24_000_000, 9_216, 12), ModelWork(800_000, 500_000, 512, 4)
    large, small, asked = (Budget(4096, "cpu", "x") for _ in range(3))
    large.suit(wide, 768, chosen=False)
    small.suit(narrow, 128, chosen=False)
    asked.suit(wide, 768, chosen=True)
    assert (large.tokens, small.tokens, asked.tokens) == (1365, 4096, 4096)
    lengths = [200, 190, 150, 100, 90]
    assert len(large.plan(lengths)) > len(small.plan(lengths))


def test_lanes_that_fail_together_halve_once() -> None:
    """Eight lanes out of memory at the same moment would otherwise go on with a 256th of the tokens."""
    budget, together = Budget(80, "cpu", "x"), threading.Barrier(4, timeout=100)
    first = threading.local()

    def work(at: np.ndarray) -> int:
        if not hasattr(first, "done"):
            first.done = True
            together.wait()
            raise torch.OutOfMemoryError("out of memory")
        return len(at)

    with ThreadPoolExecutor(4) as lanes:
        runs = [lanes.submit(lambda: list(budget.run(np.arange(8), np.full(8, 10), work))) for _ in range(4)]
        found = [run.result() for run in runs]
    assert budget.tokens == 40
    assert [sorted(int(i) for piece, _ in one for i in piece) for one in found] == [list(range(8))] * 4

"""The estimates of memory and time: parameters against transformers and peft, the rest against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.finetune_estimate import METHODS, PEAKS, SHAPES, UTILISATION, Shape, memory, seconds


def made(shape: Shape) -> torch.nn.Module:
    """A LLaMA of the shape without storage."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = shape.width // 64
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=shape.kv // 64,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_parameters_are_those_of_the_models(shape: Shape) -> None:
    model = made(shape)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    known = {"Llama-3.2-1B": 1.236, "LLaMA-2-7B": 6.738, "Llama-3.1-8B": 8.030}  # 10⁹, by the model cards
    assert shape.parameters / 1e9 == pytest.approx(known[shape.name], abs=5e-4)


def test_lora_parameters_are_pefts() -> None:
    from im_lightning.training.adapters import attach_lora

    shape = Shape("small", 2, 128, 256, 64, 300)
    with torch.device("meta"):
        network = attach_lora(made(shape), 16, None, 0.0, "all-linear")
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == shape.lora(16)


def test_memory_and_time_by_hand() -> None:
    shape = Shape("hand", 1, 2, 3, 2, 5)
    n = shape.parameters
    assert n == (8 + 8 + 18 + 4) + 20 + 2
    tokens = 4 * 1024
    rest = tokens * (2 * 2 + 34 * 2 + 8 * 5)
    assert memory(shape, "full") == 16 * n + rest
    assert memory(shape, "lora") == 2 * n + 16 * shape.lora(16) + rest
    assert memory(shape, "full, 8 × FSDP") == 2 * n + 4 * n + rest
    assert seconds(shape, "full", 1e6, PEAKS["A100"]) == pytest.approx(8 * n * 1e6 / (312e12 * UTILISATION))
    assert seconds(shape, "full, 8 × FSDP", 1e6, 1.0) * 8 == pytest.approx(seconds(shape, "full", 1e6, 1.0))


def test_four_bits_need_least() -> None:
    for shape in SHAPES:
        need = {method: memory(shape, method) for method in METHODS}
        assert need["lora nf4"] < need["lora"] < need["full"]

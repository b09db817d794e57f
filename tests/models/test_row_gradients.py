"""Gradients of single rows in one backward pass: those of a plain loop over peft's LoRA, and their projection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pools import make_pool

from im_lightning.data.tokenization import encode_examples
from im_lightning.models.checkpoint import load_causal_lm, load_tokenizer
from im_lightning.models.likelihood import collate, summed_nll
from im_lightning.models.row_gradients import RowGradients


@pytest.fixture(scope="module")
def encoded(tiny_llama: str) -> list[Any]:
    """Rows of unequal length."""
    found = encode_examples(make_pool(7), load_tokenizer(tiny_llama), "alpaca", 256)
    assert len({len(one.input_ids) for one in found}) > 3
    return found


def by_a_plain_loop(model: str, encoded: list[Any], layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of peft's B, [N, out, rank] by layer: a row at a time, through LoRA at its start with the same A."""
    from peft import LoraConfig, get_peft_model

    rank = len(next(iter(layers.values())).a)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    network = get_peft_model(load_causal_lm(model), config)
    adapted = {name.removeprefix("base_model.model."): one for name, one in network.named_modules()}
    for name, layer in layers.items():
        adapted[name].lora_A["default"].weight.data.copy_(layer.a)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for one in encoded:
        network.zero_grad()
        summed_nll(network, collate([one], 0, "loss_mask")).sum().backward()
        for name in layers:
            assert not adapted[name].lora_A["default"].weight.grad.any()  # B is zero: A has no gradient
            found[name].append(adapted[name].lora_B["default"].weight.grad.clone())
    return {name: torch.stack(some) for name, some in found.items()}


def test_without_projection_they_are_the_loops(tiny_llama: str, encoded: list[Any]) -> None:
    """An error here would rank rows by a direction that no finetune takes."""
    gradients = RowGradients(load_causal_lm(tiny_llama), rank=4, dimensions=10**6)
    vectors, sums, counts = gradients(collate(encoded, 0, "loss_mask"))
    loop = by_a_plain_loop(tiny_llama, encoded, gradients.layers)
    whole = torch.cat([one.flatten(1) for one in loop.values()], dim=1)
    assert vectors.shape == whole.shape == (7, gradients.width) and gradients.width > 1000
    torch.testing.assert_close(vectors, whole, rtol=1e-4, atol=1e-6)
    assert counts.tolist() == [int(one.loss_mask[1:].sum()) for one in encoded] and (sums > 0).all()
    cosines = torch.nn.functional.cosine_similarity(vectors, vectors.sum(dim=0, keepdim=True))
    expected = torch.nn.functional.cosine_similarity(whole, whole.sum(dim=0, keepdim=True))
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-6)


def test_the_projection_is_that_of_one_random_matrix(tiny_llama: str, encoded: list[Any]) -> None:
    """Written out: each column has one entry, +1 or -1, and the vector is the matrix times all gradients in a row."""
    gradients = RowGradients(load_causal_lm(tiny_llama), rank=4, dimensions=64)
    assert gradients.width == 64
    vectors, _, _ = gradients(collate(encoded, 0, "loss_mask"))
    expected = torch.zeros(7, 64)
    for name, loop in by_a_plain_loop(tiny_llama, encoded, gradients.layers).items():
        layer = gradients.layers[name]
        matrix = torch.zeros(64, len(layer.place))
        matrix[layer.place, torch.arange(len(layer.place))] = layer.sign
        assert set(layer.sign.tolist()) == {-1.0, 1.0}
        expected += loop.flatten(1) @ matrix.T
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)


def test_the_projection_keeps_cosines_on_average(tiny_llama: str, encoded: list[Any]) -> None:
    model = load_causal_lm(tiny_llama)

    def cosine(dimensions: int, seed: int) -> float:
        gradients = RowGradients(model, dimensions=dimensions, seed=0)
        whole = RowGradients(model, dimensions=dimensions, seed=seed)
        for name, layer in gradients.layers.items():  # the same A, so that only the projection is another
            whole.layers[name].a.copy_(layer.a)
        gradients.close()
        vectors, _, _ = whole(collate(encoded[:2], 0, "loss_mask"))
        whole.close()
        return float(torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0))

    exact, drawn = cosine(10**6, 0), [cosine(256, seed) for seed in range(12)]
    assert 0.05 < abs(exact) < 0.99
    assert abs(np.mean(drawn) - exact) < 4 * np.sqrt(2 / 256 / 12) and 0 < np.std(drawn) < 2 * np.sqrt(2 / 256)


def test_batch_and_padding_do_not_matter(tiny_llama: str, encoded: list[Any]) -> None:
    gradients = RowGradients(load_causal_lm(tiny_llama))
    together, _, _ = gradients(collate(encoded, 0, "loss_mask"))
    for at, one in enumerate(encoded):
        alone, _, _ = gradients(collate([one], 0, "loss_mask"))
        torch.testing.assert_close(together[at], alone[0], rtol=1e-3, atol=1e-5)


def test_a_row_without_loss_tokens_has_no_gradient_and_hooks_come_off(tiny_llama: str, encoded: list[Any]) -> None:
    model = load_causal_lm(tiny_llama)
    gradients = RowGradients(model)
    batch = collate(encoded[:2], 0, "loss_mask")
    batch["target_mask"][1] = False
    vectors, sums, _ = gradients(batch)
    assert vectors[0].any() and not vectors[1].any() and sums[1] == 0
    batch["target_mask"][:] = False
    assert not gradients(batch)[0].any()
    gradients.close()
    assert not any(one._forward_hooks for one in model.modules())


def test_conv1d_layers_count(encoded: list[Any]) -> None:
    """GPT-2's linear layers are written the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2)).eval()
    gradients = RowGradients(model, rank=2, dimensions=10**6)
    assert set(gradients.layers) == {
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    row = collate(encoded[:1], 0, "loss_mask")
    vector, _, _ = gradients(row)
    gradients.close()
    weights = {name: dict(model.named_modules())[name].weight.requires_grad_() for name in gradients.layers}
    summed_nll(model, row).sum().backward()
    expected = [(weights[name].grad.T @ layer.a.T).flatten() for name, layer in gradients.layers.items()]
    torch.testing.assert_close(vector[0], torch.cat(expected), rtol=1e-4, atol=1e-6)

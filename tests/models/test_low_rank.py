"""The short finetune of scoring: what peft's LoRA and a plain loop give, the base left as it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pools import make_pool

from im_lightning._utils.rng import LOW_RANK_ORDER, generator
from im_lightning.data.tokenization import encode_examples
from im_lightning.errors import RequestError
from im_lightning.models.checkpoint import load_causal_lm, load_tokenizer
from im_lightning.models.likelihood import collate, summed_nll
from im_lightning.models.low_rank import Recipe, attach, finetune, start

RECIPE = Recipe(rank=4, learning_rate=0.01, epochs=2, batch_rows=3)


@pytest.fixture(scope="module")
def encoded(tiny_llama: str) -> list[Any]:
    return encode_examples(make_pool(7), load_tokenizer(tiny_llama), "alpaca", 256)


def losses(model: Any, encoded: list[Any]) -> list[float]:
    with torch.no_grad():
        return summed_nll(model, collate(encoded, 0)).tolist()


def test_it_is_peft_trained_by_a_plain_loop(tiny_llama: str, encoded: list[Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_causal_lm(tiny_llama)
    begun = start(model, RECIPE)
    found = finetune(model, encoded, 0, RECIPE, tokens=100)

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    network = get_peft_model(load_causal_lm(tiny_llama), config)
    layers = {name.removeprefix("base_model.model."): one for name, one in network.named_modules()}
    for name, (a, b) in begun.items():
        layers[name].lora_A["default"].weight.data.copy_(a)
        assert not b.any()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], weight_decay=0.0)
    step = 0
    for epoch in range(2):
        order = generator(0, epoch, LOW_RANK_ORDER).permutation(7)
        for at in (order[:3], order[3:6], order[6:]):
            batch = collate([encoded[i] for i in at], 0, "loss_mask")
            (summed_nll(network, batch).sum() / batch["target_mask"][:, 1:].sum()).backward()
            shape = 1.0 if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 5))  # one step of warm-up of six
            optimizer.param_groups[0]["lr"] = 0.01 * shape
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    for name, (a, b) in found.items():
        torch.testing.assert_close(a, layers[name].lora_A["default"].weight.data, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(b, layers[name].lora_B["default"].weight.data, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(losses(model, encoded), losses(network, encoded), rtol=1e-4)
    assert np.mean(losses(model, encoded)) < np.mean(losses(load_causal_lm(tiny_llama), encoded))


def test_an_update_attached_elsewhere_is_the_same_model_and_the_weights_stay(
    tiny_llama: str, encoded: list[Any]
) -> None:
    tuned, fresh, plain = (load_causal_lm(tiny_llama) for _ in range(3))
    pairs = finetune(tuned, encoded, 0, RECIPE)
    attach(fresh, pairs, RECIPE.scale)
    assert losses(fresh, encoded) == losses(tuned, encoded) != losses(plain, encoded)
    for (name, one), other in zip(tuned.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_rows_without_a_token_to_train_on_are_refused(tiny_llama: str, encoded: list[Any]) -> None:
    from dataclasses import replace

    empty = [replace(one, loss_mask=np.zeros_like(one.loss_mask)) for one in encoded[:2]]
    with pytest.raises(RequestError, match=r"none of its 2 rows has a response token to train on. Fix: .*--targets"):
        finetune(load_causal_lm(tiny_llama), empty, 0, RECIPE)

"""Useful work and the matmul rate: the report's share of the limit rests on them."""

from __future__ import annotations

import numpy as np
import torch

from im_lightning.models.checkpoint import hidden_width, load_causal_lm
from im_lightning.models.device import matmul_rate, model_work


def test_work_of_a_llama_is_that_of_its_matrices(tiny_llama: str) -> None:
    """Embeddings multiply nothing, the head multiplies predicted tokens only, attention sees half of the square."""
    model = load_causal_lm(tiny_llama)
    work = model_work(model)
    assert work is not None
    layers, width, inner = 2, 32, 64
    assert work.body == layers * (4 * width**2 + 3 * width * inner)
    assert work.head == model.config.vocab_size * width
    expected = 2 * work.body * 7 + 2 * work.head * 4 + 2 * layers * width * (3**2 + 4**2)
    assert work.flops(np.array([3, 4]), 4) == expected


def test_width_is_read_without_loading(tiny_llama: str) -> None:
    assert hidden_width(tiny_llama) == 32


def test_the_rate_is_measured_once() -> None:
    first = matmul_rate(torch.float32, torch.device("cpu"), 64, 0.01)
    assert first > 1e6
    assert matmul_rate(torch.float32, torch.device("cpu"), 64, 0.01) == first

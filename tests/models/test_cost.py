"""Operations are reckoned as they are said to be: against torch's own counter, and the weights of loaded models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_llama
from torch.utils.flop_counter import FlopCounterMode

from im_lightning.errors import RequestError
from im_lightning.models.checkpoint import load_causal_lm
from im_lightning.models.cost import UNKNOWN, Cost, base_parameters, operations, total


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "model", hidden=64, layers=3)


def test_operations_are_what_torch_counts(base: str) -> None:
    """A cost that is off by a factor would call evidence cheap or dear that is not; attention alone is left out."""
    model, ids = load_causal_lm(base), torch.arange(24).reshape(2, 12)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids)
    with FlopCounterMode(display=False) as both:
        model(input_ids=ids).logits.sum().backward()
    attention = sum(
        n for op, n in forward.get_flop_counts()["Global"].items() if "attention" in str(op) or "bmm" in str(op)
    )
    parameters = base_parameters(base)
    assert operations(parameters, read=24) == forward.get_total_flops() - attention
    assert operations(parameters, trained=24) == pytest.approx(both.get_total_flops(), rel=0.1)


def test_parameters_are_those_that_tokens_are_multiplied_with(base: str, tmp_path: Path) -> None:
    """The table of embeddings costs nothing to look up, whether or not the head shares its numbers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = load_causal_lm(base)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert base_parameters(base) == linear
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    tied.save_pretrained(tmp_path / "gpt2")
    assert base_parameters(tmp_path / "gpt2") == 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64) + 100 * 16


def test_experts_are_not_counted_as_if_all_were_used(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    assert math.isnan(base_parameters(tmp_path / "experts"))
    with pytest.raises(RequestError, match="there is no such folder"):
        base_parameters(tmp_path / "nothing")


def test_what_is_not_known_stays_unknown() -> None:
    """A sum with an unknown part that came out as a number would be too small."""
    found = total([Cost(1e12, 30.0), UNKNOWN])
    assert math.isnan(found.flops) and found.text == "FLOPs not known, seconds not known"
    assert (Cost(math.nan, 90.0) * 2).text == "FLOPs not known, 3 min"
    assert found.to_json() == {"flops": None, "seconds": None}
    assert operations(math.nan) == 0.0, "no token is no work, whatever the model"

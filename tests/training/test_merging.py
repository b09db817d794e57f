"""A merged model is the base plus the weighted sum of the adapters' updates, to rounding; nothing of it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from im_lightning.errors import DataError
from im_lightning.training.merging import ADAPTER, CONFIG, StackedAdapters
from im_lightning.training.module import InstructTuningModule

SHARES = {"a": 0.2, "b": 0.0, "c": 0.8}
IDS = torch.arange(5, 45).reshape(4, 10)


@pytest.fixture
def base(tmp_path: Path) -> str:
    from tiny import make_tiny_llama

    return make_tiny_llama(tmp_path / "base", hidden=32, layers=2)


@pytest.fixture
def adapters(base: str, tmp_path: Path) -> dict[str, Path]:
    """Three adapters of different ranks and scales, as `fit --export` writes them, with updates that are not small."""
    folders = {}
    for seed, (name, rank, alpha) in enumerate((("a", 2, 4.0), ("b", 3, 3.0), ("c", 4, 2.0))):
        module = made(base, rank, alpha)
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.network.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        module.export_adapter(str(tmp_path / name))
        folders[name] = tmp_path / name
    return folders


def made(base: str, rank: int = 2, alpha: float = 4.0) -> Any:
    module = InstructTuningModule(base, lora_rank=rank, lora_alpha=alpha, dtype="fp32")
    module.configure_model()
    return module.eval()


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=IDS).logits


def test_it_is_the_sum_of_the_updates_in_weight_space(base: str, adapters: dict[str, Path]) -> None:
    """Against W + Σ c_b (alpha / r) B A, added up by hand in a model without adapters."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    module = made(base)
    StackedAdapters(module.network, adapters).mix({name: 1.7 * share for name, share in SHARES.items()})
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = dict(plain.named_parameters())
    before = logits(plain)
    for name, folder in adapters.items():
        config, state = json.loads((folder / CONFIG).read_text()), load_file(folder / ADAPTER)
        for key, down in state.items():
            if key.endswith(".lora_A.weight"):
                up = state[key.replace("lora_A", "lora_B")]
                place = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                weights[place].data += 1.7 * SHARES[name] * config["lora_alpha"] / config["r"] * (up @ down)
    torch.testing.assert_close(logits(module.network), logits(plain), rtol=0, atol=1e-5)
    assert (logits(plain) - before).abs().max() > 0.1, "the updates must matter, or the test says nothing"


def test_it_is_what_peft_makes_of_the_adapters(base: str, adapters: dict[str, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module = made(base)
    StackedAdapters(module.network, adapters).mix(SHARES)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, str(adapters["a"]), adapter_name="a")
    for name in ("b", "c"):
        peft.load_adapter(str(adapters[name]), adapter_name=name)
    named = [name for name, share in SHARES.items() if share]
    peft.add_weighted_adapter(named, [SHARES[n] for n in named], "mixed", combination_type="cat")
    peft.set_adapter("mixed")
    torch.testing.assert_close(logits(module.network), logits(peft.eval()), rtol=0, atol=1e-5)


def test_mixtures_follow_each_other_without_a_trace(base: str, adapters: dict[str, Path]) -> None:
    """One block alone is its own finetune, none is the base; blocks without a share are not computed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module = made(base)
    stack = StackedAdapters(module.network, adapters)
    with module.network.disable_adapter():
        untouched = logits(module.network)
    stack.mix(SHARES)
    first = logits(module.network)
    stack.mix({"b": 1.0})
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapters["b"])
    torch.testing.assert_close(logits(module.network), logits(alone.eval()), rtol=0, atol=1e-5)
    layer = next(iter(stack.layers.values()))
    assert layer.lora_A["default"].weight.shape[0] == 3, "the rank of b alone"
    stack.mix({})
    torch.testing.assert_close(logits(module.network), untouched, rtol=0, atol=0)
    stack.mix(SHARES)
    torch.testing.assert_close(logits(module.network), first, rtol=0, atol=0)


def test_a_folder_without_a_fitting_adapter_is_named(base: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    from tiny import make_tiny_llama

    wider = made(make_tiny_llama(tmp_path / "wider", hidden=48, layers=2))
    with pytest.raises(
        DataError, match=r"a: block a has no update of .* of the shape that the base has\. Fix: make the"
    ):
        StackedAdapters(wider.network, adapters)
    (adapters["c"] / ADAPTER).write_bytes(b"torn")
    with pytest.raises(DataError, match=r"c: it holds no adapter \(.*\)\. Fix: make the sweep again in a new folder"):
        StackedAdapters(made(base).network, adapters)
    (adapters["b"] / CONFIG).unlink()
    with pytest.raises(DataError, match=r"b: it holds no adapter"):
        StackedAdapters(made(base).network, adapters)

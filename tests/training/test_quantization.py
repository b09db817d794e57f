"""A 4-bit base: refused in time, and by name, where it cannot work; the real thing needs a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from im_lightning.errors import RequestError
from im_lightning.training import adapters as subject
from im_lightning.training.adapters import check_quantization, quantized_base
from im_lightning.training.module import InstructTuningModule


@pytest.mark.parametrize(
    ("name", "rank", "text"),
    [
        ("int3", 8, r"quantization: there is no 'int3'. Fix: use nf4"),
        ("nf4", 0, "nf4 weights are frozen, and lora_rank=0 would train them"),
        ("nf4", 8, r"nf4 needs bitsandbytes, which is not installed. Fix: pip install bitsandbytes"),
    ],
)
def test_what_cannot_work_is_refused_before_scoring(
    name: str, rank: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of scoring must not end in an ImportError."""
    monkeypatch.setattr(subject, "find_spec", lambda _: None)
    with pytest.raises(RequestError, match=text):
        InstructTuningModule("model", lora_rank=rank, quantization=name)


def test_only_on_a_cuda_device() -> None:
    with pytest.raises(RequestError, match="nf4 needs a CUDA device, and this is cpu"):
        quantized_base("nf4", torch.device("cpu"))
    config = quantized_base("nf4", torch.device("cuda", 0))["quantization_config"]
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype is torch.bfloat16


def test_without_it_nothing_changes(small_base: str) -> None:
    check_quantization(None, 0)
    assert quantized_base(None, torch.device("cpu")) == {}
    assert "nf4" not in InstructTuningModule(small_base, lora_rank=2).describe()["method"]


def test_a_regime_of_its_own(small_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on a 4-bit base and on a bf16 one are not runs of one rule."""
    found: Any = object()
    monkeypatch.setattr(subject, "find_spec", lambda _: found)
    module = InstructTuningModule(small_base, lora_rank=2, quantization="nf4")
    assert module.describe()["method"] == "lora r=2 alpha=4 all-linear on nf4"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and bitsandbytes")
def test_a_quantised_base_trains(small_base: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from fitting import make_world

    from im_lightning._lightning import Trainer

    world = make_world(small_base, tmp_path)
    trainer = Trainer(max_epochs=1, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(world.tuner(quantization="nf4"), datamodule=world.data(subset_size=12))

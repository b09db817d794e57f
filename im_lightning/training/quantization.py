"""A frozen base in 4 bits under LoRA (QLoRA, Dettmers et al. 2023), through bitsandbytes, which is optional."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    import torch

QUANTIZATIONS = (None, "nf4")


def check_quantization(quantization: str | None, lora_rank: int) -> None:
    """Refuses what cannot be trained, before anything is scored or loaded.

    Raises:
        RequestError: an unknown name, full finetuning of quantised weights, or no bitsandbytes.
    """
    if quantization not in QUANTIZATIONS:
        raise RequestError(message("quantization", f"there is no {quantization!r}", "use nf4, or leave it out"))
    if quantization is None:
        return
    if not lora_rank:
        cause = f"{quantization} weights are frozen, and lora_rank=0 would train them"
        raise RequestError(message("quantization", cause, "give a lora_rank, or leave quantization out"))
    if find_spec("bitsandbytes") is None:
        remedy = "pip install bitsandbytes (it needs a CUDA device), or leave quantization out"
        raise RequestError(
            message("quantization", f"{quantization} needs bitsandbytes, which is not installed", remedy)
        )


def quantized_base(quantization: str | None, device: torch.device) -> dict[str, Any]:
    """Arguments of `load_causal_lm` for a quantised base; empty without quantisation.

    Raises:
        RequestError: the device is none that bitsandbytes computes 4-bit products on.
    """
    if quantization is None:
        return {}
    if device.type != "cuda":
        remedy = "train on a CUDA device, or leave quantization out"
        raise RequestError(message("quantization", f"{quantization} needs a CUDA device, and this is {device}", remedy))
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    }

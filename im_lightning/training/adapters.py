"""What is trained beside or on top of the base weights: a LoRA adapter (peft), over a base in 4 bits (bitsandbytes).

Both libraries are imported here only, when they are needed: peft takes seconds, bitsandbytes is optional (QLoRA,
Dettmers et al. 2023).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from im_lightning.errors import RequestError, message

QUANTIZATIONS = (None, "nf4")


def attach_lora(network: Any, rank: int, alpha: float | None, dropout: float, target_modules: str | list[str]) -> Any:
    """Freezes a transformers causal LM and adds trainable low-rank updates: a `peft.PeftModel`, its adapter in fp32.

    The start is drawn from the global generator; the other arguments are those of `InstructTuningModule`.

    Raises:
        RequestError: none of the named layers exists in the model.
    """
    from peft import LoraConfig, get_peft_model

    scale: Any = 2 * rank if alpha is None else alpha  # peft types it as an integer and takes any number
    config = LoraConfig(
        r=rank,
        lora_alpha=scale,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        task_type="CAUSAL_LM",
    )
    try:
        with without_known_warnings():
            return get_peft_model(network, config)
    except ValueError as error:
        if "Target modules" not in str(error):
            raise
        cause = f"{target_modules!r} names no layer of the model ({type(network).__name__})"
        remedy = 'use "all-linear", or names such as q_proj and v_proj that the model has'
        raise RequestError(message("lora_target_modules", cause, remedy)) from error


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Around peft, which asks a model for an attribute that transformers has renamed: nothing that a user can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield


def check_adapter(own: Mapping[str, torch.Size], checkpoint: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that is of another adapter, or of one where this module (`lora_rank` 0) trains all weights.

    Args:
        own: Name → shape of this module's trained tensors.
        checkpoint: Its `state_dict` (name → tensor), and the `hyper_parameters` of the module that made it, if any.
        options: Those of this module.

    Raises:
        RequestError: a tensor is not there, is of another shape, or would be left out; or alpha is another.
    """
    state, rank = checkpoint["state_dict"], options["lora_rank"]
    theirs = [name for name in state if "lora_" in name]
    remedy = "use the lora_rank and lora_target_modules it was saved with"
    if not rank:
        if theirs:
            cause = "it holds a LoRA adapter, and here all weights are trained"
            raise RequestError(message("checkpoint", cause, "use the lora_rank it was saved with"))
        return
    absent = [name for name, shape in own.items() if name not in state or state[name].shape != shape]
    if absent:
        cause = f"it lacks {len(absent)} of this adapter's {len(own)} tensors, first {absent[0]}"
        raise RequestError(message("checkpoint", cause, remedy))
    if surplus := [name for name in theirs if name not in own]:
        cause = f"this adapter has no place for {len(surplus)} of its {len(theirs)} tensors, first {surplus[0]}"
        raise RequestError(message("checkpoint", cause, remedy))
    was, here = _alpha(checkpoint.get("hyper_parameters", {})), _alpha(options)
    if was is not None and here is not None and was != here:
        cause = f"its adapter was trained at lora_alpha {was:g}, and here it is {here:g}"
        raise RequestError(message("checkpoint", cause, f"pass the lora_alpha it was saved with ({was:g})"))


def _alpha(options: Mapping[str, Any]) -> float | None:
    """The alpha in force under options of `InstructTuningModule`; None where they name no rank."""
    rank, alpha = options.get("lora_rank"), options.get("lora_alpha")
    return None if not rank else float(2 * rank if alpha is None else alpha)


@contextmanager
def cast_once(network: Any, precision: AbstractContextManager[Any]) -> Iterator[None]:
    """Within autocast, adapters take their input as it comes: peft would make it fp32, and autocast bf16 again.

    The results have the same bits; a training step of SmolLM2 in bf16 takes 3 to 5 % less time.
    """
    casting = [module for module in network.modules() if getattr(module, "cast_input_dtype_enabled", False)]
    for module in casting:
        module.cast_input_dtype_enabled = False
    try:
        with precision:
            yield
    finally:
        for module in casting:
            module.cast_input_dtype_enabled = True


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
        cause = f"{quantization} needs bitsandbytes, which is not installed"
        raise RequestError(message("quantization", cause, remedy))


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
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    }

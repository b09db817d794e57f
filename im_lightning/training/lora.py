"""Attaching a LoRA adapter through peft, which is imported here only, because it takes seconds."""

from __future__ import annotations

from typing import Any

from im_lightning.errors import RequestError, message


def attach_lora(network: Any, rank: int, alpha: float | None, dropout: float, target_modules: str | list[str]) -> Any:
    """Freezes a causal LM and adds trainable low-rank updates; the start is drawn from the global generator.

    Args:
        network: A transformers causal LM.
        rank: Rank of the updates.
        alpha: Scale, applied as alpha / rank; None for twice the rank.
        dropout: In front of the updates.
        target_modules: "all-linear", or names of layers.

    Returns:
        A `peft.PeftModel`, its adapter in fp32.

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
        return get_peft_model(network, config)
    except ValueError as error:
        if "Target modules" not in str(error):
            raise
        cause = f"{target_modules!r} names no layer of the model ({type(network).__name__})"
        remedy = 'use "all-linear", or names such as q_proj and v_proj that the model has'
        raise RequestError(message("lora_target_modules", cause, remedy)) from error

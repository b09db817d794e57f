"""Settings of what makes answers; commands take them as parameters and offer a flag per field."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generating:
    """How answers are made."""

    max_new_tokens: int = 512
    """Most tokens of an answer; longer ones are cut, and counted."""
    temperature: float = 0.0
    """0 takes the most likely token each time; else tokens are drawn."""
    seed: int = 0
    """Decides what is drawn."""
    batch_tokens: int = 8192
    """Tokens per batch, prompts, answers and padding."""
    precision: str = "auto"
    """auto, fp32 or bf16."""
    device: str = "auto"
    """cpu, cuda or auto."""

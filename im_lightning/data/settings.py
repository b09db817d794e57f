"""Settings that several rooms share, each declared here once: how rows are read, and how they are encoded.

Commands take these dataclasses as parameters and offer a flag per field, described by the text under it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    format: str = "auto"
    """auto, alpaca, sharegpt, messages or prompt-response."""
    on_bad_row: str = "error"
    """error (stop at the first bad row) or quarantine (set bad rows aside, with their reasons, and go on)."""
    columns: str | None = None
    """Which field holds what, such as prompt=question,context=passage,response=answer; by default by known names."""
    answer: str = "error"
    """Of several responses: error (refuse the row), first or all (of a list), or chosen (of a pair of preferences)."""


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens: the base model whose tokenizer encodes them, the template, the length."""

    model: str | None = None
    """Base model, a checkpoint folder or Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a base model on the hub."""
    template: str = "auto"
    """auto (the tokenizer's chat template if it has one, else alpaca), alpaca, chat, none (prompt and completion as
    they stand), or a file of a chat template, NAME.jinja."""
    max_length: int = 1024
    """Tokens per example; longer ones are cut, and counted."""
    cache_dir: str | None = None
    """Score store; by default $IM_LIGHTNING_CACHE or ~/.cache/im_lightning."""
    turns: str = "last"
    """Answers that count in training where the template writes earlier ones otherwise than they were generated (Qwen3,
    Phi-3): last, or each in its own history. Scores count the last."""

"""Settings that the experiments share, each declared here once: what a study starts from, and how it finetunes.

Commands take the groups as parameters and offer a flag per field, described by the text under it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Study:
    """What a comparison or a search starts from."""

    data: list[str]
    """The pool, as it was scored: files, folders or data sets."""
    scores: str
    """Score table of the pool (im-lightning score)."""
    rule: str | None = None
    """Rule file or published name; a comparison without one leaves out the arms that need it."""
    weighting: str = "auto"
    """Of the rule's weights: auto, tilt, softmax, rank or top."""
    seed: int = 0
    """The first seed; the others follow it."""
    mixture: str | None = None
    """Mixture of sources (im-lightning mix), for the arms mix and mix+rule of a comparison."""
    exclude: str | None = None
    """Rows that share this much with an evaluation set are in no arm: prompt (the usual: the same prompt, whatever the
    answer), normalised (but for case, space and punctuation) or exact; what was begun goes on with its own."""
    force: bool | str = False
    """Go on with a rule that its own runs find no better than the mean; after it, separated by commas, what else to
    accept: other-base (a rule of other models), seen-evaluation (a set that it was fitted on); says so loudly."""


@dataclass(frozen=True)
class Tuning:
    """How each finetune is made, as the commands offer it."""

    lora_rank: int = 0
    """Rank of LoRA; 0 finetunes all weights. Under LoRA the paper saw no effect of selection."""
    learning_rate: float | None = None
    """Peak learning rate; by default 2e-5, with LoRA 2e-4."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises."""
    epochs: int = 1
    """Passes over the rows; in a comparison, tokens and steps are those of one."""
    accumulate: int = 1
    """Batches per optimiser step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    device: str = "auto"
    """cpu, cuda, mps or auto; one device."""
    dtype: str = "auto"
    """fp32, bf16 or auto (bf16 where the device multiplies it faster)."""
    token_budget: int | str = "auto"
    """Tokens of a micro-batch on the device, padding included, or auto by its memory; the gradient is the same."""

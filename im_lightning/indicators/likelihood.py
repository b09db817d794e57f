"""`ppl`, `ppl_unconditional`, `ifd`: how surprising the base model finds a response, with and without its prompt.

`ifd` is Superfiltering's ratio ppl / ppl_unconditional; the field uses the name for at least four quantities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from im_lightning.data.example import Example
from im_lightning.data.prompt_templates import SPECIAL_TOKEN
from im_lightning.indicators.base import EMPTY_RESPONSE, Features, Indicator, Likelihood, Scores, register_indicator

if TYPE_CHECKING:
    from im_lightning.data.tokenization import Encoded

NO_TOKENS = "no response token to predict"
NOT_FINITE = "the model's loss is not finite"


def perplexity(examples: Sequence[Example], likelihood: Likelihood | None, encoded: Sequence[Encoded] | None) -> Scores:
    """exp(nats / tokens) per example, or the reason why there is none."""
    if likelihood is None:
        raise ValueError("the likelihood of these examples was not computed")
    values = np.full(len(likelihood.sums), np.nan)
    reasons: list[str | None] = [None] * len(values)
    some = likelihood.counts > 0
    with np.errstate(over="ignore"):  # a mean above 709 nats overflows; said as a reason
        values[some] = np.exp(likelihood.sums[some] / likelihood.counts[some])
    for position, example in enumerate(examples):
        if not example.response and not example.messages[-1].fields:  # the model writes calls and reasoning, too
            values[position], reasons[position] = np.nan, EMPTY_RESPONSE
        elif not some[position]:
            reasons[position] = NO_TOKENS
        elif not np.isfinite(values[position]):
            values[position], reasons[position] = np.nan, NOT_FINITE
    return Scores(values, reasons, _notes(encoded or ()))


def _notes(encoded: Sequence[Encoded]) -> list[str | None]:
    notes: list[str | None] = []
    for e in encoded:
        cut = [part for part, tokens in (("prompt", e.truncated_prompt), ("response", e.truncated_response)) if tokens]
        words = [f"{' and '.join(cut)} cut"] if cut else []
        mask = e.response_mask
        answers = np.count_nonzero(mask[1:] > mask[:-1])
        other = answers > 1 or (answers and not e.loss_mask[-1])  # or one that is not the last: the end is not trained
        words += ["several answers"] if other else []
        notes.append(", ".join([*words, *([SPECIAL_TOKEN] if e.special else [])]) or None)
    return notes if any(notes) else []


@register_indicator("ppl")
class Perplexity(Indicator):
    """exp(mean negative log-likelihood of the assistant tokens given what precedes them); the paper's PPL."""

    needs = ("conditional",)

    def compute(self, features: Features) -> Scores:
        return perplexity(features.examples, features.conditional, features.encoded)


@register_indicator("ppl_unconditional")
class UnconditionalPerplexity(Indicator):
    """The same of the last response without its prompt, after BOS alone (Superfiltering's direct perplexity).

    Where BOS opens the turns of a chat (ChatML), after what the template writes before an answer: see
    `data.tokenization.unconditional_start`.
    """

    needs = ("unconditional",)

    def compute(self, features: Features) -> Scores:
        return perplexity(features.examples, features.unconditional, features.encoded_alone)


@register_indicator("ifd")
class InstructionFollowingDifficulty(Indicator):
    """ppl / ppl_unconditional (Li et al. 2024, Superfiltering): below 1 where the prompt helps to predict."""

    needs = ()
    derived_from = ("ppl", "ppl_unconditional")

    def derive(self, columns: Mapping[str, Scores]) -> Scores:
        given, alone = columns["ppl"], columns["ppl_unconditional"]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            values = given.values / alone.values
        reasons = [a or b for a, b in zip(given.reasons, alone.reasons, strict=True)]
        for position in np.flatnonzero(~np.isfinite(values)):
            values[position] = np.nan
            reasons[position] = reasons[position] or NOT_FINITE
        return Scores(values, reasons, joined(given.notes, alone.notes))


def joined(given: Sequence[str | None], alone: Sequence[str | None]) -> list[str | None]:
    """The conditional side's note where it has one: it sees the longer text, so it is cut more often."""
    if not (given and alone):
        return list(given or alone)
    return [a or b for a, b in zip(given, alone, strict=True)]

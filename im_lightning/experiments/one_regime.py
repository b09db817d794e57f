"""One regime from the runs behind a rule to what the rule is used for: method and learning rate."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from im_lightning.experiments.finetuning import Tuning
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.regime import lora_rank_of
from im_lightning.rule.published import load_rule


def as_in_rule(tuning: Tuning, rule: str | None, ledger: Path | None = None) -> tuple[Tuning, list[str]]:
    """How to finetune: where the request does not say, as an experiment that goes on was begun, else by the method and
    learning rate of the rule's runs.

    Args:
        tuning: What was asked for.
        rule: Rule file or published name.
        ledger: Where the experiment keeps its runs; earlier versions began them by defaults of their own.

    Returns:
        The settings, their rank and rate named; and what a reader must know of them, a sentence, where the rule says
        how its runs were made.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said where the rule is used
        regime = {} if rule is None else load_rule(rule).regime
    begun = [] if ledger is None else [r.regime for r in RunLedger(ledger).records() if r.steps]
    usual = begun[-1] if begun else regime
    rank, rate = lora_rank_of(usual.get("method")), usual.get("learning_rate")
    if rank is None:
        return replace(tuning, lora_rank=tuning.lora_rank or 0), []
    chosen = rank if tuning.lora_rank is None else tuning.lora_rank
    own = rate if tuning.learning_rate is None and chosen == rank else tuning.learning_rate
    made = replace(tuning, lora_rank=chosen, learning_rate=own)
    if lora_rank_of(regime.get("method")) is None:
        return made, []
    here = f"lora r={chosen} alpha={2 * chosen:g} all-linear" if chosen else "full"
    if here == regime["method"] and own == regime.get("learning_rate"):
        return made, [f"Method and learning rate are those of the rule's runs: {here}, {own:g}."]
    return made, [
        f"NOT AS THE RULE'S RUNS: they were finetuned by {regime['method']} at learning rate "
        f"{regime.get('learning_rate')}, these by {here} at {'its usual one' if own is None else f'{own:g}'}; what "
        "helped there need not help here."
    ]

"""What a transfer makes, as its flags."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransferSettings:
    """What is finetuned beside the runs of a small base."""

    model: str
    """The other base model (folder or Hugging Face id)."""
    runs: int = 10
    """Subsets of the ledger's designed runs to finetune on it, drawn by --seed; more of them go on with the same."""
    learning_rates: str | None = None
    """Learning rates of the other base, separated by commas; by default that of the ledger's runs."""
    proxy_rates: str | None = None
    """Further learning rates of the small base, on the same subsets: a small one may rank better than its usual one."""
    rule: str | None = None
    """Rule fitted on the ledger's runs: out/rule.json is this rule with the evidence for the other base."""
    scores: str | None = None
    """Score table of the pool that decided the subsets; by default the one that the ledger's runs name."""
    evaluation: str | None = None
    """Evaluation set, where the runs have several; by default the rule's, and with a rule no other."""
    regime: str | None = None
    """Id of a run: only runs of its regime. Needed where there are several and no rule."""
    arguments: str | None = None
    """More arguments of im-lightning fit for the other base, in one text."""
    seed: int = 0
    """Decides which subsets."""

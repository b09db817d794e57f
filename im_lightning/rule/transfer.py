"""Evidence that a rule may be used for another base model: the same subsets, finetuned on both, rank alike.

It stands in the rule file (`transfers`), one entry per base and learning rate, each with the digest of the rule that it
was measured for: a rule that was fitted again, or changed, has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from im_lightning._utils.hashing import digest_json
from im_lightning._utils.json_diff import differences
from im_lightning.ledger.record import RunRecord, now
from im_lightning.rule.rule_file import RuleFields, rule_to_json
from im_lightning.rule.validation.agreement import RankAgreement

GRAVE = ("base_model", "template")
"""Fields of a regime in which a rule's runs and its use may not differ without evidence or force."""
_PREDICTS = ("intercept", "offset", "regressors", "evaluation", "regime", "ledger_digest", "pool_digest")
_NUMBERS = ("spearman", "low", "high", "pairs")


def predicted_digest(rule: RuleFields) -> str:
    """Digest of what the rule predicts and of the runs behind it; its diagnostics, which later versions add to, are
    left out."""
    value = rule_to_json(rule)
    return digest_json({name: value.get(name) for name in _PREDICTS})


def evidence(
    rule: RuleFields, found: RankAgreement, small: Iterable[RunRecord], target: Iterable[RunRecord]
) -> dict[str, Any]:
    """An entry of `transfers`, JSON-like: how `small` and `target` runs of the same subsets agree on the rule's
    evaluation loss."""
    ones, others = list(small), list(target)
    there = others[0].regime
    return {
        "rule": predicted_digest(rule),
        "evaluation": rule.evaluation,
        **{name: there.get(name) for name in (*GRAVE, "method", "learning_rate")},
        "learning_rate_of_rule": ones[0].regime.get("learning_rate"),
        **found.to_json(),
        "runs": [sorted(r.run_id for r in runs) for runs in (ones, others)],
        "created": now(),
    }


def weigh_evidence(rule: RuleFields, regime: Mapping[str, Any]) -> tuple[str, str]:
    """What the rule's evidence says of a run of this regime: (why it is accepted, ""), or ("", why it is not).

    It is accepted where the lower limit of the rank correlation is above 0.
    """
    here = {name: regime[name] for name in GRAVE if regime.get(name) is not None}
    own = [e for e in rule.transfers if not differences({name: e.get(name) for name in here}, here)]
    if not own:
        return "", ""
    valid = [e for e in own if e.get("rule") == predicted_digest(rule)]
    if not valid:
        return "", "its transfer evidence was measured for another rule (this one was fitted again, or changed)"
    good = [e for e in valid if _number(e, "low") > 0]
    texts = [
        f"{RankAgreement(int(_number(e, 'subsets')), *(_number(e, n) for n in _NUMBERS))} at learning rate "
        f"{e.get('learning_rate')} there and {e.get('learning_rate_of_rule')} in the rule's runs"
        for e in good or valid
    ]
    if good:
        return f"its runs rank subsets as runs of this base do: {'; '.join(texts)}", ""
    return "", f"its transfer evidence does not show that rankings carry over: {'; '.join(texts)}"


def _number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan

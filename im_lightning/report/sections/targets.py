"""Section: several targets. What the rule's weights do to each, and how well losses and scores follow each other."""

from __future__ import annotations

from typing import Any

from im_lightning._utils.numbers import number_or_dash as number
from im_lightning.ledger.regime import group_regimes
from im_lightning.ledger.run_table import log_losses
from im_lightning.ledger.targets import SCORE, set_of
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Bullets, Head, Section, Table, Words
from im_lightning.report.sections import report_section
from im_lightning.report.text import interval, label
from im_lightning.rule.metrics import RuleMetrics
from im_lightning.rule.summary import guard_text, worse_targets
from im_lightning.rule.validation.targets import target_correlations

MOST_PAIRS = 45
_WORDS = {True: "worse", False: "", None: "not known"}


@report_section("targets", "Several targets", place=65)
def targets_section(inputs: ReportInputs, section: Section) -> None:
    """The section, from the ledger's losses and scores and the rule's guard; none where there is a single loss."""
    metrics = RuleMetrics() if inputs.rule is None else inputs.rule.metrics_
    pairs, which = (metrics.target_correlations, "the rule's runs") if inputs.records is None else _of_ledger(inputs)
    if not pairs and not metrics.targets:
        return
    section.lead = (
        "A rule predicts one target. Whether a lower loss comes with better scores, and with a lower loss on other "
        "sets, is a question of its own: here is what these runs say."
    )
    if said := guard_text(metrics):
        unknown = any(one["worse"] is None for one in metrics.targets)
        kind = "bad" if worse_targets(metrics) else "note" if unknown else "good"
        section.short = [(said, kind)]
        section.parts += [Words(said, kind), _guard(metrics.targets)]
    follows = [text for one in pairs[:MOST_PAIRS] if (text := _follows(one))]
    section.parts += [Bullets(follows)] if follows else []
    section.parts += [_correlations(pairs, which)] if pairs else []


def _of_ledger(inputs: ReportInputs) -> tuple[list[dict[str, Any]], str]:
    """Correlations over the designed runs of the largest regime, and which runs these are."""
    designed = [r for r in inputs.records or [] if r.purpose == "designed" and r.status == "complete"]
    regimes = group_regimes(designed, sorted({n for r in designed for n in r.phi_means}), None)
    if not regimes:
        return [], ""
    runs = regimes[0].records
    which = f"the {len(runs)} designed runs" + (f" of the largest of {len(regimes)} regimes" * (len(regimes) > 1))
    return target_correlations(log_losses(runs), [r.subset_key for r in runs]), which


def _follows(one: dict[str, Any]) -> str:
    """How well a loss follows a score; "" of two losses or two scores."""
    loss, score = sorted(one["targets"], key=lambda name: name.startswith(SCORE))
    if loss.startswith(SCORE) or not score.startswith(SCORE):
        return ""
    low, high = one["spearman_low"], one["spearman_high"]
    said = "which shows nothing either way"
    if low is not None and low > 0:
        said = "so that a lower loss comes with a better score"
    elif high is not None and high < 0:
        said = "so that a lower loss comes with a WORSE score"
    rho = f"ρ {number(one['spearman'], '.2f')} (95 % {interval(low, high, '.2f')}; {one['subsets']} subsets)"
    return f"The loss on {label(loss, 60)} follows the exact match on {label(set_of(score), 60)} at {rho}, {said}."


def _guard(targets: list[dict[str, Any]]) -> Table:
    heads = [
        Head("target", right=False),
        Head("weight", "In the sum that the rule predicts; watched: in none."),
        Head(
            "change", "Of log loss or log error rate, from the runs' mean to where the weights aim; above 0 is worse."
        ),
        Head("95 % interval"),
        Head("subsets"),
        Head("", right=False),
    ]
    rows = [
        [
            label(one["target"], 60),
            number(one["weight"], ".3g") if one["weight"] else "watched",
            number(one["change"], "+.3g"),
            interval(one["low"], one["high"]),
            str(one["subsets"]),
            _WORDS[one["worse"]],
        ]
        for one in targets
    ]
    strong = frozenset(k for k, one in enumerate(targets) if one["worse"])
    return Table("What weights by the rule do to each named target", heads, rows, strong)


def _correlations(pairs: list[dict[str, Any]], which: str) -> Table:
    heads = [
        Head("one", right=False),
        Head("other", right=False),
        Head("Spearman", "1: the same order of the subsets, both improve together; 0: one says nothing of the other."),
        Head("95 %"),
        Head("Pearson", "Of log losses and log error rates."),
        Head("95 % "),
        Head("subsets"),
    ]
    rows = [
        [
            *(label(name, 60) for name in one["targets"]),
            number(one["spearman"], ".2f"),
            interval(one["spearman_low"], one["spearman_high"], ".2f"),
            number(one["pearson"], ".2f"),
            interval(one["pearson_low"], one["pearson_high"], ".2f"),
            str(one["subsets"]),
        ]
        for one in pairs[:MOST_PAIRS]
    ]
    rest = len(pairs) - len(rows)
    left = f"{rest:,} further pairs are not listed." if rest else ""
    return Table(f"Losses and scores over {which}", heads, rows, left_out=left, folded=len(rows) > 12)

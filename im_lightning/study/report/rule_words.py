"""What may be said of a rule in plain words; every sentence follows from the numbers in the rule file."""

from __future__ import annotations

from typing import Any

from im_lightning.rule.rule_file import RuleFields
from im_lightning.study.report.text import number, percent

METHODS = {
    "ols": "least squares",
    "ridge": "ridge",
    "elastic-net": "elastic net",
    "additive": "additive",
    "best-subset": "best subset",
    "mean": "the mean",
    "published": "published",
}
EXPLAINED = (
    "The mean: no rule at all. Least squares: a straight line per regressor. Ridge: the same, drawn towards zero. "
    "Elastic net: the same again, weak ones set to zero. Additive: a curve per indicator. Best subset: the paper's "
    "procedure, chosen by its fit to the runs it has seen, for comparison only."
)
RIVALS = {"mean": "the mean of the runs", "length": "length alone", "sources": "the shares of the sources alone"}
SINGLE_SOURCES = "it may know little more than which source a row comes from"


def headline(rule: RuleFields) -> tuple[str, str]:
    """The verdict on a rule, and its kind ("good", "bad", "note")."""
    m = rule.metrics_
    if not rule.n_runs_:
        return (
            f"UNVERIFIED: this is the published rule {rule.name}, fitted by others on "
            f"{m.get('source', 'runs of their own')}. Nothing here shows that it holds for your model and data.",
            "note",
        )
    if rule.beats_mean is True:
        return f"The rule is {m.get('verdict') or 'better than the mean'}.", "good"
    if rule.beats_mean is False:
        text = m.get("verdict") or "no better than the mean"
        return f"{text[:1].upper()}{text[1:]}. Do not choose data by it: make more designed runs, and refit.", "bad"
    held = _held(m)
    if held is not None and held <= 0:
        return (
            "This rule does not beat the mean: on runs it has not seen it predicts no better than the mean of the "
            f"others does (held-out R² {held:.3f}). Do not choose data by it.",
            "bad",
        )
    return (
        f"Whether this rule is better than the mean was not tested (held-out R² {number(held, '.3f')}); "
        "im-lightning refit does test it.",
        "note",
    )


def _held(metrics: dict[str, Any]) -> float | None:
    """The held-out R² to speak of: by folds of whole subsets; of older rule files by single subsets."""
    found = metrics.get("grouped_r2")
    return metrics.get("leave_subset_out_r2") if found is None else found


def fitted_on(rule: RuleFields) -> str:
    """Method and runs, in a sentence."""
    m = rule.metrics_
    if not rule.n_runs_:
        return f"Coefficients as published, R² {number(m.get('r2'), '.3f')} in the sample they were fitted on."
    return (
        f"Method {METHODS.get(rule.method, rule.method)}, fitted on {rule.n_runs_} runs of "
        f"{m.get('n_subsets', rule.n_runs_)} different subsets; it predicts the logarithm of the loss on "
        f"{rule.evaluation or 'the evaluation set'}."
    )


def recommended(rule: RuleFields) -> str:
    """Which candidate is recommended and why; "" where there was no choice."""
    m = rule.metrics_
    name = m.get("recommended")
    if not m.get("candidates") or not name:
        return ""
    if name == "mean":
        return "Recommended: the mean of the runs, that is, no rule."
    rules = [c for c in m["candidates"] if c.get("method") not in ("mean", "best-subset")]
    if len(rules) < 2:
        return f"The method ({METHODS.get(name, name)}) was given; no other was considered."
    why = "the simplest whose error on unseen runs is within one standard error of the least"
    return f"Recommended: {METHODS.get(name, name)}, {why}."


def gains(metrics: dict[str, Any]) -> list[str]:
    """What the rule gains over each rival, one sentence each."""
    out = []
    for name, one in (metrics.get("rivals") or {}).items():
        title = RIVALS.get(name, name)
        if one.get("reason"):
            out.append(f"Over {title} the gain is not known: {one['reason']}.")
            continue
        gain, low, high = one.get("gain"), one.get("gain_low"), one.get("gain_high")
        if gain is None:
            out.append(f"Over {title} the gain is not known.")
            continue
        numbers = f"{gain:+.3f} in held-out R²"
        if low is None or high is None:
            out.append(f"Over {title} it gains {numbers}.")
            continue
        numbers += f" (95 % interval {low:.3f} to {high:.3f})"
        if low > 0:
            out.append(f"Over {title} it gains {numbers}.")
        elif high < 0:
            out.append(f"It is worse than {title}: {numbers}.")
        else:
            more = f"; {SINGLE_SOURCES}" if name == "sources" else ""
            out.append(f"Over {title} no gain is shown: {numbers}, an interval that includes zero{more}.")
    return out


def explained(metrics: dict[str, Any]) -> str:
    """What the R² numbers mean for this rule."""
    held = _held(metrics)
    seen = number(metrics.get("r2"), ".3f")
    said = f"R² is the share of the differences between runs that a rule explains: {seen} for the "
    said += (
        f"runs it was fitted on, {number(held, '.3f')} held out, that is for runs it had not seen (0: no better than "
    )
    said += "their mean; below 0: worse). Believe the held-out number."
    if metrics.get("noise_ceiling_r2") is not None:
        said += (
            f" More than {metrics['noise_ceiling_r2']:.3f} cannot be expected, for equal subsets trained with other "
            "seeds differ too (the noise ceiling)."
        )
    return said


def collinearity(metrics: dict[str, Any]) -> str:
    """What the condition number says."""
    value = metrics.get("condition_number")
    if value is None:
        return ""
    told = "the runs tell the indicators apart well" if value < 10 else "the runs tell some indicators apart badly"
    told = "the runs hardly tell some indicators apart" if value >= 30 else told
    return (
        f"Condition number {number(value, '.3g')} (1 is best; from 10 on single coefficients become doubtful, from 30 "
        f"on they mean little): {told}."
    )


def stability(rule: RuleFields) -> str:
    """Which signs are doubtful; "" where that was not examined."""
    bootstrap = rule.metrics_.get("bootstrap") or {}
    if not bootstrap or rule.knots:
        return ""
    weak = [n for n in rule.feature_names_in_ if (bootstrap.get(n) or {}).get("sign_stability", 1.0) < 0.95]
    if not weak:
        return "Every coefficient kept its sign in at least 95 % of the refits on resampled runs."
    shown = ", ".join(
        f"{rule.transforms_[n].label(n)} ({percent(bootstrap[n]['sign_stability'])})" for n in weak
    )  # fmt: skip
    return f"Their sign was the same in fewer than 95 % of the refits on resampled runs, so do not read it: {shown}."

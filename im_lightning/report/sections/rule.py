"""Section: the rule. Its verdict, coefficients, baselines, and how its predictions met the runs.

What may be said of a rule in plain words; every sentence follows from the numbers in the rule file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from im_lightning._utils.numbers import number_or_dash as number
from im_lightning.ledger.targets import is_score, target_text
from im_lightning.report.charts import Dot, dots
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Bullets, Figures, Head, Printed, Section, Table, Words
from im_lightning.report.sections import report_section
from im_lightning.report.sections.rule_predictions import prediction_parts, shape_parts
from im_lightning.report.svg import Figure
from im_lightning.report.text import interval, label, p_value, percent
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.metrics import RuleMetrics
from im_lightning.rule.rule_file import RuleFields
from im_lightning.rule.summary import not_borne_out, share_effects

METHODS = {
    "ols": "least squares",
    "ridge": "ridge",
    "elastic-net": "elastic net",
    "ridge+shares": "ridge with source shares",
    "additive": "additive",
    "additive+shares": "additive with source shares",
    "partial-pooling": "slopes per source, partly pooled",
    "offset": "with an offset",
    "offset-robust": "with an offset, robust",
    "best-subset": "best subset",
    "mean": "the mean",
    "published": "published",
}
EXPLAINED = (
    "The mean: no rule at all. Least squares: a straight line per regressor. Ridge: the same, drawn towards zero. "
    "Elastic net: the same again, weak ones set to zero. Additive: a curve per indicator. With source shares: a slope "
    "per source beside these. Partly pooled: slopes of the indicators per source, drawn to common ones. With an "
    "offset: the loss is a part that no data moves plus an exponential of the straight line; robust: runs far off "
    "count less. Best subset: the paper's procedure, chosen by its fit to the runs it has seen, for comparison only."
)
BASELINES = {"mean": "the mean of the runs", "length": "length alone", "sources": "the shares of the sources alone"}
SINGLE_SOURCES = "it may know little more than which source a row comes from"


def headline(rule: RuleFields) -> tuple[str, str]:
    """The verdict on a rule, and its kind ("good", "bad", "note")."""
    m = rule.metrics_
    if not rule.n_runs_:
        return (
            f"UNVERIFIED: this is the published rule {rule.name}, fitted by others on "
            f"{m.source or 'runs of their own'}. Nothing here shows that it holds for your model and data.",
            "note",
        )
    if rule.beats_mean is True:
        return f"The rule is {m.verdict or 'better than the mean'}.", "good"
    if m.beats_mean is False:
        text = m.verdict or "no better than the mean"
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
        "im-lightning refit does test it, where the runs are enough.",
        "note",
    )


def _held(metrics: RuleMetrics) -> float | None:
    """The held-out R² to speak of: by folds of whole subsets; of older rule files by single subsets."""
    found = metrics.grouped_r2
    return metrics.leave_subset_out_r2 if found is None else found


def fitted_on(rule: RuleFields) -> str:
    """Method and runs, in a sentence."""
    m = rule.metrics_
    if not rule.n_runs_:
        return f"Coefficients as published, R² {number(m.r2, '.3f')} in the sample they were fitted on."
    return (
        f"Method {METHODS.get(rule.method, rule.method)}, fitted on {rule.n_runs_} runs of "
        f"{m.n_subsets or rule.n_runs_} different subsets; it predicts the logarithm of the "
        f"{'error rate' if is_score(rule.evaluation) else 'loss'} on "
        f"{target_text(rule.evaluation) or 'the evaluation set'}."
    )


def recommended(rule: RuleFields) -> str:
    """Which candidate is recommended and why; "" where there was no choice."""
    m = rule.metrics_
    name = m.recommended
    if not m.candidates or not name:
        return ""
    if name == "mean":
        return "Recommended: the mean of the runs, that is, no rule."
    rules = [c for c in m.candidates if c.get("method") not in ("mean", "best-subset")]
    if len(rules) < 2:
        return f"The method ({METHODS.get(name, name)}) was given; no other was considered."
    why = "the simplest whose error on unseen runs is within one standard error of the least"
    return f"Recommended: {METHODS.get(name, name)}, {why}."


def gains(metrics: RuleMetrics) -> list[str]:
    """What the rule gains over each baseline, one sentence each; then why that may not fit the verdict."""
    out = []
    for name, one in metrics.rivals.items():
        title = BASELINES.get(name, name)
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
    return out + list(filter(None, [not_borne_out(metrics)]))


def explained(metrics: RuleMetrics) -> str:
    """What the R² numbers mean for this rule."""
    held = _held(metrics)
    seen = number(metrics.r2, ".3f")
    said = f"R² is the share of the differences between runs that a rule explains: {seen} for the "
    said += (
        f"runs it was fitted on, {number(held, '.3f')} held out, that is for runs it had not seen (0: no better than "
    )
    said += "their mean; below 0: worse). Believe the held-out number."
    if metrics.noise_ceiling_r2 is not None:
        low, high = metrics.noise_ceiling_low, metrics.noise_ceiling_high
        interval = "" if low is None or high is None else f" (95 % interval {low:.2f} to {high:.2f})"
        said += (
            f" More than {metrics.noise_ceiling_r2:.3f}{interval} cannot be expected, for equal subsets trained with "
            "other seeds differ too (the noise ceiling)."
        )
    return said


def collinearity(metrics: RuleMetrics) -> str:
    """What the condition number says."""
    value = metrics.condition_number
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
    bootstrap = rule.metrics_.bootstrap
    if not bootstrap or rule.knots:
        return ""
    weak = [n for n in rule.feature_names_in_ if (bootstrap.get(n) or {}).get("sign_stability", 1.0) < 0.95]
    if not weak:
        return "Every coefficient kept its sign in at least 95 % of the refits on resampled runs."
    shown = ", ".join(f"{rule.transforms_[n].label(n)} ({percent(bootstrap[n]['sign_stability'])})" for n in weak)
    return f"Their sign was the same in fewer than 95 % of the refits on resampled runs, so do not read it: {shown}."


_COEFFICIENTS = (
    Head("regressor", "An indicator, on the scale on which the rule sees it.", right=False),
    Head("coef", "Change of the log loss when the subset's mean of this regressor rises by 1, the others unchanged. "
                 "Below zero: more of it, lower loss."),
    Head("se", "Standard error: how far the coefficient would typically move with other runs."),
    Head("p", "How often chance alone would give a coefficient this far from zero, if it were zero."),
    Head("95 % interval", "Where the coefficient plausibly lies; one that includes zero leaves the sign open."),
    Head("VIF", "Variance inflation: how much the other regressors blur this one. 1 is none; above 10 the coefficient "
                "on its own means little."),
    Head("bootstrap 95 %", "The same interval by refits on resampled subsets, without assumptions on the noise."),
    Head("same sign", "Share of those refits in which the coefficient kept its sign."),
    Head("effect of one sd", "The coefficient times the spread of this regressor over the runs: what makes different "
                             "regressors comparable, and what the figure shows."),
)  # fmt: skip
_CANDIDATES = (
    Head("rule", EXPLAINED, right=False),
    Head("terms", "Coefficients that are not zero."),
    Head("R² in sample", "Share of the runs' differences explained, for runs the rule has seen. Always flatters."),
    Head("leave-one-out", "The same for each run, predicted by a rule fitted on the others."),
    Head("R² held out", "The same with whole groups of subsets left out: what to compare by."),
    Head("error held out", "Typical error of the prediction for unseen runs, in log loss."),
    Head("± se", "Standard error of that error."),
    Head("Spearman", "Whether the order of the runs is right: 1 is the true order, 0 any."),
    Head("AIC", "In-sample fit charged for the number of terms; lower is better."),
    Head("BIC", "The same with a higher charge."),
)
_BASELINES = (
    Head("baseline", "A rule that knows much less; one that is no worse makes the rule doubtful.", right=False),
    Head("R² held out"),
    Head("error held out"),
    Head("gain of the rule", "R² of the rule minus R² of the baseline, both held out."),
    Head("95 % interval", "Of the gain; one that includes zero shows no gain."),
)
_SHORT = {"mean": "the mean", "length": "length alone", "sources": "sources alone"}
_UNIVARIATE = (
    Head("indicator alone", right=False),
    Head("Pearson", "How closely the runs' mean of this indicator and the log loss lie on a line; from −1 to 1."),
    Head("95 %"),
    Head("Spearman", "The same for their order, whatever the shape."),
    Head("95 % ", "Of Spearman."),
    Head("KS", "Distance between the distributions of low-loss and high-loss runs: 0 alike, 1 apart."),
    Head("p (Holm)", "How often chance alone would do as much, corrected for asking about many indicators."),
)


@report_section("rule", "The rule", place=10)
def rule_section(inputs: ReportInputs, section: Section) -> None:
    """The section, from the rule file and, where given, the ledger."""
    rule = inputs.rule
    if rule is None:
        section.absent = "add --rule rule.json (im-lightning refit LEDGER --out rule.json)."
        return
    section.lead = (
        "The rule predicts the loss that a model reaches after finetuning on a subset, from the subset's mean "
        "indicators. Read the verdict first; the coefficients are worth a look only where it is good."
    )
    said = headline(rule)
    advice, against = recommended(rule), gains(rule.metrics_)
    section.short = [said, *([(" ".join(against), "plain")] if against else [])]
    section.parts.append(Words(fitted_on(rule)))
    lines = [advice, *against]
    if rule.n_runs_:
        lines += [explained(rule.metrics_), collinearity(rule.metrics_), stability(rule)]
    section.parts.append(Bullets([line for line in lines if line]))
    section.parts += shape_parts(rule, _gain_figure(rule)) if rule.knots else _coefficient_parts(rule)
    if rule.knots and rule.sources_:
        heads = [Head("source", right=False), Head("effect", f"Of a row, against one of {rule.sources_[-1]}.")]
        rows = [[label(source, 40), f"{value:+.3g}"] for source, value in share_effects(rule).items()]
        section.parts.append(Table("Sources", heads, rows))
    section.parts += _candidates(rule) + _baselines(rule)
    section.parts += _sources_out(rule) + _univariate(rule)
    section.parts += prediction_parts(rule, inputs.records)
    notes = [str(n) for n in rule.metrics_.notes]
    if notes:
        section.parts += [Words("Notes of the fit:"), Bullets(notes)]
    section.parts.append(Printed("As im-lightning refit prints it", rule.summary(110)))


def _coefficient_parts(rule: LinearRule) -> list[Any]:
    bootstrap = rule.metrics_.bootstrap
    spread = None if rule.cov_ is None else np.sqrt(np.diag(rule.cov_))
    rows: list[list[str]] = []
    points: list[Dot] = []
    for j, (name, estimate) in enumerate(
        zip(["intercept", *rule.feature_names_in_], [rule.intercept_, *rule.coef_], strict=True)
    ):
        values = rule.coefficients_[j] if rule.coefficients_ else {}
        resampled = bootstrap.get(name) or {}
        shown = name if not j else rule.transforms_[name].label(name)
        size = None if spread is None or not j else float(spread[j - 1])
        rows.append(
            [
                label(shown, 40), number(float(estimate), ".4g"), number(values.get("se")), p_value(values.get("p")),
                interval(values.get("low"), values.get("high")), number(values.get("vif")),
                interval(resampled.get("low"), resampled.get("high")), percent(resampled.get("sign_stability")),
                "–" if size is None else f"{estimate * size:+.3g}",
            ]
        )  # fmt: skip
        if j:
            points.append(_point(shown, float(estimate), values, resampled, size))
    if rule.offset_:
        bounds = bootstrap.get("offset") or {}
        resampled_offset = interval(bounds.get("low"), bounds.get("high"))
        rows.append(["offset c", number(rule.offset_, ".4g"), *["–"] * 4, resampled_offset, "–", "–"])
    keep = [k for k, head in enumerate(_COEFFICIENTS) if k < 2 or any(row[k] != "–" for row in rows)]
    heads = [_COEFFICIENTS[k] for k in keep]
    out: list[Any] = []
    if points and not any(row[4] == row[6] == "–" for row in rows[1:]):
        unit = "log loss per sd of the runs" if spread is not None else "log loss per unit"
        words = (
            "Each dot is what one standard deviation of the regressor (over the runs) does to the log loss, each bar "
            "its 95 % interval. Left of zero: more of it, lower loss. Blue bars exclude zero; grey ones do not."
        )
        figure = dots("rule-coefficients", "Coefficients with 95 % intervals", points, unit)
        out += [Words(words), Figures([figure, *_gain_figure(rule)])]
    return [*out, Table("Coefficients", heads, [[row[k] for k in keep] for row in rows])]


def _point(name: str, estimate: float, values: dict[str, Any], resampled: dict[str, Any], size: float | None) -> Dot:
    low, high = values.get("low"), values.get("high")
    if low is None or high is None:
        low, high = resampled.get("low"), resampled.get("high")
    scale = 1.0 if size is None else size
    clear = low is not None and high is not None and (low > 0 or high < 0)
    tip = f"{name}: coefficient {estimate:.4g}, 95 % {interval(low, high)}"
    start, end = (None, None) if low is None or high is None else (low * scale, high * scale)
    return Dot(name, estimate * scale, start, end, "accent" if clear else "muted", tip)


def _candidates(rule: LinearRule) -> list[Any]:
    found = rule.metrics_.candidates
    rows = []
    for one in found:
        numbers = [
            number(one.get(key), form)
            for key, form in (
                ("r2", ".3f"), ("leave_one_out_r2", ".3f"), ("grouped_r2", ".3f"), ("grouped_rmse", ".3g"),
                ("grouped_rmse_se", ".1g"), ("grouped_spearman", ".2f"), ("aic", ".1f"), ("bic", ".1f"),
            )
        ]  # fmt: skip
        name = METHODS.get(one["method"], str(one["method"])) + " (recommended)" * bool(one.get("recommended"))
        rows.append([name, number(one.get("regressors"), "d"), *numbers])
    strong = frozenset(k for k, one in enumerate(found) if one.get("recommended"))
    return [Table("Candidates, each evaluated on runs it had not seen", _CANDIDATES, rows, strong)] if rows else []


def _baselines(rule: LinearRule) -> list[Any]:
    rows = []
    for name, one in rule.metrics_.rivals.items():
        if one.get("reason"):
            continue
        shown = BASELINES.get(name, name)
        gain, low, high = one.get("gain"), one.get("gain_low"), one.get("gain_high")
        rows.append([shown, number(one.get("grouped_r2"), ".3f"), number(one.get("grouped_rmse"), ".3g"),
                     number(gain, "+.3f"), interval(low, high, ".3f")])  # fmt: skip
    return [Table("Baselines of the rule", _BASELINES, rows)] if rows else []


def _gain_figure(rule: LinearRule) -> list[Figure]:
    points = []
    for name, one in rule.metrics_.rivals.items():
        gain, low, high = one.get("gain"), one.get("gain_low"), one.get("gain_high")
        if gain is not None:
            role = "muted" if low is None or high is None or low <= 0 <= high else "good" if low > 0 else "bad"
            tip = f"over {BASELINES.get(name, name)}: {gain:+.3f}, 95 % {interval(low, high, '.3f')}"
            points.append(Dot(f"over {_SHORT.get(name, name)}", gain, low, high, role, tip))
    title = "Gain of the rule over its baselines, 95 % intervals: right of zero is a gain, grey shows none"
    return [dots("rule-gains", title, points, "held-out R²")] if points else []


def _sources_out(rule: LinearRule) -> list[Any]:
    found = rule.metrics_.source_out
    if not found:
        return []
    rows = []
    for source, one in found.items():
        one = one or {}
        r2 = "not estimable" if one.get("r2") is None else number(one["r2"], ".2f")
        counts = [str(one.get(name, "–")) for name in ("trained_on", "runs")]
        values = number(one.get("law_r2"), ".2f"), r2, number(one.get("spearman"), ".2f")
        rows.append([label(source, 60), *values, *counts])
    heads = [
        Head("source left out", "The rule is fitted on runs without this source and tested on runs of which it is at "
                                "least half. Not estimable: there are too few such runs.", right=False),
        Head("R², as far as so few runs can tell", "Directions that the runs without the source say nothing about "
             "hardly count: a low value speaks against the rule, a high one only says that these runs do not."),
        Head("R²"), Head("Spearman"), Head("runs without it"), Head("runs tested on"),
    ]  # fmt: skip
    return [Table("Does it hold for a source it has never seen?", heads, rows, folded=True)]


def _univariate(rule: LinearRule) -> list[Any]:
    rows = [
        [
            label(one.get("label", one.get("indicator", "")), 40), number(one.get("pearson"), ".2f"),
            interval(one.get("pearson_low"), one.get("pearson_high"), ".2f"), number(one.get("spearman"), ".2f"),
            interval(one.get("spearman_low"), one.get("spearman_high"), ".2f"), number(one.get("ks"), ".2f"),
            p_value(one.get("p_holm")),
        ]
        for one in rule.metrics_.univariate
    ]  # fmt: skip
    return [Table("Each indicator alone, over the subsets", _UNIVARIATE, rows, folded=True)] if rows else []

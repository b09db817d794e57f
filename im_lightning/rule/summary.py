"""The regression table of a rule as plain text, with the numbers that tell whether to believe it.

Tables of a rule's summary: the candidates, the baselines, the shapes of an additive rule, the held-out sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from im_lightning._utils.numbers import number_or_dash
from im_lightning._utils.text_tables import Column, terminal_width, text_table, wrapped
from im_lightning.indicators.transforms import SHARE
from im_lightning.ledger.targets import is_score, target_text
from im_lightning.rule.kinds import kinds_lines
from im_lightning.rule.metrics import RuleMetrics
from im_lightning.rule.rule_file import RuleFields
from im_lightning.rule.validation.diagnostics import FEWEST_REPEATS, region_rank
from im_lightning.rule.validation.univariate import p_value, univariate_table

LOG_LOSS = "log evaluation loss (nats per token)"
_CANDIDATES = (
    ("regressors", "", Column("terms", rank=4)),
    ("r2", ".3f", Column("R² in sample", rank=5)),
    ("leave_one_out_r2", ".3f", Column("leave-one-out", rank=6)),
    ("grouped_r2", ".3f", Column("R² held out")),
    ("grouped_rmse", ".3g", Column("error held out", rank=2)),
    ("grouped_rmse_se", ".1g", Column("± se", rank=3)),
    ("grouped_spearman", ".2f", Column("Spearman", rank=1)),
    ("aic", ".1f", Column("AIC", rank=8)),
    ("bic", ".1f", Column("BIC", rank=7)),
)
"""(key of a row, its format, its column); `_BASELINES` likewise."""
_BASELINES = (
    ("grouped_r2", ".3f", Column("R² held out", rank=1)),
    ("grouped_rmse", ".3g", Column("error held out", rank=3)),
    ("gain", "+.3f", Column("gain of the rule")),
)
_BASELINE_NAMES = {"mean": "the mean", "length": "length only", "sources": "source shares only"}


def candidate_table(metrics: RuleMetrics, width: int) -> str:
    """Every rule considered; held out = folds of whole subsets, error = root mean squared, in log loss."""
    columns = [Column("rule", right=False), *(column for *_, column in _CANDIDATES), Column("", right=False)]
    rows = []
    for one in metrics.candidates:
        numbers = [number_or_dash(one[name], form) for name, form, _ in _CANDIDATES]
        rows.append([one["method"], *numbers, "← recommended" if one["recommended"] else ""])
    folds = metrics.folds
    what = f"candidates, held out in {folds} folds of whole subsets" if folds else "candidates"
    if any(one["method"] == "best-subset" for one in metrics.candidates):
        what += " (best-subset is the paper's procedure, for comparison)"
    return wrapped(what, width) + "\n" + text_table(columns, rows, width)


def baseline_table(metrics: RuleMetrics, width: int) -> str:
    """What the rule has to beat; gain = held-out R² of the rule − that of the baseline, its interval over subsets."""
    rows, reasons = [], []
    for name, one in metrics.rivals.items():
        label = _BASELINE_NAMES.get(name, name)
        if one.get("reason"):
            reasons.append(f"{label}: not fitted, {one['reason']}")
            continue
        low, high = one["gain_low"], one["gain_high"]
        interval = "" if low is None else f"{low:.3f}, {high:.3f}"
        rows.append([label, *(number_or_dash(one[name], form) for name, form, _ in _BASELINES), interval])
    columns = [Column("baseline", right=False), *(column for *_, column in _BASELINES), Column("95 % interval", rank=2)]
    lines = [wrapped(f"baselines of the rule ({metrics.method or 'rule'}); gain is in held-out R²", width)]
    lines.append(text_table(columns, rows, width))
    return "\n".join([*lines, *(wrapped(reason, width) for reason in reasons)])


def source_lines(metrics: RuleMetrics) -> list[str]:
    """Leave-one-source-out of the rule: trained without a source, tested where it is at least half."""
    found = metrics.source_out
    if not found:
        return []
    parts = []
    for source, one in found.items():
        counts = "" if not one or "trained_on" not in one else f"{one['trained_on']} runs without it, "
        if one is None or one["r2"] is None:
            parts.append(f"{source} not estimable" + (f" ({counts}{one['runs']} to test on)" if one else ""))
        else:
            r2, rank = number_or_dash(one["r2"], ".2f"), number_or_dash(one["spearman"], ".2f")
            if one.get("law_r2") is not None:
                r2 = f"{one['law_r2']:.2f} as far as so few runs can tell, {r2} plainly"
            parts.append(f"{source} R² {r2}, Spearman {rank} ({counts}{one['runs']} to test on)")
    return [f"without a source, tested on runs where it is at least half: {'; '.join(parts)}"]


def effects(rule: RuleFields) -> dict[str, np.ndarray]:
    """Indicator of an additive rule → its effect on log loss at its knots, relative to the runs' mean."""
    coef = dict(zip(rule.feature_names_in_, rule.coef_, strict=True))
    mean = dict(zip(rule.feature_names_in_, rule.mean_ if rule.mean_ is not None else rule.coef_ * 0, strict=True))
    found = {}
    for indicator in rule.knots:
        names = [n for n, c in zip(rule.feature_names_in_, rule.columns, strict=True) if c == indicator]
        found[indicator] = np.array([0.0, *(coef[n] for n in names)]) - sum(coef[n] * mean[n] for n in names)
    return found


def worse_targets(metrics: RuleMetrics) -> str:
    """`em:gsm8k by +0.031 (0.012 to 0.050)`: what weights make worse beyond its interval; "" where nothing."""
    worse = [one for one in metrics.targets if one.get("worse")]
    return ", ".join(f"{o['target']} by {o['change']:+.3g} ({o['low']:.3g} to {o['high']:.3g})" for o in worse)


def guard_text(metrics: RuleMetrics) -> str:
    """Whether weights are recommended, for what they do to the named targets; "" where one alone is named."""
    if not metrics.targets:
        return ""
    unknown = [f"{one['target']} ({one['reason']})" for one in metrics.targets if one.get("reason")]
    untold = f" Not known of {', '.join(unknown)}." if unknown else ""
    if worse := worse_targets(metrics):
        said = f"Weights by this rule are NOT RECOMMENDED, they make a named target worse: {worse}"
        return f"{said}, in log loss or log error rate, with a 95 % interval.{untold}"
    return f"Weights by this rule make no named target worse beyond its interval.{untold}"


def target_table(targets: Sequence[dict[str, Any]], width: int) -> str:
    """One row per named target: what the weights at the edge of the fitted region do to it."""
    columns = [Column("target", right=False), Column("weight", rank=2), Column("change"), Column("95 % interval")]
    columns += [Column("subsets", rank=1), Column("", right=False)]
    words = {True: "WORSE", False: "", None: "not known"}
    rows = [
        [
            one["target"],
            f"{one['weight']:.3g}" if one["weight"] else "watched",
            number_or_dash(one["change"], "+.3g"),
            "" if one["low"] is None else f"{one['low']:.3g}, {one['high']:.3g}",
            str(one["subsets"]),
            words[one["worse"]],
        ]
        for one in targets
    ]
    note = "change: of log loss or log error rate, from the runs' mean to where the weights aim; above 0 is worse"
    return text_table(columns, rows, width) + "\n" + wrapped(note, width)


def correlation_table(pairs: Sequence[dict[str, Any]], width: int) -> str:
    """How each two losses and scores correlate over the subsets."""
    columns = [Column("targets", right=False), Column("Spearman"), Column("95 %"), Column("Pearson", rank=2)]
    columns += [Column("95 % ", rank=3), Column("subsets", rank=1)]
    rows = []
    for one in pairs:
        cells = [" with ".join(one["targets"])]
        for name in ("spearman", "pearson"):
            low, high = one[f"{name}_low"], one[f"{name}_high"]
            cells += [number_or_dash(one[name], ".2f"), "" if low is None else f"{low:.2f}, {high:.2f}"]
        rows.append([*cells, str(one["subsets"])])
    note = "over the runs' subsets; 1: the same order, both improve together, 0: one says nothing of the other"
    return text_table(columns, rows, width) + "\n" + wrapped(note, width)


def shape_table(rule: RuleFields, width: int) -> str:
    """One row per indicator of an additive rule: its effect on log loss at its knots, relative to the runs' mean."""
    columns = [Column("indicator", right=False), Column("range"), Column("lowest at", rank=1)]
    columns.append(Column("effect at the knots, low to high", right=False, rank=2))
    rows = []
    for indicator, values in effects(rule).items():
        knots = rule.knots[indicator]
        label = rule.indicator_transforms[indicator].label(indicator)
        shape = " ".join(f"{v:+.2g}" for v in values)
        rows.append([label, f"{np.ptp(values):.3g}", f"{knots[int(np.argmin(values))]:.3g}", shape])
    rows.sort(key=lambda row: -float(row[1]))
    note = "range and effect are of single examples, in log loss, on the scale of each indicator's φ"
    return text_table(columns, rows, width) + "\n" + wrapped(note, width)


def share_effects(rule: RuleFields) -> dict[str, float]:
    """source → effect of a row of it on log loss, against one of the source left out."""
    shares = zip(rule.feature_names_in_, rule.coef_.tolist(), strict=True)
    found = {rule.transforms_[name].source: value for name, value in shares if rule.transforms_[name].kind == SHARE}
    return {str(source): value for source, value in sorted(found.items(), key=lambda one: one[1])}


def _share_line(rule: RuleFields) -> str:
    """Of a rule with curves: what its sources add."""
    told = ", ".join(f"{source} {value:+.2g}" for source, value in share_effects(rule).items())
    return f"\na row's source adds, against {rule.sources_[-1]}: {told}" if told else ""


_COLUMNS = (
    Column("regressor", right=False),
    Column("coef"),
    Column("se"),
    Column("t", rank=2),
    Column("p"),
    Column("95 % interval", rank=4),
    Column("VIF", rank=3),
    Column("bootstrap 95 %", rank=6),
    Column("same sign", rank=5),
)
_T_COLUMNS = (3, 4)  # t and p, which belong to least squares alone


def rule_summary(rule: RuleFields, width: int | None = None, judged: bool = True) -> str:
    """Heading, verdict (where `judged`), regression table, fit and held-out numbers, candidates, baselines, notes."""
    width = width or terminal_width()
    metrics = rule.metrics_
    parts = [wrapped(_heading(rule), width)]
    if metrics.verdict and judged:
        lines = f"Verdict: {metrics.verdict}.", _over_baselines(metrics), guard_text(metrics)
        parts += [wrapped(line, width) for line in lines if line]
    if metrics.kinds:
        parts += [wrapped(line, width) for line in kinds_lines(metrics.kinds)]
    parts += ["", _table(rule, width), ""]
    parts += [wrapped(line, width) for line in _numbers(rule, metrics)]
    if metrics.univariate:
        parts += ["", univariate_table(metrics.univariate, width)]
    if metrics.candidates:
        parts += ["", candidate_table(metrics, width)]
        parts += [wrapped(line, width) for line in source_lines(metrics)]
    if metrics.rivals:
        parts += ["", baseline_table(metrics, width)]
    if metrics.targets:
        parts += ["", target_table(metrics.targets, width)]
    if metrics.target_correlations:
        parts += ["", correlation_table(metrics.target_correlations, width)]
    parts += [wrapped(note, width, bullet="- ") for note in metrics.notes]
    return "\n".join(parts)


def _over_baselines(metrics: RuleMetrics) -> str:
    """What the rule gains over each baseline: `Gain in held-out R² over length only +0.83 (0.73 to 0.91); …`."""
    parts = []
    for name, one in metrics.rivals.items():
        if one.get("gain") is not None:
            low, high = one["gain_low"], one["gain_high"]
            told = "" if low is None else f" ({low:.2f} to {high:.2f}{'' if low > 0 else ': none is shown'})"
            parts.append(f"{_BASELINE_NAMES.get(name, name)} {number_or_dash(one['gain'], '+.2f')}{told}")
    if not parts:
        return ""
    text = f"Gain in held-out R² over {', '.join(parts)}; in brackets a 95 % interval."
    return " ".join(filter(None, (text, not_borne_out(metrics))))


def not_borne_out(metrics: RuleMetrics) -> str:
    """What it means that a rule is better than the mean, and the interval of its gain includes 0; "" elsewhere."""
    low = metrics.rivals.get("mean", {}).get("gain_low")
    if not metrics.beats_mean or low is None or low > 0:
        return ""
    return "The verdict is of these runs; as few others may show no gain over the mean: make more runs."


def _heading(rule: RuleFields) -> str:
    if not rule.n_runs_:
        source = rule.metrics_.source or "no runs of ours"
        return f"rule {rule.title}: log evaluation loss; UNVERIFIED, fitted on {source}"
    metrics = rule.metrics_
    purposes = metrics.runs_by_purpose
    runs = " + ".join(f"{n} {purpose}" for purpose, n in purposes.items()) or str(rule.n_runs_)
    what = "log error rate (share of wrong answers)" if is_score(rule.evaluation) else LOG_LOSS
    return (
        f"rule {rule.title}: {what} on {target_text(rule.evaluation)}, {rule.method.upper()} over "
        f"{runs} runs of {metrics.n_subsets or rule.n_runs_} subsets"
    )


def _table(rule: RuleFields, width: int) -> str:
    if rule.knots:
        return shape_table(rule, width) + wrapped(_share_line(rule), width)
    bootstrap = rule.metrics_.bootstrap
    labels = ["intercept", *(rule.transforms_[n].label(n) for n in rule.feature_names_in_)]
    estimates = [rule.intercept_, *rule.coef_]
    rows = []
    for j, (label, estimate) in enumerate(zip(labels, estimates, strict=True)):
        values: dict[str, Any] = rule.coefficients_[j] if rule.coefficients_ else {}
        interval = ""
        if values.get("low") is not None and values.get("high") is not None:
            interval = f"{values['low']:.3g}, {values['high']:.3g}"
        rows.append(
            [
                label,
                number_or_dash(float(estimate), ".4g"),
                number_or_dash(values.get("se"), ".3g"),
                number_or_dash(values.get("t"), ".2f"),
                p_value(values.get("p")),
                interval,
                number_or_dash(values.get("vif"), ".3g"),
                *_resampled(bootstrap.get(values.get("term", ""))),
            ]
        )
    if rule.offset_:
        rows.append(["offset c (nats)", f"{rule.offset_:.4g}", *[""] * 5, *_resampled(bootstrap.get("offset"))])
    shown = list(range(2 if not rule.coefficients_ else len(_COLUMNS) if bootstrap else len(_COLUMNS) - 2))
    if not any(row.get("t") is not None for row in rule.coefficients_):
        shown = [j for j in shown if j not in _T_COLUMNS]
        if bootstrap:
            shown = [j for j in shown if _COLUMNS[j].header != "95 % interval"]
    return text_table([_COLUMNS[j] for j in shown], [[r[j] for j in shown] for r in rows], width)


def _resampled(values: dict[str, Any] | None) -> list[str]:
    if not values:
        return ["", ""]
    return [f"{values['low']:.3g}, {values['high']:.3g}", f"{100 * values['sign_stability']:.0f} %"]


def _numbers(rule: RuleFields, metrics: RuleMetrics) -> list[str]:
    if not rule.n_runs_:
        return [f"R² {metrics.r2:.3f} in sample, as published" if metrics.r2 is not None else "R² unknown"]
    lines = [
        f"R² {number_or_dash(metrics.r2, '.3f')} in sample, {number_or_dash(metrics.adjusted_r2, '.3f')} adjusted, "
        f"{number_or_dash(metrics.leave_one_out_r2, '.3f')} leave-one-run-out"
    ]
    if (metrics.n_subsets or rule.n_runs_) < rule.n_runs_:
        lines[0] += f", {number_or_dash(metrics.leave_subset_out_r2, '.3f')} with repeats of a subset left out together"
    residual = (
        f"residual sd {number_or_dash(metrics.residual_sd, '.3g')} of sd {number_or_dash(metrics.sd_log_loss, '.3g')} "
        f"of log loss, {number_or_dash(metrics.df_residual, '.4g')} degrees of freedom"
    )
    if metrics.f is not None:
        residual += f"; F {number_or_dash(metrics.f, '.2f')}, p {p_value(metrics.f_p)}"
    if metrics.setting:
        residual += "; chosen by cross-validation: " + ", ".join(_setting(*item) for item in metrics.setting.items())
    lines.append(residual)
    if metrics.cook:
        worst = max(metrics.cook, key=lambda run: metrics.cook[run] or 0.0)
        lines.append(f"most influential run: {worst} (Cook's distance {number_or_dash(metrics.cook[worst], '.2f')})")
    lines.append(
        f"condition number {number_or_dash(metrics.condition_number, '.3g')} of the standardised indicators "
        f"(centred, unit variance); largest leverage {number_or_dash(metrics.max_leverage, '.2f')}"
    )
    if metrics.repeat_sd is not None:
        repeats = metrics.repeat_df
        known = f"equal subsets with other seeds differ by sd {metrics.repeat_sd:.3g} ({repeats} degree"
        known += f"{'s' * (repeats != 1)} of freedom)"
        low, high = metrics.noise_ceiling_low, metrics.noise_ceiling_high
        if metrics.noise_ceiling_r2 is None:
            lines.append(f"noise ceiling: not given, {known}, and fewer than {FEWEST_REPEATS} say little")
        else:
            interval = "" if low is None or high is None else f" (95 % interval {low:.2f} to {high:.2f})"
            ceiling = f"R² cannot be expected above {metrics.noise_ceiling_r2:.3f}{interval}"
            lines.append(f"noise ceiling: {known}, so {ceiling}")
    else:
        lines.append("noise ceiling: unknown, no subset was repeated with another training seed")
    if metrics.calibration is not None:
        lines.append(
            "calibration: held out, a predicted difference of log loss of 0.1 comes out as "
            f"{metrics.calibration / 10:.3g}"
        )
    if rule.radius_ is not None and rule.cov_ is not None:
        largest = f"largest distance of a run {number_or_dash(metrics.largest_distance, '.2f')}"
        if rule.old_region:
            rank = region_rank(rule.cov_)
            where = f"radius {rule.radius_:.2f} ({largest}, {rank} of {len(rule.coef_)} directions); old region: refit"
        else:
            where = (
                f"radius {rule.radius_:.2f} over {len(rule.indicators)} indicators ({largest}); the weights aim "
                f"{rule.reach_:.2f} sd of the fitted values below the runs' mean"
            )
        lines.append(f"fitted region: {where}")
    return lines


_SETTINGS = {
    "bend": "how freely each indicator's effect may bend beside its slope",
    "pooled": "how freely the slopes of a source may differ from the common ones",
    "penalty": "how strongly coefficients are held near 0",
}


def _setting(name: str, value: Any) -> str:
    if name in _SETTINGS:
        return f"{name} {value:.3g} ({_SETTINGS[name]})"
    return f"{name.replace('_', ' ')} {', '.join(value) if isinstance(value, list) else format(value, '.3g')}"

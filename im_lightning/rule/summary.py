"""The regression table of a rule as plain text, with the numbers that tell whether to believe it."""

from __future__ import annotations

from typing import Any

from im_lightning._utils.text_tables import Column, terminal_width, text_table, wrapped
from im_lightning.rule.region import region_rank
from im_lightning.rule.rule_fields import RuleFields
from im_lightning.rule.summary_tables import candidate_table, rival_table, shape_table, source_lines
from im_lightning.rule.univariate import univariate_table

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


def rule_summary(rule: RuleFields, width: int | None = None) -> str:
    """Heading, regression table, fit and held-out numbers, region, candidates, rivals, verdict, notes."""
    width = width or terminal_width()
    metrics = rule.metrics_
    parts = [wrapped(_heading(rule), width), "", _table(rule, width), ""]
    parts += [wrapped(line, width) for line in _numbers(rule, metrics)]
    if metrics.get("univariate"):
        parts += ["", univariate_table(metrics["univariate"], width)]
    if metrics.get("candidates"):
        parts += ["", candidate_table(metrics, width)]
        parts += [wrapped(line, width) for line in source_lines(metrics)]
    if metrics.get("rivals"):
        parts += ["", rival_table(metrics, width)]
    if metrics.get("verdict"):
        parts += ["", wrapped(f"Verdict: {metrics['verdict']}.", width)]
    parts += [wrapped(note, width, bullet="- ") for note in metrics.get("notes", [])]
    return "\n".join(parts)


def _heading(rule: RuleFields) -> str:
    if not rule.n_runs_:
        source = rule.metrics_.get("source", "no runs of ours")
        return f"rule {rule.title}: log evaluation loss; UNVERIFIED, fitted on {source}"
    metrics = rule.metrics_
    purposes = metrics.get("runs_by_purpose") or {}
    runs = " + ".join(f"{n} {purpose}" for purpose, n in purposes.items()) or str(rule.n_runs_)
    return (
        f"rule {rule.title}: log evaluation loss (nats per token) on {rule.evaluation}, {rule.method.upper()} over "
        f"{runs} runs of {metrics.get('n_subsets', rule.n_runs_)} subsets"
    )


def _table(rule: RuleFields, width: int) -> str:
    if rule.knots:
        return shape_table(rule, width)
    bootstrap = rule.metrics_.get("bootstrap") or {}
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
                f"{estimate:.4g}",
                _number(values.get("se"), ".3g"),
                _number(values.get("t"), ".2f"),
                _p_value(values.get("p")),
                interval,
                _number(values.get("vif"), ".3g"),
                *_resampled(bootstrap.get(values.get("term"))),
            ]
        )
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


def _numbers(rule: RuleFields, metrics: dict[str, Any]) -> list[str]:
    if not rule.n_runs_:
        return [f"R² {metrics['r2']:.3f} in sample, as published" if "r2" in metrics else "R² unknown"]
    lines = [
        f"R² {_number(metrics.get('r2'), '.3f')} in sample, {_number(metrics.get('adjusted_r2'), '.3f')} adjusted, "
        f"{_number(metrics.get('leave_one_out_r2'), '.3f')} leave-one-run-out"
    ]
    if metrics.get("n_subsets", rule.n_runs_) < rule.n_runs_:
        lines[0] += f", {_number(metrics.get('leave_subset_out_r2'), '.3f')} with repeats of a subset left out together"
    residual = (
        f"residual sd {_number(metrics.get('residual_sd'), '.3g')} of sd {_number(metrics.get('sd_log_loss'), '.3g')} "
        f"of log loss, {_number(metrics.get('df_residual'), '.4g')} degrees of freedom"
    )
    if metrics.get("f") is not None:
        residual += f"; F {_number(metrics.get('f'), '.2f')}, p {_p_value(metrics.get('f_p'))}"
    if metrics.get("setting"):
        residual += "; chosen by cross-validation: " + ", ".join(_setting(*item) for item in metrics["setting"].items())
    lines.append(residual)
    if metrics.get("cook"):
        worst = max(metrics["cook"], key=lambda run: metrics["cook"][run] or 0.0)
        lines.append(f"most influential run: {worst} (Cook's distance {_number(metrics['cook'][worst], '.2f')})")
    lines.append(
        f"condition number {_number(metrics.get('condition_number'), '.3g')} of the standardised design (columns "
        f"centred, unit variance); largest leverage {_number(metrics.get('max_leverage'), '.2f')}"
    )
    if metrics.get("repeat_sd") is not None:
        repeats = metrics["repeat_df"]
        lines.append(
            f"noise ceiling: equal subsets with other seeds differ by sd {metrics['repeat_sd']:.3g} "
            f"({repeats} degree{'s' * (repeats != 1)} of freedom), so R² cannot be expected above "
            f"{metrics['noise_ceiling_r2']:.3f}"
        )
    else:
        lines.append("noise ceiling: unknown, no subset was repeated with another training seed")
    if rule.radius_ is not None and rule.cov_ is not None:
        rank = region_rank(rule.cov_)
        lines.append(
            f"fitted region: radius {rule.radius_:.2f} (largest distance of a run "
            f"{_number(metrics.get('largest_distance'), '.2f')}, {rank} of {len(rule.coef_)} directions)"
        )
    return lines


def _setting(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {', '.join(value) if isinstance(value, list) else format(value, '.3g')}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _p_value(value: float | None) -> str:
    return "–" if value is None else ("<0.001" if value < 0.001 else f"{value:.3f}")

"""The regression table of a rule as plain text, with the numbers that tell whether to believe it."""

from __future__ import annotations

from typing import Any

from im_lightning.rule.region import region_rank
from im_lightning.rule.rule_fields import RuleFields
from im_lightning.rule.tables import Column, terminal_width, text_table, wrapped

_COLUMNS = (
    Column("regressor", right=False),
    Column("coef"),
    Column("se"),
    Column("t", rank=2),
    Column("p"),
    Column("95 % interval", rank=4),
    Column("VIF", rank=3),
)


def rule_summary(rule: RuleFields, width: int | None = None) -> str:
    """Heading, regression table, fit and held-out numbers, region, notes; at most `width` columns."""
    width = width or terminal_width()
    metrics = rule.metrics_
    parts = [wrapped(_heading(rule), width), "", _table(rule, width), ""]
    parts += [wrapped(line, width) for line in _numbers(rule, metrics)]
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
            ]
        )
    columns = _COLUMNS if rule.coefficients_ else _COLUMNS[:2]
    return text_table(columns, [r[: len(columns)] for r in rows], width)


def _numbers(rule: RuleFields, metrics: dict[str, Any]) -> list[str]:
    if not rule.n_runs_:
        return [f"R² {metrics['r2']:.3f} in sample, as published" if "r2" in metrics else "R² unknown"]
    lines = [
        f"R² {_number(metrics.get('r2'), '.3f')} in sample, {_number(metrics.get('adjusted_r2'), '.3f')} adjusted, "
        f"{_number(metrics.get('leave_one_out_r2'), '.3f')} leave-one-run-out"
    ]
    if metrics.get("n_subsets", rule.n_runs_) < rule.n_runs_:
        lines[0] += f", {_number(metrics.get('leave_subset_out_r2'), '.3f')} with repeats of a subset left out together"
    lines.append(
        f"residual sd {_number(metrics.get('residual_sd'), '.3g')} of sd {_number(metrics.get('sd_log_loss'), '.3g')} "
        f"of log loss, {metrics.get('df_residual')} degrees of freedom; F {_number(metrics.get('f'), '.2f')}, "
        f"p {_p_value(metrics.get('f_p'))}"
    )
    lines.append(
        f"condition number {_number(metrics.get('condition_number'), '.3g')} of the standardised design (columns "
        f"centred, unit variance); largest leverage {_number(metrics.get('max_leverage'), '.2f')}"
    )
    if metrics.get("repeat_sd") is not None:
        lines.append(
            f"noise ceiling: equal subsets with other seeds differ by sd {metrics['repeat_sd']:.3g} "
            f"({metrics['repeat_df']} degrees of freedom), so R² cannot be expected above "
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


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _p_value(value: float | None) -> str:
    return "–" if value is None else ("<0.001" if value < 0.001 else f"{value:.3f}")

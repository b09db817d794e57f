"""`RuleMetrics`: what a fit found out about its rule, beside the coefficients; the object `metrics` of a rule file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from im_lightning._utils.files import plain

Json = dict[str, Any]


@dataclass(frozen=True)
class RuleMetrics:
    """The numbers of a fit; None, or nothing, where one could not be estimated or the file does not have it.

    "Held out" is by folds of whole subsets unless it says otherwise. Losses are natural logarithms of nats per token.

    Args:
        method: How the rule was fitted.
        setting: Penalty, bend or kept regressors, as cross-validation chose them.
        n_subsets: Different subsets among the runs; 0 where not known.
        folds: Folds of the held-out numbers; 0 where not known.
        runs_by_purpose: Purpose → runs.
        df_residual: Runs minus the effective number of parameters.
        r2: In sample.
        adjusted_r2: In sample, by the degrees of freedom.
        aic: In sample.
        bic: In sample.
        leave_one_out_r2: Each run predicted without it.
        leave_subset_out_r2: Each run predicted without its subset.
        grouped_r2: Held out.
        grouped_rmse: Held-out root mean squared error, log loss.
        grouped_spearman: Held-out rank correlation.
        source_out: Source → {r2, spearman, runs}, trained without it; None where not estimable.
        condition_number: Of the standardised design.
        residual_sd: Log loss.
        f: F statistic; least squares only.
        f_p: Its p.
        mean_log_loss: Of the runs.
        sd_log_loss: Of the runs.
        max_leverage: Largest leverage of a run; they sum to p + 1.
        high_leverage_runs: Run ids.
        cook: Run id → Cook's distance.
        repeat_sd: Sd of log loss between runs on equal subsets.
        repeat_df: Its degrees of freedom.
        noise_ceiling_r2: R² beyond which runs on equal subsets differ.
        candidates: One row per rule considered, the mean first.
        recommended: Method of the candidate to use, or "mean".
        rivals: Baseline → its held-out scores and the rule's gain over it.
        permutation: {p, permutations, exceedances, statistic} of the test against the mean; None where not made.
        beats_mean: Whether that test and the held-out R² find the rule better than the mean; None where not made.
        held_out: Run by run {run_id, y, prediction, low, high}.
        univariate: Indicator by indicator, see `univariate`.
        correlations: Of the indicators, see `correlation_matrix`.
        bootstrap: Regressor → {low, high, sign_stability}; or {of, seed} of a rule that is itself a resample.
        largest_distance: Mahalanobis distance of the outermost run.
        verdict: Better than the mean or not, one sentence.
        notes: What a person should know, one sentence each.
        source: Where a published rule comes from.
        read: The object of the file, whose keys are all kept when it is written again.
    """

    method: str = ""
    setting: Json = field(default_factory=dict)
    n_subsets: int = 0
    folds: int = 0
    runs_by_purpose: dict[str, int] = field(default_factory=dict)
    df_residual: float | None = None
    r2: float | None = None
    adjusted_r2: float | None = None
    aic: float | None = None
    bic: float | None = None
    leave_one_out_r2: float | None = None
    leave_subset_out_r2: float | None = None
    grouped_r2: float | None = None
    grouped_rmse: float | None = None
    grouped_spearman: float | None = None
    source_out: dict[str, Json | None] = field(default_factory=dict)
    condition_number: float | None = None
    residual_sd: float | None = None
    f: float | None = None
    f_p: float | None = None
    mean_log_loss: float | None = None
    sd_log_loss: float | None = None
    max_leverage: float | None = None
    high_leverage_runs: list[str] = field(default_factory=list)
    cook: dict[str, float | None] = field(default_factory=dict)
    repeat_sd: float | None = None
    repeat_df: int = 0
    noise_ceiling_r2: float | None = None
    candidates: list[Json] = field(default_factory=list)
    recommended: str = ""
    rivals: dict[str, Json] = field(default_factory=dict)
    permutation: Json | None = None
    beats_mean: bool | None = None
    held_out: list[Json] = field(default_factory=list)
    univariate: list[Json] = field(default_factory=list)
    correlations: Json = field(default_factory=dict)
    bootstrap: dict[str, Any] = field(default_factory=dict)
    largest_distance: float | None = None
    verdict: str = ""
    notes: list[str] = field(default_factory=list)
    source: str = ""
    read: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RuleMetrics:
        """What `to_json` wrote; a null is as good as no key."""
        return cls(**{k: v for k, v in value.items() if k in _DEFAULTS and v is not None}, read=value)

    def to_json(self) -> Json:
        """The object as it was read, with the fields that have changed since."""
        out = dict(self.read)
        for name, default in _DEFAULTS.items():
            value, was = getattr(self, name), self.read.get(name)
            if value != (default if was is None else was):
                out[name] = value
        return out

    def whole(self) -> RuleMetrics:
        """As a fit keeps them: in JSON types, with every key, null for what could not be estimated."""
        return RuleMetrics.from_json(plain({name: getattr(self, name) for name in _DEFAULTS if name != "source"}))


_DEFAULTS: Json = {
    f.name: f.default if f.default_factory is MISSING else f.default_factory()
    for f in fields(RuleMetrics)
    if f.name != "read"
}

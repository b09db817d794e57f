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
    """

    method: str = ""  # how the rule was fitted
    setting: Json = field(default_factory=dict)  # penalty, bend or kept regressors, as cross-validation chose them
    n_subsets: int = 0  # different subsets among the runs; 0 where not known
    folds: int = 0  # folds of the held-out numbers; 0 where not known
    runs_by_purpose: dict[str, int] = field(default_factory=dict)  # purpose → runs
    kinds: Json = field(default_factory=dict)  # how merged runs were mixed in, see `rule.kinds`; {} without any
    df_residual: float | None = None  # different subsets minus the effective number of parameters
    r2: float | None = None  # in sample
    adjusted_r2: float | None = None  # in sample, by the degrees of freedom
    aic: float | None = None  # in sample
    bic: float | None = None  # in sample
    leave_one_out_r2: float | None = None  # each run predicted without it
    leave_subset_out_r2: float | None = None  # each run predicted without its subset
    grouped_r2: float | None = None  # held out
    grouped_rmse: float | None = None  # held-out root mean squared error, log loss
    grouped_spearman: float | None = None  # held-out rank correlation
    # source → {r2, law_r2 (as far as so few runs can tell), spearman, runs, trained_on}, fitted without it; both R²
    # None where not estimable
    source_out: dict[str, Json | None] = field(default_factory=dict)
    condition_number: float | None = None  # of the standardised indicators
    residual_sd: float | None = None  # log loss
    f: float | None = None  # F statistic; least squares only
    f_p: float | None = None  # its p
    mean_log_loss: float | None = None  # of the runs
    sd_log_loss: float | None = None  # of the runs
    max_leverage: float | None = None  # largest leverage of a run; they sum to p + 1
    high_leverage_runs: list[str] = field(default_factory=list)  # run ids
    cook: dict[str, float | None] = field(default_factory=dict)  # run id → Cook's distance
    repeat_sd: float | None = None  # sd of log loss between runs on equal subsets
    repeat_df: int = 0  # its degrees of freedom
    noise_ceiling_r2: float | None = None  # R² beyond which runs on equal subsets differ; None under 5 of these
    noise_ceiling_low: float | None = None  # its 95 % interval
    noise_ceiling_high: float | None = None
    calibration: float | None = None  # slope of the loss on its held-out prediction, both from the training runs' mean
    candidates: list[Json] = field(default_factory=list)  # one row per rule considered, the mean first
    recommended: str = ""  # method of the candidate to use, or "mean"
    rivals: dict[str, Json] = field(default_factory=dict)  # baseline → its held-out scores and the rule's gain over it
    # {p, permutations, exceedances, statistic} of the test against the mean; None where not made
    permutation: Json | None = None
    # whether that test and the held-out R² find the rule better than the mean; None where not made
    beats_mean: bool | None = None
    held_out: list[Json] = field(default_factory=list)  # run by run {run_id, y, prediction, low, high}
    univariate: list[Json] = field(default_factory=list)  # indicator by indicator, see `univariate`
    correlations: Json = field(default_factory=dict)  # of the indicators, see `correlation_matrix`
    # regressor → {low, high, sign_stability}; or {of, seed} of a rule that is itself a resample
    bootstrap: dict[str, Any] = field(default_factory=dict)
    largest_distance: float | None = None  # Mahalanobis distance of the outermost run
    targets: list[Json] = field(default_factory=list)  # what weights do to each named target, see `guarded_targets`
    target_correlations: list[Json] = field(default_factory=list)  # of all losses and scores that the runs have
    verdict: str = ""  # better than the mean or not, one sentence
    notes: list[str] = field(default_factory=list)  # what a person should know, one sentence each
    source: str = ""  # where a published rule comes from
    # the object of the file, whose keys are all kept when it is written again
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

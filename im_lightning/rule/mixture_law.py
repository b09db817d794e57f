"""The law of mixtures: log evaluation loss as a function of the shares of the sources.

Shares sum to 1, so that all of them with an intercept would be singular: the source of the largest mean share is left
out, and the others' slopes are contrasts with it. The law itself is a `LinearRule` on these shares, with its held-out
scores, its errors and its fitted region.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import OF_SOURCE, SHARE
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.regime import (
    choose_evaluation,
    describe,
    fit_command,
    group_regimes,
    list_regimes,
    more_runs,
)
from im_lightning.ledger.run_table import source_shares
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.refits import bootstrapped_rules, runs_of

METHODS = ("ridge", "elastic-net", "offset")
"""The forms that are tried: log L linear in the shares, and L = c + exp(a + b·x); what holds out best is taken."""

RESAMPLES = 100
"""Of the subsets, on each of which a mixture is chosen."""

_SHARE = f"{SHARE}{OF_SOURCE}"
_IDENTITY = {"kind": "identity", "low": None, "high": None}


@dataclass(frozen=True)
class MixtureLaw:
    """A fitted law.

    Args:
        rule: On the shares of all sources but the last, in their order.
        sources: [K] names; the last is the one left out.
        resamples: The rule on the subsets drawn with replacement, the form as chosen.
    """

    rule: LinearRule
    sources: list[str]
    resamples: list[LinearRule] = field(default_factory=list)

    @property
    def slopes(self) -> np.ndarray:
        """float64 [K], slope of the index per share, 0 for the source left out."""
        known = dict(zip(self.rule.feature_names_in_, self.rule.coef_.tolist(), strict=True))
        return np.array([known.get(_SHARE + name, 0.0) for name in self.sources])

    def log_loss(self, shares: np.ndarray) -> np.ndarray:
        """Predicted log loss of mixtures, float64 [..., K] → [...]."""
        index = self.rule.intercept_ + np.asarray(shares) @ self.slopes
        return np.asarray(np.logaddexp(index, np.log(self.rule.offset_)) if self.rule.offset_ else index)

    def gradient(self, shares: np.ndarray) -> np.ndarray:
        """Of the predicted log loss by the shares, float64 [K]."""
        if not self.rule.offset_:
            return self.slopes
        return self.slopes * float(1.0 - self.rule.offset_ / np.exp(self.log_loss(shares)))

    def distance(self, shares: np.ndarray) -> float:
        """Mahalanobis distance of a mixture from the mean of the runs."""
        return float(self.rule.mahalanobis(self._regressors(shares)))

    def region(self) -> tuple[np.ndarray, np.ndarray]:
        """Centre float64 [K] and matrix float64 [K, K] of the squared `distance`."""
        rule, at = self.rule, self._places()
        centre, shape = np.zeros(len(self.sources)), np.zeros((len(self.sources), len(self.sources)))
        if rule.mean_ is not None and rule.cov_ is not None:
            sd = np.sqrt(np.diag(rule.cov_))
            inverse = np.linalg.pinv(rule.cov_ / np.outer(sd, sd), rcond=1e-8, hermitian=True) / np.outer(sd, sd)
            centre[at], shape[np.ix_(at, at)] = rule.mean_, inverse
        return centre, shape

    def difference(self, shares: np.ndarray, other: np.ndarray) -> tuple[float, float | None]:
        """Predicted log loss of a mixture minus that of another, and half of its 95 % interval where known."""
        from scipy.stats import t as student

        gap = float(self.log_loss(shares) - self.log_loss(other))
        cov = self.rule.coef_cov_
        if cov is None:
            return gap, None
        row = self._slopes_at(shares) - self._slopes_at(other)
        known = self.rule.metrics_.df_residual
        df = max(self.rule.n_runs_ - len(cov) if known is None else known, 1)
        return gap, float(student.ppf(0.975, df) * np.sqrt(max(row @ cov @ row, 0.0)))

    def _regressors(self, shares: np.ndarray) -> np.ndarray:
        return np.asarray(shares)[..., self._places()]

    def _places(self) -> list[int]:
        """Which sources the rule's regressors are the shares of."""
        return [self.sources.index(name.removeprefix(_SHARE)) for name in self.rule.feature_names_in_]

    def _slopes_at(self, shares: np.ndarray) -> np.ndarray:
        """Of the predicted log loss by the coefficients, as `LinearRule.predict_mean` has them."""
        row, offset = np.concatenate([[1.0], self._regressors(shares)]), self.rule.offset_
        if not offset:
            return row
        estimate = float(self.log_loss(shares))
        return np.append(row * (1.0 - offset / np.exp(estimate)), np.exp(-estimate))


def fit_mixture_law(
    records: Iterable[RunRecord],
    evaluation: str | None = None,
    method: str = "auto",
    regime: str | None = None,
    bootstrap: int = 200,
) -> MixtureLaw:
    """Fits the law on the complete designed runs of one regime, over the sources of these runs.

    Args:
        records: Runs; those without shares of sources are left out.
        evaluation: The evaluation set, where there are several.
        method: "auto" (of `METHODS` what holds out best), or one of them, "ols" or "offset-robust".
        regime: As `fit_rule`.
        bootstrap: Resamples of the subsets for the errors of the coefficients; 0 leaves out those of the mixture, too.

    Raises:
        RequestError: no run records the shares of its sources, they are of one source alone, the runs are too few or of
            several regimes of which none is chosen, or `fit_rule` refuses.
    """
    every = list(records)
    designed = [
        r for r in every if r.purpose == "designed" and r.status == "complete" and r.subset.get("source_shares")
    ]
    target, designed = _of_one_regime(every, designed, evaluation, regime)
    measured = [r for r in designed if r.has_loss(target)] or designed
    shares = source_shares(measured)
    varying = {name: values for name, values in shares.items() if values.std() > 1e-9}
    if len(varying) < 2:
        cause = "the designed runs do not differ in the shares of their sources"
        raise RequestError(message("the mixture", cause, f"make runs of a pool of several: `{fit_command(every)}`"))
    if (missing := len(varying) + 2 - len(measured)) > 0:
        cause = f"{len(measured)} runs are too few for {len(varying)} sources: it takes at least {len(varying) + 2}"
        raise RequestError(message("mix", cause, more_runs(every, missing)))
    *kept, last = sorted(varying, key=lambda name: (float(varying[name].mean()), name))
    names = [_SHARE + name for name in kept]
    runs = [_with_shares(run, dict(zip(names, kept, strict=True))) for run in designed]
    rules = [
        fit_rule(runs, one, names, target, name="mixture", permutations=0, bootstrap=0)
        for one in (METHODS if method == "auto" else (method,))
    ]
    errors = [np.inf if rule.metrics_.grouped_rmse is None else rule.metrics_.grouped_rmse for rule in rules]
    best = rules[int(np.argmin(errors))]
    if bootstrap:
        best = fit_rule(runs, best.method, names, target, name="mixture", permutations=0, bootstrap=bootstrap)
    return MixtureLaw(best, [*kept, last], _resampled(best, runs, names) if bootstrap else [])


def _of_one_regime(
    every: Sequence[RunRecord], designed: list[RunRecord], evaluation: str | None, regime: str | None
) -> tuple[str, list[RunRecord]]:
    """The evaluation set, and of the designed runs those of the regime of a run (`regime` is its id), or of the only
    regime.

    Raises:
        RequestError: there are several and none is chosen, or none is that of the run.
    """
    if not designed:
        return evaluation or "", designed
    target = choose_evaluation(designed, evaluation)
    groups = group_regimes([r for r in designed if r.has_loss(target)], [], target)
    if regime is not None:
        run = next((r for r in every if r.run_id == regime and r.status == "complete"), None)
        groups = [] if run is None else [g for g in groups if g.takes(*describe(run, [], target))]
        if not groups:
            cause = "no designed run that records its shares is of the regime of this run"
            raise RequestError(message(f"--regime {regime}", cause, "name another run (im-lightning runs LEDGER)"))
    if len(groups) > 1:
        cause = f"the designed runs are of {len(groups)} regimes; one law cannot describe them:\n{list_regimes(groups)}"
        remedy = f"choose the regime of a run (--regime {groups[0].records[0].run_id}) or keep separate ledgers"
        raise RequestError(message("mix", cause, remedy))
    return target, [r for r in designed if not groups or groups[0].takes(*describe(r, [], target))]


def _resampled(best: LinearRule, runs: list[RunRecord], names: list[str]) -> list[LinearRule]:
    """Fits of the law on resamples of its subsets, as many as determine it."""
    streams = (np.random.default_rng([RESAMPLES, k]) for k in range(RESAMPLES))
    every = bootstrapped_rules(best, runs_of(best, runs), streams, names)
    return [rule for rule in every if isinstance(rule, LinearRule)]


def _with_shares(run: RunRecord, sources: Mapping[str, str]) -> RunRecord:
    """The run with shares for indicators."""
    shares = run.subset["source_shares"]
    means = {name: float(shares.get(source, 0.0)) for name, source in sources.items()}
    return replace(run, phi_means=means, transforms=dict.fromkeys(means, _IDENTITY), keys={}, basis_means={})

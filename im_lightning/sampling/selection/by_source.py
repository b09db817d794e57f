"""Weights from source shares alone: what the designed runs tell of their sources, without any indicator.

`refit` fits log loss on the sources' shares beside every rule, as a baseline. The same fit, tilted as a rule is, is the
arm that a rule has to beat to be worth its indicators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.linear_rule import LinearRule

_SHARE = Transform("identity", 0.0, 1.0)


def source_rule(rule: LinearRule) -> LinearRule:
    """The rule over shares of sources that was fitted on the same runs, with a region of its own.

    Raises:
        RequestError: the rule file has none: it is of an earlier version, or its runs do not differ in their sources.
    """
    fit = (rule.metrics_.rivals.get("sources") or {}).get("fit")
    if fit is None:
        reason = (rule.metrics_.rivals.get("sources") or {}).get("reason") or "an earlier version wrote it"
        remedy = "refit (im-lightning refit LEDGER --out rule.json) on runs that differ in their sources"
        raise RequestError(
            message(f"rule {rule.title}, method by-source", f"it has no fit of sources ({reason})", remedy)
        )
    names = list(rule.metrics_.rivals["sources"]["regressors"])
    return LinearRule(
        name=f"{rule.name}, sources alone",
        intercept_=float(fit["coefficients"][0]),
        coef_=np.array(fit["coefficients"][1:], dtype=np.float64),
        feature_names_in_=names,
        transforms_=dict.fromkeys(names, _SHARE),
        method="ridge",
        evaluation=rule.evaluation,
        mean_=np.array(fit["mean"], dtype=np.float64),
        cov_=np.array(fit["covariance"], dtype=np.float64),
        radius_=float(fit["radius"]),
        reach_=float(fit["reach"]),
        lowest_=float(fit["lowest"]),
        n_runs_=rule.n_runs_,
    )


def source_phi(sources: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """1 where a row is of a source, float64 [N, K]."""
    at = {name: k for k, name in enumerate(names)}
    out = np.zeros((len(sources), len(names)))
    for row, source in enumerate(sources):
        if source in at:
            out[row, at[source]] = 1.0
    return out

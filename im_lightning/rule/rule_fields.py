"""`RuleFields`: what a rule knows, without what it does; what rule files and tables are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from im_lightning.indicators.hat_basis import knots_of
from im_lightning.indicators.transforms import Transform


@dataclass(eq=False, repr=False)
class RuleFields:
    """The data of a fitted or published rule.

    Args:
        name: What messages call it.
        intercept_: In log nats per token.
        coef_: float64 [p].
        feature_names_in_: [p] regressors, in the order of `coef_`: indicators, or under an additive rule their hats,
            named `<indicator>[k]`.
        transforms_: regressor → φ, with its hat under an additive rule.
        verified: False for coefficients that nobody here has reproduced.
        method: How it was fitted: "ols", "published", …
        evaluation: Name of the evaluation set whose loss it predicts.
        mean_: float64 [p], mean of the run means; None without a fitted region.
        cov_: float64 [p, p], their covariance (n − 1).
        radius_: Radius of the fitted region in Mahalanobis distance: min(largest distance of a run, 3).
        coef_cov_: float64 [p + 1, p + 1], covariance of the estimates, intercept first.
        coefficients_: One row per term, intercept first: {term, estimate, se, t, p, low, high, vif} (95 % interval).
        identities: indicator → identity part of its key.
        numerics: indicator → numerics part of its key.
        regime: The regime of the runs.
        n_runs_: Runs it was fitted on; 0 for published rules.
        metrics_: R², held-out R², candidates, rivals, permutation p, condition number, notes, …; None where something
            could not be estimated.
        ledger_digest_: Digest of those runs.
        pool_digest_: Digest of their pool, "" where there were several.
        created: ISO 8601 time of the fit.
        origin: The file it was read from; messages name it.
    """

    name: str
    intercept_: float
    coef_: np.ndarray
    feature_names_in_: list[str]
    transforms_: dict[str, Transform]
    verified: bool = True
    method: str = "ols"
    evaluation: str = ""
    mean_: np.ndarray | None = None
    cov_: np.ndarray | None = None
    radius_: float | None = None
    coef_cov_: np.ndarray | None = None
    coefficients_: list[dict[str, Any]] = field(default_factory=list)
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    numerics: dict[str, dict[str, Any]] = field(default_factory=dict)
    regime: dict[str, Any] = field(default_factory=dict)
    n_runs_: int = 0
    metrics_: dict[str, Any] = field(default_factory=dict)
    ledger_digest_: str = ""
    pool_digest_: str = ""
    created: str = ""
    origin: str = ""

    @property
    def title(self) -> str:
        """What messages call the rule: its file where it has one, else its name."""
        return self.origin or self.name

    @property
    def columns(self) -> list[str]:
        """[p] the indicator behind each regressor."""
        return [n if self.transforms_[n].hat is None else n[: n.rindex("[")] for n in self.feature_names_in_]

    @property
    def indicators(self) -> list[str]:
        """The indicators that the rule needs, each once."""
        return list(dict.fromkeys(self.columns))

    @property
    def indicator_transforms(self) -> dict[str, Transform]:
        """indicator → φ of the indicator itself, without hats."""
        return {c: self.transforms_[n].base() for c, n in zip(self.columns, self.feature_names_in_, strict=True)}

    @property
    def knots(self) -> dict[str, list[float]]:
        """indicator → knots of its hats; {} for a rule that is linear in its indicators."""
        pairs = list(zip(self.columns, self.feature_names_in_, strict=True))
        found = {c: knots_of([self.transforms_[n] for d, n in pairs if d == c]) for c in self.indicators}
        return {c: knots for c, knots in found.items() if knots}

    @property
    def beats_mean(self) -> bool | None:
        """Whether the permutation test found the rule better than the mean; None where it was not made."""
        value = self.metrics_.get("beats_mean")
        return value if isinstance(value, bool) else None

    @property
    def has_region(self) -> bool:
        """Whether the rule knows where its evidence lies; the published ones do not."""
        return self.mean_ is not None and self.cov_ is not None and self.radius_ is not None

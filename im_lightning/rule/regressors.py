"""`Regressors`: φ of every row of a scored pool and what it is made of; one object per table and rule, made once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from im_lightning.indicators.transforms import Transform, default_regressors, default_transforms, phi_matrix, pool_knots

if TYPE_CHECKING:
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.rule.linear_rule import LinearRule


@dataclass(frozen=True)
class Regressors:
    """The regressors of a scored pool of N rows, under a rule or without one.

    Args:
        rule: The rule, or None.
        names: [p] the rule's (under an additive rule hats of indicators); without one the paper's indicators where
            present, else all of the table.
        transforms: indicator → φ, for all indicators of the table: the rule's own where it has one, else the default
            on this pool.
        knots: indicator → knots of its hats: an additive rule's own, else quantiles of this pool.
        phi: float64 [N, p]; a row that lacks any of the regressors is all NaN.
        predicted: float64 [N], log loss predicted by the rule, NaN where φ is; None without a rule.
    """

    rule: LinearRule | None
    names: list[str]
    transforms: dict[str, Transform]
    knots: dict[str, list[float]]
    phi: np.ndarray
    predicted: np.ndarray | None

    @classmethod
    def of(cls, table: ScoreTable, rule: LinearRule | None) -> Regressors:
        """Those of a table.

        Raises:
            RequestError: the table has no column of an indicator of the rule.
        """
        phi = None if rule is None else rule.phi(table)
        own = {} if rule is None else {n: t for n, t in rule.indicator_transforms.items() if n in table.indicators}
        transforms = {**own, **default_transforms(table, [name for name in table.indicators if name not in own])}
        knots = {} if rule is None else rule.knots
        knots = {**pool_knots(table, {n: t for n, t in transforms.items() if n not in knots}), **knots}
        if rule is not None and phi is not None:
            names = list(rule.feature_names_in_)
            return cls(rule, names, transforms, knots, phi, rule.intercept_ + phi @ rule.coef_)
        names = default_regressors(table.indicators) or list(table.indicators)
        return cls(None, names, transforms, knots, phi_matrix(table, {n: transforms[n] for n in names}), None)

    @property
    def known(self) -> np.ndarray:
        """bool [N], rows that lack no regressor."""
        return ~np.isnan(self.phi).any(axis=1)

    def of_indicators(self, table: ScoreTable) -> tuple[list[str], np.ndarray]:
        """The q indicators behind the regressors and their own φ, float64 [N, q]: under an additive rule without hats,
        else the regressors themselves. A row that lacks one is all NaN."""
        names = self.names if self.rule is None else self.rule.indicators
        if names == self.names:
            return self.names, self.phi
        return names, phi_matrix(table, {name: self.transforms[name] for name in names})

"""What every way to fit a rule has in common: settings to choose from, and fits of many training sets at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

NO_CHOICE = ((0.0, 0.0),)


class Estimator(ABC):
    """A way to fit a rule, under each of its settings.

    Attributes:
        method: Its name.
        x: Regressors, float64 [n, p].
        weights: Of the runs, float64 [n].
        settings: What cross-validation chooses from, the simplest first; `NO_CHOICE` where there is one alone.
    """

    method: str
    x: np.ndarray
    weights: np.ndarray
    settings: Sequence[tuple[float, float]]

    def describe(self, setting: int) -> dict[str, float]:
        """The setting in words for a rule file; {} where there is no choice."""
        return {}

    @abstractmethod
    def degrees(self, setting: int, coefficients: np.ndarray, y: np.ndarray) -> float:
        """Effective number of parameters of a fit, the intercept among them."""

    def solve(
        self,
        trains: Sequence[np.ndarray],
        y: np.ndarray,
        final: bool = False,
        weights: np.ndarray | None = None,
        only: int | None = None,
    ) -> np.ndarray:
        """Coefficients of every training set, setting and response.

        Args:
            trains: F training sets, positions of runs.
            y: Responses, float64 [n, B].
            final: To the last digit, instead of as far as a cross-validation needs.
            weights: [F, n], in place of the runs' own.
            only: One setting; by default all L.

        Returns:
            float64 [F, L, p + 1, B], the intercept first; NaN where a training set does not determine the fit.
        """
        own = [(self.weights if weights is None else weights[f])[train] for f, train in enumerate(trains)]
        return self._solve(trains, own, y, final, only)

    @abstractmethod
    def _solve(
        self, trains: Sequence[np.ndarray], own: list[np.ndarray], y: np.ndarray, final: bool, only: int | None
    ) -> np.ndarray:
        """`solve`; `own` are the weights [m] of each training set's m runs."""

"""`LinearRule`: log evaluation loss as a linear function of a dataset's mean regressors φ, with what it was fitted on.

    log L ≈ intercept_ + Σ_j coef_j · mean φ_j      (InstructMining, arXiv 2307.06290)

or, where it holds out better, L ≈ offset_ + exp(intercept_ + Σ_j coef_j · mean φ_j), whose index is linear.

Lower is better. The means and covariance of the fitted runs bound the region in which the rule has evidence.
`Regressors` holds φ of every row of a scored pool under a rule: one object per table and rule, made once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from im_lightning._utils.display import Displayed
from im_lightning._utils.files import write_json
from im_lightning._utils.force import RISKS, Force, accepted, to_force
from im_lightning._utils.json_diff import POOL_FIELDS, Difference, differences
from im_lightning.errors import RequestError, message
from im_lightning.indicators.built_in import models_of
from im_lightning.indicators.transforms import Transform, default_regressors, default_transforms, phi_matrix, pool_knots
from im_lightning.ledger.regime import comparable
from im_lightning.rule.display import coefficient_frame, plot_rule
from im_lightning.rule.rule_file import RuleFields, read_fields, rule_to_json
from im_lightning.rule.summary import rule_summary, worse_targets
from im_lightning.rule.transfer import GRAVE, weigh_evidence
from im_lightning.rule.validation import diagnostics

if TYPE_CHECKING:
    from im_lightning.data.score_table import ScoreTable


class LinearRule(RuleFields, Displayed):
    """A fitted (or published) rule; its arguments and attributes are those of `RuleFields`.

    >>> from im_lightning.indicators.transforms import Transform
    >>> rule = LinearRule("mine", 0.9, np.array([-0.01]), ["mtld"], {"mtld": Transform("identity", 0.0, 100.0)})
    >>> rule.predict_mean([50.0])
    (0.4, None)
    """

    def __repr__(self) -> str:
        terms = ", ".join(f"{n}={b:.4g}" for n, b in zip(self.feature_names_in_, self.coef_, strict=True))
        return f"LinearRule({self.name!r}, intercept={self.intercept_:.4g}, {terms})"

    def phi(self, table: ScoreTable) -> np.ndarray:
        """Regressors of every row: float64 [N, p]; a row that lacks any of them is all NaN, and so is one of a source
        that no run had, under a rule with regressors of sources.

        Raises:
            RequestError: the table has no column of an indicator.
        """
        if not table.values.keys() >= set(filter(None, columns := self.columns)):
            self._require_columns(table)
        phi = phi_matrix(table, {n: self.transforms_[n] for n in self.feature_names_in_}, columns)
        if self.sources_:
            phi[self._foreign(table)] = np.nan
        return phi

    def _foreign(self, table: ScoreTable) -> np.ndarray:
        """bool [N], rows of sources that no run had."""
        known = set(self.sources_)
        return np.fromiter((name not in known for name in table.source), dtype=np.bool_, count=len(table))

    def why_none(self, source: str) -> str:
        """Why a row of this source that has all indicators has no prediction."""
        if self.sources_ and source not in self.sources_:
            return f"no run of the rule had its source ({source})"
        return "an indicator of it has no finite regressor, as the logarithm of a negative number"

    def predict(self, table: ScoreTable) -> np.ndarray:
        """Predicted log loss per row, float64 [N]; NaN where an indicator is missing. Lower is better."""
        return self.log_loss(self.phi(table))

    def log_loss(self, phi: np.ndarray) -> np.ndarray:
        """Log loss of regressors float64 […, p]: a + b·φ, under a law with an offset log(c + exp(a + b·φ))."""
        index = self.intercept_ + phi @ self.coef_
        return np.asarray(np.logaddexp(index, np.log(self.offset_)) if self.offset_ else index)

    def predict_mean(self, mean_phi: np.ndarray | Sequence[float]) -> tuple[float, float | None]:
        """Predicted log loss of a dataset with these mean regressors ([p]), and its standard error where known."""
        x = np.asarray(mean_phi, dtype=np.float64)
        estimate = float(self.log_loss(x))
        if self.coef_cov_ is None:
            return estimate, None
        row = np.concatenate([[1.0], x])
        if self.offset_:  # the slopes of log(c + exp(index)) in its terms
            share = 1.0 - self.offset_ / np.exp(estimate)
            row = np.append(row * share, np.exp(-estimate))
        return estimate, float(np.sqrt(max(row @ self.coef_cov_ @ row, 0.0)))

    def predict_interval(
        self, mean_phi: np.ndarray | Sequence[float], level: float = 0.95
    ) -> tuple[float, float | None, float | None]:
        """Predicted log loss of one more run on a dataset with these mean regressors ([p]), and where it should lie.

        Least squares: the t interval. Other rules: prediction ± t · held-out root mean squared error, which holds
        within the fitted region only.

        Returns:
            (estimate, low, high); the limits are None for a rule that does not know its errors.
        """
        from scipy.stats import t as student

        estimate, se = self.predict_mean(mean_phi)
        metrics, half = self.metrics_, None
        if self.method == "ols" and se is not None and metrics.residual_sd and metrics.f is not None:
            df = metrics.df_residual or self.n_runs_ - len(self.coef_) - 1
            half = float(student.ppf((1 + level) / 2, df)) * float(np.hypot(se, metrics.residual_sd))
        elif metrics.grouped_rmse and metrics.n_subsets > 1:
            half = float(student.ppf((1 + level) / 2, metrics.n_subsets - 1)) * metrics.grouped_rmse
        return (estimate, None, None) if half is None else (estimate, estimate - half, estimate + half)

    def edge(self) -> np.ndarray:
        """Where the tilt of strength 1 goes, in the direction of lower loss: μ₁ = m − r·Cb/√(bᵀCb), float64 [p].

        r is `reach_` (under an old region the radius), in sd of the fitted values; Cb is the covariance of the run
        means with the fitted values, so no inverse is needed. A rule whose
        coefficients are all zero has no direction: its edge is the mean.

        Raises:
            RequestError: the rule has no fitted region.
        """
        mean, cov, radius = self._region()
        return diagnostics.lower_edge(mean, cov, radius if self.reach_ is None else self.reach_, self.coef_)

    def mahalanobis(self, mean_phi: np.ndarray | Sequence[float]) -> float | np.ndarray:
        """Distance of a dataset's mean regressors from the mean of the fitted runs, in the means of the indicators.

        By the pseudo-inverse of their covariance; directions without evidence are left out (see `region_rank`).

        Args:
            mean_phi: [p], or [k, p] for k datasets.

        Returns:
            A float, or float64 [k].

        Raises:
            RequestError: the rule has no fitted region.
        """
        mean, cov, _ = self._region()
        heights, away, spread = self.heights, np.asarray(mean_phi, dtype=np.float64) - mean, cov
        if heights is not None:
            away, spread = away @ heights, (cov @ heights).T @ heights
        distances = diagnostics.mahalanobis(away, np.zeros(len(spread)), spread)
        return float(distances) if distances.ndim == 0 else distances

    @property
    def region_rank(self) -> int:
        """Directions of `cov_` that count in `mahalanobis`; p unless the runs' means were collinear."""
        return diagnostics.region_rank(self._region()[1])

    def check(self, table: ScoreTable, force: Force = False) -> list[str]:
        """Whether the rule may be applied to the table.

        Args:
            table: Scores with their keys.
            force: Accept a rule no better than the mean ("weak-rule", or True), indicators computed in another way than
                for the fit ("other-base"), a rule that makes a target worse ("worse-target"); several in
                a list or separated by commas.

        Returns:
            What a person should know, one sentence each; also issued as warnings.

        Raises:
            RequestError: an indicator is absent; or, unless `force` names it, one was computed by another model,
                template, length, … than at the fit, or the permutation test found the rule no better than the mean.
        """
        self._require_columns(table)
        found, notes = objections(self, table)
        refused = [one for one in found if one.risk not in accepted(force)]
        if refused:
            remedies = list(dict.fromkeys(one.remedy for one in refused))
            remedy = f"{', and '.join(remedies)}, or {to_force((one.risk for one in refused), force)}"
            raise RequestError(message(f"rule {self.title}", ". ".join(one.cause for one in refused), remedy))
        notes += [f"rule {self.title}, forced: {one.cause}" for one in found]
        if self.sources_ and (foreign := self._foreign(table)).any():
            names = ", ".join(sorted({table.source[at] for at in np.flatnonzero(foreign)})[:5])
            notes.append(
                f"rule {self.title}: {int(foreign.sum()):,} rows have no prediction: no run of it had their source "
                f"({names}), and it knows sources by name (refit --method names one that does not)"
            )
        if unknown := [name for name in self.indicators if not self.identities.get(name)]:
            which = ", ".join(unknown) if self.identities else "its indicators"
            notes.append(f"rule {self.title} does not record the identity of {which}, which cannot be verified")
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return notes

    def forced(self, table: ScoreTable, regime: Mapping[str, Any] | None = None) -> list[str]:
        """The risks that have to be accepted for using the rule on the table, in a run of this regime: what a record
        keeps of `force`."""
        risks = {one.risk for one in objections(self, table)[0]}
        if any(map(_is_grave, self._differences(regime or {}))) and not weigh_evidence(self, regime or {})[0]:
            risks.add("other-base")
        return [name for name in RISKS if name in risks]

    def _differences(self, regime: Mapping[str, Any]) -> list[Difference]:
        if not self.regime:
            return []
        found = differences(comparable(self.regime, self.evaluation), comparable(regime, self.evaluation))
        return [d for d in found if d.left is not None and d.right is not None]

    def check_regime(self, regime: Mapping[str, Any], force: Force = False) -> list[str]:
        """How a run that would use the rule differs from the runs it was fitted on.

        Args:
            regime: The coming run's regime, as a RunRecord keeps it.
            force: With "other-base", accept another base model or template.

        Returns:
            The differences that remain, one sentence each; also issued as warnings.

        Raises:
            RequestError: another base model or template, for which the rule has no evidence (im-lightning transfer),
                and `force` does not name it.
        """
        found = self._differences(regime)
        texts = [d.text("in the rule's runs", "here") for d in found]
        grave = [t for t, d in zip(texts, found, strict=True) if _is_grave(d)]
        carried, lacking = weigh_evidence(self, regime) if grave and self.transfers else ("", "")
        if grave and not carried and "other-base" not in accepted(force):
            remedy = (
                "refit on runs of this model (im-lightning refit LEDGER --out rule.json), show that rankings carry "
            )
            remedy += f"over (im-lightning transfer LEDGER --model BASE), or {to_force(['other-base'], force)}"
            raise RequestError(message(f"rule {self.title}", "; ".join(filter(None, [*grave, lacking])), remedy))
        notes = [f"rule {self.title}: {text}" for text in (*texts, carried) if text]
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return notes

    def score_command(self) -> str:
        """The command that computes what the rule needs."""
        named = [(f"--{name.replace('_', '-')}", name) for name in ("model", *models_of(self.indicators))]
        models = " ".join(f"{flag} {'FILE' if name == 'targets' else 'MODEL'}" for flag, name in named)
        return f"im-lightning score DATA {models} --indicators {','.join(self.indicators)} --out scores.parquet"

    def to_pandas(self) -> Any:
        """One row per regressor: indicator, coefficient and `effect_of_one_sd` (coefficient × sd over the runs, in log
        loss), and where they are known its se, t, p, 95 % interval and VIF, as a `pandas.DataFrame`."""
        return coefficient_frame(self)

    def plot(self, axes: Any = None) -> list[Any]:
        """Draws what the rule says of each indicator: the coefficient with its interval in sd of the runs, or under an
        additive rule a panel per indicator with the effect at its knots. Below zero: lower loss.

        Args:
            axes: Axes of matplotlib, one or one per panel; by default those of a new figure.

        Returns:
            The axes.
        """
        return plot_rule(self, axes)

    def summary(self, width: int | None = None) -> str:
        """The regression table and what to think of it, as plain text.

        Args:
            width: Columns to stay within; by default the terminal's.
        """
        return rule_summary(self, width)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the rule file (JSON) atomically."""
        write_json(path, rule_to_json(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearRule:
        """Reads a rule file.

        Raises:
            RequestError: there is no such file.
            DataError: torn, foreign, of another schema or with a wrong field; names file and field.
        """
        return cls(**vars(read_fields(path)))

    def _region(self) -> tuple[np.ndarray, np.ndarray, float]:
        if self.mean_ is None or self.cov_ is None or self.radius_ is None:
            cause = "it has no fitted region (the means and covariance of the runs behind it are not known)"
            remedy = "fit a rule of your own (im-lightning refit LEDGER --out rule.json), or weight by softmax"
            raise RequestError(message(f"rule {self.title}", cause, remedy))
        return self.mean_, self.cov_, self.radius_

    def _require_columns(self, table: ScoreTable) -> None:
        absent = [n for n in self.indicators if n not in table.values]
        if absent:
            have = ", ".join(table.indicators) or "none"
            cause = f"it needs {', '.join(absent)}, and the table has no such column (it has {have})"
            raise RequestError(message(f"rule {self.title}", cause, f"run `{self.score_command()}`"))


def _is_grave(difference: Difference) -> bool:
    return difference.field.split(".")[0] in GRAVE


class Objection(NamedTuple):
    """Why a rule is refused for a table, unless its risk is accepted; and what to do about it."""

    risk: str
    cause: str
    remedy: str


def objections(rule: LinearRule, table: ScoreTable) -> tuple[list[Objection], list[str]]:
    """What `LinearRule.check` refuses a rule and a table for, and notes on what must only be known."""
    found: list[Objection] = []
    notes: list[str] = []
    if rule.beats_mean is False:
        p, r2 = (rule.metrics_.permutation or {}).get("p"), rule.held_out_r2
        numbers = [f"{word} {v:.2g}" for word, v in (("permutation p", p), ("held-out R²", r2)) if v is not None]
        untested = "" if rule.metrics_.permutation else "; it was not tested"
        cause = f"its own runs find it no better than the mean ({', '.join(numbers) or 'permutation test'}{untested})"
        found.append(Objection("weak-rule", cause, "make more designed runs and refit"))

    if rule.metrics_.targets and (worse := worse_targets(rule.metrics_)):
        remedy = "weigh the targets in another way and refit (--target)"
        found.append(Objection("worse-target", f"its weights make a named target worse: {worse}", remedy))

    def other_base(cause: str) -> None:
        found.append(Objection("other-base", cause, f"score the data as for the fit ({rule.score_command()})"))

    for name in rule.indicators:
        key = table.keys.get(name) or {}
        known, present = rule.identities.get(name), key.get("identity")
        if not known:
            continue
        if not present:
            other_base(f"{name}: the table does not say how it was computed")
            continue
        other = differences(known, present, POOL_FIELDS)
        if [d for d in other if d.field.endswith("long texts") and d.right is None]:  # what no text there needs
            other = [d for d in other if not d.field.endswith("long texts")]
            notes.append(
                f"rule {rule.title}: {name}: the rule's pool had texts longer than the embedding model takes, this one "
                "has none, or was scored by a version that cut them: then score it again"
            )
        if other:
            parts = "; ".join(d.text("in the rule", "in the table") for d in other)
            other_base(f"{name} was computed in another way than for the fit ({parts})")
            continue
        rounding = differences(rule.numerics.get(name) or {}, key.get("numerics") or {})
        if rounding and rule.numerics.get(name):
            parts = "; ".join(d.text("in the rule", "in the table") for d in rounding)
            notes.append(f"rule {rule.title}: {name} was computed with other numerics ({parts})")
    return found, notes


@dataclass(frozen=True)
class Regressors:
    """The regressors of a scored pool of N rows, under a rule or without one."""

    rule: LinearRule | None
    # [p] the rule's (under an additive rule hat functions of indicators); without one the paper's indicators where
    # present, else all of the table
    names: list[str]
    # indicator → φ, for all indicators of the table: the rule's own where it has one, else the default on this pool
    transforms: dict[str, Transform]
    knots: dict[
        str, list[float]
    ]  # indicator → knots of its hat functions: an additive rule's own, else quantiles of this pool
    phi: np.ndarray  # float64 [N, p]; a row that lacks any of the regressors is all NaN
    predicted: np.ndarray | None  # float64 [N], log loss predicted by the rule, NaN where φ is; None without a rule

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
            return cls(rule, names, transforms, knots, phi, rule.log_loss(phi))
        names = default_regressors(table.indicators) or list(table.indicators)
        return cls(None, names, transforms, knots, phi_matrix(table, {n: transforms[n] for n in names}), None)

    @property
    def known(self) -> np.ndarray:
        """bool [N], rows that lack no regressor."""
        return ~np.isnan(self.phi).any(axis=1)

    def of_indicators(self, table: ScoreTable) -> tuple[list[str], np.ndarray]:
        """The q indicators behind the regressors and their own φ, float64 [N, q]: under an additive rule without hat
        functions, else the regressors themselves. A row that lacks one is all NaN."""
        names = self.names if self.rule is None else self.rule.indicators
        if names == self.names:
            return self.names, self.phi
        return names, phi_matrix(table, {name: self.transforms[name] for name in names})

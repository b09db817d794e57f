"""Chooses the runs of a fit: complete, designed, of one regime, with one evaluation set and the same regressors.

What runs record beside the regressors of a fit: weights, means of hat functions, source shares, lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from im_lightning._utils.force import Force, accepted
from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import Transform, default_regressors
from im_lightning.ledger.curve import STOPPED, stopped_text
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.regime import (
    Regime,
    choose_evaluation,
    count_runs,
    describe,
    fit_command,
    group_regimes,
    list_regimes,
    run_names,
)
from im_lightning.ledger.targets import terms_of


def run_weights(records: Sequence[RunRecord], weights: Mapping[str, float] | None) -> np.ndarray:
    """Weights of the n runs in a fit, float64 [n], mean 1; `weights` is run id → weight, 1 where none is given.

    Raises:
        RequestError: an unknown run, or a weight that is not positive.
    """
    given = dict(weights or {})
    unknown = [name for name in given if name not in {r.run_id for r in records}]
    if unknown:
        cause = f"no run of the fit has the id {', '.join(unknown[:3])}"
        raise RequestError(message("weights", cause, "name runs of the fit (im-lightning runs LEDGER)"))
    out = np.array([float(given.get(r.run_id, 1.0)) for r in records])
    if not (np.isfinite(out).all() and (out > 0).all()):
        raise RequestError(message("weights", "one is not a positive number", "leave a run out of the ledger instead"))
    return out / out.mean()


def hat_means(
    records: Sequence[RunRecord], names: Sequence[str]
) -> tuple[dict[str, tuple[list[float], np.ndarray]], str]:
    """(indicator → (knots, means of the hat functions [n, K + 1]), ""), or ({}, why there are none)."""
    if lacking := [r for r in records if any(n not in r.basis_means for n in names)]:
        lacked = ", ".join(n for n in names if n not in lacking[0].basis_means)
        return {}, f"{run_names(lacking)} recorded no basis means of {lacked}"
    out = {}
    for name in names:
        knots = [float(k) for k in records[0].basis_means[name]["knots"]]
        width = knots[-1] - knots[0]
        for record in records:
            other = record.basis_means[name]["knots"]
            if len(other) != len(knots) or not np.allclose(other, knots, rtol=0, atol=1e-3 * max(width, 1e-12)):
                return {}, f"the knots of {name} differ between {records[0].run_id} and {record.run_id} (another pool?)"
        means = np.array([r.basis_means[name]["means"] for r in records], dtype=np.float64)
        if not np.isfinite(means).all():
            return {}, f"the basis means of {name} are missing in some run"
        out[name] = (knots, means)
    return out, ""


def source_shares(records: Sequence[RunRecord]) -> dict[str, np.ndarray]:
    """source → float64 [n], its share of each run; {} where some run does not record them."""
    every = [r.subset.get("source_shares") or {} for r in records]
    if not all(every) or any(share is None for shares in every for share in shares.values()):
        return {}
    names = sorted({name for shares in every for name in shares})
    return {name: np.array([float(shares.get(name, 0.0)) for shares in every]) for name in names}


def source_means(records: Sequence[RunRecord], names: Sequence[str], x: np.ndarray) -> dict[str, np.ndarray]:
    """source → float64 [n, p], the part of the runs' means of φ (`x`) that its rows make up; {} where some run does not
    record it, or as it was at another point of its curve."""
    sources = sorted({source for r in records for source in r.source_phi_means})
    none = dict.fromkeys(names, 0.0)
    found = {
        source: np.array(
            [[r.source_phi_means.get(source, none).get(n, math.nan) for n in names] for r in records], dtype=np.float64
        )
        for source in sources
    }
    whole = all(r.source_phi_means for r in records) and np.allclose(sum(found.values()), x, rtol=1e-6, atol=1e-9)
    return found if whole else {}


Lengths = tuple[list[str], np.ndarray, dict[str, tuple[list[float], np.ndarray]]]


def mean_lengths(records: Sequence[RunRecord]) -> Lengths:
    """Names [k] and means of φ [n, k] of the lengths of responses and inputs, as far as the runs have them and differ
    in them by more than rounding, and the means of their hat functions, as `hat_means`."""
    found = {}
    for name in ("length_output", "length_input"):
        values = np.array([r.phi_means.get(name, math.nan) for r in records], dtype=np.float64)
        if np.isfinite(values).all() and values.std() > 1e-9 * np.abs(values).max():
            found[name] = values
    return list(found), np.array(list(found.values())).T, hat_means(records, list(found))[0] if found else {}


def log_losses(records: Sequence[RunRecord], evaluation: str = "") -> dict[str, np.ndarray]:
    """Loss or score that some run has, those of a target first → its logarithm in n runs, float64 [n], lower is better;
    NaN where a run lacks it."""
    measured = dict.fromkeys(name for r in records for name in r.measured)
    named = [evaluation] if evaluation in measured else list(terms_of(evaluation)) if evaluation else []
    every = dict.fromkeys([*named, *measured])
    return {n: np.log([r.loss(n) if r.has_loss(n) else math.nan for r in records]) for n in every}


@dataclass
class FitData:
    """What a fit sees."""

    records: list[RunRecord]  # [n] runs, by time
    names: list[str]  # [p] indicators
    x: np.ndarray  # float64 [n, p], exposure-weighted means of φ
    y: np.ndarray  # float64 [n], log of the evaluation loss in nats per token, or of an error rate
    groups: list[str]  # [n] subset of each run; equal for repeats
    transforms: dict[str, Transform]  # indicator → φ
    evaluation: str  # the target: an evaluation set, or as `ledger.targets` writes it
    regime: dict[str, Any]  # the regime of the runs, without what varies among them
    notes: list[str] = field(default_factory=list)  # what a person should know, one sentence each
    # float64 [n], weights of the runs in the fit, mean 1
    weights: np.ndarray = field(default_factory=lambda: np.empty(0))
    # indicator → (knots, means of the hat functions [n, K + 1]), for an additive rule; {} where `no_hats` says why
    hats: dict[str, tuple[list[float], np.ndarray]] = field(default_factory=dict)
    no_hats: str = ""  # why the runs do not allow an additive rule; "" where they do
    # source → float64 [n], its share of each run; {} where the runs do not record them
    shares: dict[str, np.ndarray] = field(default_factory=dict)
    # source → float64 [n, p], means of φ counted as 0 in rows of other sources; {} where the runs do not record them
    by_source: dict[str, np.ndarray] = field(default_factory=dict)
    # lengths of responses and inputs: names [k], means of φ [n, k], means of hat functions; see `mean_lengths`
    lengths: Lengths = field(default_factory=lambda: ([], np.empty((0, 0)), {}))
    # every loss and score that the runs have, as `y`: float64 [n], NaN where a run lacks it; see `log_losses`
    targets: dict[str, np.ndarray] = field(default_factory=dict)
    # how runs of several kinds were mixed (`rule.kinds`), JSON-like; {} where all were trained
    kinds: dict[str, Any] = field(default_factory=dict)

    def take(self, kept: np.ndarray) -> FitData:
        """Of some of the runs only; `kept` are their positions."""
        names, means, hats = self.lengths
        return replace(
            self,
            records=[self.records[k] for k in kept],
            x=self.x[kept],
            y=self.y[kept],
            groups=[self.groups[k] for k in kept],
            weights=self.weights[kept] / self.weights[kept].mean(),
            hats={name: (knots, m[kept]) for name, (knots, m) in self.hats.items()},
            shares={name: share[kept] for name, share in self.shares.items()},
            by_source={name: part[kept] for name, part in self.by_source.items()},
            targets={name: values[kept] for name, values in self.targets.items()},
            lengths=(names, means[kept] if len(names) else means, {n: (k, m[kept]) for n, (k, m) in hats.items()}),
        )

    @property
    def contrasts(self) -> dict[str, np.ndarray]:
        """source → float64 [n], its share of each run, of the sources whose shares vary; that of the largest mean
        share is last. {} where `no_contrasts` says why."""
        varying = {name: shares for name, shares in self.shares.items() if shares.std() > 1e-9}
        order = sorted(varying, key=lambda name: (float(varying[name].mean()), name))
        found = {name: varying[name] for name in order}
        return {} if len(found) < 2 or _within(np.column_stack(list(found.values())), self.x) else found

    @property
    def no_pooling(self) -> str:
        """Why slopes cannot differ by source; "" where they can."""
        if self.no_contrasts:
            return self.no_contrasts
        if set(self.by_source) != set(self.contrasts):
            return "some run does not record the means of its indicators by source"
        need = len(self.names) + len(self.contrasts)
        few = len(set(self.groups)) <= need
        return f"so many slopes and sources take more than {need} different subsets" if few else ""

    @property
    def no_contrasts(self) -> str:
        """Why shares of sources cannot stand beside the indicators; "" where they can."""
        if not self.shares:
            return "some run does not record the shares of its sources"
        return "" if self.contrasts else "the runs do not differ in their sources, or the indicators say as much"

    @property
    def codes(self) -> np.ndarray:
        """int64 [n], subset of each run, numbered by name."""
        return np.unique(np.asarray(self.groups, dtype=str), return_inverse=True)[1].reshape(-1)

    @property
    def once(self) -> np.ndarray:
        """float64 [n], mean 1: the weights of the runs such that a subset counts once, however many runs repeat it.
        Least squares with them is the fit of the subsets' mean losses."""
        w = self.weights / np.bincount(self.codes)[self.codes]
        return w / w.mean()


def _within(shares: np.ndarray, x: np.ndarray) -> bool:
    """Whether the shares are linear combinations of the regressors and a constant."""
    base = np.column_stack([np.ones(len(x)), (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 0, x.std(axis=0), 1.0)])
    rank = [np.linalg.matrix_rank(part, tol=1e-8 * len(x)) for part in (base, np.column_stack([base, shares]))]
    return bool(rank[0] == rank[1])


def gather(
    records: Iterable[RunRecord],
    indicators: Sequence[str] | None = None,
    evaluation: str | None = None,
    regime: str | None = None,
    force: Force = False,
    weights: Mapping[str, float] | None = None,
) -> FitData:
    """The runs that may be fitted together.

    Args: as `fit_rule`.

    Raises:
        RequestError: no complete designed runs; several evaluation sets and none named; runs of several regimes and
            none chosen; unknown indicators; means that are missing.
    """
    every = sorted(records, key=lambda r: (r.when, r.run_id))
    complete = [r for r in every if r.status == "complete"]
    designed = [r for r in complete if r.purpose == "designed"]
    if not designed:
        cause = f"no complete designed runs to fit on (there are {count_runs(every)})"
        raise RequestError(message("refit", cause, f"make designed runs, for example `{fit_command(every)}`"))
    chosen_set = choose_evaluation(designed, evaluation)
    notes: list[str] = []
    designed = _with_loss(designed, chosen_set, notes)
    names = _choose_indicators(designed, indicators)
    groups = group_regimes(designed, names, chosen_set)
    wanted = None if regime is None else (regime, next((r for r in complete if r.run_id == regime), None))
    kept = _choose_regimes(groups, wanted, names, chosen_set, force, notes)
    if indicators is None:  # the chosen runs may know fewer than all runs do
        known = [n for n in names if all(n in g.transforms for g in kept)]
        if known != names:
            names, kept = known, group_regimes([r for g in kept for r in g.records], known, chosen_set)
    if early := {stopped_text(r) for g in kept for r in g.records if r.regime.get(STOPPED)}:
        notes.append(f"These losses are early ones ({', '.join(sorted(early))}), not those of finished runs.")
    _refuse_without_phi(kept, names)
    used = [r for g in kept for r in g.records]
    used.sort(key=lambda r: (r.when, r.run_id))
    x = np.array([[r.phi_means.get(n, math.nan) for n in names] for r in used], dtype=np.float64)
    _refuse_missing(x, used, names)
    y = np.log([r.loss(chosen_set) for r in used])
    hats, no_hats = hat_means(used, names)
    return FitData(
        records=used,
        names=names,
        x=x,
        y=y,
        groups=[r.subset_key for r in used],
        transforms={n: kept[0].transforms[n] for n in names},
        evaluation=chosen_set,
        regime=kept[0].description["regime"],
        notes=notes,
        weights=run_weights(used, weights),
        hats=hats,
        no_hats=no_hats,
        shares=source_shares(used),
        by_source=source_means(used, names, x),
        lengths=mean_lengths(used),
        targets=log_losses(used, chosen_set),
    )


def _with_loss(records: list[RunRecord], evaluation: str, notes: list[str]) -> list[RunRecord]:
    good = [r for r in records if r.has_loss(evaluation)]
    bad = [r for r in records if not r.has_loss(evaluation)]
    if bad:
        notes.append(f"left out, without a finite loss on {evaluation}: {run_names(bad)}")
    if not good:
        cause = f"none of the {run_names(bad)} has a finite loss on {evaluation}"
        raise RequestError(message("refit", cause, f"make designed runs, for example `{fit_command(records)}`"))
    return good


def _choose_indicators(records: Sequence[RunRecord], indicators: Sequence[str] | None) -> list[str]:
    present = dict.fromkeys(n for r in records for n in r.phi_means)
    listed = ", ".join(present) or "none"
    if indicators is not None:
        names = list(dict.fromkeys(indicators))
        absent = [n for n in names if n not in present]
        if absent or not names:
            cause = f"no run has the indicators {', '.join(absent)}" if absent else "no indicator is named"
            raise RequestError(message("--indicators", f"{cause}; the runs have {listed}", "name some of these"))
        return names
    names = default_regressors(present)
    if not names:
        cause = f"the runs have none of the default regressors; they have {listed}"
        raise RequestError(message("refit", cause, "name the regressors with --indicators a,b"))
    return names


def _choose_regimes(
    groups: list[Regime],
    regime: tuple[str, RunRecord | None] | None,
    names: Sequence[str],
    evaluation: str,
    force: Force,
    notes: list[str],
) -> list[Regime]:
    if regime is not None:
        run_id, run = regime
        chosen = [] if run is None else [g for g in groups if g.takes(*describe(run, names, evaluation))]
        if chosen:
            return chosen
        cause = "the ledger has no complete run of this id" if run is None else "no designed run shares its regime"
        cause += f"; the designed runs are of these regimes:\n{list_regimes(groups)}"
        raise RequestError(message(f"--regime {run_id}", cause, "name a run of the regime you want"))
    if len(groups) == 1:
        return groups
    same_phi = [g for g in groups if g.takes(g.description, groups[0].transforms)]
    ends = {str(g.description["regime"].get(STOPPED)) for g in groups}
    if "other-regime" in accepted(force) and len(same_phi) == len(groups) and len(ends) == 1:
        notes.append(f"FORCED: runs of {len(groups)} regimes are mixed:\n{list_regimes(groups)}")
        return groups
    grave = " whose φ differ, so that their means are not comparable" if len(same_phi) < len(groups) else ""
    cause = f"the designed runs are of {len(groups)} regimes{grave}; one rule cannot describe them:\n"
    remedy = f"choose the regime of a run (--regime {groups[0].records[0].run_id}) or keep separate ledgers"
    shared = [n for n in groups[0].transforms if all(n in g.transforms for g in groups)]
    if shared and any(len(shared) < len(g.transforms) for g in groups):
        remedy += f", or name the indicators that all runs have (--indicators {','.join(shared)})"
    elif len(ends) > 1:
        remedy += ", or fit all runs as they were at one point (--at 0.2, a share of the steps or a number of them)"
    elif not grave:
        remedy += ", or mix them (--force other-regime; Python: force='other-regime')"
    raise RequestError(message("refit", cause + list_regimes(groups), remedy))


def _refuse_without_phi(kept: Sequence[Regime], names: Sequence[str]) -> None:
    for group in kept:
        absent = [n for n in names if n not in group.transforms]
        if absent or not names:
            lacking = ", ".join(absent) or "any indicator"
            cause = f"the runs do not record the φ of {lacking}: {run_names(group.records)}"
            raise RequestError(message("refit", cause, "name others with --indicators, or make the runs again"))


def _refuse_missing(x: np.ndarray, records: Sequence[RunRecord], names: Sequence[str]) -> None:
    missing = ~np.isfinite(x)
    if not missing.any():
        return
    lines = [
        f"{names[j]} in {run_names([r for r, m in zip(records, missing[:, j], strict=True) if m])}"
        for j in np.flatnonzero(missing.any(axis=0)).tolist()
    ]
    rest = ",".join(n for j, n in enumerate(names) if not missing[:, j].any()) or "a,b"
    remedy = f"leave the indicator out (--indicators {rest}), or score its rows and make the runs again"
    raise RequestError(message("refit", f"the mean of a regressor is missing: {'; '.join(lines)}", remedy))

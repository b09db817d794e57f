"""What `refit` and `compare` say beside coefficients, against ledgers whose truth is known; run by `scripts/simulate`.

`repeats`: errors, t and F of least squares where subsets are repeated. `region`: who lies inside the fitted region.
`gain`: the interval of the gain over the baselines. `length`: a loss that is length alone. `sources`: a rule that is
right in every source. `ledger`, `weak-ledger`: the interval of `compare --ledger`. `numbers`: noise ceiling,
calibration, resampled and Pearson intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.simulation import (
    INTERCEPT,
    NAMES,
    ROWS,
    SUBSET,
    TRUTH,
    bank_of,
    make_bank,
    make_ledger,
    make_pool,
    make_records,
)
from im_lightning.experiments.compare.rule_spread import DRAWS, rule_spread
from im_lightning.experiments.compare.statistics import compare
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.run_table import gather
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.validation import diagnostics, uncertainty
from im_lightning.rule.validation.baselines import baselines
from im_lightning.rule.validation.model_selection import Scheme, estimators_of, evaluate, recommend
from im_lightning.rule.validation.univariate import univariate
from im_lightning.sampling.draws.systematic import checked_weights, systematic_sample
from im_lightning.sampling.plan_runs import plan_runs
from im_lightning.sampling.weights.quality_weights import Weighting, weights_of

BETA = np.array([TRUTH[name] for name in NAMES])
Line = dict[str, Any]


class Claim(NamedTuple):
    """One simulation: a line per ledger, what its lines say, and whether the bar is met."""

    ledgers: int
    line: Callable[[int], Line]
    told: Callable[[Sequence[Line]], list[tuple[str, bool]]]


def share(values: Any) -> str:
    """`95.2 % (± 0.7)`: a share and its standard error from simulating so many."""
    v = np.asarray(values, dtype=np.float64).ravel()
    return f"{100 * v.mean():.1f} % (± {100 * np.sqrt(v.mean() * (1 - v.mean()) / len(v)):.1f})"


def phi_of_pool() -> np.ndarray:
    """float64 [N, p], the regressors of the pool's rows."""
    transforms = make_bank().transforms
    table = make_pool()
    return np.column_stack([transforms[n].apply(table.values[n]) for n in NAMES])


# repeats

DESIGNS = {"27 subsets, 3 of them twice": [2] * 3 + [1] * 24, "12 subsets thrice": [3] * 12,
           "18 subsets, 6 of them thrice": [3] * 6 + [1] * 12}  # fmt: skip
BETWEEN = (0.0, 0.5, 0.9)


def repeats_line(seed: int) -> Line:
    rng, out = np.random.default_rng([seed, 11]), {}
    bank = make_bank()
    for design, counts in DESIGNS.items():
        picks = np.repeat(rng.choice(len(bank.phi), len(counts), replace=False), counts)
        for between in BETWEEN:
            of_subset = dict(zip(picks.tolist(), rng.standard_normal(len(picks)), strict=True))
            noise = [
                np.sqrt(between) * of_subset[p] + np.sqrt(1 - between) * rng.standard_normal() for p in picks.tolist()
            ]
            y = INTERCEPT + bank.phi[picks] @ BETA + 0.02 * np.array(noise)
            limits, _ = _least_squares(make_records(bank, picks, y))
            truth = [INTERCEPT, *(TRUTH[n] for n in gather(make_records(bank, picks, y)).names)]
            held = [bool(low <= b <= high) for (low, high), b in zip(limits, truth, strict=True)]
            _, p = _least_squares(make_records(bank, picks, INTERCEPT + 0.02 * np.array(noise)))
            out[f"{design}, {between} between subsets"] = [held, p < 0.05]
    return {"seed": seed, "found": out}


def _least_squares(records: list[RunRecord]) -> tuple[np.ndarray, float]:
    """What a rule by least squares says of its runs: intervals [p + 1, 2] and the p of F."""
    rule = fit_rule(records, "ols", permutations=0, bootstrap=0, diagnose=False)
    p = rule.metrics_.f_p
    return np.array([[row["low"], row["high"]] for row in rule.coefficients_]), np.nan if p is None else p


def repeats_told(lines: Sequence[Line]) -> list[tuple[str, bool]]:
    out = []
    for name in lines[0]["found"]:
        held = np.array([one["found"][name][0] for one in lines])
        size = np.array([one["found"][name][1] for one in lines])
        good = 0.93 <= held.mean() <= 0.97 and 0.03 <= size.mean() <= 0.07
        out.append((f"{name}: intervals hold {share(held)} (93 to 97); F below 0.05 in {share(size)} (3 to 7)", good))
    return out


# region


def region_line(seed: int) -> Line:
    rng, bank, table, out = np.random.default_rng([seed, 12]), make_bank(), make_pool(), {}
    for runs in (24, 30, 60):
        records = make_ledger(bank, runs, rng, TRUTH)
        for method in ("ols", "additive"):
            rule = fit_rule(records, method, diagnose=False)
            phi, radius = rule.phi(table), float(rule.radius_ or 0)
            data = gather(records)
            x = np.column_stack([m[:, 1:] for _, m in data.hats.values()]) if method == "additive" else data.x
            alone = diagnostics.without_itself(rule.of_indicators(x), data.groups)
            draw = weights_of(phi, rule, Weighting(), SUBSET, None).weights @ phi
            pool, drawn = float(rule.mahalanobis(phi.mean(axis=0))), float(rule.mahalanobis(draw))
            inside = [float((alone <= radius).mean()), float((np.asarray(rule.mahalanobis(x)) <= radius).mean())]
            out[f"{method}, {runs} runs"] = [pool > radius, *inside, drawn < pool]
    return {"seed": seed, "found": out}


def region_told(lines: Sequence[Line]) -> list[tuple[str, bool]]:
    out = []
    for name in lines[0]["found"]:
        v = np.array([one["found"][name] for one in lines], dtype=float)
        words = (
            f"{name}: the pool is flagged in {share(v[:, 0])} (at most 5); own runs inside {100 * v[:, 1].mean():.1f} %"
        )
        words += (
            f" each without itself (90 to 99), {100 * v[:, 2].mean():.1f} % of all; the draw is nearer than the pool in"
        )
        out.append((f"{words} {share(v[:, 3])}", bool(v[:, 0].mean() <= 0.05 and 0.9 <= v[:, 1].mean() <= 0.99)))
    return out


# gain

GAINS = (("ols", 30, 0.02), ("ols", 60, 0.05), ("ridge", 60, 0.05))


def gain_line(seed: int) -> Line:
    rng, out = np.random.default_rng([seed, 13]), {}
    for method, runs, noise in GAINS:
        data = gather(make_ledger(make_bank(), runs, rng, TRUTH, noise))
        scheme = Scheme.of(data)
        found = baselines(data, scheme, evaluate(data, scheme, estimators_of(data, [method], None)[0]))
        for name, one in found.items():
            out[f"{method}, {runs} runs, noise {noise}, over {name}"] = [one["gain"], one["gain_low"], one["gain_high"]]
    return {"seed": seed, "found": out}


def gain_told(lines: Sequence[Line]) -> list[tuple[str, bool]]:
    return [_held(name, np.array([one["found"][name] for one in lines]), 0.92) for name in lines[0]["found"]]


def _held(name: str, v: np.ndarray, least: float) -> tuple[str, bool]:
    """Of estimates and limits [ledgers, 3]: whether the limits hold the mean estimate, and how wide they are."""
    mean, sd = v[:, 0].mean(), v[:, 0].std(ddof=1)
    held = (v[:, 1] <= mean) & (mean <= v[:, 2])
    wide = float(np.median(v[:, 2] - v[:, 1]) / 2 / (1.96 * sd))
    words = f"{name}: mean {mean:+.3f}, held in {share(held)} ({100 * least:.0f} to 98), median half width {wide:.2f}"
    return f"{words} of 1.96 sd (at most 1.5)", bool(least <= held.mean() <= 0.98 and wide <= 1.5)


# length alone


def length_line(seed: int) -> Line:
    rng, bank, out = np.random.default_rng([seed, 14]), make_bank(), {}
    z = phi_of_pool()[:, NAMES.index("length_output")]
    z = (z - z.mean()) / z.std()
    loss = bank_of(0.06 * np.abs(z) - 0.02 * z)
    for noise in (0.02, 0.006):
        picks = rng.choice(len(bank.phi), 40, replace=False)
        data = gather(make_records(bank, picks, INTERCEPT + loss[picks] + noise * rng.standard_normal(40)))
        scheme = Scheme.of(data)
        rules = [
            evaluate(data, scheme, e) for e in estimators_of(data, ("ols", "ridge", "elastic-net", "additive"), None)
        ]
        found = baselines(data, scheme, recommend(rules, data, scheme.codes))["length"]
        out[f"noise {noise}"] = found["gain_low"] > 0
    return {"seed": seed, "found": out}


def length_told(lines: Sequence[Line]) -> list[tuple[str, bool]]:
    out = []
    for name in lines[0]["found"]:
        v = np.array([one["found"][name] for one in lines])
        out.append((f"{name}: a gain over length is shown in {share(v)} (at most 6)", bool(v.mean() <= 0.06)))
    return out


# sources held out


def sources_line(seed: int) -> Line:
    """Sixty designed runs as `design` plans them; the noise leaves the truth itself a source R² of about 0.8."""
    rng, table = np.random.default_rng([seed, 15]), make_pool()
    plan = plan_runs(table, table.source, {}, 60, SUBSET, first_seed=1000 * seed)
    phi = phi_of_pool()
    means = np.array([phi[one.rows].mean(axis=0) for one in plan.runs])
    y = INTERCEPT + means @ BETA + 0.045 * rng.standard_normal(60)
    shares = np.array([list(one.design["source_shares"].values()) for one in plan.runs])
    names = list(plan.runs[0].design["source_shares"])
    keys = [one.design["seed"] for one in plan.runs]
    bank = make_bank()._replace(
        phi=means, hats=[{}] * 60, shares=[dict(zip(names, s, strict=True)) for s in shares.tolist()]
    )
    found = fit_rule(make_records(bank, np.arange(60), y, keys), diagnose=False).metrics_.source_out
    r2 = [(one or {})["law_r2"] for one in found.values()]
    plain = [(one or {})["r2"] for one in found.values()]
    truth = []
    for k in range(len(names)):
        train, test = shares[:, k] == 0, shares[:, k] >= 0.5
        errors = (y - INTERCEPT - means @ BETA)[test] ** 2
        truth.append(1 - errors.sum() / ((y[test] - y[train].mean()) ** 2).sum())
    return {"seed": seed, "r2": r2, "plain": plain, "truth": truth, "without_quota": plan.without_quota}


def sources_told(lines: Sequence[Line]) -> list[tuple[str, bool]]:
    counts = np.array([sum(v is not None for v in one["r2"]) for one in lines])
    r2 = np.median([v for one in lines for v in one["r2"] if v is not None])
    truth = np.median([v for one in lines for v in one["truth"]])
    words = f"60 runs, 4 sources, 5 indicators: estimable {counts.mean():.2f} of 4, least {counts.min()} (3 or more)"
    words += f"; median printed R² of a rule right everywhere {r2:.2f} (0.6 or more), of the truth itself {truth:.2f}"
    plain = np.median([v for one in lines for v in one["plain"] if v is not None])
    words += f"; plain R² {plain:.2f}"
    return [(words, bool(counts.min() >= 3 and r2 >= 0.6))]


# compare --ledger

LEDGERS = {"training noise 0.02": 0.02, "training noise 0.002": 0.002}


def ledger_line(seed: int, runs: int = 30, run_noise: float = 0.05, stream: int = 16) -> Line:
    """Ledgers of `runs` runs, folds of 300 rows, arms of 100; the effect of the tilt's draw on the loss."""
    rng, bank, table, phi = np.random.default_rng([seed, stream]), make_bank(), make_pool(), phi_of_pool()
    records = make_ledger(bank, runs, rng, TRUTH, run_noise)
    rule = fit_rule(records, diagnose=False)
    folds, how = np.array_split(rng.permutation(ROWS), 10), Weighting()
    tokens = round(100 * float(table.values["length_output"].mean() + 1))
    spread = rule_spread(rule, records, table, ["weighted"], folds[0].tolist(), tokens, how, seed=seed)
    random, weighted = [], []
    for fold in folds:
        mask = np.isin(np.arange(ROWS), fold)
        w = checked_weights(weights_of(rule.phi(table), rule, how, 100, mask).weights)
        random.append(INTERCEPT + phi[rng.choice(fold, 100, replace=False)].mean(axis=0) @ BETA)
        weighted.append(INTERCEPT + phi[systematic_sample(w, 100, rng)].mean(axis=0) @ BETA)
    out = {}
    for name, noise in LEDGERS.items():
        losses = {
            arm: np.exp(v + noise * rng.standard_normal(10)) for arm, v in (("random", random), ("weighted", weighted))
        }
        for seeds in (5, 10):
            some = {arm: v[:seeds].tolist() for arm, v in losses.items()}
            for told, given in (("", spread), (" without the rule's part", None)):
                (r,) = [r for r in compare(some, spread=given, spread_df=DRAWS - 1) if r.arm == "weighted"]
                half = r.difference_half_width
                out[f"{name}, {seeds} seeds{told}"] = [r.difference, r.difference - half, r.difference + half]
    return {"seed": seed, "found": out}


def weak_ledger_line(seed: int) -> Line:
    """The same with a rule that is known badly: 20 runs with noise 0.1."""
    return ledger_line(seed, runs=20, run_noise=0.1, stream=18)


def ledger_told(lines: Sequence[Line]) -> list[tuple[str, bool]]:
    out = []
    for name in lines[0]["found"]:
        words, good = _held(name, np.array([one["found"][name] for one in lines]), 0.93)
        out.append((words, good or "without" in name))
    return out


# numbers


def numbers_line(seed: int) -> Line:
    rng, bank = np.random.default_rng([seed, 17]), make_bank()
    phi, table = phi_of_pool(), make_pool()
    out: Line = {"seed": seed, "ceiling": {}, "calibration": {}}
    for df in (6, 10):
        groups = np.concatenate([np.arange(60 - df), np.arange(df)])
        y = rng.standard_normal(60 - df)[groups] * np.sqrt(0.54) + np.sqrt(0.46) * rng.standard_normal(60)
        found = diagnostics.pure_error(y, [str(g) for g in groups])
        ceiling = found.ceiling if found is not None else None
        out["ceiling"][df] = None if ceiling is None else [*ceiling]
    for noise in (0.04, 0.07):
        rule = fit_rule(make_ledger(bank, 60, rng, TRUTH, noise), diagnose=False)
        draw = weights_of(rule.phi(table), rule, Weighting(), SUBSET, None).weights @ phi - phi.mean(axis=0)
        numbers = [float(draw @ BETA), float(draw @ rule.coef_), rule.metrics_.calibration, rule.held_out_r2]
        out["calibration"][noise] = numbers
    data = gather(make_ledger(bank, 24, rng, TRUTH))
    ridge = evaluate(data, Scheme.of(data), estimators_of(data, ["ridge"], None)[0])
    told = uncertainty.intervals(ridge, uncertainty.bootstrap_coefficients(data, ridge), len(set(data.groups)))
    out["ridge"] = [bool(told[n]["low"] <= TRUTH[n] <= told[n]["high"]) for n in told]
    picks = rng.choice(len(bank.phi), 40, replace=False)
    heavy = bank.phi.copy()
    heavy[:, :] = rng.standard_t(3, heavy.shape)
    y = 0.5 * heavy[picks, 0] + rng.standard_t(3, 40)
    (row,) = [
        r for r in univariate(make_records(bank._replace(phi=heavy), picks, 0.01 * y)) if r["indicator"] == NAMES[0]
    ]
    out["pearson"] = bool(row["pearson_low"] <= 0.5 / np.sqrt(1.25) <= row["pearson_high"])
    return out


def numbers_told(lines: Sequence[Line]) -> list[tuple[str, bool]]:
    out = []
    for df in ("6", "10"):
        v = np.array([one["ceiling"].get(df, one["ceiling"].get(int(df))) for one in lines], dtype=float)
        held = (v[:, 1] <= 0.54) & (v[:, 2] >= 0.54)
        words = (
            f"noise ceiling of 0.54, {df} repeats: printed {v[:, 0].min():.2f} to {v[:, 0].max():.2f}, interval holds"
        )
        out.append((f"{words} it in {share(held)}", bool(held.mean() >= 0.93)))
    for noise in ("0.04", "0.07"):
        v = np.array(
            [one["calibration"].get(noise, one["calibration"].get(float(noise))) for one in lines], dtype=float
        )
        true, told, slope, r2 = v.mean(axis=0)
        words = f"held-out R² {r2:.2f}: true gain of the draw {true / told:.2f} of the predicted, slope {slope:.2f}"
        out.append((words, bool(abs(true / told - slope) <= 0.1)))
    out.append((f"ridge, 24 runs: resampled intervals hold {share([one['ridge'] for one in lines])}", True))
    out.append((f"Pearson, t with 3 df: intervals hold {share([one['pearson'] for one in lines])}", True))
    return out


CLAIMS = {
    "repeats": Claim(400, repeats_line, repeats_told),
    "region": Claim(100, region_line, region_told),
    "gain": Claim(200, gain_line, gain_told),
    "length": Claim(100, length_line, length_told),
    "sources": Claim(20, sources_line, sources_told),
    "ledger": Claim(120, ledger_line, ledger_told),
    "weak-ledger": Claim(120, weak_ledger_line, ledger_told),
    "numbers": Claim(200, numbers_line, numbers_told),
}

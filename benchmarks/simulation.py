"""Whether the statistics of `refit` keep what they promise: many simulated ledgers with a known truth.

`coverage`: log loss is a known linear rule plus noise. How often do least squares' 95 % t intervals hold the truth, and
how often are designs with a nearly collinear pair flagged?
`null`: log loss is noise alone. How often does the whole selection (four rules, penalties, choice, permutation test)
say "no better than the mean"? The others are in `simulated_claims`.

Designs are real ones: subsets of one synthetic pool of 3,000 rows in four sources, drawn as designed runs are. One line
per ledger is appended to a log; ledgers in the log are not simulated again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import status_of
from im_lightning._utils.progress import progress
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import Transform, default_transforms, hat_values, pool_knots
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule
from im_lightning.sampling.designs.subsets import DesignPool
from im_lightning.sampling.rows import source_shares

NAMES = ("length_output", "ppl", "mtld", "knn_6", "reward")
SOURCES = ("a", "b", "c", "d")
ROWS, SUBSET, BANK = 3000, 300, 400
TRUTH = {"length_output": -0.05, "ppl": 0.12, "mtld": -0.02, "knn_6": -0.3, "reward": -0.01}
INTERCEPT, NOISE = 0.9, 0.02
COVERAGE_RUNS, COVERAGE_LEDGERS = 30, 1000
NULL_RUNS, NULL_LEDGERS = (24, 60), 300
COVERAGE_BOUNDS, NULL_BOUND = (0.93, 0.97), 0.92
FURTHER = ("repeats", "region", "gain", "length", "sources", "ledger", "weak-ledger", "numbers")
NO_BETTER = "NO BETTER THAN THE MEAN"


class Bank(NamedTuple):
    """Designed subsets of the pool: phi [k, p] and hat means, source shares and what every record shares."""

    phi: np.ndarray
    hats: list[dict[str, dict[str, list[float]]]]
    shares: list[dict[str, float]]
    transforms: dict[str, Transform]


@cache
def make_pool() -> ScoreTable:
    """A synthetic pool: correlated indicators whose level depends on the source, as real pools have."""
    rng = np.random.default_rng(0)
    source = rng.integers(0, len(SOURCES), ROWS)
    level = rng.normal(0.0, 0.6, (len(SOURCES), len(NAMES)))[source]
    common = rng.standard_normal((ROWS, 1))
    z = level + 0.5 * common + rng.standard_normal((ROWS, len(NAMES)))
    values = {
        "length_output": np.round(np.exp(4.0 + 0.7 * z[:, 0])).clip(1, 1500),
        "ppl": np.exp(2.0 + 0.6 * z[:, 1]),
        "mtld": np.exp(3.5 + 0.5 * z[:, 2]),
        "knn_6": 0.7 + 0.15 * z[:, 3],
        "reward": 2.0 * z[:, 4],
    }
    return ScoreTable(range(ROWS), [str(i) for i in range(ROWS)], [SOURCES[s] for s in source], values)


@cache
def make_bank() -> Bank:
    """`BANK` designed subsets of `SUBSET` rows each."""
    table = make_pool()
    transforms = default_transforms(table, NAMES)
    knots = pool_knots(table, transforms)
    columns = {n: transforms[n].apply(table.values[n]) for n in NAMES}
    hats = {n: hat_values(columns[n], knots[n]) for n in NAMES}
    phi = np.column_stack([columns[n] for n in NAMES])
    pool = DesignPool(phi, table.source)
    drawn = [pool.draw(SUBSET, seed).rows for seed in range(BANK)]
    shares = []
    for rows in drawn:
        exposures = np.zeros(len(table))
        exposures[rows] = 1
        shares.append(source_shares(table.source, exposures))
    return Bank(
        np.array([phi[rows].mean(axis=0) for rows in drawn]),
        [{n: {"knots": knots[n], "means": hats[n][rows].mean(axis=0).tolist()} for n in NAMES} for rows in drawn],
        shares,
        transforms,
    )


def bank_of(values: np.ndarray) -> np.ndarray:
    """Means of values of the pool's rows [N] over the bank's subsets, float64 [BANK]."""
    table, transforms = make_pool(), make_bank().transforms
    phi = np.column_stack([transforms[n].apply(table.values[n]) for n in NAMES])
    pool = DesignPool(phi, table.source)
    return np.array([values[pool.draw(SUBSET, seed).rows].mean() for seed in range(BANK)])


def make_records(bank: Bank, picks: np.ndarray, y: np.ndarray, keys: Sequence[int] | None = None) -> list[RunRecord]:
    """Designed runs on these subsets of the bank, [n], with log losses y [n]; `keys` name their subsets instead."""
    transforms = {n: t.to_json() for n, t in bank.transforms.items()}
    return [
        RunRecord(
            run_id=f"run-{k:03d}",
            status="complete",
            purpose="designed",
            created=f"2026-01-01T00:{k // 60:02d}:{k % 60:02d}+00:00",
            subset={"digest": str(key), "size": SUBSET, "seed": key, "source_shares": bank.shares[pick]},
            phi_means=dict(zip(NAMES, bank.phi[pick].tolist(), strict=True)),
            transforms=transforms,
            basis_means=bank.hats[pick],
            evaluation={"eval": {"loss": float(np.exp(y[k]))}},
        )
        for k, (pick, key) in enumerate(zip(picks.tolist(), keys or picks.tolist(), strict=True))
    ]


def make_ledger(
    bank: Bank, runs: int, rng: np.random.Generator, truth: dict[str, float] | None, noise: float = NOISE
) -> list[RunRecord]:
    """Designed runs; a tenth repeat a subset with another seed. `truth` None: the loss is noise alone."""
    picks = rng.choice(len(bank.phi), runs - runs // 10, replace=False)
    picks = np.concatenate([picks, picks[: runs // 10]])
    y = INTERCEPT + noise * rng.standard_normal(runs)
    return make_records(bank, picks, y + bank.phi[picks] @ [(truth or {}).get(n, 0.0) for n in NAMES])


def coverage_line(seed: int) -> dict[str, Any]:
    """One ledger with a known rule: which intervals hold it; and the same ledger with a nearly collinear pair."""
    rng = np.random.default_rng([seed, 1])
    records = make_ledger(make_bank(), COVERAGE_RUNS, rng, TRUTH)
    rule = fit_rule(records)
    truth = {"intercept": INTERCEPT, **TRUTH}
    held = [bool(row["low"] <= truth[row["term"]] <= row["high"]) for row in rule.coefficients_]
    flagged = _flagged(rule.metrics_.notes)
    for record in records:  # a second length that says nearly the same
        record.phi_means["length_input"] = record.phi_means["length_output"] + 0.02 * rng.standard_normal()
        record.transforms = {**record.transforms, "length_input": record.transforms["length_output"]}
    return {
        "seed": seed,
        "held": held,
        "flagged": flagged,
        "collinear_flagged": _flagged(fit_rule(records).metrics_.notes),
    }


def null_line(runs: int) -> Callable[[int], dict[str, Any]]:
    """What makes one line of the null for ledgers of `runs` runs."""

    def line(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, 2, runs])
        rule = fit_rule(make_ledger(make_bank(), runs, rng, None), "auto", bootstrap=0)
        tested = rule.metrics_.permutation or {}
        said = NO_BETTER in " ".join(rule.summary(120).split())
        return {"seed": seed, "said": said, "p": tested["p"], "permutations": tested["permutations"]}

    return line


def _flagged(notes: Sequence[str]) -> bool:
    return any(note.startswith("Collinear regressors") for note in notes)


def simulate(path: Path, count: int, line: Callable[[int], dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The lines of seeds 0 to count − 1: those in the log at `path`, and the others, made and appended."""
    known = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    done = {one["seed"]: one for one in known}
    with progress(what, count, "ledgers") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warnings of a ledger's rules help nobody
        for seed in range(count):
            if seed not in done:
                done[seed] = line(seed)
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(done[seed]) + "\n")
            bar.advance()
    return [done[seed] for seed in range(count)]


def coverage(out: Path, ledgers: int = COVERAGE_LEDGERS) -> bool:
    """Prints what the intervals cover; True if within the bounds."""
    lines = simulate(out / "coverage.jsonl", ledgers, coverage_line, "coverage")
    held = np.array([one["held"] for one in lines])
    share, (low, high) = float(held.mean()), COVERAGE_BOUNDS
    flagged = float(np.mean([one["collinear_flagged"] for one in lines]))
    false = float(np.mean([one["flagged"] for one in lines]))
    print(f"coverage: {ledgers} ledgers of {COVERAGE_RUNS} runs, {held.shape[1]} coefficients each")
    print(f"  95 % t intervals that hold the truth: {100 * share:.1f} % (wanted {100 * low:.0f} to {100 * high:.0f})")
    for term, column in zip(("intercept", *sorted(NAMES, key=_order)), held.T, strict=True):
        print(f"    {term}: {100 * column.mean():.1f} %")
    print(f"  designs with a nearly collinear pair that are flagged: {100 * flagged:.1f} %")
    print(f"  the same designs without the pair, flagged: {100 * false:.1f} %")
    return low <= share <= high


def null(out: Path, ledgers: int = NULL_LEDGERS) -> bool:
    """Prints how often pure noise is called that; True if often enough at each number of runs."""
    good = True
    for n in NULL_RUNS:
        lines = simulate(out / f"null-{n}.jsonl", ledgers, null_line(n), f"null, {n} runs")
        share = float(np.mean([one["said"] for one in lines]))
        trials = float(np.mean([one["permutations"] for one in lines]))
        print(
            f"null: {ledgers} ledgers of {n} runs of pure noise: {100 * share:.1f} % are called no better than the "
            f"mean (wanted at least {100 * NULL_BOUND:.0f}); {trials:.0f} permutations on average"
        )
        good = good and share >= NULL_BOUND
    return good


def claim(name: str, out: Path, ledgers: int | None) -> bool:
    """Prints what a simulation of `simulated_claims` found; True if its bars are met."""
    from benchmarks.simulated_claims import CLAIMS

    found = CLAIMS[name]
    lines = simulate(out / f"{name}.jsonl", ledgers or found.ledgers, found.line, name)
    print(f"{name}: {len(lines)} ledgers")
    told = found.told(lines)
    for words, good in told:
        print(f"  {words}{'' if good else '  MISSED'}")
    return all(good for _, good in told)


def _order(name: str) -> int:
    from im_lightning.indicators.built_in import BUILT_IN

    return BUILT_IN[name].regressor or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a simulation; status 1 where it misses what is wanted."""
    first = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=first)
    parser.add_argument("what", choices=("coverage", "null", *FURTHER, "all"))
    parser.add_argument("--out", default="simulations", help="folder of the logs")
    parser.add_argument("--ledgers", type=int, help="how many ledgers; by default what the page says")
    arguments = parser.parse_args(argv)
    return status_of("simulate", lambda: _simulate(arguments))


def _simulate(arguments: argparse.Namespace) -> int:
    if arguments.ledgers is not None and arguments.ledgers < 1:
        cause = "it is not a number of ledgers"
        raise RequestError(message(f"--ledgers {arguments.ledgers}", cause, "give 1 or more"))
    out, good, start = Path(arguments.out), True, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.what in ("coverage", "all"):
        good &= coverage(out, arguments.ledgers or COVERAGE_LEDGERS)
    if arguments.what in ("null", "all"):
        good &= null(out, arguments.ledgers or NULL_LEDGERS)
    for name in FURTHER:
        if arguments.what in (name, "all"):
            good &= claim(name, out, arguments.ledgers)
    print(f"{time.monotonic() - start:.0f} s")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

"""The table of the ways: what budgets buy and what was spent, quality and intervals, against explicit loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import r2_score

from benchmarks.evidence.budget import BLOCKS, SCALE_PASSES, Prices, affordable, anchors, flops, merged_plan
from benchmarks.evidence.measure import label, measure
from benchmarks.evidence.playground import FAST, Playground
from benchmarks.evidence.quality import gain_interval, paired_interval, r_squared, resampled, spearman
from benchmarks.evidence.table import difference, reached, table
from benchmarks.evidence.ways import REFERENCE, WAYS
from im_lightning.experiments.demo.playground.base import BaseSettings
from im_lightning.ledger.curve import at_point
from im_lightning.ledger.record import RunRecord

PRICES = Prices(trained=6500, read=2450, steps=32, small=0.1)
BUDGETS = (3, 6, 12, 30, 60)


def bought(budget: float, price: float, fixed: float) -> int:
    """Buys one after the other for as long as the budget lasts."""
    count, spent = 0, fixed
    while spent + price <= budget + 1e-9:
        count, spent = count + 1, spent + price
    return count


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("price", [1.0, PRICES.stopped(0.2), PRICES.small, 1 / 3])
def test_a_budget_buys_what_buying_one_by_one_does(budget: float, price: float) -> None:
    for fixed in (0, 1, anchors(budget)):
        assert affordable(budget, price, fixed) == bought(budget, price, fixed)
        assert affordable(budget, price, fixed, most=5) == min(5, bought(budget, price, fixed))
    assert affordable(budget, price, fixed=budget + 1) == 0


def test_prices_count_a_token_once_forward_and_twice_backward() -> None:
    passes = {}
    for share in (1.0, 0.25, 6 / 32):
        trained = share * PRICES.trained
        passes[share] = trained + 2 * trained + PRICES.read
    assert PRICES.run() == 1.0
    assert PRICES.run(0.25) == pytest.approx(passes[0.25] / passes[1.0])
    assert PRICES.stopped(0.2) == pytest.approx(passes[6 / 32] / passes[1.0]), "6 of 32 steps are a fifth of them"
    assert PRICES.look == pytest.approx(PRICES.read / passes[1.0])


def test_merged_runs_stay_within_their_budget_and_use_it() -> None:
    """A way that overspends would look better than it is."""
    for budget in BUDGETS:
        plan = merged_plan(budget, PRICES, 0.25, 60)
        if plan is None:
            twins = max(4, min(12, budget // 3))
            assert BLOCKS[0] * PRICES.run(0.25) + twins * (1 + SCALE_PASSES * PRICES.look) + 8 * PRICES.look > budget
            continue
        spent = sum(PRICES.run(0.25) for _ in range(plan.blocks)) + plan.twins
        spent += sum(PRICES.look for _ in range(SCALE_PASSES * plan.twins + plan.mixtures))
        assert spent <= budget and (plan.mixtures == 60 or spent + PRICES.look > budget)
        assert plan.mixtures >= plan.twins >= 4 and plan.blocks >= BLOCKS[0]
    assert merged_plan(3, PRICES, 0.25, 60) is None and merged_plan(60, PRICES, 0.25, 60) is not None


def run(trained: int, looks: int, read: int, points: dict[int, int]) -> RunRecord:
    """A full run of 32 steps; `points` is step → tokens trained on by then."""
    there = [
        {
            "steps": step,
            "evaluation": {"fit": {"loss": 2.0}},
            **{name: {} for name in ("indicator_means", "phi_means", "basis_means")},
            "subset": {"rows_seen": step, "exposures": step, "source_shares": {}},
            "compute": {"parameters": 100.0, "tokens_trained": tokens, "tokens_evaluated": read * (k + 1)},
        }
        for k, (step, tokens) in enumerate(points.items())
    ]
    compute = {"parameters": 100.0, "tokens_trained": trained, "tokens_evaluated": read * looks}
    curve = {"steps": 32, "points": there} if points else {}
    return RunRecord("a", "complete", "designed", "2026-01-01T00:00:00Z", compute=compute, curve=curve)


def test_a_run_is_charged_one_evaluation_however_often_its_curve_was_measured() -> None:
    record = run(6400, 3, 2000, {6: 1200, 16: 3200})
    assert flops(record) == 2 * 100 * (3 * 6400 + 2000)
    assert flops(record, 0.2) == 2 * 100 * (3 * 1200 + 2000)
    assert flops(record, 0.5) == 2 * 100 * (3 * 3200 + 2000)
    assert flops(run(0, 1, 2000, {})) == 2 * 100 * 2000, "a merged run is an evaluation"
    with pytest.raises(ValueError, match="no point"):
        flops(record, 0.9)


def test_quality_is_that_of_scipy_and_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 40))
    b[0, :20] = 1.0  # ties
    for x, y, found in zip(a, b, spearman(a, b), strict=True):
        assert found == pytest.approx(spearmanr(x, y).statistic)
        assert r_squared(x, y) == pytest.approx(r2_score(x, y))
    assert spearman(np.ones(5), np.arange(5)) == 0, "a constant ranks nothing"


@pytest.mark.parametrize("sizes", [(30,), (30, 25, 40)])
def test_intervals_are_those_of_a_loop_over_draws(sizes: tuple[int, ...]) -> None:
    """Both ways are judged by the same runs in every draw: unpaired, their difference would be too uncertain."""
    rng = np.random.default_rng(1)
    actual = [rng.normal(size=n) for n in sizes]
    one = [y + rng.normal(size=len(y)) for y in actual]
    other = [y + 0.3 * rng.normal(size=len(y)) for y in actual]
    gaps = [[] for _ in range(200)]
    for place, drawn in enumerate(resampled(sizes, 200)):
        for draw, rows in zip(*drawn, strict=True):
            y, f, g = (values[place][rows] for values in (actual, one, other))
            gaps[draw].append(spearmanr(y, f).statistic - spearmanr(y, g).statistic)
    assert {len(gap) for gap in gaps} == {len(sizes)}, "every draw has as many seeds as there are"
    found = paired_interval(actual, one, other, draws=200)
    assert found[1:] == pytest.approx(np.quantile(np.mean(gaps, axis=1), [0.025, 0.975]))
    each = [spearmanr(y, f).statistic - spearmanr(y, g).statistic for y, f, g in zip(actual, one, other, strict=True)]
    assert found[0] == pytest.approx(np.mean(each)) and found[1] < found[0] < found[2] < 0
    same = paired_interval(actual, one, one, draws=50)
    assert same == (0.0, 0.0, 0.0)


def test_gains_are_over_generator_seeds_and_comparison_seeds() -> None:
    gains = [np.array([0.1, 0.3]), np.array([0.5, 0.7])]
    found = gain_interval(gains, draws=500)
    means = [[] for _ in range(500)]
    for gain, drawn in zip(gains, resampled([2, 2], 500), strict=True):
        for draw, rows in zip(*drawn, strict=True):
            means[draw].append(gain[rows].mean())
    assert found[0] == pytest.approx(0.4) and found[1:] == pytest.approx(
        np.quantile(np.mean(means, axis=1), [0.025, 0.975])
    )


def seed_of(actual: np.ndarray, cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    nothing = {"what": "", "why": "too few", "agreement": None}
    every = {way: {f"{share:g}": nothing for share in (0.05, 0.1, 0.2, 0.5, 1.0)} for way in WAYS}
    for way, by_share in cells.items():
        every[way] = {**every[way], **by_share}
    sizes = {"runs": 60, "test_runs": len(actual), "conclusive": True}
    finetunes = {"random": [3.0, 3.2], "by-source": [2.9, 3.1], "full runs, 1": [2.8, 3.0]}
    whole = {"flops": 1e12, "seconds": 90.0}
    return {"seed": 1, "sizes": sizes, "whole": whole, "actual": actual, "cells": every, "finetunes": finetunes}


def test_a_way_that_ranks_as_well_for_a_fifth_is_named_and_no_other() -> None:
    """The sentence decides what is recommended."""
    rng = np.random.default_rng(2)
    actual = rng.normal(size=60)
    good, bad = actual + 0.1 * rng.normal(size=60), rng.normal(size=60)

    def cell(predicted: np.ndarray, spent: float) -> dict[str, Any]:
        told = {"what": "runs", "why": "", "agreement": None, "flops": spent, "seconds": spent, "r2": 0.5}
        return {**told, "predicted": predicted, "spearman": float(spearmanr(actual, predicted).statistic)}

    cells = {
        REFERENCE: {"0.2": cell(bad, 0.2), "1": cell(good, 1.0)},
        "smaller base": {"0.2": cell(good, 0.19), "0.5": cell(good, 0.4)},
        "merged runs": {"0.2": cell(good, 0.3)},  # which spent more than it should have
    }
    found = [seed_of(actual, cells)]
    assert reached(found) == [("smaller base", 0.19)]
    assert difference(found, "smaller base", 0.05) is None
    gap = difference(found, REFERENCE, 0.2)
    assert gap is not None and gap[2] < -0.5
    text = " ".join(table(found, 160).split())
    assert "it is reached by smaller base (0.190)" in text and "No rule (—): too few." in text
    assert "+0.200 (+0.200 to +0.200)" in text, "of the weights against random rows"
    cells["smaller base"] = {}
    assert reached([seed_of(actual, cells)]) == [] and "no way reaches it" in table([seed_of(actual, cells)], 999)


MINI = replace(
    FAST,
    demo=replace(
        FAST.demo, name="evidence, miniature", base=BaseSettings(hidden=32, layers=1, heads=2, steps=20, batch=16,
        block=32, documents=600, warmup=5), designed_rows=400, fold_rows=200, fit_rows=12, report_rows=24,
        subset_rows=32, seeds=2, seed=5,
    ),
    small=BaseSettings(hidden=16, layers=1, heads=2, steps=20, batch=16, block=32, documents=600, warmup=5),
    test_runs=8, block_rows=8,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_way_is_measured_once_and_gone_on_with(tmp_path: Path) -> None:
    """Hours of runs are not made again; what a stopped run would have recorded is what one that was stopped did."""
    found = measure(tmp_path, MINI, finetunes=True)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("ledger*/**/*.json")}
    again = measure(tmp_path, MINI, finetunes=True)
    assert again == found and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("ledger*/**/*.json")} == made

    for way in WAYS:
        for share, cell in found["cells"][way].items():
            assert bool(cell["why"]) != ("predicted" in cell)
            if cell["why"]:
                continue
            assert cell["flops"] <= 1.05 * float(share), f"{way} spent more than it had: {cell['what']}"
            assert cell["spearman"] == pytest.approx(spearmanr(found["actual"], cell["predicted"]).statistic)
    assert found["cells"]["merged runs"]["1"]["agreement"] is not None
    assert found["cells"][REFERENCE]["1"]["flops"] == pytest.approx(1.0)
    assert {"random", "by-source", label(REFERENCE, 1.0)} <= found["finetunes"].keys()
    assert all(len(losses) == 2 for losses in found["finetunes"].values())

    world = Playground(tmp_path, MINI)
    full = {r.subset_key: r for r in world.designed}
    stopped = world.ledger_of("timed-base-0.2").records()
    assert len(stopped) == 3
    for record in stopped:
        seen = at_point(full[record.subset_key], 0.2)
        assert seen is not None and seen.evaluation == record.evaluation
        assert flops(full[record.subset_key], 0.2) == record.cost.flops
    assert "TOO SMALL TO CONCLUDE" in table([found], 120)

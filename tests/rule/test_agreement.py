"""How two measurements rank the same subsets, against scipy and simulation; fits at an early point of the runs."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from scipy import stats
from simulated_ledger import make_record, simulate

from im_lightning.cli import main
from im_lightning.errors import RequestError
from im_lightning.ledger.curve import at_point, stopped
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.refits import runs_of
from im_lightning.rule.rule_file import rule_to_json
from im_lightning.rule.validation.agreement import agreement_of, rank_agreement, subset_losses

# the number and its interval


@pytest.mark.parametrize("n", [5, 12, 60])
def test_the_number_is_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = np.round(x + rng.normal(size=n), 1)  # with ties
    found = rank_agreement(x, y)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    distinct = stats.rankdata(y, method="ordinal")
    tau = stats.kendalltau(x, distinct).statistic
    assert rank_agreement(x, distinct).pairs == pytest.approx((tau + 1) / 2)


def test_the_interval_is_that_of_a_bootstrap_where_there_are_many() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=200)
    y = x + rng.normal(size=200)
    found = rank_agreement(x, y)
    again = stats.bootstrap(
        (x, y),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1000,
        random_state=4,
    )
    assert (found.low, found.high) == pytest.approx(tuple(again.confidence_interval), abs=0.03)


@pytest.mark.parametrize(("n", "r"), [(5, 0.9), (8, 0.6), (20, 0.9)])
def test_the_interval_holds_the_truth_as_often_as_it_says(n: int, r: float) -> None:
    """Of normal pairs the rank correlation of the population is known; a perfect ranking of five proves little."""
    rng, truth = np.random.default_rng(7), 6 / math.pi * math.asin(r / 2)
    pairs = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], size=(600, n))
    found = [rank_agreement(one[:, 0], one[:, 1]) for one in pairs]
    assert 0.92 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.995


def test_what_cannot_be_known_is_not_a_number() -> None:
    assert "no interval: it takes 4 subsets" in str(rank_agreement([1, 2, 3], [1, 2, 3]))
    assert str(rank_agreement([1, 2], [1, 2])) == "not known over 2 subsets"
    level = rank_agreement([1, 1, 1, 1, 1], range(5))
    assert math.isnan(level.spearman) and json.loads(json.dumps(level.to_json(), allow_nan=False))["low"] is None
    perfect = rank_agreement(range(5), range(5))
    assert perfect.spearman == 1 and 0 < perfect.low < perfect.high < 1


def test_repeats_of_a_subset_count_once() -> None:
    runs = [make_record(k, loss=loss, subset=k // 2) for k, loss in enumerate([2.0, 2.2, 3.0, 3.1])]
    runs.append(make_record(9, loss=math.nan))
    found = subset_losses(runs, "held-out")
    assert found == pytest.approx({"s0": np.log([2.0, 2.2]).mean(), "s1": np.log([3.0, 3.1]).mean()})
    assert agreement_of(found, {"s1": 1.0, "s7": 2.0}).subsets == 1


# fits at an early point


def with_point(record: RunRecord, loss: float) -> RunRecord:
    """A full run that was measured at step 8 of 40, too."""
    point = {
        **{n: copy.deepcopy(getattr(record, n)) for n in ("indicator_means", "phi_means", "basis_means")},
        "evaluation": {"held-out": {"loss": loss}}, "steps": 8, "tokens": 9, "seconds": 1.0,
        "subset": {"rows_seen": 60, "exposures": 60, "source_shares": {}},
    }  # fmt: skip
    record.curve = {"steps": 40, "points": [point]}
    return record


def mixed_ledger() -> tuple[list[RunRecord], list[RunRecord]]:
    """(12 full runs with a curve, 12 that were stopped at step 8 of 40); early losses are half as far apart again."""
    rng = np.random.default_rng(1)
    full = simulate(12, noise=0.002)
    full = [with_point(r, math.exp(1.5 + 0.5 * math.log(r.loss("held-out")) + rng.normal(0, 0.01))) for r in full]
    short = []
    for record in simulate(12, seed=2, first=50, noise=0.002):
        record.evaluation["held-out"]["loss"] = math.exp(1.5 + 0.5 * math.log(record.loss("held-out")))
        record.curve, record.steps = {"steps": 40, "points": []}, 8
        short.append(stopped(record, 8, 40))
    return full, short


def test_stopped_and_full_runs_are_never_mixed_unawares() -> None:
    """Half of the losses would be of another moment: neither by default nor by force."""
    full, short = mixed_ledger()
    for force in (False, "other-regime"):
        with pytest.raises(RequestError, match=r"of 2 regimes(?s:.*)stopped_at.step = 8(?s:.*)at one point \(--at 0.2"):
            fit_rule(full + short, force=force)
    assert fit_rule(full + short, regime="run-000").n_runs_ == 12
    early = fit_rule(full + short, regime="run-050")
    assert "These losses are early ones (stopped at step 8 of 40)" in early.summary()


def test_a_fit_at_a_point_takes_all_runs_as_they_were_there_and_says_so() -> None:
    full, short = mixed_ledger()
    lone = make_record(80)  # without a curve
    rule = fit_rule([*full, *short, lone], at=0.2)
    by_hand = fit_rule([*(at_point(r, 8) for r in full), *short])  # type: ignore[list-item]
    assert rule.n_runs_ == 24
    np.testing.assert_array_equal(rule.coef_, by_hand.coef_)
    early = [r.curve["points"][0]["evaluation"]["held-out"]["loss"] for r in full]
    rho = stats.spearmanr(early, [r.loss("held-out") for r in full]).statistic
    note = next(n for n in rule.metrics_.notes if n.startswith("Fitted at an early point"))
    assert "(0.2): 12 runs stopped at step 8 of 40, 12 full runs as their curves have them there; left out" in note
    assert "1 run (run-080)" in note and f"Spearman {rho:.2f} (95 % interval" in note and "over 12 subsets" in note
    assert rule_to_json(rule)["regime"]["stopped_at"] == {"step": 8, "of": 40}
    assert RunLedger.digest(runs_of(rule, [*full, *short, lone])) == rule.ledger_digest_


def test_without_a_run_that_has_both_the_agreement_is_not_known() -> None:
    _, short = mixed_ledger()
    assert any("not known over 0 subsets" in note for note in fit_rule(short, at=8).metrics_.notes)


def test_a_point_that_no_run_has_is_refused() -> None:
    full, _ = mixed_ledger()
    with pytest.raises(RequestError, match=r"no complete designed run has this point; there are points at the steps 8"):
        fit_rule(full, at=0.5)
    with pytest.raises(RequestError, match="neither a share of the steps"):
        fit_rule(full, at=-2)


def test_the_command_prints_the_agreement(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    full, short = mixed_ledger()
    book = RunLedger(tmp_path / "runs")
    for record in full + short:
        book.add(record)
    quick = ["--method=ols", "--permutations=0", "--bootstrap=0", f"--out={tmp_path / 'rule.json'}"]
    assert main(["refit", str(book.path), "--at=0.2", *quick]) == 0
    assert "How it agrees with the full runs' ends: Spearman" in " ".join(capsys.readouterr().out.split())
    assert main(["runs", str(book.path)]) == 0
    assert "complete, stopped at step 8 of 40" in capsys.readouterr().out

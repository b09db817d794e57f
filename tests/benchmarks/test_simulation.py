"""The simulations behind docs/simulations.md, small: their ledgers are what they claim, and they resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import simulation
from benchmarks.simulation import COVERAGE_RUNS, INTERCEPT, TRUTH, main, make_bank, make_ledger
from im_lightning.rule.fit import fit_rule


def test_ledgers_hold_the_known_rule() -> None:
    """Without noise least squares must return it exactly, else coverage would measure the simulation."""
    records = make_ledger(make_bank(), 40, np.random.default_rng(0), TRUTH)
    for record in records:
        y = INTERCEPT + sum(TRUTH[n] * v for n, v in record.phi_means.items())
        record.evaluation["eval"]["loss"] = float(np.exp(y))
        for one in record.basis_means.values():
            assert sum(one["means"]) == pytest.approx(1.0)
    rule = fit_rule(records)
    for name, b in zip(rule.feature_names_in_, rule.coef_, strict=True):
        assert b == pytest.approx(TRUTH[name], rel=1e-6)
    assert rule.metrics_.n_subsets == 36  # a tenth of the runs repeat a subset
    assert rule.metrics_.condition_number < 30


def test_coverage_and_flags_of_a_few_ledgers(tmp_path, capsys) -> None:
    assert main(["coverage", "--out", str(tmp_path), "--ledgers", "12"]) in (0, 1)
    out = capsys.readouterr().out
    assert f"coverage: 12 ledgers of {COVERAGE_RUNS} runs, 6 coefficients each" in out
    lines = [json.loads(line) for line in (tmp_path / "coverage.jsonl").read_text().splitlines()]
    held = np.mean([line["held"] for line in lines])
    assert held > 0.8  # 72 intervals; 0.95 less than six standard deviations of chance
    assert all(line["collinear_flagged"] for line in lines) and not any(line["flagged"] for line in lines)


def test_noise_is_called_noise_and_the_log_is_gone_on_with(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(simulation, "NULL_RUNS", (24,))
    assert main(["null", "--out", str(tmp_path), "--ledgers", "4"]) in (0, 1)
    first = (tmp_path / "null-24.jsonl").read_text()
    assert sum(json.loads(line)["said"] for line in first.splitlines()) >= 2
    for line in map(json.loads, first.splitlines()):
        assert line["said"] == (line["p"] >= 0.05)
    monkeypatch.setattr(simulation, "null_line", lambda runs: lambda seed: {"seed": seed, "said": True, "p": 1.0,
                                                                            "permutations": 10})  # fmt: skip
    main(["null", "--out", str(tmp_path), "--ledgers", "5"])
    assert (tmp_path / "null-24.jsonl").read_text().startswith(first)
    assert len((tmp_path / "null-24.jsonl").read_text().splitlines()) == 5
    assert "null: 5 ledgers of 24 runs of pure noise" in capsys.readouterr().out
    assert main(["null", "--ledgers", "0", "--out", str(tmp_path)]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", simulation.FURTHER)
def test_every_further_claim_is_simulated_printed_and_gone_on_with(name, tmp_path, capsys) -> None:
    assert main([name, "--out", str(tmp_path), "--ledgers", "2"]) in (0, 1)
    first, out = (tmp_path / f"{name}.jsonl").read_text(), capsys.readouterr().out
    assert out.startswith(f"{name}: 2 ledgers") and len(first.splitlines()) == 2
    assert main([name, "--out", str(tmp_path), "--ledgers", "2"]) in (0, 1)
    assert (tmp_path / f"{name}.jsonl").read_text() == first, "the lines of the log are not made again"
    assert capsys.readouterr().out.splitlines()[1:-1] == out.splitlines()[1:-1], "and say the same"

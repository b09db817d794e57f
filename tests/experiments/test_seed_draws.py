"""The runs behind a rule are found among those of other regimes, in a time that thousands of runs allow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulated_ledger import simulate

from im_lightning.errors import RequestError
from im_lightning.experiments.compare import run as seed_draws
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule import refits
from im_lightning.rule.fit import fit_rule


def test_each_regime_is_looked_at_once(tmp_path, monkeypatch) -> None:
    """One look reads all runs: a look per run would take hours for a ledger of thousands, and end in a refusal."""
    book = RunLedger(tmp_path)
    for regime in range(3):
        for record in simulate(10, seed=regime, first=10 * regime, regime={"subset_size": 100 + regime}):
            book.add(record)
    rule = fit_rule(book, regime="run-029")
    looks: list[str | None] = []
    real = refits.gather

    def counting(records, names, evaluation, regime, force):
        looks.append(regime)
        return real(records, names, evaluation, regime, force)

    monkeypatch.setattr(refits, "gather", counting)
    assert {r.run_id for r in seed_draws.runs_behind(rule, book)} == {f"run-{k:03d}" for k in range(20, 30)}
    assert looks == [], "the rule names its runs"
    rule.metrics_ = replace(rule.metrics_, held_out=[])  # as the rule files of earlier versions
    assert {r.run_id for r in seed_draws.runs_behind(rule, book)} == {f"run-{k:03d}" for k in range(20, 30)}
    assert looks == [None, "run-000", "run-010", "run-020"]
    looks.clear()
    rule.ledger_digest_ = "another"
    with pytest.raises(RequestError, match="its runs are not those that refit was fitted on"):
        seed_draws.runs_behind(rule, book)
    assert len(looks) == 4

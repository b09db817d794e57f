"""The arm that knows sources alone: its weights are those of the fit of shares on the rule's own runs."""

from __future__ import annotations

import numpy as np
import pytest
from pool_ledger import pool_ledger
from simulated_ledger import simulate

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.selection.by_source import source_phi, source_rule
from im_lightning.sampling.selection.select import choose_rows


@pytest.fixture(scope="module")
def rule() -> LinearRule:
    """Of runs whose loss is lower the more of s1 they hold."""
    records, _ = pool_ledger(40, sources=True, noise=0.01, effect=lambda z: 0.0 * z[:, 0])
    for record in records:
        share = record.subset["source_shares"].get("s1", 0.0)
        record.evaluation["held-out"]["loss"] *= float(np.exp(-0.3 * share))
    return fit_rule(records)


def two_sources() -> ScoreTable:
    rows = 400
    rng = np.random.default_rng(0)
    values = {"length_output": rng.integers(1, 200, rows).astype(float), "ppl": np.exp(rng.normal(2, 0.8, rows)),
              "knn_6": rng.uniform(0.2, 1.2, rows)}  # fmt: skip
    return ScoreTable(range(rows), [f"id{i}" for i in range(rows)], ["s0", "s1"] * (rows // 2), values)


def test_rows_of_a_source_have_equal_chances_and_the_better_source_more(rule, tmp_path) -> None:
    table = two_sources()
    rule.save(tmp_path / "rule.json")
    made = choose_rows(table, LinearRule.load(tmp_path / "rule.json"), 60, "by-source", seed=1)
    share = np.mean([table.source[row] == "s1" for row in made.rows])
    by = source_rule(rule)
    assert by.feature_names_in_ == ["s0", "s1"] and by.coef_[1] - by.coef_[0] == pytest.approx(-0.3, abs=0.03)
    assert share == pytest.approx(made.report["expected_mean"]["s1"], abs=1 / 60) and share > 0.7
    lengths = table.values["length_output"]
    inside = np.array(table.source) == "s1"
    drawn = [choose_rows(table, rule, 60, "by-source", seed=k).rows for k in range(60)]
    seen = np.bincount(np.concatenate(drawn), minlength=400)[inside]
    assert abs(np.corrcoef(seen, lengths[inside])[0, 1]) < 0.25  # no indicator decides within a source


def test_rows_of_a_source_without_runs_count_as_none() -> None:
    assert source_phi(["a", "c", "b"], ["a", "b"]).tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]


def test_a_rule_without_such_a_fit_is_refused_with_the_reason() -> None:
    plain = fit_rule(simulate(20))
    with pytest.raises(RequestError, match=r"by-source: it has no fit of sources \(some run does not record.*refit"):
        source_rule(plain)

"""What a notebook shows of tables, ledgers and rules is what they hold."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from pool_ledger import pool_ledger
from simulated_ledger import make_table, simulate

from im_lightning import RunLedger, ScoreTable, fit_rule
from im_lightning.errors import RequestError

matplotlib.use("Agg")


@pytest.fixture
def ledger(tmp_path: Path) -> RunLedger:
    book = RunLedger(tmp_path)
    for record in simulate(24, seed=1):
        book.add(record)
    return book


def test_a_score_table_is_a_data_frame_with_its_reasons() -> None:
    table = ScoreTable([0, 1], ["a", "b"], ["s", "s"], {"mtld": [np.nan, 50.0]}, {"mtld": ["empty response", None]})
    frame = table.to_pandas()
    assert frame["id"].tolist() == ["a", "b"] and np.isnan(frame["mtld"][0]) and frame["mtld"][1] == 50.0
    assert "empty response" in table._repr_html_() and "2 rows" in table._repr_html_()


def test_a_long_table_shows_its_ends_and_its_size() -> None:
    shown = make_table(200)._repr_html_()
    assert shown.count("<tr>") < 30 and "200 rows" in shown


def test_the_histograms_count_the_known_values() -> None:
    table = make_table(200, mtld=np.where(np.arange(200) < 3, np.nan, np.arange(200.0)))
    axes = table.plot()
    assert [ax.get_xlabel() for ax in axes] == table.indicators
    (mtld,) = [ax for ax in axes if ax.get_xlabel() == "mtld"]
    assert sum(bar.get_height() for bar in mtld.patches) == 197 and mtld.get_title() == "3 missing"


def test_a_ledger_is_a_data_frame_of_its_runs(ledger: RunLedger) -> None:
    frame, records = ledger.to_pandas(), ledger.records(status=None)
    assert frame["run_id"].tolist() == [r.run_id for r in records]
    (name,) = records[0].evaluation
    np.testing.assert_array_equal(frame[f"loss_{name}"], [r.loss(name) for r in records])
    (ax,) = ledger.plot()
    np.testing.assert_array_equal(np.concatenate([line.get_ydata() for line in ax.lines]), frame[f"loss_{name}"])
    assert "run_id" in ledger._repr_html_()


def test_a_linear_rule_shows_its_coefficients_in_sd_of_the_runs(ledger: RunLedger) -> None:
    rule = fit_rule(ledger.records(), method="ols", permutations=0, bootstrap=0)
    frame = rule.to_pandas()
    np.testing.assert_array_equal(frame["coef"], rule.coef_)
    np.testing.assert_allclose(frame["effect_of_one_sd"], rule.coef_ * np.sqrt(np.diag(rule.cov_)))
    assert frame["low"].lt(frame["coef"]).all() and frame["high"].gt(frame["coef"]).all()
    (ax,) = rule.plot()
    np.testing.assert_allclose(ax.lines[0].get_xydata()[:, 0], frame["effect_of_one_sd"])
    assert [text.get_text() for text in ax.get_yticklabels()] == rule.feature_names_in_
    assert rule.plot(ax) == [ax]


def test_an_additive_rule_shows_one_shape_per_indicator() -> None:
    rule = fit_rule(pool_ledger()[0], method="additive", permutations=0, bootstrap=0)
    axes = rule.plot()
    assert len(axes) == len(rule.knots)
    for ax, knots in zip(axes, rule.knots.values(), strict=True):
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), knots)
    with pytest.raises(RequestError, match=rf"axes: there are 1 for {len(axes)} panels\. Fix: pass {len(axes)} axes"):
        rule.plot(axes[0])

"""The published coefficients: a wrong digit or a silent use would be somebody's wasted training run."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from simulated_ledger import make_table

from im_lightning.errors import RequestError
from im_lightning.rule import published
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.published import load_rule, published_rule


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr(published, "_warned", set())


def test_v1_predicts_its_formula_on_raw_values():
    table = make_table(30, reward=np.linspace(-5, 5, 30))
    rule = published_rule("instructmining-v1")
    v = table.values
    expected = 1.0694 - 0.1498 * v["reward"] + 8.257e-5 * v["length_output"] - 0.9350 * v["knn_6"]
    np.testing.assert_allclose(rule.predict(table), expected, rtol=1e-14)


def test_v3_predicts_its_formula_on_raw_values():
    rng = np.random.default_rng(0)
    columns = {n: rng.uniform(0, 1, 20) for n in ("reward", "understandability", "naturalness", "coherence")}
    table = make_table(20, **columns)
    expected = (
        0.0274
        - 0.0078 * columns["reward"]
        + 0.4421 * columns["understandability"]
        - 0.3212 * columns["naturalness"]
        - 0.1520 * columns["coherence"]
    )
    np.testing.assert_allclose(published_rule("instructmining-v3").predict(table), expected, rtol=1e-14)


def test_they_warn_loudly_and_once(recwarn):
    with pytest.warns(UserWarning, match="THE RULE instructmining-v3 IS UNVERIFIED"):
        load_rule("instructmining-v3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rule("instructmining-v3")
    with pytest.warns(UserWarning, match="instructmining-v1"):
        load_rule("instructmining-v1")


def test_a_saved_copy_is_still_unverified(tmp_path):
    published_rule("instructmining-v1").save(tmp_path / "mine.json")
    with pytest.warns(UserWarning, match="UNVERIFIED"):
        rule = load_rule(tmp_path / "mine.json")
    assert rule.verified is False
    assert not rule.has_region
    assert "UNVERIFIED" in rule.summary(80)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(RequestError) as error:
        load_rule("instructmining-v2")
    assert "'instructmining-v2': it is neither a published rule (instructmining-v1, instructmining-v3)" in str(
        error.value
    )
    with pytest.raises(RequestError, match="instructmining-v1"):
        published_rule("x")


def test_they_have_no_region_and_say_what_to_do():
    rule = published_rule("instructmining-v3")
    for ask in (rule.edge, lambda: rule.mahalanobis([0, 0, 0, 0])):
        with pytest.raises(RequestError, match=r"it has no fitted region .* or weight by softmax"):
            ask()


def test_check_asks_for_columns_only_and_warns():
    rule = published_rule("instructmining-v1")
    with pytest.raises(RequestError) as error:
        rule.check(make_table(5))
    assert "it needs reward, and the table has no such column (it has ppl, length_output, knn_6)" in str(error.value)
    assert "im-lightning score DATA --model MODEL --reward-model MODEL --embedding-model MODEL" in str(error.value)
    assert "--indicators reward,length_output,knn_6" in str(error.value)
    with pytest.warns(UserWarning, match="does not record the identity of its indicators"):
        notes = rule.check(make_table(5, reward=np.zeros(5)))
    assert len(notes) == 1


def test_a_rule_is_what_load_returns():
    assert isinstance(published_rule("instructmining-v1"), LinearRule)

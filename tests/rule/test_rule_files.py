"""Rule files travel between people and machines: nothing may change on the way, and a damaged one must say where."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from simulated_ledger import make_table, simulate

from im_lightning.errors import DataError, RequestError
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.published import load_rule


@pytest.fixture(scope="module")
def fitted() -> LinearRule:
    return fit_rule(simulate(20, repeats=3))


def test_round_trip_is_exact(fitted, tmp_path):
    fitted.save(tmp_path / "rule.json")
    read = load_rule(tmp_path / "rule.json")
    for name in ("coef_", "mean_", "cov_", "coef_cov_"):
        np.testing.assert_array_equal(getattr(read, name), getattr(fitted, name))
    for name in (
        "name", "intercept_", "feature_names_in_", "transforms_", "verified", "method", "evaluation", "radius_",
        "coefficients_", "identities", "numerics", "regime", "n_runs_", "metrics_", "ledger_digest_", "pool_digest_",
        "created",
    ):  # fmt: skip
        assert getattr(read, name) == getattr(fitted, name), name
    assert read.origin == str(tmp_path / "rule.json")
    table = make_table(30)
    np.testing.assert_array_equal(read.predict(table), fitted.predict(table))


def test_the_file_is_strict_json_that_a_person_can_read(fitted, tmp_path):
    fitted.save(tmp_path / "rule.json")
    text = (tmp_path / "rule.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    value = json.loads(text)
    assert list(value)[:4] == ["format", "schema_version", "name", "verified"]
    first = value["regressors"][0]
    assert first["indicator"] == "length_output"
    assert first["transform"] == {"kind": "log1p", "low": 0.0, "high": 7.0}
    assert first["identity"]["model"]["weights"] == "a" * 32
    assert value["runs"] == 20
    assert value["metrics"]["n_subsets"] == 17
    assert value["ledger_digest"] and value["pool_digest"] == "p" * 32
    assert value["regime"]["template"] == "alpaca"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(format="x"), 'it is not a rule file ("format" is not "im_lightning.rule")'),
        (lambda v: v.update(schema_version=9), "its schema_version is 9, and this version of im-lightning reads 1"),
        (lambda v: v.update(intercept="a"), "the field intercept is 'a'; it must be a finite number"),
        (lambda v: v.pop("intercept"), "the field intercept is missing; it must be a finite number"),
        (lambda v: v.update(verified=1), "the field verified is 1; it must be true or false"),
        (lambda v: v.update(regressors=[]), "the field regressors is empty"),
        (lambda v: v.update(regressors=[3]), "the field regressors[0] is 3; it must be an object"),
        (lambda v: v["regressors"][1].update(coefficient=None), "the field regressors[1].coefficient is None"),
        (lambda v: v["regressors"][1].update(coefficient=True), "the field regressors[1].coefficient is True"),
        (lambda v: v["regressors"][1].update(transform={"kind": "cube"}), "the field regressors[1].transform: it is {"),
        (lambda v: v["regressors"][1].update(regressor="length_output"), "regressors names a regressor twice"),
        (
            lambda v: v["regressors"][1].update(regressor="ppl[0]"),
            "regressors[1].regressor is 'ppl[0]', which is no hat",
        ),
        (
            lambda v: v["regressors"][1]["transform"].update(hat=[1, 2]),
            "hat is [1, 2], not [left, peak, right or null]",
        ),
        (lambda v: v["region"].update(mean=[1.0]), "the field region.mean is [1.0]; it must be 3 finite numbers"),
        (lambda v: v["region"]["covariance"].pop(), "region.covariance is [[0."),
        (lambda v: v["region"].update(radius=None), "the field region.radius is None"),
        (lambda v: v.update(coefficient_covariance=[[1]]), "coefficient_covariance is [[1]]; it must be 4 × 4 finite"),
        (lambda v: v.update(runs="20"), "the field runs is '20'; it must be a whole number"),
        (lambda v: v.update(regime=[]), "the field regime is []; it must be an object"),
    ],
)
def test_a_damaged_file_names_itself_and_the_field(fitted, tmp_path, change, says):
    path = tmp_path / "rule.json"
    fitted.save(path)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(DataError) as error:
        load_rule(path)
    assert str(error.value).startswith(str(path))
    assert says in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(zebra={"a": [1, None]}, rivals=None, f=None),
        lambda m: [m.pop(name) for name in ("repeat_df", "candidates", "grouped_r2", "bootstrap")],
        lambda m: m.clear(),
        lambda m: m.update({name: m.pop(name) for name in sorted(m)}),
    ],
)
def test_metrics_of_other_versions_are_read_and_written_again_as_they_were(fitted, tmp_path, change):
    """The digest of a rule is in run keys and frozen folders: what this version does not know, or lacks, is kept."""
    path = tmp_path / "rule.json"
    fitted.save(path)
    value = json.loads(path.read_text())
    change(value["metrics"])
    path.write_text(json.dumps(value))
    rule = LinearRule.load(path)
    assert rule.summary(100)
    rule.save(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert json.dumps(again["metrics"]) == json.dumps(value["metrics"])
    rule.metrics_ = replace(rule.metrics_, verdict="another")
    assert rule.metrics_.to_json() == {**value["metrics"], "verdict": "another"}


def test_torn_and_absent_files(tmp_path):
    (tmp_path / "torn.json").write_text('{"format": ')
    with pytest.raises(DataError, match=r"torn.json: it is not whole JSON"):
        LinearRule.load(tmp_path / "torn.json")
    with pytest.raises(RequestError, match=r"absent.json: there is no such rule file"):
        LinearRule.load(tmp_path / "absent.json")
    with pytest.raises(RequestError, match=r"absent.json': it is neither a published rule"):
        load_rule(tmp_path / "absent.json")


def test_a_run_is_no_rule(tmp_path):
    from im_lightning.ledger.ledger import RunLedger

    path = RunLedger(tmp_path).add(simulate(1)[0])
    with pytest.raises(DataError, match="it is not a rule file"):
        load_rule(path)

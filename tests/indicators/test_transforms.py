"""φ: without it an outlier rules every mean, and a rule means something else on examples than on runs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from simulated_ledger import make_table

from im_lightning.errors import DataError, RequestError
from im_lightning.indicators.built_in import info_of
from im_lightning.indicators.transforms import (
    Transform,
    default_kind,
    default_regressors,
    default_transforms,
    mean_phi,
    phi_matrix,
)


@pytest.mark.parametrize(("kind", "f"), [("log", np.log), ("log1p", np.log1p), ("identity", lambda v: v)])
def test_apply_is_kind_then_clip_in_transformed_units(kind, f):
    values = np.array([0.5, 1.0, 3.0, 40.0])
    np.testing.assert_array_equal(Transform(kind, 0.1, 2.0).apply(values), np.clip(f(values), 0.1, 2.0))
    np.testing.assert_array_equal(Transform(kind).apply(values), f(values))


def test_missing_values_stay_missing_and_the_argument_is_not_changed():
    values = np.array([np.nan, 2.0])
    out = Transform("log", -1.0, 5.0).apply(values)
    assert math.isnan(out[0])
    assert out[1] == np.log(2.0)
    assert values[1] == 2.0


def test_values_outside_the_domain_are_clipped_or_missing_but_never_infinite():
    """log(0) and an overflowed perplexity have a place at the bounds; log(−1) has none."""
    out = Transform("log", -1.0, 5.0).apply([0.0, np.inf, -1.0])
    np.testing.assert_array_equal(out, [-1.0, 5.0, np.nan])
    assert np.isnan(Transform("log").apply([0.0, np.inf])).all()


def test_default_kinds_follow_the_architecture():
    kinds = {n: default_kind(n) for n in ("ppl", "ppl_unconditional", "ifd", "length_input", "mtld", "knn_6", "reward")}
    assert list(kinds.values()) == ["log", "log", "log", "log1p", "log1p", "identity", "identity"]


def test_default_bounds_are_the_example_quantiles():
    table = make_table(1000)
    table.values["ppl"][3] = np.nan
    got = default_transforms(table, ["ppl", "length_output"])
    logs = np.log(np.delete(table.values["ppl"], 3))
    assert got["ppl"] == Transform("log", *np.quantile(logs, [0.005, 0.995]))
    assert got["length_output"].kind == "log1p"
    assert list(default_transforms(table)) == ["ppl", "length_output", "knn_6"]


def test_an_indicator_without_values_gets_no_bounds_and_an_absent_one_is_refused():
    table = make_table(5, reward=np.full(5, np.nan))
    assert default_transforms(table, ["reward"])["reward"] == Transform("identity")
    with pytest.raises(RequestError, match="mtld"):
        default_transforms(table, ["mtld"])


def test_default_regressors_are_the_papers_nine_and_one_neighbour_distance():
    have = ["ifd", "ppl_unconditional", "knn_12", "knn_6", "ppl", "my_own", "reward", "understandability", "knn_3"]
    assert default_regressors(have) == ["reward", "ppl", "knn_6", "understandability"]
    assert default_regressors(["knn_12", "knn_3"]) == ["knn_3"]
    assert default_regressors(["knn_density", "mtld", "knn_"]) == ["mtld"], "those of another tool on request alone"
    assert info_of("knn_density") is None and info_of("knn_12") is not None


def test_phi_matrix_and_run_means_agree_with_plain_loops():
    table = make_table(40)
    table.values["knn_6"][7] = np.nan
    phi = {"knn_6": Transform("identity", 0.3, 1.0), "ppl": Transform("log", 0.5, 3.0)}
    matrix = phi_matrix(table, phi)
    assert np.isnan(matrix[7]).all()
    assert matrix[0, 1] == min(max(math.log(table.values["ppl"][0]), 0.5), 3.0)
    exposures = np.arange(40.0)
    means = mean_phi(table, phi, exposures)
    rows = [i for i in range(40) if i != 7]
    expected = sum(i * min(max(table.values["knn_6"][i], 0.3), 1.0) for i in rows) / sum(rows)
    assert means["knn_6"] == pytest.approx(expected, rel=1e-12)
    assert math.isnan(mean_phi(table, phi, np.zeros(40))["ppl"])
    assert phi_matrix(table, {}).shape == (40, 0)


@pytest.mark.parametrize("transform", [Transform("log"), Transform("log1p", 0.1, 2.3), Transform("identity", high=1.0)])
def test_json_round_trip_is_strict_json(transform):
    text = json.dumps(transform.to_json(), allow_nan=False)
    assert Transform.from_json(json.loads(text)) == transform


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"kind": "sqrt", "low": 0, "high": 1}, "kind (log, log1p, identity, share)"),
        ({"kind": "log", "low": "a", "high": 1}, "low is 'a'"),
        ({"kind": "log", "low": True, "high": 1}, "low is True"),
        ([], "it is []"),
    ],
)
def test_a_wrong_transform_names_its_place(value, says):
    with pytest.raises(DataError) as error:
        Transform.from_json(value, "rule.json: the field x")
    assert str(error.value).startswith("rule.json: the field x: ")
    assert says in str(error.value)


def test_wrong_bounds_and_kinds_are_refused():
    with pytest.raises(DataError, match=r"lower bound 2.0 is not below"):
        Transform("log", 2.0, 1.0)
    with pytest.raises(DataError, match="no transform 'sqrt'"):
        Transform("sqrt")


def test_close_to_forgives_rounding_and_nothing_else():
    """Two machines score the same pool with other rounding; their runs must still share a rule."""
    base = Transform("log", 0.5, 4.5)
    assert base.close_to(Transform("log", 0.5 + 1e-6, 4.5 - 1e-3))
    assert not base.close_to(Transform("log", 0.52, 4.5))
    assert not base.close_to(Transform("log1p", 0.5, 4.5))
    assert not base.close_to(Transform("log", 0.5))
    assert Transform("log").close_to(Transform("log"))
    assert Transform("identity", 2.0, 2.0).close_to(Transform("identity", 2.0, 2.0))


def test_labels_say_the_scale():
    assert Transform("log").label("ppl") == "log(ppl)"
    assert Transform("identity").label("reward") == "reward"

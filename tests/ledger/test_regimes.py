"""Regimes: runs of other models, sets or φ in one fit would give coefficients that describe nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from simulated_ledger import make_record, refused, simulate

from im_lightning.errors import DataError, RequestError
from im_lightning.ledger.regime import group_regimes
from im_lightning.rule.fit import fit_rule


@pytest.mark.parametrize(
    ("regime", "says"),
    [
        ({"learning_rate": 1e-3}, "learning rate (learning_rate) = 0.0002"),
        (
            {"base_model": {"weights": "f" * 32, "tokenizer": "b" * 32}},
            "model weights (base_model.weights) = ffffffff…",
        ),
        ({"method": "full"}, "method = full"),
        ({"subset_size": 1000}, "subset size = 1000"),
        ({"template": "chat"}, "template = chat"),
        ({"evaluation_sets": {"held-out": "9" * 32}}, "evaluation set (evaluation_sets.held-out) = 99999999…"),
        ({"something_new": 1}, "something_new = 1"),
    ],
)
def test_runs_of_two_regimes_are_refused_and_listed(regime, says):
    records = simulate(8) + simulate(7, seed=1, first=50, regime=regime)
    text = refused(records)
    assert "the designed runs are of 2 regimes; one rule cannot describe them" in text
    assert "8 runs (run-000, run-001, run-002, …)" in text
    assert "7 runs (run-050, run-051, run-052, …)" in text
    assert says.replace(" (learning_rate)", "").replace("subset size", "subset size") in text
    assert "--regime run-000" in text
    assert fit_rule(records, regime="run-053").n_runs_ == 7
    assert fit_rule(records, regime="run-000").n_runs_ == 8


def test_seeds_and_other_evaluation_sets_are_no_regime():
    records = simulate(8)
    for i, record in enumerate(records):
        record.regime["seed"] = i
        record.regime["identities"] = f"digest{i}"
        record.regime["evaluation_sets"] = {"held-out": "e" * 32, **({"more": "x"} if i % 2 else {})}
    assert fit_rule(records).n_runs_ == 8


def test_other_identities_of_a_used_indicator_are_another_regime():
    records = simulate(8) + simulate(6, seed=1, first=50)
    for record in records[8:]:
        record.keys["ppl"]["identity"]["model"]["weights"] = "f" * 32
    text = refused(records)
    assert "model weights (ppl.model.weights) = aaaaaaaa…" in text
    assert "model weights (ppl.model.weights) = ffffffff…" in text
    assert fit_rule(records, indicators=["knn_6", "length_output"]).n_runs_ == 14


def test_other_phi_is_another_regime_and_force_does_not_mix_it():
    """Means of differently clipped values are not comparable, whatever anybody insists on."""
    records = simulate(8) + simulate(6, seed=1, first=50)
    for record in records[8:]:
        record.transforms["ppl"] = {"kind": "log", "low": 0.5, "high": 3.0}
    for force in (False, "other-regime"):
        text = refused(records, force=force)
        assert "--force" not in text and "2 regimes whose φ differ" in text
        assert "φ of ppl = log in [0.5, 5]" in text and "φ of ppl = log in [0.5, 3]" in text
    for record in records[8:]:
        record.transforms["ppl"] = {"kind": "log", "low": 0.5 + 1e-5, "high": 5.0}
    assert fit_rule(records).n_runs_ == 14  # rounding of another machine


def test_force_mixes_regimes_and_says_so():
    records = simulate(8) + simulate(6, seed=1, first=50, regime={"learning_rate": 1e-3})
    for force in (False, True):  # the bare switch accepts a weak rule, and nothing else
        assert "mix them (--force other-regime; Python: force='other-regime')" in refused(records, force=force)
    rule = fit_rule(records, force="other-regime")
    assert rule.n_runs_ == 14
    assert any(n.startswith("FORCED: runs of 2 regimes are mixed") for n in rule.metrics_.notes)
    assert "FORCED" in rule.summary(80)


def test_runs_with_and_without_an_indicator_are_two_regimes():
    old = simulate(8, names=("ppl", "length_output"))
    text = refused(old + simulate(7, seed=1, first=50))
    assert "φ of knn_6 = none" in text
    assert "--indicators length_output,ppl" in text
    records = old + simulate(7, seed=1, first=50)
    assert fit_rule(records, indicators=["length_output", "ppl"]).n_runs_ == 15
    assert fit_rule(records, regime="run-000").feature_names_in_ == ["length_output", "ppl"]
    assert fit_rule(records, regime="run-050").feature_names_in_ == ["length_output", "ppl", "knn_6"]


def test_the_regime_of_a_weighted_run_may_be_named():
    """The callback refits in the regime of the run that just ended, whatever its purpose."""
    records = simulate(8) + simulate(7, seed=1, first=50, regime={"method": "full"})
    records.append(make_record(90, purpose="weighted", regime={"method": "full"}))
    assert fit_rule(records, regime="run-090").n_runs_ == 7
    records.append(make_record(91, purpose="weighted", regime={"method": "other"}))
    text = refused(records, regime="run-091")
    assert text.startswith("--regime run-091: no designed run shares its regime; the designed runs are of these")
    text = refused(records, regime="run-999")
    assert "the ledger has no complete run of this id" in text
    assert "method = full" in text


def test_runs_without_phi_are_refused():
    records = simulate(8)
    for record in records:
        record.transforms = {}
    assert "the runs do not record the φ of" in refused(records)
    assert "the runs do not record the φ of ppl: 8 runs" in refused(records, indicators=["ppl"])


def test_a_broken_phi_names_the_run():
    records = simulate(8)
    records[2].transforms["ppl"] = {"kind": "cube"}
    with pytest.raises(DataError, match=r"run run-002: the field transforms.ppl: it is"):
        fit_rule(records)


def test_other_numerics_and_pools_are_noted():
    records = simulate(12)
    for record in records[6:]:
        record.keys["ppl"]["numerics"]["precision"] = "bf16"
        record.pool_digest = "q" * 32
        record.numerics = {"precision": "bf16"}
        record.keys["knn_6"]["identity"]["pool_digest"] = "q"
    rule = fit_rule(records)
    assert rule.pool_digest_ == ""
    notes = " ".join(rule.metrics_.notes)
    assert "ppl was computed with 2 kinds of numerics" in notes
    assert "The runs drew on 2 pools" in notes
    assert "The runs were trained and evaluated in different precision: 6 not recorded, 6 bf16." in notes


def test_what_identities_of_derived_indicators_say_of_a_pool_is_no_regime():
    records = simulate(8) + simulate(6, seed=1, first=50)
    for number, record in enumerate(records):
        parts = {"indicator": "ppl_unconditional", **({"completion": "without its end"} if number > 7 else {})}
        record.keys["ppl"]["identity"] = {"indicator": "ppl", "from": {"ppl_unconditional": parts}}
    assert fit_rule(records).n_runs_ == 14


def test_groups_come_largest_first():
    records = simulate(2) + simulate(5, first=50, regime={"method": "full"})
    groups = group_regimes(copy.deepcopy(records), ["ppl"], "held-out")
    assert [len(g.records) for g in groups] == [5, 2]


def test_the_loss_by_instruction_is_a_target_by_name():
    """Several reference outputs: which mean a rule predicts is chosen, and said in the rule."""
    records = simulate(12)
    for k, record in enumerate(records):
        record.evaluation["held-out"]["example_loss"] = record.loss("held-out") * (1 + 0.01 * (k % 3))
    by_token, by_example = fit_rule(records), fit_rule(records, evaluation="held-out:example")
    assert by_example.evaluation == "held-out:example"
    wanted = np.mean([np.log(r.loss("held-out") * (1 + 0.01 * (k % 3))) for k, r in enumerate(records)])
    assert by_example.metrics_.mean_log_loss == pytest.approx(wanted)
    assert by_example.metrics_.mean_log_loss != by_token.metrics_.mean_log_loss
    assert by_example.regime["evaluation_sets"] == by_token.regime["evaluation_sets"]
    for record in records:
        del record.evaluation["held-out"]["example_loss"]  # as earlier versions wrote them
    with pytest.raises(RequestError, match="has a finite loss on held-out:example"):
        fit_rule(records, evaluation="held-out:example")

"""Merged runs beside trained ones: which count, as how much, what is corrected, and that a person is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_ledger import CENTRE, PHI, SPREAD, TRUE_COEF, TRUE_INTERCEPT, make_record

from im_lightning.errors import DataError, RequestError
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.run_table import gather
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.kinds import mix_kinds
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.refits import bootstrapped_rules, runs_of

NAMES = tuple(PHI)
B = 10
SHIFT = 0.05
TRUTH = np.array([TRUE_COEF[name] for name in NAMES])


def ledger(
    seed: int = 0, twins: int = 12, noise: float = 0.01, own: float = 0.01, blocks: str = "designed"
) -> list[RunRecord]:
    """Blocks, twins and merged runs of a known linear rule: trained ones with noise of their own, merged ones with that
    of their blocks in their shares (`own`), and all of them higher by SHIFT."""
    rng = np.random.default_rng(seed)
    centre, spread = (np.array([one[name] for name in NAMES]) for one in (CENTRE, SPREAD))
    means = centre + 2 * spread * rng.standard_normal((B, 3))
    shares = rng.dirichlet(np.full(B, 0.3), 60)
    of_blocks = own * rng.standard_normal(B)

    def record(number: int, x: np.ndarray, error: float, mixture: np.ndarray, **more: Any) -> RunRecord:
        told = {f"b{k}": float(a) for k, a in enumerate(mixture)}
        subset = {"digest": f"s{number}", "size": 300, "blocks": "d", "shares_wanted": told}
        loss = float(np.exp(TRUE_INTERCEPT + x @ TRUTH + error))
        phi = dict(zip(NAMES, map(float, x), strict=True))
        return replace(make_record(number, phi, loss), subset=subset, **more)

    out = [record(k, means[k], of_blocks[k], np.eye(B)[k], purpose=blocks) for k in range(B)]
    for k, mixture in enumerate(shares):
        x = mixture @ means
        if k < twins:
            out.append(record(100 + k, x, noise * rng.standard_normal(), mixture))
        ids = {f"b{j}": {"digest": f"s{j}", "run_id": f"run-{j:03d}"} for j in range(B)}
        alpha = {f"b{j}": float(a) for j, a in enumerate(mixture)}
        made = {"kind": "merged", "alpha": alpha, "s": 1.0, "blocks": ids}
        out.append(record(200 + k, x, mixture @ of_blocks + SHIFT, mixture, made=made))
    return out


def trained(records: list[RunRecord]) -> list[RunRecord]:
    return [r for r in records if r.kind == "trained"]


def coefficients(rule: LinearRule) -> np.ndarray:
    return np.array([rule.intercept_, *rule.coef_])


def test_the_fit_is_the_weighted_one_of_the_documented_rule() -> None:
    """Against least squares written out: twins in place of merged runs, mean difference taken off, weights B / Σ α²."""
    records = ledger()
    kinds = {name: [r for r in records if r.kind == name] for name in ("trained", "merged")}
    twins = {r.mixture_key: r for r in kinds["trained"]}
    paired = [r for r in kinds["merged"] if r.mixture_key in twins]
    gaps = [np.log(r.loss("held-out") / twins[r.mixture_key].loss("held-out")) for r in paired]
    assert len(paired) == 12 and np.mean(gaps) == pytest.approx(SHIFT, abs=0.01)
    alone = [r for r in kinds["merged"] if r.mixture_key not in twins]
    x = np.array([[1.0, *(r.phi_means[n] for n in NAMES)] for r in [*kinds["trained"], *alone]])
    y = np.log([r.loss("held-out") for r in [*kinds["trained"], *alone]])
    y[len(kinds["trained"]) :] -= np.mean(gaps)
    weight = min(1.0, B / sum(share**2 for r in alone for share in r.subset["shares_wanted"].values()))
    w = np.array([1.0] * len(kinds["trained"]) + [weight] * len(alone)) ** 0.5
    expected = np.linalg.lstsq(x * w[:, None], y * w, rcond=None)[0]
    rule = fit_rule(records, indicators=NAMES)
    np.testing.assert_allclose(coefficients(rule), expected, rtol=1e-8)
    told = rule.metrics_.kinds
    assert told["used"] and (told["runs"], told["counted"], told["twins"], told["blocks"]) == (60, 48, 12, B)
    assert (told["shift"], told["weight"]) == pytest.approx((np.mean(gaps), weight))
    assert 0.3 < weight < 1
    a = [np.log(r.loss("held-out")) for r in paired]
    b = [np.log(twins[r.mixture_key].loss("held-out")) for r in paired]
    assert told["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1]) and 0 < told["pearson_low"] < told["pearson"]
    assert rule.n_runs_ == len(kinds["trained"]) + 48


def test_with_merged_runs_the_truth_is_met_more_closely_than_without() -> None:
    """Short blocks, which are in no fit themselves: their merged runs are the only evidence beside twelve twins."""
    errors: dict[str, list[float]] = {"mixed": [], "trained": [], "alike": []}
    scale = np.array([SPREAD[name] for name in NAMES])
    for seed in range(30):
        records = ledger(seed, noise=0.02, own=0.02, blocks="block")
        fits = {
            "mixed": fit_rule(records, indicators=NAMES, diagnose=False),
            "trained": fit_rule(records, indicators=NAMES, kind="trained", diagnose=False),
            "alike": fit_rule([replace(r, made={}) for r in records], indicators=NAMES, diagnose=False),
        }
        for name, rule in fits.items():
            errors[name].append(float((((rule.coef_ - TRUTH) * scale) ** 2).sum()))
        predicted = fits["mixed"].intercept_ + sum(fits["mixed"].coef_ * list(CENTRE.values()))
        assert abs(predicted - TRUE_INTERCEPT - TRUTH @ list(CENTRE.values())) < SHIFT / 2, "the level is the trained"
    mixed, alone, alike = (np.mean(errors[name]) for name in ("mixed", "trained", "alike"))
    assert mixed < 0.5 * alone and alike < alone


def test_merged_runs_that_do_not_agree_are_left_out() -> None:
    records = ledger()
    merged = [r for r in records if r.kind == "merged"]
    losses = [1.0 / r.loss("held-out") for r in merged]  # what is best becomes worst
    turned = {r.run_id: {"held-out": {"loss": float(v)}} for r, v in zip(merged, losses, strict=True)}
    records = [replace(r, evaluation=turned.get(r.run_id, r.evaluation)) for r in records]
    rule = fit_rule(records, indicators=NAMES)
    np.testing.assert_allclose(coefficients(rule), coefficients(fit_rule(trained(records), indicators=NAMES)))
    assert not rule.metrics_.kinds["used"] and rule.metrics_.kinds["pearson"] < 0
    text = " ".join(rule.summary(100).split())
    assert "merged runs: 60 of 10 blocks, s 1; LEFT OUT, since they are not shown to agree with their twins" in text
    assert "agreement of merged runs with their 12 trained twins: Pearson" in text


def test_the_summary_and_the_file_say_what_was_mixed(tmp_path: Path) -> None:
    rule = fit_rule(ledger(), indicators=NAMES)
    rule.save(tmp_path / "rule.json")
    again = LinearRule.load(tmp_path / "rule.json")
    assert again.metrics_.kinds == rule.metrics_.kinds
    text = " ".join(again.summary(100).split())
    assert f"48 count beside the trained runs, each {rule.metrics_.kinds['weight']:.2g} of one" in text
    assert "the others' twins stand for them" in text and "Spearman 0." in text and "± 0.0" in text
    assert fit_rule(trained(ledger()), indicators=NAMES).metrics_.kinds == {}
    assert "merged" not in fit_rule(trained(ledger()), indicators=NAMES).summary()


def test_few_twins_are_no_evidence() -> None:
    rule = fit_rule(ledger(twins=3), indicators=NAMES)
    assert not rule.metrics_.kinds["used"] and rule.n_runs_ == B + 3
    assert "LEFT OUT, since 3 of them have a trained twin, and 4 are needed" in " ".join(rule.summary().split())
    records = ledger(twins=3, blocks="block")
    with pytest.raises(RequestError, match=r"3 runs are too few .*; 60 merged runs are left out, since 3 of them have"):
        fit_rule(records, indicators=NAMES)
    with pytest.raises(RequestError, match="there are merged runs alone, left out since 0 of them have a trained twin"):
        fit_rule([r for r in records if r.kind == "merged"], indicators=NAMES)


def test_merged_runs_can_be_left_out_by_hand() -> None:
    records = ledger()
    rule = fit_rule(records, indicators=NAMES, kind="trained")
    np.testing.assert_allclose(coefficients(rule), coefficients(fit_rule(trained(records), indicators=NAMES)))
    assert "LEFT OUT, as asked for" in " ".join(rule.summary().split())
    with pytest.raises(RequestError, match="kind 'melted': a fit has no such choice"):
        fit_rule(records, kind="melted")


def test_resamples_mix_as_the_rule_did() -> None:
    """The runs behind the rule have no pairs of twins among them, and still count as they did."""
    records = ledger()
    rule = fit_rule(records, indicators=NAMES)
    runs = runs_of(rule, records)
    assert len(runs) == rule.n_runs_
    streams = [np.random.default_rng(seed) for seed in range(5)]
    drawn = list(bootstrapped_rules(rule, runs, streams, list(NAMES)))
    assert all(isinstance(one, LinearRule) for one in drawn)
    assert {one.metrics_.kinds["weight"] for one in drawn} == {rule.metrics_.kinds["weight"]}  # type: ignore[union-attr]
    every = fit_rule(runs, indicators=NAMES, kinds=rule.metrics_.kinds)
    np.testing.assert_allclose(coefficients(every), coefficients(rule))


def test_a_record_without_a_kind_is_a_trained_one() -> None:
    old = make_record()
    value = old.to_json()
    assert old.kind == "trained" and "made" not in value and RunRecord.from_json(value, "f").made == {}
    merged = next(r for r in ledger() if r.kind == "merged")
    assert RunRecord.from_json(merged.to_json(), "f") == merged
    with pytest.raises(DataError, match=r"the field made\.kind is 'melted'; it must be one of trained, merged"):
        replace(old, made={"kind": "melted"}).validate()


def test_another_target_of_merged_runs_without_a_twin_of_it_is_not_known() -> None:
    """Twins correct every target for what merging adds; one that none of them measured counts in trained runs alone."""
    lacks = [r.kind == "trained" and k >= B for k, r in enumerate(ledger())]
    more = {"more": {"loss": 2.0}}
    runs = [r if lacks[k] else replace(r, evaluation={**r.evaluation, **more}) for k, r in enumerate(ledger())]
    mixed = mix_kinds(gather(runs, evaluation=next(iter(runs[-1].evaluation))))
    merged = np.array([r.kind == "merged" for r in mixed.records])
    assert merged.any() and np.isnan(mixed.targets["more"][merged]).all()
    assert np.isfinite(mixed.y).all()

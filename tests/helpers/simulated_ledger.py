"""Simulated ledgers for the tests of the rule: records with a known rule behind them."""

from __future__ import annotations

import numpy as np
import pytest

from im_lightning.errors import RequestError
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule

PHI = {"ppl": ("log", 0.5, 5.0), "length_output": ("log1p", 0.0, 7.0), "knn_6": ("identity", 0.1, 1.5)}
TRUE_INTERCEPT = 0.9
TRUE_COEF = {"ppl": 0.12, "length_output": -0.05, "knn_6": -0.3}
AGAINST = {name: -b for name, b in TRUE_COEF.items()}
"""The rule of a target that conflicts with it."""
ANSWERS = 400
"""Of the task of `with_targets`."""
CENTRE = {"ppl": 2.0, "length_output": 4.0, "knn_6": 0.7}
SPREAD = {"ppl": 0.2, "length_output": 0.3, "knn_6": 0.05}


def make_record(
    number=0, phi=None, loss=2.5, purpose="designed", status="complete", subset=None, regime=None, **changes
) -> RunRecord:
    """A valid run; `phi` are its mean regressors, `regime` and `changes` replace fields."""
    phi = dict(CENTRE) if phi is None else phi
    transforms = {n: dict(zip(("kind", "low", "high"), PHI.get(n, ("identity", None, None)), strict=True)) for n in phi}
    keys = {
        n: {
            "identity": {"indicator": n, "version": 1, "model": {"weights": "a" * 32, "tokenizer": "b" * 32}},
            "numerics": {"precision": "fp32"},
        }
        for n in phi
    }
    fields = {
        "run_id": f"run-{number:03d}",
        "status": status,
        "purpose": purpose,
        "created": f"2026-01-01T00:{number // 60 % 60:02d}:{number % 60:02d}+00:00",
        "subset": {"digest": f"s{number if subset is None else subset}", "size": 300, "seed": number},
        "pool_digest": "p" * 32,
        "indicator_means": dict(phi),
        "phi_means": dict(phi),
        "transforms": transforms,
        "keys": keys,
        "evaluation": {"held-out": {"loss": loss, "tokens": 1000, "examples": 50}},
        "regime": {
            "base_model": {"weights": "a" * 32, "tokenizer": "b" * 32},
            "method": "lora-16",
            "learning_rate": 2e-4,
            "subset_size": 300,
            "template": "alpaca",
            "evaluation_sets": {"held-out": "e" * 32},
            **(regime or {}),
        },
        "tokens": 12345,
        "steps": 40,
    }
    fields.update(changes)
    return RunRecord(**fields)


def simulate(n=24, seed=0, noise=0.01, names=tuple(PHI), coef=None, repeats=0, first=0, **changes):
    """`n` designed runs whose log loss is a known linear function of their means plus noise; the last `repeats`
    share the subsets of the first ones."""
    rng = np.random.default_rng(seed)
    coef = TRUE_COEF if coef is None else coef
    means = [{k: CENTRE[k] + SPREAD[k] * rng.standard_normal() for k in names} for _ in range(n - repeats)]
    means += means[:repeats]
    records = []
    for i, phi in enumerate(means):
        y = TRUE_INTERCEPT + sum(coef[k] * v for k, v in phi.items()) + noise * rng.standard_normal()
        subset = i if i < n - repeats else i - (n - repeats)
        records.append(make_record(first + i, dict(phi), float(np.exp(y)), subset=subset, **changes))
    return records


def with_targets(n=30, seed=0, b=None, score=None, noise=0.01, repeats=0):
    """Runs with losses on held-out (the known rule) and b, and a task; `b` and `score` are their own true rules, of log
    loss and log error rate. Their noise is their own."""
    rng = np.random.default_rng([seed, 7])
    records = simulate(n, seed, noise, repeats=repeats)
    for record in records:

        def of(rule, level, phi=record.phi_means):
            away = sum((TRUE_COEF if rule is None else rule)[k] * (v - CENTRE[k]) for k, v in phi.items())
            return float(np.exp(level + away + noise * rng.standard_normal()))

        record.evaluation["b"] = {"loss": of(b, 0.5), "tokens": 500, "examples": 20}
        right = round((1 - of(score, -0.7)) * ANSWERS)
        record.scores["task"] = {"exact_match": right / ANSWERS, "answers": ANSWERS}
    return records


def make_table(n=200, seed=0, names=tuple(PHI), **columns):
    """A ScoreTable with plausible raw values and keys that match `make_record`."""
    from im_lightning.data.score_table import ScoreTable

    rng = np.random.default_rng(seed)
    values = {
        "ppl": np.exp(rng.normal(2.0, 0.8, n)),
        "length_output": rng.integers(1, 200, n).astype(float),
        "knn_6": rng.uniform(0.2, 1.2, n),
    }
    values = {**{k: v for k, v in values.items() if k in names}, **columns}
    keys = make_record(phi=dict.fromkeys(values, 0.0)).keys
    return ScoreTable(range(n), [f"id{i}" for i in range(n)], ["s"] * n, values, keys=keys)


def refused(*args, **kwargs) -> str:
    """What `fit_rule` says where it refuses."""
    with pytest.raises(RequestError) as error:
        fit_rule(*args, **kwargs)
    return str(error.value)

"""If these failed, a rule would know of sources what its runs do not say, or apply it to rows of others."""

from __future__ import annotations

import json

import numpy as np
import pytest
from simulated_ledger import PHI, make_record, make_table, simulate
from sklearn.linear_model import Ridge

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import DataError, RequestError
from im_lightning.indicators.transforms import Transform, mean_phi
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.run_table import gather
from im_lightning.rule.estimators.linear import PENALTIES, POOLED, partial_pooling, ridge, with_shares
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.rows import source_phi_means, source_shares
from im_lightning.sampling.selection.decisions import contributions
from im_lightning.sampling.weights.quality_weights import quality_weights

SOURCES = ("books", "forum", "web")
TRANSFORMS = {name: Transform(*of) for name, of in PHI.items()}
LEVEL = {"books": 0.0, "forum": 0.3, "web": -0.2}
OWN = {"books": 1.0, "forum": -1.0, "web": 0.2}
"""Slopes of ppl where they differ by source."""


def pool(n: int = 1500) -> ScoreTable:
    table = make_table(n)
    sources = [SOURCES[k % 3] for k in range(n)]
    return ScoreTable(table.row, table.id, sources, table.values, keys=table.keys)


def runs(n: int = 48, level: float = 0.0, own: float = 0.0, noise: float = 0.005) -> list[RunRecord]:
    """Designed runs on subsets of the pool; log loss has a common slope, levels of sources and slopes of their own."""
    table, rng, out = pool(), np.random.default_rng(0), []
    source = np.array(table.source)
    ppl = TRANSFORMS["ppl"].apply(table.values["ppl"])
    for k in range(n):
        shares = rng.dirichlet(np.ones(3))
        weight = np.exp(rng.normal(0, 1) * (ppl - 2) + rng.normal(0, 1) * table.values["knn_6"])
        weight *= shares[np.searchsorted(SOURCES, source)]
        exposures = np.bincount(rng.choice(len(table), 200, p=weight / weight.sum()), minlength=len(table))
        seen = np.flatnonzero(exposures)
        effect = 0.1 * ppl + level * np.array([LEVEL[s] for s in source])
        effect = effect + own * np.array([OWN[s] for s in source]) * (ppl - 2)
        y = 0.5 + float(effect[seen] @ exposures[seen]) / 200 + noise * rng.standard_normal()
        subset = {"digest": f"s{k}", "size": 200, "source_shares": source_shares(table.source, exposures)}
        out.append(
            make_record(
                k, mean_phi(table, TRANSFORMS, exposures), float(np.exp(y)), subset=k,
                transforms={name: t.to_json() for name, t in TRANSFORMS.items()},
                source_phi_means=source_phi_means(table, TRANSFORMS, exposures),
            )
        )  # fmt: skip
        out[-1].subset = subset
    return out


def test_the_parts_of_the_sources_make_up_the_mean() -> None:
    table = pool(60)
    table.values["ppl"][4] = np.nan
    exposures = np.arange(60) % 4
    parts = source_phi_means(table, TRANSFORMS, exposures)
    for name, mean in mean_phi(table, TRANSFORMS, exposures).items():
        assert sum(part[name] for part in parts.values()) == pytest.approx(mean)
    ppl = TRANSFORMS["ppl"].apply(table.values["ppl"])
    mine = (np.array(table.source) == "web") & np.isfinite(ppl)
    total = exposures[np.isfinite(ppl)].sum()
    assert parts["web"]["ppl"] == pytest.approx(ppl[mine] @ exposures[mine] / total)


def test_ridge_with_shares_is_ridge_on_all_of_them() -> None:
    """Contrasts, so that nothing is singular, and yet no source is penalised otherwise than the others."""
    data = gather(runs(30, level=1.0))
    shares = np.column_stack(list(data.contrasts.values()))
    made = with_shares(ridge(data.x, data.weights), shares)
    setting = made.settings.index((0, PENALTIES[6]))
    found = made.solve([np.arange(30)], data.y[:, None], final=True, only=setting)[0, 0, :, 0]
    every = np.column_stack([data.x, shares])
    standard = (every - every.mean(axis=0)) / every.std(axis=0)
    wanted = Ridge(alpha=PENALTIES[6] * 30).fit(standard, data.y)
    slopes = wanted.coef_ / every.std(axis=0)
    np.testing.assert_allclose(found[1:4], slopes[:3], rtol=1e-8)
    np.testing.assert_allclose(found[4:], slopes[3:5] - slopes[5], rtol=1e-8)
    np.testing.assert_allclose(found[0] + made.x @ found[1:], wanted.predict(standard), rtol=1e-9)


def test_partial_pooling_is_ridge_with_a_block_penalty() -> None:
    """Against the normal equations in common slopes, levels, and slopes of each source about its mean row."""
    data = gather(runs(40, own=0.3))
    parts = [data.by_source[source] for source in data.contrasts]
    shares = np.column_stack(list(data.contrasts.values()))
    made = partial_pooling(parts, shares, data.weights)
    n, p, penalty = 40, 3, PENALTIES[5]
    for space, pooled in enumerate(POOLED):
        setting = made.settings.index((space, penalty))
        found = made.solve([np.arange(n)], data.y[:, None], final=True, only=setting)[0, 0, :, 0]
        own = [part - part.sum(axis=0) / of.sum() * of[:, None] for part, of in zip(parts, shares.T, strict=True)]
        z = np.column_stack([data.x, shares, *own])
        sd, of_shares = data.x.std(axis=0), shares.std(axis=0)
        block = np.concatenate([sd**2, of_shares**2, np.tile((sd / pooled) ** 2, 3)])
        centred = z - z.mean(axis=0)
        b = np.linalg.solve(
            centred.T @ centred / n + penalty * np.diag(block), centred.T @ (data.y - data.y.mean()) / n
        )
        np.testing.assert_allclose(found[0] + made.x @ found[1:], data.y.mean() + centred @ b, rtol=1e-9)
        np.testing.assert_allclose(found[1 : 1 + p], b[:p] + b[6 : 6 + p], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("truth", "method"), [({}, "ols"), ({"level": 1.0}, "ridge+shares"), ({"own": 1.0}, "partial-pooling")]
)
def test_what_holds_out_best_is_taken(truth: dict[str, float], method: str) -> None:
    rule = fit_rule(runs(60, **truth), "auto", permutations=0, bootstrap=0, diagnose=False)
    assert rule.method == method
    assert {"ridge+shares", "partial-pooling"} <= {row["method"] for row in rule.metrics_.candidates}


@pytest.mark.parametrize("method", ["ridge+shares", "partial-pooling"])
def test_a_rule_of_sources_predicts_draws_and_is_kept(method: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    records = runs(60, level=0.5, own=0.2 if method == "partial-pooling" else 0.0)
    rule, table = fit_rule(records, method), pool()
    assert rule.held_out_r2 is not None and rule.held_out_r2 > 0.8
    means = rule.phi(table).mean(axis=0)
    source = np.array(table.source)
    for name, value in zip(rule.feature_names_in_, means, strict=True):
        t = rule.transforms_[name]
        mine = (source == t.source) if t.source else np.ones(len(table), dtype=bool)
        wanted = (
            mine.mean() if t.kind == "share" else np.where(mine, t.base().apply(table.values[t.column(name)]), 0).mean()
        )
        assert value == pytest.approx(wanted)
    made = quality_weights(table, rule, budget=200, force=True)
    shares = {name: made.weights[source == name].sum() for name in SOURCES}
    assert shares["web"] > 0.4 > 0.2 > shares["forum"], "towards the source of lower loss, by the rule's weights alone"
    parts = contributions(rule, rule.phi(table))
    told = sum(values for name, values in parts.items() if name != "predicted_log_loss")
    np.testing.assert_allclose(told, parts["predicted_log_loss"] - rule.log_loss(rule.phi(table).mean(axis=0)))
    assert any(name.endswith("its source") for name in parts)

    rule.save(tmp_path / "rule.json")
    read = LinearRule.load(tmp_path / "rule.json")
    np.testing.assert_array_equal(read.predict(table), rule.predict(table))
    assert read.sources_ == rule.sources_ and set(read.indicators) == set(TRANSFORMS)
    assert read.mahalanobis(means) == rule.mahalanobis(means) and len(rule.of_indicators(means)) == 5
    value = json.loads((tmp_path / "rule.json").read_text())
    assert value["schema_version"] == 5
    value["regressors"][-1]["regressor"] = "share of news"
    (tmp_path / "rule.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"is 'share of news', which is no share of a source"):
        LinearRule.load(tmp_path / "rule.json")


def test_rows_of_sources_that_no_run_had_get_no_prediction() -> None:
    """Their level is not that of the source left out; nothing is known of it."""
    rule, table = fit_rule(runs(level=1.0), "ridge+shares"), pool(30)
    other = ScoreTable(table.row, table.id, ["news", *table.source[1:]], table.values, keys=table.keys)
    predicted = rule.predict(other)
    assert np.isnan(predicted[0]) and np.isfinite(predicted[1:]).all()
    with pytest.warns(UserWarning, match=r"1 rows have no prediction: no run of it had their source \(news\)"):
        rule.check(other, True)
    assert f"contrasts with {rule.sources_[-1]}" in " ".join(rule.metrics_.notes)
    assert any(
        f"ppl) of {SOURCES[0]}" in t.label(n) for n, t in fit_rule(runs(), "partial-pooling").transforms_.items()
    )


def test_runs_that_cannot_tell_sources_apart_are_refused() -> None:
    for method in ("ridge+shares", "additive+shares", "partial-pooling"):
        with pytest.raises(RequestError, match=rf"method {method[:5]}.*some run does not record the shares"):
            fit_rule(simulate(), method)
    old = runs(20)
    for record in old:
        record.source_phi_means = {}
    with pytest.raises(RequestError, match="does not record the means of its indicators by source"):
        fit_rule(old, "partial-pooling")
    with pytest.raises(RequestError, match="take more than 6 different subsets"):
        fit_rule(runs(8)[:6], "partial-pooling", ["ppl", "knn_6", "length_output"])
    shares = [make_record(k, {"web": s}, 2.0 + s + k * 1e-3) for k, s in enumerate(np.linspace(0, 1, 12))]
    for record in shares:
        web = record.phi_means["web"]
        record.subset |= {"source_shares": {"web": web, "books": 1 - web}}
    with pytest.raises(RequestError, match="the indicators say as much"):
        fit_rule(shares, "ridge+shares", ["web"])
    assert "ridge+shares" not in {
        c["method"] for c in fit_rule(shares, "auto", ["web"], permutations=0).metrics_.candidates
    }

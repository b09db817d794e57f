"""If these failed, a mixture would not be the one that the runs predict best, or rows would not follow it."""

from __future__ import annotations

import json
from collections import Counter
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize

from im_lightning import RunRecord, ScoreTable, select_subset
from im_lightning.cli import main
from im_lightning.commands.mix import _text
from im_lightning.errors import DataError, RequestError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.mixture_law import MixtureLaw, fit_mixture_law
from im_lightning.sampling.weights.mixture import best_mixture, mixed, read_mixture, read_repeat, solve
from im_lightning.sampling.weights.quality_weights import quality_weights

SLOPES = {"books": 0.0, "code": -0.3, "forum": 0.2, "web": -0.1}
ROWS = {"books": 400, "code": 60, "forum": 140, "web": 400}


def runs(n: int = 40, noise: float = 0.002, offset: float = 0.0, seed: int = 0) -> list[RunRecord]:
    """Designed runs whose loss follows the shares of their sources, log-linearly or with an offset."""
    rng, out = np.random.default_rng(seed), []
    for k in range(n):
        shares = dict(zip(SLOPES, rng.dirichlet(np.ones(len(SLOPES))).tolist(), strict=True))
        index = 0.5 + sum(SLOPES[name] * share for name, share in shares.items()) * (4 if offset else 1)
        loss = (offset + np.exp(index)) * np.exp(noise * rng.standard_normal())
        out.append(
            RunRecord(
                run_id=f"r{k}", status="complete", purpose="designed", created=f"2026-01-01T00:00:{k % 60:02}Z",
                subset={"digest": str(k), "size": 100, "source_shares": shares},
                evaluation={"eval": {"loss": float(loss)}},
            )
        )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def law() -> MixtureLaw:
    return fit_mixture_law(runs(), method="ols")


def array(law: MixtureLaw, shares: dict[str, float]) -> np.ndarray:
    return np.array([shares[name] for name in law.sources])


def test_slopes_are_contrasts_with_the_source_left_out(law: MixtureLaw) -> None:
    """All shares with an intercept would be singular."""
    last = law.sources[-1]
    for name, slope in zip(law.sources, law.slopes, strict=True):
        assert slope == pytest.approx(SLOPES[name] - SLOPES[last], abs=0.01)
    assert law.slopes[-1] == 0 and set(law.sources) == set(SLOPES)
    shares = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    wanted = [law.rule.predict_mean(row[:-1])[0] for row in shares]
    np.testing.assert_allclose(law.log_loss(shares), wanted)


def test_the_form_that_holds_out_best_is_taken() -> None:
    curved = fit_mixture_law(runs(60, offset=3.0), bootstrap=0)
    assert curved.rule.method == "offset" and curved.rule.offset_ == pytest.approx(3.0, abs=0.6)
    p, step = np.full(4, 0.25), 1e-6
    numeric = [(curved.log_loss(p + step * e) - curved.log_loss(p - step * e)) / (2 * step) for e in np.eye(4)]
    np.testing.assert_allclose(curved.gradient(p), numeric, rtol=1e-5, atol=1e-8)


def test_the_interval_of_a_difference_is_that_of_least_squares(law: MixtureLaw) -> None:
    import statsmodels.api as sm

    records = runs()
    x = sm.add_constant(np.array([[r.subset["source_shares"][name] for name in law.sources[:-1]] for r in records]))
    fitted = sm.OLS(np.log([r.loss("eval") for r in records]), x).fit()
    one, other = np.array([0.4, 0.3, 0.2, 0.1]), np.full(4, 0.25)
    test = fitted.t_test(np.concatenate([[0.0], (one - other)[:-1]]))
    gap, half = law.difference(one, other)
    low, high = test.conf_int()[0]
    assert gap == pytest.approx(float(test.effect[0])) and half == pytest.approx((high - low) / 2, rel=1e-6)


def test_repeats_are_no_further_runs_to_the_interval() -> None:
    import statsmodels.api as sm

    once = runs(12, noise=0.02)
    law = fit_mixture_law([*once, *(replace(r, run_id=f"{r.run_id}b") for r in once)], method="ols", bootstrap=0)
    x = sm.add_constant(np.array([[r.subset["source_shares"][name] for name in law.sources[:-1]] for r in once]))
    fitted = sm.OLS(np.log([r.loss("eval") for r in once]), x).fit()
    one, other = np.array([0.4, 0.3, 0.2, 0.1]), np.full(4, 0.25)
    low, high = fitted.t_test(np.concatenate([[0.0], (one - other)[:-1]])).conf_int()[0]
    assert law.difference(one, other)[1] == pytest.approx((high - low) / 2, rel=1e-6)


def test_the_notes_of_the_fit_are_reported(
    law: MixtureLaw, tmp_path: Path, table: ScoreTable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Early losses would be read as those of finished runs, and merged runs as trained ones."""
    book = RunLedger(tmp_path / "runs")
    for run in runs():
        book.add(replace(run, regime={"stopped_at": {"step": 8, "of": 40}}, curve={"steps": 40, "points": []}))
    table.write(tmp_path / "scores.parquet")
    words = ["mix", str(book.path), "--scores", str(tmp_path / "scores.parquet"), "--budget", "100", "--method", "ols"]
    assert main(words) == 0
    assert "Note: These losses are early ones (stopped at step 8 of 40)" in " ".join(capsys.readouterr().out.split())
    rule = copy(law.rule)
    kinds: dict[str, Any] = {"used": False, "runs": 3, "blocks": 2, "scale": [0.5], "reason": "as asked for"}
    rule.metrics_ = replace(rule.metrics_, kinds=kinds)
    said = _text(replace(law, rule=rule), best_mixture(law, ROWS, 100), None)
    assert "merged runs: 3 of 2 blocks, s 0.5; LEFT OUT, as asked for" in " ".join(said.split())


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize(("budget", "pull"), [(100, 0.0), (100, 0.02), (900, 0.001)])
def test_no_other_solver_finds_a_better_mixture(offset: float, budget: int, pull: float) -> None:
    """Best of 20 starts of the interior-point method."""
    made = fit_mixture_law(runs(60, offset=offset), method="offset" if offset else "ols", bootstrap=0)
    found = best_mixture(made, ROWS, budget, pull)
    natural, most = array(made, found.natural), array(made, found.most)
    centre, shape = made.region()
    radius = max(found.predicted["radius"], made.distance(natural))

    def objective(p: np.ndarray) -> float:
        return float(made.log_loss(p)) + pull * float(p @ np.log(np.maximum(p, 1e-12) / natural))

    limits = [
        LinearConstraint(np.ones(4), 1, 1),
        NonlinearConstraint(lambda p: (p - centre) @ shape @ (p - centre), -np.inf, radius**2),
    ]
    values = []
    for start in np.random.default_rng(0).dirichlet(np.ones(4), 20):
        other = minimize(
            objective, start, method="trust-constr", bounds=list(zip(np.full(4, 1e-9), most, strict=True)),
            constraints=limits, options={"gtol": 1e-9, "xtol": 1e-11, "maxiter": 400},
        )  # fmt: skip
        if other.constr_violation < 1e-8:
            values.append(other.fun)
    p = array(made, found.shares)
    assert objective(p) <= min(values) + 1e-6
    assert p.sum() == pytest.approx(1, abs=1e-12) and (p >= 0).all() and (p <= most + 1e-12).all()
    assert made.distance(p) <= radius * (1 + 1e-6) and made.distance(p) == pytest.approx(
        np.sqrt((p - centre) @ shape @ (p - centre))
    )


def test_the_pull_and_the_cap_on_repetition(law: MixtureLaw) -> None:
    free = best_mixture(law, ROWS, 100, 0.0).shares
    assert max(free, key=lambda name: free[name]) == "code", "the source that lowers the loss"
    held = best_mixture(law, ROWS, 100, 1e4).shares
    assert held == pytest.approx({name: rows / 1000 for name, rows in ROWS.items()}, abs=1e-4)
    capped = best_mixture(law, ROWS, 400, 0.0)
    assert capped.shares["code"] == pytest.approx(60 / 400) and capped.most["code"] == pytest.approx(60 / 400)
    twice = best_mixture(law, ROWS, 400, 0.0, repeat=2)
    assert twice.shares["code"] == pytest.approx(120 / 400)


def test_a_search_that_failed_is_no_mixture(law: MixtureLaw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it stood still would be printed, and saved, as the best mix; at its start that is the natural one."""

    def stuck(objective: Any, start: np.ndarray, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(x=start, success=False, message="Iteration limit reached")

    def stuck_on_resamples(*words: Any) -> np.ndarray:
        if len(words) > 5:  # the region of the law of all runs, given
            raise RequestError("no best one")
        return solve(*words)

    with monkeypatch.context() as patched:
        patched.setattr("scipy.optimize.minimize", stuck)
        with pytest.raises(RequestError, match=r"the mixture: no best one was found \(Iteration limit reached\)"):
            best_mixture(law, ROWS, 100)
        whole = best_mixture(law, ROWS, 1000).shares
        assert whole == {name: rows / 1000 for name, rows in ROWS.items()}, "all rows: nothing is sought"
    monkeypatch.setattr("im_lightning.sampling.weights.mixture.solve", stuck_on_resamples)
    found, count = best_mixture(law, ROWS, 100), len(law.resamples)
    assert count and found.spread == {} and found.predicted["corrected"] is None
    assert f"no best mixture was found on {count} of {count} resamples, which are left out" in found.notes


def test_resamples_say_how_sure_the_mixture_is_and_what_choosing_it_flatters() -> None:
    """Against an explicit loop over resampled subsets; where the loss is noise the gain is mostly flattery."""
    sure = best_mixture(fit_mixture_law(runs(60), method="ols", bootstrap=50), ROWS, 100, 0.0)
    low, high = sure.spread["code"]
    assert low - 1e-9 <= sure.shares["code"] <= high + 1e-9 and high - low < 0.1
    assert sure.predicted["corrected"] == pytest.approx(sure.predicted["difference"], rel=0.05)
    losses = np.exp(0.05 * np.random.default_rng(1).standard_normal(30)).tolist()
    noise = [replace(r, evaluation={"eval": {"loss": loss}}) for r, loss in zip(runs(30), losses, strict=True)]
    law = fit_mixture_law(noise, method="ols", bootstrap=50)
    found = best_mixture(law, ROWS, 100, 0.0)
    assert max(high - low for low, high in found.spread.values()) > 0.3
    assert found.predicted["difference"] < 0.6 * found.predicted["corrected"] or found.predicted["corrected"] > 0
    x = np.array([[r.subset["source_shares"][name] for name in law.sources[:-1]] for r in noise])
    y = np.log([r.loss("eval") for r in noise])
    natural, most = array(law, found.natural), array(law, found.most)
    gaps = []
    for k in range(len(law.resamples)):
        picks = np.random.default_rng([100, k]).integers(0, 30, 30)
        b = np.linalg.lstsq(np.column_stack([np.ones(30), x[picks]]), y[picks], rcond=None)[0]
        p = solve(replace(law, rule=law.resamples[k]), natural, most, found.predicted["radius"], 0.0, law.region())
        gaps.append((p - natural)[:-1] @ (b[1:] - law.slopes[:-1]))
    assert found.predicted["difference"] - found.predicted["corrected"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert best_mixture(replace(law, resamples=[]), ROWS, 100, 0.0).spread == {}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"budget": 0}, "budget=0"), ({"budget": 1001}, "give from 1 to 1000 rows"), ({"pull": -1.0}, "pull=-1.0"),
        ({"repeat": 0.5}, "repeat=0.5"), ({"rows": {**ROWS, "news": 5}}, "no run differs in its share of news"),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_refused(law: MixtureLaw, change: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError) as error:
        best_mixture(law, **{"rows": ROWS, "budget": 100, **change})
    assert text in str(error.value)


def test_runs_of_one_source_have_no_law() -> None:
    same = runs(12)
    for r in same:
        r.subset["source_shares"] = {"web": 1.0}
    with pytest.raises(RequestError, match="do not differ in the shares of their sources"):
        fit_mixture_law(same)


@pytest.mark.parametrize("other", [{"method": "full"}, {"stopped_at": {"step": 8, "of": 40}}])
def test_of_two_regimes_one_is_chosen_with_its_own_sources(other: dict[str, Any]) -> None:
    """A source that only the other regime's runs had would be a regressor that is 0 in all of these."""
    older = []
    for k, run in enumerate(runs(20, seed=3)):
        news = 0.02 + 0.05 * (k % 3)
        shares = {name: (1 - news) * share for name, share in run.subset["source_shares"].items()} | {"news": news}
        older.append(replace(run, run_id=f"old{k}", regime=other, subset={"digest": f"o{k}", "source_shares": shares}))
    law = fit_mixture_law([*runs(), *older], method="ols", regime="r0", bootstrap=0)
    assert set(law.sources) == set(SLOPES) and law.rule.n_runs_ == 40
    assert set(fit_mixture_law([*runs(), *older], "eval", "ols", "old3", 0).sources) == {*SLOPES, "news"}
    with pytest.raises(RequestError, match=r"mix: the designed runs are of 2 regimes(?s:.*)--regime r0") as error:
        fit_mixture_law([*runs(), *older], method="ols")
    assert not any(word in str(error.value) for word in ("--at", "--force", "--indicators")), "mix has no such options"
    with pytest.raises(RequestError, match="--regime r99: no designed run that records its shares is of the regime"):
        fit_mixture_law([*runs(), *older], method="ols", regime="r99")
    with pytest.raises(RequestError, match="mix: 5 runs are too few for 4 sources: it takes at least 6") as error:
        fit_mixture_law([*runs(5), *older], method="ols", regime="r0")
    assert "--indicators" not in str(error.value) and fit_mixture_law(runs(6), method="ols", bootstrap=0)


@pytest.fixture
def table() -> ScoreTable:
    source = [name for name, rows in ROWS.items() for _ in range(rows)]
    reward = np.random.default_rng(0).normal(size=1000)
    return ScoreTable(np.arange(1000), [f"{k:032x}" for k in range(1000)], source, {"reward": reward})


MIX = {"books": 0.1, "code": 0.5, "forum": 0.4}


def test_weights_have_the_shares_of_the_mixture_and_the_ratios_of_the_rule(table: ScoreTable) -> None:
    from im_lightning.indicators.transforms import Transform
    from im_lightning.rule.linear_rule import LinearRule

    rule = LinearRule("r", 0.0, np.array([-0.5]), ["reward"], {"reward": Transform("identity")})
    source = np.array(table.source)
    for base in (quality_weights(table, None, "uniform"), quality_weights(table, rule, "softmax")):
        made = mixed(base, table.source, MIX)
        for name in ROWS:
            mine = source == name
            assert made.weights[mine].sum() == pytest.approx(MIX.get(name, 0.0))
            if name in MIX:
                ratio = made.weights[mine] / base.weights[mine]
                np.testing.assert_allclose(ratio, ratio[0])
    with pytest.raises(RequestError, match="no row that can be drawn is of a source with a share"):
        mixed(quality_weights(table, None, "uniform", eligible=source == "web"), table.source, MIX)


def test_draws_follow_the_mixture_and_take_no_row_twice(table: ScoreTable) -> None:
    """At the cap all rows of a source are drawn, each once."""
    counts: Counter[str] = Counter()
    for seed in range(30):
        rows = select_subset(table, None, 120, "mix", seed, mixture=MIX)
        assert len(set(rows.tolist())) == 120
        counts.update(table.source[k] for k in rows)
    assert counts["code"] == 30 * 60, "a share of 0.5 of 120 is all there are"
    assert counts["forum"] / 3600 == pytest.approx(0.4, abs=0.02) and counts["web"] == 0
    with pytest.raises(RequestError, match="method mix: it needs a mixture of sources"):
        select_subset(table, None, 50, "mix")
    with pytest.raises(RequestError, match="the pool has no row of news"):
        select_subset(table, None, 50, "mix", mixture={"news": 1.0})
    with pytest.raises(RequestError, match="weighting mix: it needs a mixture of sources"):
        quality_weights(table, None, "mix")


def test_a_file_of_shares(tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    for text, cause in (
        ('{"a": 0.5}', "its shares sum to 0.5"),
        ("[1]", "does not hold shares"),
        ("{", "does not hold"),
        ('{"shares": {"a": 1}, "repeat": 0.5}', "its repeat is 0.5"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=cause):
            read_mixture(path)
    path.write_text('{"a": 0.25, "b": 0.75}')
    assert read_mixture(path) == {"a": 0.25, "b": 0.75} and read_repeat(path) is None
    path.write_text('{"shares": {"a": 1.0}, "repeat": 2}')
    assert read_mixture(path) == {"a": 1.0} and read_repeat(path) == 2
    with pytest.raises(RequestError, match="there is no such mixture"):
        read_mixture(tmp_path / "gone.json")


def test_the_command(tmp_path: Path, table: ScoreTable, capsys: pytest.CaptureFixture[str]) -> None:
    from im_lightning.indicators.transforms import Transform
    from im_lightning.rule.linear_rule import LinearRule

    ledger = RunLedger(tmp_path / "runs")
    ledger.make()
    for record in runs():
        ledger.add(record)
    table.write(tmp_path / "scores.parquet")
    words = [str(tmp_path / "runs"), "--scores", str(tmp_path / "scores.parquet"), "--budget", "100"]
    assert main(["mix", *words, "--method", "ols", "--out", str(tmp_path / "mix.json")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "mix.json").read_text())
    assert out.splitlines()[2].split()[0] == max(found["shares"], key=lambda name: found["shares"][name])
    low, high = found["spread"][out.splitlines()[2].split()[0]]
    said = " ".join(out.split())
    assert f"{low:.3f} to {high:.3f}" in said and f"flatters it, {found['predicted']['corrected']:+.4f}" in said
    assert f"{found['predicted']['difference']:+.4f} ± {found['predicted']['half_width']:.4f}" in said
    assert read_mixture(tmp_path / "mix.json") == found["shares"]
    assert main(["mix", *words, "--method", "ols", "--out", str(tmp_path / "mix.json")]) == 0
    more = [*words[:-1], "1500", "--repeat", "3", "--method", "ols"]  # rows than there are, and a rule's shares beside
    rule = LinearRule("r", 0.0, np.array([-0.5]), ["reward"], {"reward": Transform("identity")})
    rule.save(tmp_path / "rule.json")
    assert main(["mix", *more, "--rule", str(tmp_path / "rule.json")]) == 0
    assert "rule's weights" in capsys.readouterr().out
    assert main(["mix", *more, "--rule", str(tmp_path / "rule.json"), "--json"]) == 0
    weights, source = quality_weights(table, rule).weights, np.array(table.source)
    drawn = {name: float(weights[source == name].sum()) for name in ROWS}  # the natural mix was printed for it
    told = json.loads(capsys.readouterr().out)
    assert told["rule_shares"] == pytest.approx(drawn) and drawn != pytest.approx(told["natural"], rel=1e-3)
    (tmp_path / "mix.json").write_text("{}")
    assert main(["mix", *words, "--out", str(tmp_path / "mix.json")]) == 2

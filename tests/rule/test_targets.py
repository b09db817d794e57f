"""Several targets: sums, scores, how they correlate, and the guard, against numpy and scipy and a known truth."""

from __future__ import annotations

import numpy as np
import pytest
from pool_ledger import pool_ledger, valley
from scipy import stats
from simulated_ledger import AGAINST, ANSWERS, TRUE_COEF, make_record, make_table, simulate, with_targets

from im_lightning.cli import main
from im_lightning.errors import DataError, RequestError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.run_table import gather
from im_lightning.ledger.targets import read_targets, terms_of
from im_lightning.report.inputs import read_inputs
from im_lightning.report.sections.targets import targets_section
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.rule_file import rule_to_json
from im_lightning.rule.validation.targets import guarded_targets
from im_lightning.sampling.weights.quality_weights import quality_weights

NAMES = ["length_output", "ppl", "knn_6"]  # the order of a fit


def subset_rows(records, target, names=NAMES):
    """Means over subsets of the regressors [s, 3] and of a target's logarithm [s], by an explicit loop."""
    rows: dict[str, list] = {}
    for r in records:
        rows.setdefault(r.subset_key, []).append(([r.phi_means[k] for k in names], value_of(r, target)))
    x = np.array([np.mean([row[0] for row in group], axis=0) for group in rows.values()])
    return x, np.array([np.mean([row[1] for row in group]) for group in rows.values()])


def value_of(record, target):
    if target == "em:task":
        wrong = (1 - record.scores["task"]["exact_match"]) * ANSWERS
        return np.log((wrong + 0.5) / (ANSWERS + 1))
    return np.log(record.evaluation[target]["loss"])


def by_hand(records, target, move, names=NAMES):
    """Change and its 95 % t interval: the textbook's contrast of a least-squares fit, in numpy."""
    x, y = subset_rows(records, target, names)
    full = np.column_stack([np.ones(len(x)), x])
    inverse = np.linalg.inv(full.T @ full)
    beta = inverse @ full.T @ y
    df = len(y) - full.shape[1]
    variance = ((y - full @ beta) ** 2).sum() / df
    contrast = np.concatenate([[0.0], move])
    half = stats.t.ppf(0.975, df) * np.sqrt(variance * contrast @ inverse @ contrast)
    return contrast @ beta, contrast @ beta - half, contrast @ beta + half


def fitted(records, target, method="ols", **options) -> LinearRule:
    return fit_rule(records, method, evaluation=target, permutations=0, bootstrap=0, **options)


def guard(rule) -> dict:
    return {row["target"]: row for row in rule.metrics_.targets}


def test_a_weighted_sum_is_fitted_as_the_loss_it_is():
    records = with_targets(24, b=AGAINST)
    rule = fitted(records, "held-out=3,b=1")
    y = np.log([0.75 * r.evaluation["held-out"]["loss"] + 0.25 * r.evaluation["b"]["loss"] for r in records])
    x = np.column_stack([np.ones(24), [[r.phi_means[k] for k in NAMES] for r in records]])
    np.testing.assert_allclose([rule.intercept_, *rule.coef_], np.linalg.lstsq(x, y, rcond=None)[0], rtol=1e-8)
    assert rule.evaluation == "held-out=0.75,b=0.25"
    assert "on 0.75 held-out + 0.25 b, OLS" in rule.summary(200)


def test_a_score_is_fitted_as_the_log_of_its_error_rate_so_that_lower_is_better():
    """Weights must go to where more answers are right."""
    records = with_targets(40, score=AGAINST)
    rule = fitted(records, "em:task")
    x, y = subset_rows(records, "em:task")
    wanted = np.linalg.lstsq(np.column_stack([np.ones(len(x)), x]), y, rcond=None)[0]
    np.testing.assert_allclose([rule.intercept_, *rule.coef_], wanted, rtol=1e-8)
    assert rule.coef_[1] < 0 < TRUE_COEF["ppl"], "the task wants what the loss does not"
    assert "log error rate (share of wrong answers) on task" in rule.summary(200)
    assert rule_to_json(rule)["predicts"].startswith("natural logarithm of the error rate")
    exact = np.array([r.scores["task"]["exact_match"] for r in records])
    low = np.array([rule.predict_mean([r.phi_means[k] for k in NAMES])[0] for r in records])
    assert stats.spearmanr(low, exact).statistic < -0.8


def test_all_right_still_has_a_logarithm():
    """A run that answers everything right is the best of all, not one to leave out."""
    record = make_record(scores={"t": {"exact_match": 1.0, "answers": 49}})
    assert record.loss("em:t") == pytest.approx(0.01) and record.has_loss("em:t")
    record.evaluation["held-out"] |= {"exact_match": 0.5, "answers": 9}
    assert record.loss("em:held-out") == 0.5 and record.measured == ["held-out", "em:held-out", "em:t"]


@pytest.mark.parametrize("repeats", [0, 6])
@pytest.mark.parametrize("method", ["ols", "ridge", "offset"])
def test_the_guard_is_the_textbooks_contrast(method, repeats):
    """Change and interval of each named target, where the weights aim; computed again in numpy, repeats or not."""
    records = with_targets(30, b=AGAINST, repeats=repeats)
    rule = fitted(records, "held-out=1,b=0,em:task=0", method)
    move = rule.edge() - rule.mean_
    assert [*guard(rule)] == ["held-out", "b", "em:task"]
    for name, row in guard(rule).items():
        assert (row["change"], row["low"], row["high"]) == pytest.approx(by_hand(records, name, move), rel=1e-6)
        assert row["subsets"] == 30 - repeats


def test_the_guard_of_a_rule_that_bends_is_of_its_own_index():
    """Its regressors are more than runs; beside the indicators' means its prediction is one more, and none is lost."""
    records, _ = pool_ledger(36, effect=valley)
    for record in records:
        loss = record.evaluation["held-out"]["loss"]
        record.evaluation["b"] = {"loss": float(np.exp(0.1 * record.phi_means["ppl"] + 0.2 * np.sin(90 * loss)))}
    rule = fitted(records, "held-out=1,b=0", "additive")
    names = rule.indicators
    x = np.array([[r.phi_means[k] for k in names] for r in records])
    index = np.zeros(len(records))
    for term, coef in zip(rule.feature_names_in_, rule.coef_, strict=True):
        name, at = term.rstrip("]").split("[")
        index += coef * np.array([r.basis_means[name]["means"][int(at) + 1] for r in records])
    for record, value in zip(records, index, strict=True):
        record.phi_means = {**record.phi_means, "index": value}
    move = [-rule.reach_ * np.cov(column, index)[0, 1] / index.std(ddof=1) for column in (*x.T, index)]
    row = guard(rule)["b"]
    wanted = by_hand(records, "b", move, [*names, "index"])
    assert (row["change"], row["low"], row["high"]) == pytest.approx(wanted, rel=1e-6)
    slope = np.polyfit(index, [value_of(r, "b") for r in records], 1)[0]
    assert row["change"] == pytest.approx(-rule.reach_ * index.std(ddof=1) * slope, rel=1e-6)


def test_targets_that_conflict_are_refused_and_those_that_agree_are_not(tmp_path):
    """Better here and worse there is no recommendation; and nothing is refused that has no reason."""
    table = make_table(300)
    rule = fitted(with_targets(b=AGAINST), "held-out=1,b=0,em:task=0")
    assert {name: row["worse"] for name, row in guard(rule).items()} == {
        "held-out": False, "b": True, "em:task": False,
    }  # fmt: skip
    rule.save(tmp_path / "rule.json")
    read = LinearRule.load(tmp_path / "rule.json")
    assert guard(read) == guard(rule)
    with pytest.raises(RequestError, match=r"its weights make a named target worse: b by \+0\.\d+ \(0\.\d+ to .*Fix"):
        quality_weights(table, read)
    with pytest.raises(RequestError, match="pass --force worse-target"):
        quality_weights(table, read)
    assert quality_weights(table, read, force="worse-target").report["forced"] == ["worse-target"]
    said = " ".join(read.summary(100).split())
    assert "Weights by this rule are NOT RECOMMENDED, they make a named target worse: b by +0." in said
    agreeing = fitted(with_targets(), "held-out=1,b=0,em:task=0")
    assert not any(row["worse"] for row in guard(agreeing).values())
    assert all(row["high"] < 0 for row in guard(agreeing).values()), "all get better"
    assert quality_weights(table, agreeing).report.get("forced", []) == []
    assert "make no named target worse beyond its interval" in " ".join(agreeing.summary(100).split())


def test_the_sum_weighs_conflicting_targets():
    """Most of the weight decides which of the two is made worse."""
    records = with_targets(b=AGAINST)
    for target, worse in (("held-out=9,b=1", "b"), ("held-out=1,b=9", "held-out")):
        assert [name for name, row in guard(fitted(records, target)).items() if row["worse"]] == [worse]


def test_the_interval_holds_the_true_change():
    """95 of 100, over ledgers with a known truth; a target that does not move is called worse 2.5 times in 100."""
    indifferent = dict.fromkeys(TRUE_COEF, 0.0)
    covered = fired = 0
    for seed in range(120):
        data = gather(with_targets(14, 100 + seed, b=indifferent, noise=0.03), evaluation="held-out=1,b=0")
        index = data.x @ np.linalg.lstsq(np.column_stack([data.x, np.ones(14)]), data.y, rcond=None)[0][:-1]
        row = guarded_targets(data, index, 3.0)[1]
        covered += row["low"] <= 0.0 <= row["high"]
        fired += row["worse"]
    assert covered >= 107 and fired <= 8  # binomial: below these 1 in 200


def test_what_cannot_be_told_is_said():
    records = with_targets(12)
    for record in records[4:]:
        record.scores = {}
    rule = fitted(records, "held-out=1,em:task=0")
    row = guard(rule)["em:task"]
    assert row["worse"] is None and row["change"] is None and row["reason"] == "4 subsets are too few for 3 regressors"
    assert "Not known of em:task (4 subsets are too few" in " ".join(rule.summary(100).split())


def test_correlations_of_targets_are_scipys():
    """Signs as a reader expects them: positive where a lower loss comes with a better score."""
    records = with_targets(30, score=AGAINST, repeats=5)
    pairs = {tuple(row["targets"]): row for row in fitted(records, "held-out").metrics_.target_correlations}
    assert set(pairs) == {("held-out", "b"), ("held-out", "em:task"), ("b", "em:task")}
    for (one, other), row in pairs.items():
        a, b = subset_rows(records, one)[1], subset_rows(records, other)[1]
        assert row["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        assert row["pearson"] == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
        assert row["subsets"] == 25 and row["spearman_low"] < row["spearman"] < row["spearman_high"]
    assert pairs["held-out", "b"]["spearman"] > 0.7 > 0 > pairs["held-out", "em:task"]["spearman"]


def test_one_loss_alone_is_as_before():
    metrics = fitted(simulate(20), None).metrics_
    assert metrics.targets == [] and metrics.target_correlations == []


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("a=0.5,b", "neither names nor names with their weights.*write a=0.5,b=0.5"),
        ("a,,b", "neither names nor names with their weights"),
        ("a=half,b=0.5", "neither names nor names with their weights"),
        ("a=-1,b=2", "a weight is negative, or all are 0"),
        ("a=0,b=0", "a weight is negative, or all are 0"),
        ("a=1,a=2", "it names one twice"),
        ("a=1,em:t=1", "their sum has no unit.*watch the others with weight 0"),
    ],
)
def test_what_is_no_target_says_how_to_write_one(target, says):
    with pytest.raises(RequestError, match=says):
        read_targets(target)


def test_a_set_called_as_a_sum_is_a_set():
    """Names of sets are the user's."""
    record = make_record(evaluation={"a=1,b=2": {"loss": 1.5}, "a": {"loss": 3.0}, "b": {"loss": 6.0}})
    assert record.loss("a=1,b=2") == 1.5 and record.loss("a=1,b=1") == 4.5
    assert terms_of("held-out:example") == {"held-out:example": 1.0}


@pytest.mark.parametrize(("share", "answers"), [(1.2, 5), (0.5, None), (1, 0), ("0.5", 10)])
def test_a_score_that_is_none_is_refused(tmp_path, share, answers):
    score = {"exact_match": share, "answers": answers}
    with pytest.raises(DataError, match=r"the field scores.t is .* must be \{exact_match: 0 to 1, answers: 1 or more"):
        RunLedger(tmp_path).add(make_record(scores={"t": score}))


def test_scores_may_be_added_after_a_rule_was_fitted(tmp_path):
    """A benchmark takes longer than a finetune: its score comes later, and the rule is still that of these runs."""
    book = RunLedger(tmp_path)
    records = simulate(12)
    before = RunLedger.digest(records)
    for record in records:
        record.scores["t"] = {"exact_match": 0.25, "answers": 8}
        book.add(record, replace=True)
    assert book.records()[3].loss("em:t") == 6.5 / 9 and RunLedger.digest(book.records()) == before


def test_refit_on_each_writes_a_rule_each(tmp_path, capsys):
    book = RunLedger(tmp_path / "runs")
    for record in with_targets(b=AGAINST):
        book.add(record)
    out = tmp_path / "rule.json"
    options = ["--out", str(out), "--permutations", "0", "--bootstrap", "0", "--method", "ols"]
    assert main(["refit", str(book.path), "--target", "held-out,b,em:task", *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("NOT RECOMMENDED") == 3 and "held-out with em:task" in printed
    rules = {name: LinearRule.load(tmp_path / f"rule-{name}.json") for name in ("held-out", "b", "em-task")}
    assert [r.evaluation for r in rules.values()][2] == "held-out=0,b=0,em:task=1" and not out.exists()
    alone = fitted(book.records(), "b")
    np.testing.assert_allclose(rules["b"].coef_, alone.coef_, rtol=1e-12)
    assert main(["refit", str(book.path), "--target", "b", "--evaluation", "b", *options]) == 2
    assert "--target and --evaluation: both say what the rule predicts" in capsys.readouterr().err
    assert main(["refit", str(book.path), "--target", "held-out,em:nope", *options]) == 2
    assert "evaluation set 'em:nope': no complete designed run was evaluated on it" in (said := capsys.readouterr().err)
    assert "em:task (30 runs)" in said


def test_the_report_says_how_well_loss_follows_scores_and_what_the_guard_found(tmp_path):
    records = with_targets(b=AGAINST, score=AGAINST)
    for record in records:
        RunLedger(tmp_path / "runs").add(record)
    rule = fitted(records, "held-out=1,b=0")
    rule.save(tmp_path / "rule.json")
    section = targets_section(read_inputs(ledger=str(tmp_path / "runs"), rule=str(tmp_path / "rule.json")))
    (said, kind) = section.short[0]
    assert kind == "bad" and "NOT RECOMMENDED" in said
    (bullets,) = (part.items for part in section.parts if part.is_a == "bullets")
    row = next(r for r in rule.metrics_.target_correlations if r["targets"] == ["held-out", "em:task"])
    assert f"The loss on held-out follows the exact match on task at ρ {row['spearman']:.2f} (95 % " in bullets[0]
    assert bullets[0].endswith("30 subsets), so that a lower loss comes with a WORSE score.")
    assert "so that a lower loss comes with a better score" in bullets[1]
    tables = {part.title: part.rows for part in section.parts if part.is_a == "table"}
    assert tables["What weights by the rule do to each named target"][1][-1] == "worse"
    assert len(tables["Losses and scores over the 30 designed runs"]) == 3
    assert targets_section(read_inputs(rule=str(tmp_path / "rule.json"))).parts, "from the rule alone"

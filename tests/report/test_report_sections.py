"""What the sections say: the numbers of the commands, the verdicts that follow from them, and nothing more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pool_ledger import valley
from report_inputs import Page, arms, make_folder, named, statistics

from im_lightning._utils.files import write_json
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.experiments.compare import result as compare_result
from im_lightning.experiments.compare.curve import Multiplier
from im_lightning.ledger.ledger import RunLedger
from im_lightning.report import text as report_text
from im_lightning.report.inputs import ReportInputs, read_inputs
from im_lightning.report.page import write_report
from im_lightning.report.sections import comparison as comparison_section
from im_lightning.report.sections import examples as examples_section
from im_lightning.report.sections import pool
from im_lightning.report.sections import training as training_section
from im_lightning.report.sections import weights as weights_section
from im_lightning.report.sections.rows import rows_section
from im_lightning.report.sections.rule import gains, headline, rule_section
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.metrics import RuleMetrics
from im_lightning.rule.rule_file import rule_to_json
from im_lightning.sampling.selection.decisions import decisions_file, read_decision, why
from im_lightning.sampling.selection.select import choose_rows
from im_lightning.sampling.weights.quality_weights import quality_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sections")
    rule, table = make_folder(folder)
    return Page(write_report(folder / "r.html", **named(folder)).read_text()), folder, rule, table


def words(section) -> str:
    return " ".join([part.text for part in section.parts if part.is_a == "words"])


def test_coefficients_and_held_out_numbers_are_those_of_refit(made) -> None:
    """Two numbers for one thing: neither would be believed."""
    page, folder, rule, _ = made
    for name, row in zip(rule.feature_names_in_, rule.coefficients_[1:], strict=True):
        for shown in (
            rule.transforms_[name].label(name), f"{row['estimate']:.4g}", f"{row['se']:.3g}", f"{row['vif']:.3g}",
            f"{row['low']:.3g}, {row['high']:.3g}",
        ):  # fmt: skip
            assert shown in page.text and shown in rule.summary(400), shown
    for one in rule.metrics_.candidates:
        for shown in (f"{one['grouped_r2']:.3f}", f"{one['grouped_rmse']:.3g}", f"{one['bic']:.1f}"):
            assert shown in page.text and shown in rule.summary(400), shown
    for one in rule.metrics_.rivals.values():
        assert f"{one['gain']:+.3f}" in page.text and f"{one['gain']:+.3f}" in rule.summary(400)
    for line in LinearRule.load(folder / "rule.json").summary(110).splitlines():
        assert " ".join(line.split()) in page.text  # the command's own words, folded in
    assert rule.metrics_.verdict in page.text


def test_runs_are_named_where_prediction_meets_measurement(made) -> None:
    """A run that lies far off has to be found again in the ledger."""
    page, _, rule, _ = made
    for row in rule.metrics_.held_out:
        assert f"{row['run_id']}: measured {row['y']:.4f}, predicted {row['prediction']:.4f}" in page.raw
        assert f"{row['low']:.4f}" in page.text
    inside = sum(r["low"] <= r["y"] <= r["high"] for r in rule.metrics_.held_out)
    assert f"{inside} of {len(rule.metrics_.held_out)} runs lie inside their interval" in page.text
    assert "that has not seen it" in page.text


def test_a_rule_no_better_than_the_mean_is_called_that_first(tmp_path: Path) -> None:
    """Who reads one line reads this one."""
    rule, _ = make_folder(tmp_path, effect=lambda z: 0.0 * z[:, 0], permutations=60)
    assert rule.beats_mean is False
    said, kind = headline(rule)
    assert said.startswith("NO BETTER THAN THE MEAN") and kind == "bad"
    out = write_report(tmp_path / "r.html", rule=str(tmp_path / "rule.json"))
    text = Page(out.read_text()).text
    assert text.index("NO BETTER THAN THE MEAN") < text.index("The rule predicts the loss")
    assert "Recommended: the mean of the runs" in text
    weighed = read_inputs(rule=str(tmp_path / "rule.json"), scores=str(tmp_path / "scores.parquet"))
    assert "refuse it unless forced" in words(weights_section.weights_section(weighed))


def test_a_gain_is_claimed_only_where_its_interval_excludes_zero() -> None:
    """Source identity that passes for quality is what the method is most often fooled by."""
    rivals = {
        "mean": {"gain": 0.5, "gain_low": 0.1, "gain_high": 0.7},
        "sources": {"gain": 0.2, "gain_low": -0.1, "gain_high": 0.4},
        "length": {"gain": -0.3, "gain_low": -0.5, "gain_high": -0.1},
    }
    mean, sources, length = gains(RuleMetrics(rivals=rivals))
    assert "it gains +0.500" in mean and "0.100 to 0.700" in mean
    assert "no gain is shown" in sources and "which source a row comes from" in sources
    assert "worse than length alone" in length
    assert "not known: no lengths" in gains(RuleMetrics(rivals={"length": {"gain": None, "reason": "no lengths"}}))[0]


def test_a_verdict_that_its_interval_does_not_bear_out_is_explained_as_refit_does(tmp_path: Path) -> None:
    """Two sentences in a row that seem to disagree, of which only one can be read."""
    rule, _ = make_folder(tmp_path)
    told = "The verdict is of these runs; as few others may show no gain over the mean: make more runs."
    rivals = rule.metrics_.rivals
    for low, explained in ((0.1, False), (-0.33, True)):
        rule.metrics_ = replace(rule.metrics_, rivals={**rivals, "mean": {**rivals["mean"], "gain_low": low}})
        rule.save(tmp_path / "rule.json")
        text = Page(write_report(tmp_path / f"{explained}.html", rule=str(tmp_path / "rule.json")).read_text()).text
        short = text.partition("In short")[2].partition("Method least squares")[0]
        assert "better than the mean" in short and (told in short) == explained, short
        assert (told in " ".join(rule.summary(110).split())) == explained


def test_an_additive_rule_is_shown_as_curves(tmp_path: Path) -> None:
    """That both extremes are bad cannot be seen in a list of thirty coefficients."""
    rule, _ = make_folder(tmp_path, n=40, method="additive", effect=valley)
    section = rule_section(read_inputs(rule=str(tmp_path / "rule.json")))
    keys = [figure.key for figure in section.figures]
    assert sum(key.startswith("rule-shape-") for key in keys) == len(rule.indicators) == 3
    table = next(part for part in section.parts if part.is_a == "table" and part.title == "Shapes")
    first = table.rows[0]
    effects = [float(v) for v in first[3].split()]
    assert first[0] == "log(ppl)" and min(effects[0], effects[-1]) > min(effects)
    assert f" {first[1]} " in rule.summary(200) and first[3] in rule.summary(200)
    bullets = [text for part in section.parts if part.is_a == "bullets" for text in part.items]
    assert any("was given; no other was considered" in text for text in bullets)


def test_a_rule_file_of_an_earlier_version_is_still_shown(tmp_path: Path) -> None:
    """Rules live longer than versions; what they lack is left out and said."""
    rule, _ = make_folder(tmp_path)
    value = rule_to_json(rule)
    for gone in ("held_out", "cook", "candidates", "rivals", "bootstrap", "beats_mean", "verdict", "permutation",
                 "recommended", "grouped_r2", "source_out", "univariate"):  # fmt: skip
        value["metrics"].pop(gone, None)
    write_json(tmp_path / "rule.json", value)
    alone = rule_section(read_inputs(rule=str(tmp_path / "rule.json")))
    assert "refit the rule, or add --ledger" in words(alone) and "was not tested" in alone.short[0][0]
    with_runs = rule_section(read_inputs(rule=str(tmp_path / "rule.json"), ledger=str(tmp_path / "ledger")))
    assert "has seen these runs, which flatters it" in words(with_runs)
    table = next(part for part in with_runs.parts if part.is_a == "table" and part.title.startswith("Predicted and"))
    assert len(table.rows) == rule.n_runs_
    first = RunLedger(tmp_path / "ledger").records()[0]
    row = next(row for row in table.rows if row[0] == first.run_id)
    expected = rule.predict_mean([first.phi_means[n] for n in rule.feature_names_in_])[0]
    assert row[1:3] == [f"{math.log(first.loss('held-out')):.4f}", f"{expected:.4f}"]


def test_a_published_rule_is_marked_as_unverified() -> None:
    section = rule_section(read_inputs(rule="instructmining-v3"))
    assert section.short[0][0].startswith("UNVERIFIED") and "0.522" in words(section)


def test_the_row_table_says_why_each_row_was_taken_or_not(tmp_path: Path) -> None:
    """The same words as `explain`, joined by id."""
    _, table = make_folder(tmp_path)
    chosen = choose_rows(table, None, 200, "random", 3)
    chosen.decisions.write(tmp_path / "subset.jsonl.decisions.parquet", table, None)
    (tmp_path / "subset.jsonl").write_text("")
    given = {"scores": str(tmp_path / "scores.parquet"), "decisions": str(tmp_path / "subset.jsonl")}
    section = rows_section(read_inputs(**given))
    heads = [head.name for head in section.parts[0].heads]
    taken, reason = heads.index("taken"), heads.index("why")
    told = {int(row[0]): (row[taken], row[reason]) for row in section.parts[0].rows}
    assert len(told) == len(table)
    assert {k for k, (word, _) in told.items() if word == "yes"} == set(chosen.rows.tolist())
    for at, (word, text) in told.items():
        found = read_decision(decisions_file(given["decisions"]), str(at))
        assert text == why(found) and (word == "no") == text.startswith("It was not taken: others were taken")
    table.take(range(9)).write(tmp_path / "scores.parquet")
    with pytest.raises(RequestError, match="rows are not the 9 of the score table"):
        read_inputs(**given)
    with pytest.raises(RequestError, match=r"--decisions.*there is no score table"):
        read_inputs(decisions=given["decisions"])


def test_rows_that_are_not_listed_are_called_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("im_lightning.report.sections.rows.MOST_ROWS", 4)
    table = ScoreTable(range(9), [f"i{k}" for k in range(9)], [""] * 9, {"mtld": np.arange(9.0)})

    def listed(predicted: list[float] | None) -> tuple[str, list[str]]:
        inputs = ReportInputs(table=table, predicted=None if predicted is None else np.array(predicted))
        (part,) = rows_section(inputs).parts
        return part.left_out, [row[0] for row in part.rows]

    assert listed(None) == ("5 rows are not listed; the score table has all.", list("0123"))
    some = [5.0, 4.0, 3.0, 2.0, 1.0, *[float("nan")] * 4]
    said = "5 rows between the best and the worst, or without a prediction, are not listed; the score table has all."
    assert listed(some) == (said, list("4310"))
    assert listed([3.0, 1.0, *[float("nan")] * 7])[1] == list("1023"), "those with a prediction first"


def test_weights_are_those_of_fit_and_select(made) -> None:
    """The page must show the draw that will be made, not one like it."""
    page, _, rule, table = made
    for budget in (200, 50):
        report = quality_weights(table, rule, budget=budget).report
        assert f"{report['ess']:,.0f} ({100 * report['ess'] / len(table):.0f} %)" in page.text
        assert f"{report['predicted']['expected']:.4f}" in page.text
    chances = np.arange(1.0, len(table) + 1) / np.arange(1.0, len(table) + 1).sum()
    shares = weights_section.source_shares(table, chances)
    assert sum(a for _, a, _ in shares) == pytest.approx(1) and sum(b for _, _, b in shares) == pytest.approx(1)
    for source, before, after in shares:
        inside = np.array([s == source for s in table.source])
        assert (before, after) == pytest.approx((inside.mean(), chances[inside].sum()))
    moved = dict(weights_section.shifts(table, rule, chances, np.ones(len(table), bool)))
    phi = rule.phi(table)
    for j, name in enumerate(rule.feature_names_in_):
        expected = (chances @ phi[:, j] - phi[:, j].mean()) / phi[:, j].std()
        assert moved[rule.transforms_[name].label(name)] == pytest.approx(expected)


def test_a_budget_that_cannot_be_drawn_is_a_line_on_the_page(tmp_path: Path) -> None:
    make_folder(tmp_path)
    given = {"rule": str(tmp_path / "rule.json"), "scores": str(tmp_path / "scores.parquet"), "budgets": [10**6]}
    said = words(weights_section.weights_section(read_inputs(**given)))
    assert "budget=1000000" in said and "1500 of 1500 rows can be drawn" in said


def test_best_and_worst_rows_are_different_rows_in_order() -> None:
    """Five copies of one row would show nothing of the other extremes."""
    predicted = np.array([3.0, 1.0, np.nan, 1.0, 2.0, 5.0, 4.0])
    ids = ["a", "b", "x", "b", "c", "d", "e"]
    best, worst = examples_section.best_and_worst(predicted, ids, 3)
    assert best == [1, 4, 0] and worst == [5, 6, 0]


def test_examples_are_the_rows_of_the_data_with_their_full_length(made) -> None:
    """A row cut without a word would be judged by its first lines."""
    page, _, rule, table = made
    best = int(np.argmin(rule.predict(table)))
    assert f"row {best:,} of source{best % 3}: predicted log loss {rule.predict(table)[best]:.4f}" in page.text
    assert f"Say {best}." in page.text and f"It is {best}." in page.text
    text, length = report_text.shortened("é" * 5000, 700)
    assert (len(text), length) == (700, 5000)
    assert report_text.shortened("short\r\n", 700) == ("short\n", 7)


def test_correlations_of_the_pool_are_those_of_numpy(made) -> None:
    _, _, rule, table = made
    found = pool.correlations(table, table.indicators)
    phi = np.column_stack([rule.transforms_[n].apply(table.values[n]) for n in table.indicators])
    np.testing.assert_allclose(found, np.corrcoef(phi, rowvar=False), atol=0.02)  # the clip is the ledger's there


def test_a_pool_of_odd_columns_is_drawn(tmp_path: Path) -> None:
    """One row, a constant, nothing at all, infinities: what real pools have too."""

    def odd(values, reasons) -> None:
        n = 1500
        values["constant"] = np.full(n, 2.0)
        values["nothing"] = np.full(n, np.nan)
        values["infinite"] = np.where(np.arange(n) % 2, np.inf, 1.0)
        values["ifd"] = np.linspace(-1, 1, n)
        reasons["nothing"] = [f"reason {k % 9}" for k in range(n)]

    make_folder(tmp_path, change=odd)
    page = Page(write_report(tmp_path / "r.html", scores=str(tmp_path / "scores.parquet")).read_text())
    assert "reason 4" in page.text and "other reasons" in page.text and "1,500 different" in page.text
    table = read_inputs(scores=str(tmp_path / "scores.parquet")).table
    assert table is not None
    for rows in ([0], []):
        table.take(rows).write(tmp_path / "few.parquet")
        text = Page(write_report(tmp_path / "few.html", scores=str(tmp_path / "few.parquet")).read_text()).text
        assert ("no rows" in text) == (not rows)


def test_losses_by_tenths_are_means_over_runs() -> None:
    """Averaged by hand: two runs, of different sizes, one of which did not see a tenth."""
    one, two = statistics(["ppl"], slope=0.1), statistics(["ppl"], slope=0.3)
    two["decile_examples"]["ppl"] = [0] + [90] * 9
    two["by_decile"]["ppl"] = [None, *two["by_decile"]["ppl"][1:]]
    found = training_section.mean_by_decile([one, two], "ppl")
    assert found[0] == pytest.approx(3.0)
    assert found[9] == pytest.approx((30 * 3.9 + 90 * 5.7) / 120)
    steps, losses = training_section.over_training([one, two], "ppl")
    assert steps.tolist() == [10, 20, 30] and losses.shape == (3, 10)
    assert losses[1, 9] == pytest.approx((3.9 - 0.2 + 5.7 - 0.2) / 2)
    assert np.isnan(training_section.mean_by_decile([one], "mtld")).all()


def test_runs_without_statistics_say_how_to_get_them(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for path in (tmp_path / "ledger").glob("*.statistics.json"):
        path.unlink()
    torn = next(iter((tmp_path / "ledger").glob("*.json")))
    torn.with_name(f"{torn.stem}.statistics.json").write_text("{")
    page = Page(write_report(tmp_path / "r.html", ledger=str(tmp_path / "ledger")).read_text())
    assert "kept no live statistics; InstructMiningCallback" in page.text
    assert f"{torn.stem}.statistics.json" in page.text  # the torn one is named


def test_a_comparison_says_better_or_worse_only_with_a_verdict() -> None:
    """A point estimate in words would be read as a finding."""
    value = arms()
    said = comparison_section.sentences(value["arms"])
    assert ("Rule's weights: better than random (-0.350 ± 0.122 nats per token, Holm p < 0.001).", "good") in said
    assert ("No difference from random is shown for: highest IFD below 1.", "note") in said
    assert not any("base" in text for text, _ in said)
    lonely = [{**arm, "losses": arm["losses"][:1]} for arm in value["arms"]]
    assert "One seed has no interval" in comparison_section.sentences(lonely)[0][0]


def test_numbers_of_a_comparison_are_printed_as_compare_prints_them(made) -> None:
    page, _, _, _ = made
    for name in ("half_width", "p_text", "BASE", "REFERENCE"):
        assert getattr(comparison_section, name) is getattr(compare_result, name)
    for shown in ("2.550", "± 0.124", "-0.350", "± 0.122", "< 0.001", "a note of the comparison", "random 2.900"):
        assert shown in page.text, shown


def test_win_rates_of_a_judge_stand_beside_the_loss(tmp_path: Path) -> None:
    """Four judged arms: their rates in the table, and how they go with the loss in words, as compare prints them."""
    value = arms()
    rates = {"base": 0.05, "weighted": 0.7, "longest": 0.2, "ifd": 0.5, "top": 0.6}
    value["arms"].append({**value["arms"][2], "arm": "top", "title": "rule's top rows", "losses": [2.7], "mean": 2.7})
    for one in value["arms"]:
        if one["arm"] in rates:
            rate = rates[one["arm"]]
            one["win_rate"] = {"rate": {"value": rate, "low": rate - 0.1, "high": rate + 0.1, "reason": ""}}
    write_json(tmp_path / "compare.json", value)
    page = Page(write_report(tmp_path / "r.html", compare=str(tmp_path / "compare.json")).read_text())
    assert "base model: loss" not in page.text, "the figure is of what was trained"
    assert "Win rate and loss over 5 arms: Spearman -1.00 (arms of lower loss are preferred)." in page.text
    assert "longest: loss 4.700, win rate 0.20 (0.10 to 0.30)" in page.text
    write_json(tmp_path / "compare.json", arms())
    page = Page(write_report(tmp_path / "r.html", compare=str(tmp_path / "compare.json")).read_text())
    assert "win rate" not in page.text


def test_what_arms_are_worth_stands_where_it_was_measured(tmp_path: Path) -> None:
    """Multiples of random tokens with their intervals, net of the evidence, and nothing beyond the curve."""
    value = arms()
    points = [{"scale": s, "mean": 2.9 - 0.1 * s, "fitted": 2.9 - 0.1 * s} for s in (0.5, 1.0, 2.0, 4.0)]
    value["curve"] = {"points": points}
    worth = Multiplier(4.0, 2.5, 4.0, 0.5, 4.0)
    net = {"flops": (worth * 0.25).to_json(), "seconds": Multiplier.from_json({}).to_json()}
    weighted = next(arm for arm in value["arms"] if arm["arm"] == "weighted")
    weighted |= {"multiplier": worth.to_json(), "net": net}
    write_json(tmp_path / "compare.json", value)
    page = Page(write_report(tmp_path / "r.html", compare=str(tmp_path / "compare.json")).read_text())
    for words in ("more than 4×", "2.5× to more than 4×", "more than 1×", "not known", "4×: measured 2.500"):
        assert words in page.text, words
    write_json(tmp_path / "compare.json", arms())
    page = Page(write_report(tmp_path / "r.html", compare=str(tmp_path / "compare.json")).read_text())
    assert "random tokens" not in page.text


def test_a_small_or_null_demo_is_marked_before_its_differences() -> None:
    """A demo that is too small to conclude must not look like a result."""
    value = arms(settings={"conclusive": False, "null": True})
    inputs = read_inputs.__globals__["ReportInputs"](comparison=value)
    section = comparison_section.comparison_section(inputs)
    assert "too small to conclude" in section.short[0][0] and "chance" in section.short[1][0]
    assert not any("better" in text for text, _ in section.short), "too small for any verdict"


def test_the_noise_ceiling_of_the_runs_is_that_of_the_fit(made) -> None:
    page, _, rule, _ = made
    m = rule.metrics_
    assert f"other training seeds differ by {m.repeat_sd:.3g} ({m.repeat_df} degrees of freedom" in page.text
    assert m.repeat_df < 5 and m.noise_ceiling_r2 is None
    assert "too few to say how much of the differences a rule can explain: 5 are needed" in page.text


def test_a_rule_that_cannot_be_applied_does_not_stop_the_page(tmp_path: Path) -> None:
    """The pool is still worth seeing where the rule needs an indicator that was not scored."""
    make_folder(tmp_path, change=lambda values, reasons: values.pop("knn_6"))
    inputs = read_inputs(**named(tmp_path))
    said = words(weights_section.weights_section(inputs))
    assert "cannot be applied to this table" in said and "needs knn_6" in said
    assert "add a --rule that can be applied" in examples_section.examples_section(inputs).absent
    assert pool.pool_section(inputs).figures
    assert LinearRule.load(tmp_path / "rule.json").n_runs_ == 36

"""The demo end to end at miniature sizes: the loop closes, the arms are equal, and an interrupted demo goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mini_demo import MINI

from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.experiments.compare import arms as arms_module
from im_lightning.experiments.demo import run as demo_module
from im_lightning.experiments.demo.run import Demo, arms_of, permuted, without_sources
from im_lightning.experiments.demo.settings import FAST, FULL
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule

ARMS = arms_of(MINI)
COMPARED = MINI.seeds * (len(ARMS) - 1) + 1
"""Runs of the comparison: every arm with every seed, the base model once."""


def test_the_loop_closes_and_leaves_its_parts(finished) -> None:
    """A user can look at, and go on from, every part that the demo says it keeps."""
    folder, result = finished
    ledger = RunLedger(folder / "ledger")
    assert len(ledger.records("designed")) == MINI.runs and len(ledger.records("compare")) == COMPARED
    rule = LinearRule.load(folder / "rule.json")
    assert rule.n_runs_ == MINI.runs and set(rule.indicators) == set(MINI.indicators) and len(MINI.indicators) == 9
    assert (
        len(load_examples(str(folder / "pool.jsonl")))
        == MINI.pool_rows
        == len(ScoreTable.read(folder / "scores.parquet"))
    )
    written = json.loads((folder / "comparison.json").read_text())
    arms = {arm["arm"]: arm for arm in written["arms"]}
    assert arms["random"]["mean"] == result.results["random"].mean and set(arms) == set(ARMS)
    assert arms["base"]["mean"] == pytest.approx(written["base_loss"], rel=1e-6)  # measured twice, in two ways
    assert result.arms.base_loss > result.results["random"].mean
    assert result.table() in result.text() and written["rendered"] == result.table()


def test_no_row_serves_two_purposes(finished) -> None:
    """Rows shared between seeds, or with the fit of the rule, would make the intervals too narrow."""
    folder, _ = finished
    files = [folder / "parts" / "designed.jsonl", *(folder / "parts" / f"seed-{s}.jsonl" for s in range(2))]
    files += [folder / "evaluation" / "fit.jsonl", folder / "evaluation" / "report.jsonl"]
    ids = [{example.id for example in load_examples(str(path))} for path in files]
    assert sum(map(len, ids)) == len(set.union(*ids))
    pool = {example.id for example in load_examples(str(folder / "pool.jsonl"))}
    assert set.union(*ids[:3]) == pool


def test_rules_are_fitted_and_compared_on_different_sets(finished) -> None:
    """The report set would flatter a rule that was fitted on it."""
    ledger = RunLedger(finished[0] / "ledger")
    assert {tuple(r.evaluation) for r in ledger.records("designed")} == {("fit",)}
    assert {tuple(r.evaluation) for r in ledger.records("compare")} == {("report",)}


def test_designed_runs_repeat_subsets_with_other_training_seeds(finished) -> None:
    """Without repeats there is no noise ceiling to hold the rule's R² against."""
    by_subset: dict[str, list] = {}
    for record in RunLedger(finished[0] / "ledger").records("designed"):
        by_subset.setdefault(record.subset["digest"], []).append(record)
    repeats = [runs for runs in by_subset.values() if len(runs) > 1]
    assert len(repeats) == MINI.repeats and len({r.seeds["training"] for r in repeats[0]}) == 2
    assert len({r.evaluation["fit"]["loss"] for r in repeats[0]}) == 2  # the order of training differs
    for settings in (FULL, FAST):
        assert settings.repeats >= settings.runs / 10
    assert FULL.runs >= 60 and len(FULL.indicators) == 9 and FULL.seeds >= 5 and FAST.runs == 16 and FAST.seeds == 2


def test_arms_are_equal_in_tokens_and_steps(finished) -> None:
    """Otherwise the longest rows might win by being more, not better."""
    records = [r for r in RunLedger(finished[0] / "ledger").records("compare") if r.subset["arm"] != "base"]
    wanted = {r.subset["supervised_tokens_wanted"] for r in records}
    assert len(wanted) == 1
    assert {r.steps for r in records} == {MINI.steps}
    assert all(abs(r.tokens / next(iter(wanted)) - 1) <= 0.01 for r in records)
    assert len({r.subset["size"] for r in records}) > 3  # rows differ, as they must


def test_the_oracle_takes_good_rows_only(finished) -> None:
    """The share of good rows in the table comes from the pool's own labels."""
    folder, result = finished
    assert result.arms.facts("oracle")["good_share"] == 1.0
    rows = [json.loads(line) for line in (folder / "parts" / "seed-1.jsonl").read_text().splitlines()]
    top = result.arms.records["top"][1]
    known = result.arms.known["top"][1]
    assert known["good_share"] == pytest.approx(np.mean([rows[i]["quality"] for i in top.subset["rows"]]))
    assert 1 <= known["tasks"] <= 8


def test_the_text_says_what_the_numbers_say(finished) -> None:
    """A verdict in words needs its p value; small sizes are marked."""
    _, result = finished
    text = " ".join(result.text().split())
    assert "TOO SMALL TO CONCLUDE" in text and "too small to conclude anything" in text
    assert "log(ppl)" in text and "leave-one-run-out" in text
    for arm, r in result.results.items():
        assert f"{r.mean:.3f}" in text
        assert (r.verdict in ("better", "worse")) == (not math.isnan(r.p_holm) and r.p_holm < 0.05), arm
    assert "Verdict" not in text and "random (" not in text and "Holm p" not in text, "too small for any verdict"
    settings, result.settings = result.settings, replace(result.settings, conclusive=True)
    text, result.settings = " ".join(result.text().split()), settings
    assert ("Rows drawn by the rule's weights beat random" in text) == (result.results["weighted"].verdict == "better")
    assert "Verdict: " in text and "Holm p" in text


def test_an_interrupted_demo_goes_on_to_the_same_numbers(finished, parts: Path, monkeypatch) -> None:
    """An hour of runs must not be lost to Ctrl-C, nor done twice, nor come out differently."""
    real, made = arms_module.finetune, []

    def counting(*args, **kwargs):
        made.append(1)
        if len(made) == MINI.runs + 3:  # after the designed runs, within the comparison
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(demo_module, "finetune", counting)
    monkeypatch.setattr(arms_module, "finetune", counting)
    with pytest.raises(KeyboardInterrupt):
        Demo(parts, MINI).run()
    before = {r.run_id for r in RunLedger(parts / "ledger").records()}
    assert len(before) == MINI.runs + 3  # two finetunes and the base
    result = Demo(parts, MINI).run()
    after = RunLedger(parts / "ledger").records()
    assert before < {r.run_id for r in after} and len(after) == MINI.runs + COMPARED
    assert result.arms.losses == finished[1].arms.losses
    made.clear()
    again = Demo(parts, MINI).run()
    assert not made and again.arms.losses == result.arms.losses


def test_other_settings_and_foreign_folders_are_refused(finished, tmp_path: Path) -> None:
    """Runs of two seeds mixed in one ledger would be called one experiment."""
    with pytest.raises(RequestError, match=r"other settings \(seed: 0 there, 7 asked for\).*another folder with --out"):
        Demo(finished[0], replace(MINI, seed=7))
    (tmp_path / "mine.txt").write_text("something of the user's")
    with pytest.raises(RequestError, match=r"not a folder of this demo.*another folder with --out"):
        Demo(tmp_path, MINI)


def test_null_permutes_indicators_jointly(finished) -> None:
    """Columns permuted apart would also break what the indicators say about one another, which is not the null."""
    table = ScoreTable.read(finished[0] / "scores.parquet")
    null = permuted(table, 5)
    names = table.indicators
    assert null.id == table.id and null.source == table.source
    before, after = table.matrix(names), null.matrix(names)
    assert not np.array_equal(before, after)
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    assert abs(np.corrcoef(before[:, 1], after[:, 1])[0, 1]) < 0.2
    np.testing.assert_array_equal(permuted(table, 5).matrix(names), after)


def test_under_the_null_no_rule_knows_the_sources(finished) -> None:
    """The sources stay with their rows, so that shares would tell of them whatever the indicators say."""
    designed = RunLedger(finished[0] / "ledger").records("designed")
    assert all(run.source_phi_means and run.subset["source_shares"] for run in designed)
    rule = fit_rule(map(without_sources, designed), "auto", permutations=0, bootstrap=0)
    methods = {row["method"] for row in rule.metrics_.candidates}
    assert "ols" in methods and not methods & {"ridge+shares", "additive+shares", "partial-pooling"}

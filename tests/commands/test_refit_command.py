"""`runs` and `refit` as a person calls them: exit statuses, what is printed, and what stands in the way."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from simulated_ledger import make_record, simulate

from im_lightning.cli import main
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.published import load_rule


@pytest.fixture()
def ledger(tmp_path) -> RunLedger:
    book = RunLedger(tmp_path / "runs")
    for record in simulate(12, repeats=2):
        book.add(record)
    return book


def test_refit_prints_the_table_and_writes_the_rule(ledger, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "rule.json"
    assert main(["refit", str(ledger.path), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    for word in ("log(ppl)", "log1p(length_output)", "knn_6", "VIF", "leave-one-run-out", "condition number"):
        assert word in printed.out
    assert max(map(len, printed.out.splitlines())) <= 80
    assert f"wrote {out}" in printed.err
    assert load_rule(out).feature_names_in_ == ["length_output", "ppl", "knn_6"]
    rule = load_rule(out)
    rule.origin = ""
    assert printed.out == rule.summary(80) + "\n"


def test_refit_takes_its_options(ledger, tmp_path, capsys):
    for record in simulate(8, seed=5, first=50, regime={"method": "full"}):
        ledger.add(record)
    out = tmp_path / "rule.json"
    assert main(["refit", str(ledger.path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "im-lightning refit: refit: the designed runs are of 2 regimes" in said
    assert not out.exists()
    options = ["--regime", "run-050", "--indicators", "ppl, knn_6", "--evaluation", "held-out"]
    assert main(["refit", str(ledger.path), "--out", str(out), *options]) == 0
    value = json.loads(out.read_text())
    assert [r["indicator"] for r in value["regressors"]] == ["ppl", "knn_6"]
    assert value["runs"] == 8
    assert main(["refit", str(ledger.path), "--out", str(out), "--force"]) == 2
    assert "or mix them (--force other-regime" in capsys.readouterr().err
    assert main(["refit", str(ledger.path), "--out", str(out), "--force", "other-regime"]) == 0
    assert json.loads(out.read_text())["runs"] == 20


def test_a_rule_in_the_ledger_does_not_disturb_the_next_refit(ledger, capsys):
    for _ in range(2):
        assert main(["refit", str(ledger.path), "--out", str(ledger.path / "rule.json")]) == 0
    assert "ledger:" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [["runs"], ["refit", "--out", "rule.json"]])
def test_empty_and_absent_ledgers(tmp_path, capsys, command):
    name, *options = command
    assert main([name, str(tmp_path / "absent"), *options]) == 2
    said = capsys.readouterr().err
    assert "there is no such ledger. Fix: check the path: `im-lightning run` keeps its runs in im-run/runs" in said
    assert not (tmp_path / "absent").exists()
    (tmp_path / "torn.json").write_text("{")
    assert main([name, str(tmp_path), *options]) == 2
    said = capsys.readouterr().err
    assert "there are no runs in this folder; unusable: torn.json. Fix: make some: `im-lightning run pool.jsonl" in said
    (tmp_path / "file").write_text("")
    assert main([name, str(tmp_path / "file"), *options]) == 2
    assert "it is a file, and a ledger is a folder" in capsys.readouterr().err


def test_refit_over_too_few_runs_says_how_many_and_how(tmp_path, capsys):
    book = RunLedger(tmp_path)
    for record in simulate(4):
        book.add(record)
    assert main(["refit", str(tmp_path), "--out", str(tmp_path / "rule.json")]) == 2
    said = capsys.readouterr().err
    assert "4 runs are too few for 3 regressors" in said
    assert "make 2 more designed runs: `im-lightning fit … --data.subset_size=300 --data.subset_seed=4`" in said


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_runs_lists_every_run_at_any_width(ledger, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    ledger.add(make_record(70, status="failed", evaluation={}))
    ledger.add(make_record(71, purpose="search", evaluation={"held-out": {"loss": 1.25}}))
    assert main(["runs", str(ledger.path)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    table = lines[: lines.index("")] if width > 40 else lines
    assert max(map(len, table)) <= width
    for record in ledger.records(status=None):
        assert record.run_id in out
    assert "1.2500" in out
    text = " ".join(out.split())
    assert "14 runs: 12 designed, 1 failed designed, 1 search" in text
    assert f"im-lightning refit {ledger.path}"[:24] in text


def test_runs_says_what_is_missing(tmp_path, capsys):
    book = RunLedger(tmp_path)
    for record in simulate(4):
        book.add(record)
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "a refit on length_output, ppl, knn_6 needs 2 more: make 2 more designed runs" in out
    assert "--data.subset_seed=4" in out


def test_runs_without_designed_ones(tmp_path, capsys):
    RunLedger(tmp_path).add(make_record(0, purpose="weighted"))
    assert main(["runs", str(tmp_path)]) == 0
    assert "a refit needs 8 more: make 8 more designed runs" in capsys.readouterr().out


def test_runs_shows_regimes_and_several_evaluation_sets(ledger, capsys):
    for record in simulate(8, seed=5, first=50, regime={"method": "full"}):
        record.evaluation["other"] = {"loss": 1.5}
        ledger.add(record)
    assert main(["runs", str(ledger.path)]) == 0
    out = capsys.readouterr().out
    assert "loss on held-out" in out and "loss on other" in out
    assert "the designed runs are of 2 regimes" in out
    assert "method = full" in out
    assert "--evaluation held-out --regime run-000" in " ".join(out.split())


@pytest.mark.parametrize("name", ["runs", "refit"])
def test_help_has_an_example(capsys, name):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"im-lightning {name} runs/" in capsys.readouterr().out


def test_refit_imports_from_wandb_first(tmp_path, capsys, monkeypatch):
    """A ledger that is nowhere but in wandb is enough for a refit; what was not a run of ours is named."""
    import wandb

    class Api:
        def runs(self, path, order, per_page):
            assert path == "me/instruct"
            told = [{"im/record": json.dumps(r.to_json()), "im/eval_loss/held-out": 1.0} for r in simulate(12)]
            return [
                SimpleNamespace(id=f"w{k}", state="finished", config={}, summary=s) for k, s in enumerate([*told, {}])
            ]

    monkeypatch.setattr(wandb, "Api", Api)
    out = tmp_path / "rule.json"
    options = ["--out", str(out), "--permutations", "0", "--bootstrap", "0"]
    assert main(["refit", str(tmp_path / "runs"), "--from-wandb", "me/instruct", *options]) == 0
    printed = capsys.readouterr()
    assert "me/instruct: 12 runs imported, 0 known already" in printed.err
    assert "not imported: w12 (w12)" in printed.err
    assert load_rule(out).n_runs_ == 12 == len(RunLedger(tmp_path / "runs").records())
    assert main(["refit", str(tmp_path / "runs"), "--from-wandb", "instruct", *options]) == 2
    assert "--from-wandb instruct: it is not a project" in capsys.readouterr().err


def test_refit_shows_each_indicator_alone(ledger, tmp_path, capsys):
    out = tmp_path / "rule.json"
    assert main(["refit", str(ledger.path), "--out", str(out), "--method", "ols"]) == 0
    printed = capsys.readouterr().out
    assert "Spearman" in printed and "p (Holm)" in printed
    rows = load_rule(out).metrics_.univariate
    assert [r["indicator"] for r in rows] == ["length_output", "ppl", "knn_6"] and rows[0]["subsets"] == 10
    assert f"{rows[1]['pearson']:.2f}" in printed
    assert len(load_rule(out).metrics_.correlations["pearson"]) == 3


def test_refit_tests_the_whole_choice_unless_told_otherwise(ledger, tmp_path, capsys):
    out = tmp_path / "rule.json"
    assert main(["refit", str(ledger.path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Verdict: better than the mean" in printed and "best-subset" in printed
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["beats_mean"] is True and metrics["permutation"]["permutations"] == 999
    assert any(note.startswith("the additive rule was not considered") for note in metrics["notes"])
    options = ["--method", "ridge", "--permutations", "0", "--bootstrap", "0", "--signs", "ppl=-, knn_6=-"]
    assert main(["refit", str(ledger.path), "--out", str(out), *options]) == 0
    assert "NOT TESTED" in " ".join(capsys.readouterr().out.split())
    value = json.loads(out.read_text())
    assert value["method"] == "ridge" and value["metrics"]["beats_mean"] is None
    assert next(r["coefficient"] for r in value["regressors"] if r["indicator"] == "ppl") <= 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--signs", "ppl"], "--signs: 'ppl' is not an indicator with its sign"),
        (["--signs", "mtld=+"], "signs: mtld is not among the regressors"),
        (["--permutations", "-1"], "--permutations -1: it is negative"),
        (["--method", "lasso"], "method 'lasso': this version does not have it"),
        (["--method", "additive"], "recorded no basis means of length_output, ppl, knn_6"),
    ],
)
def test_wrong_options_of_refit_say_what_to_do(ledger, tmp_path, capsys, options, says):
    assert main(["refit", str(ledger.path), "--out", str(tmp_path / "rule.json"), *options]) == 2
    said = capsys.readouterr().err
    assert says in said and "Fix" in said


def test_runs_says_whether_the_runs_can_tell_subsets_apart(tmp_path, capsys):
    """At 2e-4 three very different subsets differed by no more than repeats: sixty runs would have been for nothing."""
    rng = np.random.default_rng(0)

    def losses(between: float, within: float, repeats: int, runs: int = 8) -> str:
        folder = tmp_path / f"{between}-{within}-{repeats}"
        values = {}
        for k in range(runs):
            subset = k - (runs - repeats) if k >= runs - repeats else k
            shift = values.setdefault(subset, between * rng.standard_normal())
            RunLedger(folder).add(
                make_record(k, loss=float(np.exp(0.9 + shift + within * rng.standard_normal())), subset=subset)
            )
        assert main(["runs", str(folder)]) == 0
        return " ".join(capsys.readouterr().out.split())

    blind = losses(0.0001, 0.02, 10, 30)
    assert (
        "differ by sd" in blind and "(10 degrees of freedom): these runs cannot tell subsets apart: raise the" in blind
    )
    seeing = losses(0.05, 0.001, 2)
    assert "different subsets differ by sd 0.0" in seeing and "cannot tell" not in seeing
    assert "not enough repeats" not in seeing and "not enough repeats" in losses(0.02, 0.01, 1)
    assert "no subset was repeated" in losses(0.05, 0.001, 0) and "cannot tell" in losses(0.0016, 0.0001, 0)
    for k in range(5):
        RunLedger(tmp_path / "few").add(make_record(k))
    assert main(["runs", str(tmp_path / "few")]) == 0 and "differ by sd" not in capsys.readouterr().out


@pytest.mark.parametrize(("method", "runs", "repeats"), [("offset", 6, 0), ("offset-robust", 6, 0), ("ols", 8, 4)])
def test_a_fit_that_cannot_be_held_out_is_not_tested(method, runs, repeats, tmp_path, capsys):
    """The other folds do not determine it: it is no better and no worse than the mean, and ends nothing."""
    book, out = RunLedger(tmp_path / "runs"), tmp_path / "rule.json"
    for record in simulate(runs, repeats=repeats):
        book.add(record)
    assert main(["refit", str(book.path), "--method", method, "--bootstrap", "0", "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "was NOT TESTED (held-out R² not estimable); im-lightning refit tests it by permutations, where" in said
    assert "Not tested against the mean: the held-out R² cannot be estimated, since the other folds do not" in said
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["permutation"] is None and metrics["beats_mean"] is None


def test_rules_on_several_sets_are_files_of_their_own(ledger, tmp_path, capsys):
    """Sets are called as their files are, in any script: one rule must not replace the other."""
    for record in ledger.records():
        loss = record.evaluation["held-out"]
        record.evaluation = {"评测": loss, "考试": loss, "a b": loss, "a-b": loss}
        ledger.add(record, replace=True)
    words = ["refit", str(ledger.path), "--out", str(tmp_path / "rule.json"), "--method=ols", "--permutations=0"]
    assert main([*words, "--bootstrap=0", "--target", "评测,考试"]) == 0
    assert {path.name for path in tmp_path.glob("rule*")} == {"rule-评测.json", "rule-考试.json"}
    assert main([*words, "--bootstrap=0", "--target", "a b,a-b"]) == 2
    assert "--target a b,a-b: two of its rules would be written to" in capsys.readouterr().err

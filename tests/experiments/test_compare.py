"""`im-lightning compare` on the miniature playground: real finetunes, refusals, and a resume that repeats none."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flat_run import flat
from mini_demo import ols_rule

from im_lightning.cli import main
from im_lightning.commands import compare
from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding, Reading
from im_lightning.data.tokenization import encode_examples
from im_lightning.errors import DataError, InstructMiningError, RequestError
from im_lightning.experiments.compare import arms as arms_module
from im_lightning.experiments.compare.arms import ArmRunner, ArmsSettings, Cell
from im_lightning.experiments.compare.equal_tokens import candidate_rows, settle_pool_draw
from im_lightning.experiments.compare.result import ArmRuns, ComparisonResult
from im_lightning.experiments.compare.run import runs_behind
from im_lightning.experiments.compare.statistics import ExampleSums
from im_lightning.experiments.finetuning import Study, TuningSettings
from im_lightning.ledger.ledger import RunLedger
from im_lightning.models.cost import Cost, base_parameters, cost_path, note_cost, read_cost
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.weights.quality_weights import Weighting
from im_lightning.scoring.report import Step
from im_lightning.training.run.encoded_pool import coding_of

ARMS = "base,random,weighted,full"
run = flat(compare.run)


def request(finished: Any, out: Path, **changes: Any) -> dict[str, Any]:
    folder = finished[0]
    return {
        "data": [str(folder / "pool.jsonl")], "eval_data": str(folder / "evaluation" / "report.jsonl"),
        "model": str(folder / "base"), "scores": str(folder / "scores.parquet"), "rule": ols_rule(folder),
        "tokens": 200, "steps": 4, "seeds": 2, "arms": ARMS, "device": "cpu", "learning_rate": 1e-3,
        "cache_dir": str(folder / "work" / "cache"), "out": str(out), "force": True, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def compared(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison with the rule's bootstrap and exact matches; look, do not write."""
    out = tmp_path_factory.mktemp("compare") / "out"
    assert run(**request(finished, out, ledger=str(finished[0] / "ledger"), exact_match=True)) == 0
    return out


def test_every_arm_is_there_at_equal_tokens(compared: Path) -> None:
    """The table is what a user decides by: arms, intervals, tokens, cost, in the file and in the text."""
    value = json.loads((compared / "compare.json").read_text())
    arms = {arm["arm"]: arm for arm in value["arms"]}
    assert list(arms) == ["base", "random", "weighted", "full"] and value["seeds"] == 2
    for name in ("random", "weighted"):
        assert abs(arms[name]["tokens"] - 200) <= 2 and arms[name]["steps"] == 4 and arms[name]["seconds"] > 0
        assert 0 <= arms[name]["exact_match"] <= 1
    assert arms["base"]["tokens"] == 0 and arms["full"]["tokens"] > 500 and not arms["full"]["tested"]
    assert arms["weighted"]["tested"] and arms["weighted"]["difference_half_width"] > 0
    text = (compared / "compare.txt").read_text()
    assert value["rendered"] + "\n" == text
    for words in ("full finetuning", "two-way", "Holm", "rule's weights", "full pool *", "base model", "train s"):
        assert words in " ".join(text.split())
    assert value["rule"]["bootstrap"] and "13 designed runs behind the rule" in " ".join(text.split())


def test_runs_are_of_purpose_compare(compared: Path) -> None:
    """A comparison's arms in a refit would teach the rule its own choices."""
    ledger = RunLedger(compared / "ledger")
    assert {r.purpose for r in ledger.records()} == {"compare"} and len(ledger.records()) == 2 * 3 + 1


def test_a_seed_varies_the_pool_and_the_training_and_intervals_the_rule(compared: Path) -> None:
    """Seeds that differ in the training alone make intervals that leave out most of what is uncertain."""
    value = json.loads((compared / "compare.json").read_text())
    assert value["rule"]["spread"] == {}  # of 13 runs no resample determines a fit of five indicators
    assert "too few resamples of its subsets determine a fit" in " ".join(value["rendered"].split())
    records = [r for r in RunLedger(compared / "ledger").records() if r.subset["arm"] == "full"]
    rows = [set(r.subset["rows"]) for r in records]
    assert rows[0] != rows[1] and {r.seeds["training"] for r in records} == {0, 1}


def test_samples_are_kept(compared: Path) -> None:
    """A loss hides what the model says; the samples show it."""
    lines = [json.loads(line) for line in (compared / "samples.jsonl").read_text().splitlines()]
    assert {line["arm"] for line in lines} == {"base", "random", "weighted", "full"}
    assert all({"prompt", "reference", "answer", "match", "run_id", "id"} <= line.keys() for line in lines)


def test_finished_runs_are_not_repeated(finished, compared: Path, tmp_path: Path, monkeypatch) -> None:
    """A night of finetunes must survive Ctrl-C, and another arm must not cost the first ones again."""
    out = tmp_path / "copy"
    shutil.copytree(compared, out)
    made: list[str] = []
    real = arms_module.finetune

    def counting(data, *args, **kwargs):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(data.arm.method)
        return real(data, *args, **kwargs)

    monkeypatch.setattr(arms_module, "finetune", counting)
    again = request(finished, out, ledger=str(finished[0] / "ledger"), exact_match=True)
    before = (out / "compare.json").read_text()
    run(**again)
    assert not made and json.loads((out / "compare.json").read_text())["arms"] == json.loads(before)["arms"]
    with pytest.raises(KeyboardInterrupt):
        run(**{**again, "arms": f"{ARMS},longest"})
    assert made == ["longest"]
    made.clear()
    monkeypatch.setattr(arms_module, "finetune", real)
    run(**{**again, "arms": f"{ARMS},longest"})
    arms = {arm["arm"]: arm for arm in json.loads((out / "compare.json").read_text())["arms"]}
    assert set(arms) == {*ARMS.split(","), "longest"}
    assert len(RunLedger(out / "ledger").records()) == 2 * 4 + 1


@pytest.mark.parametrize(
    ("there", "overwrite"), [("{}", True), ("[", True), ("", False), ("old", True), ("old", False)]
)
def test_only_a_result_that_stays_decides_how_candidates_are_drawn(
    finished, compared: Path, tmp_path: Path, there: str, overwrite: bool
) -> None:
    """--overwrite replaces whatever lies there, a file of something else too, and takes nothing over from it."""
    out = tmp_path / "copy"
    shutil.copytree(compared, out)
    value = json.loads((out / "compare.json").read_text())
    draw = value["settings"]["pool_draw"]
    assert draw in ("folds", "same")
    value["settings"]["pool_draw"] = "bootstrap"  # as an earlier version began it
    (out / "compare.json").write_text(json.dumps(value) if there == "old" else there)
    if there != "old":
        (out / "compare.txt").unlink()
    asked = request(finished, out, arms="base,random", ledger=str(finished[0] / "ledger"), exact_match=True)
    assert run(**asked, overwrite=overwrite) == 0
    now = json.loads((out / "compare.json").read_text())["settings"]["pool_draw"]
    assert now == ("bootstrap" if there == "old" and not overwrite else draw)


def test_further_seeds_of_folds_are_said_to_begin_anew(
    finished, compared: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The help promised that seeds are added: a night of finetunes was made again without a word."""
    out = tmp_path / "copy"
    shutil.copytree(compared, out)

    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(arms_module, "finetune", stops)
    asked = request(finished, out, ledger=str(finished[0] / "ledger"), exact_match=True, pool_draw="folds")
    with pytest.raises(KeyboardInterrupt):
        run(**{**asked, "seeds": 3})
    said = capsys.readouterr().err
    assert "2 seeds in the result that is there, 3 asked for: folds of another number have other rows" in said
    assert "(--pool-draw same adds seeds)" in said
    with contextlib.suppress(KeyboardInterrupt):
        run(**asked)
    assert "seeds in the result that is there" not in capsys.readouterr().err


def test_a_curve_is_added_to_a_finished_comparison(finished, compared: Path, tmp_path: Path, monkeypatch) -> None:
    """What an arm is worth in random tokens costs the runs on the curve and no other; where candidates do not hold
    the tokens of a point the curve is shorter, and says so."""
    out, made = tmp_path / "copy", list[tuple[str, int]]()
    shutil.copytree(compared, out)
    real = arms_module.finetune

    def noting(data, *args, **kwargs):
        made.append((data.arm.method, data.arm.supervised_tokens))
        return real(data, *args, **kwargs)

    monkeypatch.setattr(arms_module, "finetune", noting)
    scores = shutil.copy(finished[0] / "scores.parquet", tmp_path)
    note_cost(scores, [Step("ppl", 3.0, 100, flops=1e9)])
    ledger = str(finished[0] / "ledger")
    again = request(finished, out, ledger=ledger, exact_match=True, curve=True, scores=str(scores))
    run(**again)
    value = json.loads((out / "compare.json").read_text())
    held = next(a for a in value["arms"] if a["arm"] == "full")["tokens"]
    scales = [s for s in (0.5, 1, 2, 4) if s * 200 <= held]
    assert sorted(made) == sorted(("random", round(200 * s)) for s in scales if s != 1 for _ in range(2))
    points, arms = value["curve"]["points"], {a["arm"]: a for a in value["arms"]}
    assert [p["scale"] for p in points] == pytest.approx(scales, rel=0.02)
    assert [p["steps"] for p in points] == [4 * s for s in scales]
    assert list(points[1]["losses"]) == pytest.approx(arms["random"]["losses"])
    assert "multiplier" in arms["weighted"] and all("multiplier" not in arms[a] for a in ("base", "random", "full"))
    m, net, evidence = arms["weighted"]["multiplier"], arms["weighted"]["net"], value["costs"]["weighted"]["evidence"]
    assert m["least"] == pytest.approx(0.5, rel=0.02) and m["low"] <= m["value"] <= m["high"]
    runs = RunLedger(finished[0] / "ledger").records("designed")
    one, other = (value["costs"][arm]["finetune"]["seconds"] for arm in ("weighted", "random"))
    spent = value["scoring_seconds"] + sum(r.seconds for r in runs) + one
    assert net["seconds"]["value"] == pytest.approx(m["value"] * other / spent)
    assert evidence["seconds"] == pytest.approx(spent - one)
    text = " ".join(value["rendered"].split())
    assert "Random rows by their tokens: 0.5×" in text and "forward 1, backward 2 per token and parameter" in text
    if 4 not in scales:
        assert "LEFT OUT of the curve: random at" in text
    made.clear()
    run(**again)
    assert not made and json.loads((out / "compare.json").read_text())["curve"] == value["curve"]
    run(**{**again, "curve": False})
    assert "curve" not in json.loads((out / "compare.json").read_text())


def test_a_point_of_the_curve_is_the_arm_random_at_so_many_tokens(finished, tmp_path: Path, monkeypatch) -> None:
    """So a comparison at more tokens, all else equal, finds its random rows made; fewer seeds are the first ones."""
    made, real = list[str](), arms_module.finetune

    def noting(data, *args, **kwargs):
        made.append(data.arm.method)
        return real(data, *args, **kwargs)

    monkeypatch.setattr(arms_module, "finetune", noting)
    about = {"arms": "random,weighted", "ledger": str(finished[0] / "ledger"), "pool_draw": "same"}
    run(**request(finished, tmp_path / "out", **about, curve=True))
    assert made.count("weighted") == 2 and made.count("random") >= 4
    made.clear()
    shutil.copytree(tmp_path / "out" / "ledger", tmp_path / "longer" / "ledger")
    run(**request(finished, tmp_path / "longer", **about, tokens=400, steps=8, seeds=1))
    assert made == ["weighted"]


def test_every_run_says_what_it_computed(compared: Path, finished) -> None:
    """Cost is reckoned from the records alone: tokens with their prompts, and one pass over the evaluation set."""
    folder = finished[0]
    rows, coding = load_examples(str(folder / "pool.jsonl")), coding_of(Encoding(model=str(folder / "base")))
    held = load_examples(str(folder / "evaluation" / "report.jsonl"))

    def tokens(examples: Any) -> int:
        return sum(len(one.input_ids) for one in encode_examples(examples, coding.tokenizer, coding.template, 1024))

    parameters = base_parameters(folder / "base")
    for r in RunLedger(compared / "ledger").records():
        trained = tokens([rows[at] for at in r.subset["rows"]])
        assert r.compute == {"parameters": parameters, "tokens_trained": trained, "tokens_evaluated": tokens(held)}
        assert r.cost.flops == 2 * parameters * (3 * trained + tokens(held)) and r.cost.seconds == r.seconds


def test_a_renamed_evaluation_set_is_measured_anew(finished, compared: Path, tmp_path: Path) -> None:
    """Runs keep their losses under the set's name: under another one there is nothing to take over."""
    out, renamed = tmp_path / "copy", tmp_path / "renamed.jsonl"
    shutil.copytree(compared, out)
    shutil.copy(finished[0] / "evaluation" / "report.jsonl", renamed)
    run(**request(finished, out, eval_data=str(renamed), arms="base,random"))
    value = json.loads((out / "compare.json").read_text())
    assert value["evaluation"]["name"] == "renamed"
    before = {arm["arm"]: arm["mean"] for arm in json.loads((compared / "compare.json").read_text())["arms"]}
    assert {arm["arm"]: arm["mean"] for arm in value["arms"]} == {
        k: pytest.approx(before[k]) for k in ("base", "random")
    }


def test_an_evaluation_set_of_the_fit_is_refused(finished, tmp_path: Path, capsys) -> None:
    """The rule's own evaluation set flatters it: the paper's weakness, not to be repeated by accident."""
    fit = finished[0] / "evaluation" / "fit.jsonl"
    with pytest.raises(
        RequestError, match=r"was fitted on this very set \(fit\).*or pass --force weak-rule,seen-evaluation"
    ):
        run(**request(finished, tmp_path / "a", eval_data=str(fit)))
    part = tmp_path / "part.jsonl"
    part.write_text("".join(fit.read_text().splitlines(keepends=True)[:10]))
    with pytest.raises(RequestError, match=r"10 of its 10 rows are in the set that .* was fitted on"):
        run(**request(finished, tmp_path / "b", eval_data=str(part), ledger=str(finished[0] / "ledger")))
    run(
        **request(
            finished, tmp_path / "c", eval_data=str(fit), force="weak-rule,seen-evaluation", arms="random", seeds=1
        )
    )
    assert "FORCED" in capsys.readouterr().out
    assert "NO EVIDENCE FOR THE RULE" in (tmp_path / "c" / "compare.txt").read_text().replace("\n", " ")


def test_an_arm_of_fewer_rows_than_steps_is_found_before_anything_is_trained(finished, tmp_path: Path) -> None:
    """It was refused after the finetunes of the arms before it; other steps then made all of them worthless."""
    lengths = np.sort(ScoreTable.read(finished[0] / "scores.parquet").values["length_output"])[::-1] + 1
    few = int(np.searchsorted(np.cumsum(lengths), 200)) + 1  # so many of the longest rows hold 200 tokens
    asked = request(finished, tmp_path, rule=None, steps=few + 2, seeds=1, pool_draw="same")
    with pytest.raises(RequestError, match=rf"--arms: longest has \d+ rows for {few + 2} batches, .*lower --steps"):
        run(**{**asked, "arms": "base,random,longest"})
    assert not RunLedger(tmp_path / "ledger").records(status=None)
    with pytest.raises(RequestError, match=r"--arms: random has \d+ rows for 9,999 batches"):
        run(**{**asked, "arms": "base,random", "steps": 9999})


def test_an_arm_whose_rows_hold_too_few_tokens_is_found_before_anything_is_trained(
    finished, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Few rows may have an IFD below 1: the arm ended the comparison after the finetunes of the arms before it."""
    table = ScoreTable.read(finished[0] / "scores.parquet")
    few = np.cumsum(table.values["length_output"] + 1) <= 100
    scores = tmp_path / "scores.parquet"
    table.with_values("ifd", np.where(few, 0.5, 2.0)).write(scores)
    asked = request(finished, tmp_path / "out", rule=None, scores=str(scores), seeds=1, pool_draw="same")
    reason = r"ifd has rows of \d+ supervised tokens, and every arm needs 200"
    with pytest.raises(RequestError, match=rf"--arms: {reason}\. Fix: .*change --tokens, or leave these arms out"):
        run(**{**asked, "arms": "base,random,ifd"})
    assert not RunLedger(tmp_path / "out" / "ledger").records(status=None)

    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(arms_module, "finetune", stops)
    with pytest.raises(KeyboardInterrupt):
        run(**{**asked, "arms": None})
    assert re.search(rf"LEFT OUT: {reason}\n", capsys.readouterr().err)


def test_rows_that_the_rule_cannot_predict_are_counted_in_no_arm(finished, tmp_path: Path) -> None:
    """A point of the curve was tried that the rows of known sources do not hold, after the finetunes of all arms."""
    folder = finished[0]
    table, rule = ScoreTable.read(folder / "scores.parquet"), LinearRule.load(ols_rule(folder))
    other, *rule.sources_ = sorted(set(table.source))  # no run of it had rows of the first
    rule.save(tmp_path / "rule.json")
    study = Study([str(folder / "pool.jsonl")], str(folder / "scores.parquet"), str(tmp_path / "rule.json"))
    settings = ArmsSettings(
        study, Encoding(str(folder / "base"), cache_dir=str(folder / "work" / "cache")), Reading(), TuningSettings(),
        eval_data=str(folder / "evaluation" / "report.jsonl"), tokens=200, steps=4,
    )  # fmt: skip
    runner, of_other = ArmRunner(settings, RunLedger(tmp_path / "ledger"), tmp_path / "work"), np.array(table.source)
    tokens = runner.tokens(Cell("random", 0, study.data, study.rule), table)
    assert not tokens[of_other == other].any() and tokens[of_other != other].any()


def test_what_no_arm_needs_is_not_missed(finished, tmp_path: Path, capsys) -> None:
    """Where the rule decides no arm, further designed runs would change nothing; and a mixture that none draws by."""
    asked = request(finished, tmp_path, arms="random,longest", seeds=1, ledger=str(finished[0] / "ledger"))
    assert run(**asked) == 0
    assert "too few resamples" not in " ".join(capsys.readouterr().out.split())
    mix = tmp_path / "mix.json"
    mix.write_text('{"a": 1.0}')
    with pytest.raises(RequestError, match=r"--mixture .*mix\.json: no arm draws by it.*add mix or mix\+rule"):
        run(**{**asked, "mixture": str(mix), "out": str(tmp_path / "other")})


def test_a_pool_that_was_scored_in_quarantine_can_be_compared(finished, tmp_path: Path, capsys) -> None:
    """One bad row of fifty thousand, set aside when the pool was scored, must not end the loop here."""
    pool = tmp_path / "pool.jsonl"
    first, *rest = (finished[0] / "pool.jsonl").read_text().splitlines(keepends=True)
    pool.write_text(first + '{"instruction": "Say nothing."}\n' + "".join(rest))
    asked = request(finished, tmp_path / "out", data=[str(pool)], arms="random,longest", seeds=1, rule=None)
    with pytest.raises(DataError, match=r"pool\.jsonl:2: no response.*--on-bad-row quarantine"):
        run(**asked)
    assert run(**asked, on_bad_row="quarantine") == 0
    assert "1 bad row set aside" in capsys.readouterr().err
    assert {arm["arm"] for arm in json.loads((tmp_path / "out" / "compare.json").read_text())["arms"]} == {
        "random", "longest",
    }  # fmt: skip


def test_a_forced_rule_is_named_in_the_result(finished, tmp_path: Path) -> None:
    """A warning at the start is gone when the table is read a day later: what was forced stands below it."""
    rule = LinearRule.load(ols_rule(finished[0]))
    rule.metrics_ = replace(rule.metrics_, beats_mean=False)
    rule.regime = {**rule.regime, "base_model": "weights of another base"}
    rule.save(tmp_path / "rule.json")
    asked = request(finished, tmp_path / "out", rule=str(tmp_path / "rule.json"), arms="random,weighted", seeds=1)
    with pytest.raises(RequestError, match="no better than the mean"):
        run(**{**asked, "force": False})
    with pytest.warns(UserWarning, match="forced: its own runs find it no better than the mean"):
        run(**{**asked, "force": "weak-rule,other-base"})
    with pytest.raises(RequestError, match="pass --force weak-rule,other-base"):
        run(**{**asked, "out": str(tmp_path / "bare")})
    text = " ".join((tmp_path / "out" / "compare.txt").read_text().split())
    assert "rule.json: its own runs find it no better than the mean" in text
    assert (
        text.count("FORCED (weak-rule): ") == text.count("FORCED (other-base): ") == 1
        and "weights of another base" in text
    )


def test_one_seed_says_nothing_of_differences(finished, tmp_path: Path, capsys) -> None:
    """A single run per arm has no interval: the text must not name a winner."""
    run(**request(finished, tmp_path, arms="random,longest", seeds=1, lora_rank=2))
    text = " ".join(capsys.readouterr().out.split())
    assert "One seed has no interval" in text and "better than random" not in text
    assert "Finetuned with LoRA, under which the paper saw no difference" in text
    assert "The rule is the same for all seeds" in text and "was not noted" in text


def test_arms_that_cannot_be_are_said(finished, tmp_path: Path, capsys) -> None:
    """An arm that silently is not there looks like one that was beaten."""
    with pytest.raises(RequestError, match=r"--arms: ifd needs the column ifd in the.*score what is missing"):
        run(**request(finished, tmp_path, arms="random,ifd"))
    with pytest.raises(RequestError, match=r"there is no best.*use some of weighted, by-source, top"):
        run(**request(finished, tmp_path, arms="best"))
    with pytest.raises(RequestError, match=r"weighted needs a rule \(--rule\)"):
        run(**request(finished, tmp_path, arms="weighted", rule=None))
    with pytest.raises(RequestError, match=r"diverse needs embeddings"):
        run(**request(finished, tmp_path, arms="diverse", cache_dir=str(tmp_path / "empty")))
    with pytest.raises(RequestError, match=r"--seeds: it is 0"):
        run(**request(finished, tmp_path, seeds=0))
    with pytest.raises(RequestError, match=r"--seed: it is -1. Fix: give one from 0"):
        run(**request(finished, tmp_path, seed=-1))
    for name in ("tokens", "steps", "eval_batch_tokens", "epochs", "accumulate"):
        with pytest.raises(RequestError, match=rf"--{name.replace('_', '-')}: it is 0\. Fix: give 1 or more"):
            run(**request(finished, tmp_path, **{name: 0}))
    with pytest.raises(RequestError, match=r"--ledger: there is no rule to refit"):
        run(**request(finished, tmp_path, arms="random", rule=None, ledger="runs"))
    with pytest.raises(RequestError, match=r"there is no such score table.*im-lightning score"):
        run(**request(finished, tmp_path, scores=str(tmp_path / "no.parquet")))
    with pytest.raises(RequestError, match=r"candidate rows hold \d+ supervised tokens, and every arm needs 99999"):
        run(**request(finished, tmp_path, arms="random", tokens=99_999))
    with pytest.raises(RequestError, match=r"pool_draw: there is no 'half'"):
        run(**request(finished, tmp_path, arms="random", pool_draw="half"))
    capsys.readouterr()


def test_a_fit_that_diverges_says_what_to_change(finished, tmp_path: Path) -> None:
    """Repeating the command would repeat the divergence, hours of it."""
    asked = request(finished, tmp_path, arms="random", seeds=1, learning_rate=1e18)
    with pytest.raises(InstructMiningError, match=r"loss is not finite\).*lower the learning rate \(--learning-rate\)"):
        run(**asked)


def test_rows_without_a_score_are_counted(finished, tmp_path: Path, capsys) -> None:
    """A column that few rows have leaves few rows to every arm: a user must see which and how many."""
    table = ScoreTable.read(finished[0] / "scores.parquet")
    had = int(np.isfinite(table.matrix(table.indicators)).all(axis=1).sum())
    name = table.indicators[0]
    table.values[name][:40] = np.nan
    table.write(tmp_path / "scores.parquet")
    whole = int(np.isfinite(table.matrix(table.indicators)).all(axis=1).sum())
    assert whole < had
    scores = str(tmp_path / "scores.parquet")
    run(**request(finished, tmp_path / "out", scores=scores, rule=None, arms="random", seeds=1))
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"In no arm: {len(table) - whole:,} of {len(table):,} rows, which lack a score ({name} of " in text
        and "): rows " in text
    )


def test_a_ledger_of_other_runs_is_refused(finished, tmp_path: Path) -> None:
    """Refits on other runs would be the uncertainty of another rule."""
    source, other = RunLedger(finished[0] / "ledger"), RunLedger(tmp_path / "other")
    for record in source.records("designed")[:-1]:
        other.add(record)
    with pytest.raises(RequestError, match=r"its runs are not those that .* was fitted on.*im-lightning refit"):
        run(**request(finished, tmp_path / "out", ledger=str(other.path)))
    rule = LinearRule.load(ols_rule(finished[0]))
    assert len(runs_behind(rule, source)) == rule.n_runs_


def test_candidates_are_drawn_as_said() -> None:
    """Folds share no row; where they would be too small all seeds have the same, and the text says so."""
    folds = [candidate_rows("folds", 103, k, 4, 0) for k in range(4)]
    assert sorted(row for fold in folds for row in fold or []) == list(range(103))
    assert candidate_rows("same", 10, 0, 4, 0) is None
    assert settle_pool_draw("auto", 2000, 200, 5) == "folds" and settle_pool_draw("auto", 1999, 200, 5) == "same"
    assert settle_pool_draw("auto", float("nan"), 200, 5) == "same"
    with pytest.raises(
        RequestError, match=r"a rule of noise alone came out significant.*Fix: use folds: fewer --seeds"
    ):
        settle_pool_draw("bootstrap", 4000, 200, 5)


def test_words_follow_the_intervals(tmp_path: Path, monkeypatch) -> None:
    """A verdict in words only where the interval excludes zero; a rule whose worst rows are no worse is named."""
    from simulated_ledger import make_record

    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 30, 200)
    shifts = {"random": 0.0, "weighted": -0.1, "top": 0.002, "worst": 0.001, "longest": 0.1}
    noise = rng.normal(2.5, 0.2, (5, 200))
    sums = {a: (noise + d + rng.normal(0, 0.02, (5, 200))) * tokens for a, d in shifts.items()}
    runs = ArmRuns("held-out")
    for arm, values in sums.items():
        for k, row in enumerate(values):
            loss = float(row.sum() / tokens.sum())
            runs.add(arm, make_record(number=10 * len(runs.records) + k, loss=loss, purpose="compare"))
    monkeypatch.setattr(ArmRuns, "example_sums", lambda self, ledger: ExampleSums(sums, tokens))
    result = ComparisonResult(runs, RunLedger(tmp_path))
    text = " ".join(result.sentences())
    assert "Rule's weights: better than random (-0.1" in text and "Longest: worse than random (+0.1" in text
    assert "No difference from random is shown for: rule's top rows; rule's worst rows." in text
    assert "its sign is not confirmed" in text
    assert result.differences_shown == ["weighted", "longest"]
    table = result.table(200)
    assert "better" in table and "n.s." in table


def test_a_weighting_decides_the_runs_that_draw_by_it_and_no_others(finished, tmp_path: Path) -> None:
    """A floor that the key left out would show the finetunes of another one; a key that names it in every arm, or where
    it is as before, would throw away finetunes that are right."""
    folder = finished[0]
    study = Study([str(folder / "pool.jsonl")], str(folder / "scores.parquet"), ols_rule(folder))

    def keys(**asked: Any) -> dict[str, str]:
        weights = Weighting(**asked)
        encoding = Encoding(str(folder / "base"), cache_dir=str(folder / "work" / "cache"))
        settings = ArmsSettings(
            study, encoding, Reading(), TuningSettings(),
            eval_data=str(folder / "evaluation" / "report.jsonl"), tokens=200, steps=4, weights=weights,
        )  # fmt: skip
        runner = ArmRunner(settings, RunLedger(tmp_path / "ledger"), tmp_path / "work")
        assert ("floor" in runner.inputs(study.data, study.rule)) == ("floor" in asked)
        return {arm: runner.key(Cell(arm, 0, study.data, study.rule)) for arm in ("random", "weighted", "top")}

    usual = keys()
    assert keys(temperature=1.0) == usual, "as by default"
    for asked in ({"floor": 0.5}, {"temperature": 0.5}, {"strength": 0.5}, {"weighting": "rank"}):
        other = keys(**asked)
        assert {arm for arm in usual if other[arm] != usual[arm]} == {"weighted"}, asked


def test_the_command_line_reads_it(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "--lora-rank" in text and "im-lightning compare pool.jsonl" in text
    assert "further seeds are added with --pool-draw same alone" in " ".join(text.split())


def test_the_cost_of_scoring_another_pool_under_the_same_name_is_its_own(tmp_path: Path) -> None:
    """Scores of 1,000 rows told what 100,000 had cost, and `plan` counted a hundred times as much for a row."""
    table = tmp_path / "scores.parquet"
    cost_path(table).write_text(json.dumps({"seconds": {"ppl": 2.0}, "flops": {"ppl": 8.0}}))  # of an earlier version
    note_cost(table, [Step("ppl", 1.0, 5, flops=2.0)], "a" * 32)
    assert read_cost(table) == Cost(10.0, 3.0)
    for steps in ([Step("ppl", 0.5, 5, flops=1.0)], []):
        note_cost(table, steps, "b" * 32)
        assert read_cost(table) == Cost(1.0, 0.5)


def test_the_cost_of_scoring_is_noted_and_added_up(tmp_path: Path) -> None:
    """Scoring interrupted and resumed costs the sum of both calls; one that found everything costs nothing more."""
    table = tmp_path / "scores.parquet"
    assert read_cost(table) is None
    note_cost(table, [Step("ppl", 2.0, 10, flops=8e6), Step("knn_6", 1.0, 0)])
    note_cost(table, [])
    note_cost(table, [Step("ppl", 0.5, 3, flops=2e6)])
    assert read_cost(table) == Cost(1e7, 3.5)
    note_cost(table, [Step("reward", 1.0, 5, flops=math.nan)])
    found = read_cost(table)
    assert found is not None and math.isnan(found.flops) and found.seconds == 4.5
    cost_path(table).write_text(json.dumps({"seconds": {"ppl": 2.0}}))  # as earlier versions wrote it
    found = read_cost(table)
    assert found is not None and math.isnan(found.flops) and found.seconds == 2.0
    cost_path(table).write_text("torn")
    assert read_cost(table) is None


def test_score_notes_what_it_cost(finished, tmp_path: Path, capsys) -> None:
    """The table of a comparison says what scoring cost; that must come from the scoring itself."""
    out = tmp_path / "scores.parquet"
    assert (
        main(["score", str(finished[0] / "evaluation" / "fit.jsonl"), "--indicators", "mtld", "--out", str(out)]) == 0
    )
    cost = read_cost(out)
    assert cost is not None and cost.seconds > 0 and cost.flops == 0  # no model was read
    capsys.readouterr()


def test_the_playground_pool_holds_what_the_tests_assume(finished) -> None:
    folder = finished[0]
    table = ScoreTable.read(folder / "scores.parquet")
    assert "ifd" not in table.values and len(load_examples(str(folder / "pool.jsonl"))) == len(table)

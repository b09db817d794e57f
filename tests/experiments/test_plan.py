"""A plan says "train on everything" where that is the answer, what it cannot know, and numbers that add up by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_tiny_llama

from im_lightning.cli import main
from im_lightning.data.score_table import ScoreTable
from im_lightning.experiments.compare.curve import Multiplier
from im_lightning.experiments.plan import Plan, PlanSettings, workload, worth_of
from im_lightning.experiments.ways import FULL, MERGED_RUNS, PER_ROW, SHORT, SMALL, WAYS, Way, Workload, way_of
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord, now
from im_lightning.models.cost import Cost, base_parameters, note_cost
from im_lightning.scoring.report import Step

ROW = Cost(6e9, 0.3)
"""Of a row trained on: a third of it to read it."""


def work(rows: int = 10_000, runs: int = 60, **changes: Any) -> Workload:
    parts: dict[str, Any] = {
        "trained": ROW,
        "read": ROW * (1 / 3),
        "run": ROW * 300,
        "evaluated": ROW * 40,
        "scored": ROW * 0.1,
    }
    return Workload(rows=rows, runs=runs, **{**parts, **changes})


def plan(worth: Multiplier | None, rows: int = 10_000, hours: float | None = None, **changes: Any) -> Plan:
    curve = [{"scale": s, "fitted": 2.0 - 0.1 * math.log2(s)} for s in (0.5, 1, 2, 4)]
    return Plan(PlanSettings(rows, budget_hours=hours), work(rows, **changes), worth, curve=curve)


def exact(worth: float) -> Multiplier:
    return Multiplier(worth, 0.9 * worth, 1.1 * worth, 0.5, 4.0)


@pytest.mark.parametrize(("worth", "seconds"), [(1.5, True), (2.0, False), (3.0, True)])
def test_the_break_even_is_where_both_cost_the_same(worth: float, seconds: bool) -> None:
    """At that pool size evidence and 1/worth of the rows cost what all rows do; below more, above less."""
    way, unit = WAYS[0], "seconds" if seconds else "flops"
    at = way.pays_above(work(), worth, unit)

    def spent(rows: float) -> float:
        w = work(round(rows))
        return float(getattr(way.cost(w) + w.row * (rows / worth), unit) - getattr(w.everything, unit))

    assert abs(spent(at)) < getattr(ROW, unit) and spent(0.9 * at) > 0 > spent(1.1 * at)
    pays = plan(exact(worth), round(1.3 * at)).gain(way)
    assert pays is not None and pays.value > 1 > plan(exact(worth), round(0.8 * at)).gain(way).value  # type: ignore[union-attr]
    assert way.needed(work(round(at)), work(round(at)).everything.seconds, "seconds") == pytest.approx(worth, rel=1e-3)


def test_the_pages_table_is_this_formula() -> None:
    """docs/cost.md: sixty runs of 256 rows and two sets of 60, scoring by one pass of the base, one epoch or three."""
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+) \| ([\w, ]+) \| ([\w, ]+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 5
    for worth, *cells in rows:
        for epochs, cell in zip((1, 3), cells, strict=True):
            read = ROW * (1 / 3)
            w = work(run=ROW * 256 + read * 120, read=read, scored=read, epochs=epochs)
            found = WAYS[0].pays_above(w, float(worth), "flops")
            said = math.inf if cell == "never" else float(cell.removesuffix(" rows").replace(",", ""))
            assert found == pytest.approx(said, abs=0.51), (worth, epochs)


def test_scoring_that_costs_what_it_saves_never_pays() -> None:
    assert WAYS[0].pays_above(work(scored=ROW * 0.6), 2.0, "flops") == math.inf
    assert WAYS[0].pays_above(work(), 1.0, "flops") == WAYS[0].pays_above(work(), 0.7, "flops") == math.inf


def test_verdicts() -> None:
    """The honest answer first: evidence that costs more than it can gain is not worth making."""
    small = plan(exact(2.0), 10_000).verdict()
    assert small.startswith("TRAIN ON EVERYTHING: scores and full runs alone cost 1.9 times as much as")
    assert plan(None, 100_000).verdict().startswith("NOT KNOWN whether evidence pays: scores and full runs take 28%")
    large = plan(exact(2.0), 100_000).verdict()
    assert large.startswith("MAKE THE EVIDENCE: scores and full runs pay; with chosen rows they reach the loss")
    assert "for 78% of the cost (95 % interval 73% to 84%)" in large, "28 % of evidence, and half of the rows"
    poor = plan(exact(1.0), 100_000).verdict()
    assert poor.startswith("TRAIN ON EVERYTHING: scores and full runs do not pay")
    unsure = plan(Multiplier(1.6, 0.8, 4.0, 0.5, 4.0), 100_000).verdict()
    assert unsure.startswith("TRAIN ON EVERYTHING") and "are not shown to pay" in unsure and "53% to 153%" in unsure
    one_seed = plan(Multiplier(2.0, math.nan, math.nan, 0.5, 4.0), 100_000).verdict()
    assert "are not shown to pay" in one_seed and "interval" not in one_seed


def test_a_budget_that_does_not_train_on_everything() -> None:
    """With a tenth of the time the question is another one: random rows for all of it, or chosen ones for the rest."""
    hours = 0.1 * work(100_000).everything.seconds / 3600
    assert (
        plan(exact(2.0), 100_000, hours).verdict().startswith("TRAIN ON RANDOM ROWS: scores and full runs alone cost")
    )
    assert (
        plan(exact(2.0), 100_000, 5 * hours).verdict().startswith("TRAIN ON RANDOM ROWS: scores and full runs do not")
    )
    pays = plan(exact(4.0), 100_000, 5 * hours).verdict()  # 56 % of it is evidence; at 4 the curve ends
    gain, low = 4 * 0.44, 3.6 * 0.44
    assert pays.startswith("MAKE THE EVIDENCE") and f"is worth more than {gain:.2g}× its random rows" in pays
    assert f"{-0.1 * math.log2(gain):+.3f} ({-0.1 * math.log2(low):+.3f} to" in pays
    assert plan(exact(2.0), 100_000, 100 * hours).affordable


def record(k: int, tokens: int = 20_000, seconds: float = 30.0, **changes: Any) -> RunRecord:
    compute = {"parameters": 1e6, "tokens_trained": tokens, "tokens_evaluated": 6_000}
    values = {"subset": {"size": 100, "exposures": 100}, "steps": 10, "seconds": seconds, "compute": compute, **changes}
    losses = {"held-out": {"loss": 1.0 + k / 100, "tokens": 10, "examples": 5}}
    purpose = values.pop("purpose", "designed")
    return RunRecord(f"run-{k}", "complete", purpose, now(), evaluation=losses, **values)


def test_a_row_costs_what_the_runs_took() -> None:
    """Seconds of a fit go to training and evaluation as their operations do."""
    found = workload(PlanSettings(1000), [record(k) for k in range(3)])
    assert found.trained.flops == pytest.approx(6 * 1e6 * 200) and found.read.flops == pytest.approx(2 * 1e6 * 200)
    assert found.run.flops == pytest.approx(1e6 * (6 * 20_000 + 2 * 6_000)) and found.run.seconds == 30
    evaluated = 30 * 6_000 / (3 * 20_000 + 6_000)
    assert found.trained.seconds == pytest.approx((30 - evaluated) / 100)
    assert found.scored == found.read, "one forward pass, where no note says more"
    double = workload(PlanSettings(1000, row_tokens=400), [record(k) for k in range(3)])
    assert double.trained.seconds == pytest.approx(2 * found.trained.seconds) and double.run == found.run
    other = workload(PlanSettings(1000, subset_size=50), [record(0)])
    assert other.run.flops == pytest.approx(50 * other.trained.flops + 120 * other.read.flops)


def test_runs_of_earlier_versions_give_their_seconds() -> None:
    found = workload(PlanSettings(1000), [record(0, compute={})])
    assert math.isnan(found.trained.flops) and found.trained.seconds == pytest.approx(0.3)
    assert math.isnan(workload(PlanSettings(1000), []).trained.seconds)


def test_runs_that_were_all_stopped_are_as_long_as_they_would_have_been() -> None:
    """A ledger of the short way alone: its full runs are no guess of 256 rows, and stopped at a fifth it took this."""
    short = [record(k, regime={"stopped_at": {"step": 2, "of": 10}}) for k in range(3)]
    found, read = workload(PlanSettings(1000), short), 30 * 6 / 66
    assert found.run.seconds == pytest.approx(5 * (30 - read) + read)
    assert found.run.flops == pytest.approx(1e6 * (6 * 100_000 + 2 * 6_000))
    assert SHORT.once(Workload(**{**vars(found), "runs": 60})).seconds == pytest.approx(60 * 30)


def test_a_run_costs_what_the_runs_of_its_length_that_say_took() -> None:
    """One of an earlier version makes nothing unknown; and runs of two lengths are no runs of a length between."""
    known = record(0)
    found = workload(PlanSettings(1000), [known, record(1, compute={}), record(2, seconds=math.nan)])
    assert found.run.flops == known.cost.flops and found.run.seconds == 30
    long = [record(k, 200_000, 300.0, subset={"size": 1000, "exposures": 1000}) for k in (3, 4, 5)]
    assert workload(PlanSettings(1000), [known, record(1), *long]).run.seconds == 300


def test_another_way_is_one_row() -> None:
    """Blocks trained once and merged for each run: what it costs is said where it is listed."""
    merged = Way("merged", lambda w: w.run * 16 + w.read * (120 * w.runs), lambda w: w.scored)
    assert MERGED_RUNS.once(work()).seconds == pytest.approx(0.3 * (300 * 28 + 40 * 60))
    assert SHORT.once(work()).seconds == pytest.approx(0.3 * 60 * ((300 - 40) / 5 + 40))
    assert SMALL.once(work()).seconds == pytest.approx(0.3 * 300 * (6 + 4))
    assert merged.cost(work()).seconds == pytest.approx(0.3 * (300 * 16 + 40 * 60 + 0.1 * 10_000))
    assert merged.pays_above(work(), 2.0, "seconds") < WAYS[0].pays_above(work(), 2.0, "seconds")


def test_ways_show_how_they_ranked_as_the_page_has_it() -> None:
    """The last column of docs/cost.md's table; of a gradient per row and of merged runs, too."""
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    names = {
        FULL: "full runs",
        SMALL: "smaller base",
        SHORT: "stopped at 0.2",
        MERGED_RUNS: "merged runs",
        PER_ROW: "with gradient_similarity",
    }
    for way, name in names.items():
        line = next(one for one in page.splitlines() if one.startswith(f"| {name} |"))
        whole = line.strip("| ").split(" | ")[-1].replace(",", " ").split()[0]
        assert float(whole) == way.ranks and f"{way.ranks:.2f}" in plan(None).table(200), name


def test_a_ledger_says_in_which_way_its_runs_were_made() -> None:
    """A worth measured with merged runs says nothing of full ones; and what a full run costs, full runs say."""
    full, block = record(0), record(1, purpose="block")
    short = record(2, seconds=8.0, regime={"stopped_at": {"step": 2, "of": 10}})
    compute = {"parameters": 1e6, "tokens_trained": 0, "tokens_evaluated": 6_000}
    merged = record(3, seconds=2.0, steps=0, made={"kind": "merged"}, compute=compute)
    assert (way_of([]), way_of([full]), way_of([full, short]), way_of([full, merged])) == (
        FULL,
        FULL,
        SHORT,
        MERGED_RUNS,
    )
    found = workload(PlanSettings(1000), [full, block, short, merged])
    assert found.run == full.cost and found.evaluated.seconds == pytest.approx(30 * 6 / 66)
    assert merged.cost.flops == 2 * 1e6 * 6_000


def test_what_a_comparison_knows() -> None:
    assert worth_of(None)[0] is None and "compare … --arms random,weighted --curve" in worth_of(None)[1]
    arms = [{"arm": "random", "losses": [1.0]}]
    assert "has no arm weighted" in worth_of({"arms": arms})[1]
    arms.append({"arm": "weighted", "losses": [1.0]})
    assert "was made without a curve" in worth_of({"arms": arms})[1]
    arms[1]["multiplier"] = exact(2.0).to_json()
    assert worth_of({"arms": arms}) == (exact(2.0), "")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of runs, a comparison with a curve, a score table with its note, and a base of other size."""
    ledger = RunLedger(tmp_path / "runs")
    for k in range(4):
        ledger.add(record(k))
    points = [{"scale": s, "fitted": 2.0 - 0.1 * math.log2(s)} for s in (0.5, 1, 2, 4)]
    arms = [
        {"arm": "random", "losses": [2.0]},
        {"arm": "weighted", "losses": [1.9], "multiplier": exact(2.0).to_json()},
    ]
    (tmp_path / "compare.json").write_text(json.dumps({"arms": arms, "curve": {"points": points}}))
    ids = [f"{k:032x}" for k in range(50)]
    ScoreTable(range(50), ids, ["a"] * 50, {"ppl": np.ones(50)}).write(tmp_path / "scores.parquet")
    make_tiny_llama(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_the_command_says_what_it_knows_and_what_not(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--rows", "50000"]) == 0
    bare = capsys.readouterr().out
    assert bare.startswith("NOT KNOWN whether evidence can pay")
    for words in ("Not known: the operations of a row", "Not known: how fast the machine is", "Not known: what chosen"):
        assert words in bare
    note_cost("scores.parquet", [Step("ppl", 2.5, 10_000, flops=1e9)])
    words = ["plan", "--rows", "50000", "--ledger", "runs", "--compare", "compare.json", "--scores", "scores.parquet"]
    assert main([*words, "--budget-hours", "3.5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MAKE THE EVIDENCE") and "Not known" not in out
    assert "4 designed runs are made already" in out and "Budget: 3.5 GPU hours" in out
    row = (30 - 30 * 6 / 66) / 100
    at = 60 * 30 / (row * (1 - 1 / 2) - 2.5 / 50)
    assert f"{at:,.0f} rows (" in out, "the scores' note and the runs' seconds decide the break-even"
    assert main([*words[:3], "--model", "base", "--ledger", "runs"]) == 0
    assert "what 4 runs of the ledger would take on this base: theirs is another" in capsys.readouterr().out
    assert main([*words[:3], "--model", "base", "--row-tokens", "100"]) == 0
    assert f"{6 * base_parameters('base') * 100 * 50_000:.2e} FLOPs" in capsys.readouterr().out


def test_what_the_runs_do_not_say_is_named(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of earlier versions, or interrupted ones: an answer of "not known" alone helps nobody."""
    timed, older = RunLedger("timed"), RunLedger("older")
    timed.add(record(0, seconds=math.nan))
    timed.add(record(1, purpose="weighted"))
    older.add(record(0, compute={}))
    assert main(["plan", "--rows", "50000", "--ledger", "timed"]) == 0
    said = "Not known: what a designed run took, which none of the ledger's says (--subset-size reckons it by rows)."
    assert said in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "--rows", "50000", "--ledger", "timed", "--subset-size", "100"]) == 0
    assert "what a designed run took" not in capsys.readouterr().out
    assert main(["plan", "--rows", "50000", "--ledger", "older", "--row-tokens", "400"]) == 0
    said = "Not known: how long the ledger's rows are, so that --row-tokens does not change the time"
    assert said in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_asked(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--rows", "0"]) == 2
    assert "--rows 0: it is no size. Fix: give a number above 0" in capsys.readouterr().err
    assert main(["plan", "--rows", "9", "--scores", "scores.parquet"]) == 2
    assert "what its scoring cost was not noted beside it" in capsys.readouterr().err
    compute = {"parameters": 2e6, "tokens_trained": 10, "tokens_evaluated": 0}
    RunLedger("runs").add(record(9, compute=compute))
    assert main(["plan", "--rows", "9", "--ledger", "runs"]) == 2
    assert (
        "its runs are of 2 bases (1,000,000, 2,000,000 parameters). Fix: say which with --model"
        in capsys.readouterr().err
    )

"""`im-lightning run`: one command from a pool to whether a rule paid, whatever stops it on the way."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from pools import write_jsonl

from im_lightning import cli
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.experiments.loop import run as loop_run
from im_lightning.experiments.loop.cost import Sizes, Speed, runs_within, seconds_of
from im_lightning.ledger.ledger import RunLedger
from im_lightning.sampling.plan_runs import DesignPlan
from im_lightning.training.datamodule import InstructMiningDataModule

WORDS = ["red", "blue", "atom", "cell", "tree", "river", "stone", "cloud", "light", "heavy", "quick", "slow"]
SIZE = ["--runs", "14", "--seeds", "2", "--device", "cpu", "--max-length", "64", "--lora-rank", "0"]


def kind(draw: random.Random, good: bool) -> dict[str, str]:
    """A row that repeats what it was told, or a longer one that babbles other letters."""
    told = draw.choices(WORDS, k=3)
    answer = " ".join(told) if good else " ".join("".join(draw.choices("qxzjkvw", k=6)) for _ in range(6))
    return {"instruction": f"Say {' '.join(told)}.", "input": "", "output": answer, "source": "one"}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    write_jsonl(tmp_path / "pool.jsonl", [kind(draw, k % 2 == 0) for k in range(240)])
    write_jsonl(tmp_path / "eval.jsonl", [kind(draw, True) for _ in range(48)])
    return tmp_path


def records(folder: Path, name: str) -> dict[str, float]:
    """run id → loss on the set, of a loop's ledger (runs: fit; compare/ledger: verdict)."""
    found = RunLedger(folder / ("runs" if name == "fit" else "compare/ledger")).records()
    return {r.run_id: r.loss(name) for r in found}


@pytest.mark.timeout(600)
def test_a_rule_that_tells_rows_apart_is_used_and_judged(
    desk: Path, small_base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the wrong kind are longer: the rule finds that, draws others, and the output begins with what came of
    it. Interrupted in the designed runs it goes on with the next one, to the numbers it would have had."""
    command = ["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", small_base, *SIZE]
    command += ["--learning-rate", "0.005", "--seeds", "4", "--out", "out"]
    finetune, made = loop_run.finetune, []

    def stops(*given: object) -> object:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(finetune(*given))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(loop_run, "finetune", stops)
    assert cli.main(command) == 130
    assert "about" in capsys.readouterr().err
    monkeypatch.setattr(loop_run, "finetune", finetune)
    kept = records(Path("out"), "fit")
    assert len(kept) == 4
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("It paid: rows drawn by the rule's weights beat as many tokens of random rows (-")
    assert kept.items() <= records(Path("out"), "fit").items() and len(records(Path("out"), "fit")) == 14
    assert (Path("out") / "run.txt").read_text() == shown.out
    assert "<html" in (Path("out") / "report.html").read_text(encoding="utf-8")

    compared = records(Path("out"), "verdict")
    assert cli.main(command) == 0  # nothing is made again
    assert capsys.readouterr().out.splitlines()[0] == shown.out.splitlines()[0]
    assert records(Path("out"), "verdict") == compared

    assert cli.main([*command[:-1], "whole"]) == 0  # and nothing depends on the interruption
    assert sorted(records(Path("whole"), "fit").values()) == sorted(records(Path("out"), "fit").values())


def test_a_refused_rule_ends_with_random_and_all_rows(
    desk: Path, small_base: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """At a rate of almost nothing no subset differs from another: that is said first, and is no failure."""
    command = ["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", small_base, *SIZE]
    assert cli.main([*command, "--learning-rate", "1e-12"]) == 0
    out, err = capfd.readouterr()
    assert "Tip" not in err and "GPU available" not in err and "Warning" not in err
    assert out.startswith("REFUSED: ") and "random rows and all rows" in " ".join(out.split())
    arms = json.loads(Path("im-run/compare/compare.json").read_text())["arms"]
    assert [arm["arm"] for arm in arms] == ["base", "random", "full"]

    assert cli.main([*command, "--learning-rate", "1e-3"]) == 2
    assert "im-run: it holds a run with other settings (" in capfd.readouterr().err


def answered(prompts: int, answers: int) -> list[dict[str, str]]:
    """Rows of some prompts, several answers each, in turn."""
    draw = random.Random(1)
    asked = [kind(draw, True) for _ in range(prompts)]
    return [{**row, "output": f"{row['output']} {k}"} for k in range(answers) for row in asked]


def test_answers_to_one_prompt_are_in_one_half(
    desk: Path, small_base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rule that was fitted on an answer has seen what another answer to the same prompt would evaluate it on. A loop
    that an earlier version began, and cut by rows, goes on with its own parts."""
    rows = answered(13, 3)
    seen: list[list[list[dict[str, str]]]] = []
    write_jsonl(desk / "eval.jsonl", rows)

    def stops(loop: loop_run.Loop, table: object) -> None:
        seen.append([[row.raw for row in half] for half in loop.halves])
        raise KeyboardInterrupt

    monkeypatch.setattr(loop_run.Loop, "_designed_runs", stops)
    command = ["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", small_base, *SIZE]
    assert cli.main(command) == 130
    parts = [desk / "im-run" / "parts" / f"{name}.jsonl" for name in ("fit", "verdict")]
    fit, verdict = ([json.loads(line) for line in part.read_text().splitlines()] for part in parts)
    assert sorted(map(str, [*fit, *verdict])) == sorted(map(str, rows))
    assert not {row["instruction"] for row in fit} & {row["instruction"] for row in verdict}
    assert sorted(map(len, (fit, verdict))) == [18, 21], "as near to halves as prompts of three answers allow"

    halves = [rows[:20], rows[20:]]
    for part, half in zip(parts, halves, strict=True):
        write_jsonl(part, half)
    earlier = [part.read_bytes() for part in parts]
    assert cli.main(command) == 130
    assert "going on in im-run" in capsys.readouterr().err
    assert [part.read_bytes() for part in parts] == earlier and seen == [[fit, verdict], halves]


def test_a_loop_goes_on_with_smaller_micro_batches(
    desk: Path, small_base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where memory ran out one must: the numbers are the same but for rounding."""

    def stops(loop: loop_run.Loop, table: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop_run.Loop, "_designed_runs", stops)
    command = ["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", small_base, *SIZE]
    assert cli.main(command) == 130
    assert cli.main([*command, "--token-budget", "64"]) == 130 and "going on in im-run" in capsys.readouterr().err
    assert cli.main([*command, "--learning-rate", "0.5"]) == 2 and "learning_rate" in capsys.readouterr().err


def test_planned_subsets_are_those_that_runs_draw(desk: Path, small_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the pool holds the evaluation rows, of which a designed run leaves out its own half."""
    draw = random.Random(3)
    rows = [kind(draw, k % 2 == 0) for k in range(240)]
    write_jsonl(desk / "pool.jsonl", rows)
    write_jsonl(desk / "eval.jsonl", rows[::5])
    planned: list[DesignPlan] = []
    drawn: list[InstructMiningDataModule] = []
    plan = loop_run.Loop._plan

    def planning(loop: loop_run.Loop, table: ScoreTable) -> DesignPlan:
        planned.append(plan(loop, table))
        return planned[-1]

    def stops(data: InstructMiningDataModule, *_: object) -> None:
        data.prepare_data()
        data.setup()
        drawn.append(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop_run.Loop, "_plan", planning)
    monkeypatch.setattr(loop_run, "finetune", stops)
    assert cli.main(["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", small_base, *SIZE]) == 130
    (data,) = drawn
    one = next(one for one in planned[0].subsets if one.design["seed"] == data.choice.subset_seed)
    assert data.rows is not None and sorted(one.rows) == sorted(data.rows)


def test_evaluation_rows_that_are_not_used_are_counted(
    desk: Path, small_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(desk / "eval.jsonl", [{"instruction": f"Say {k}.", "input": "", "output": str(k)} for k in range(450)])
    command = ["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", small_base, *SIZE]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "eval.jsonl: 50 of its rows are not used, for each half takes 200" in capsys.readouterr().err


def test_the_cost_is_said_without_a_loop(desk: Path, small_base: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", small_base, *SIZE]
    assert cli.main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "14 designed runs of 32 rows (4 steps of 8), then random rows, weighted rows and all rows" in said
    assert not Path("im-run").exists()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--runs", "8"], r"--runs 8: 5 indicators .*\. Fix: make 9 or more"),
        (["--budget-minutes", "5"], r"--runs and --budget-minutes both .*\. Fix: give one of them"),
        (["--seeds", "0"], r"--seeds 0: .*\. Fix: give 2 or more"),
        (["--epochs", "0"], r"--epochs: it is 0\. Fix: give 1 or more"),
        (["--epochs", "-1"], r"--epochs: it is -1\. Fix: give 1 or more"),
        (["--accumulate", "0"], r"--accumulate: it is 0\. Fix: give 1 or more"),
        (["--dtype", "fp16"], r"--dtype: there is no .fp16.\. Fix: use one of auto, fp32, bf16"),
        (["--budget-minutes", ".inf", "--runs", "null"], r"--budget-minutes inf: it is no time\. Fix: give minutes"),
        (["--budget-minutes", "0.0001", "--runs", "null"], r"--budget-minutes 0\.0001: the smallest loop .*\. Fix: "),
        (["--eval-data", "few.jsonl"], r"--eval-data few\.jsonl: it has 12 different rows.*\. Fix: give 20 or more"),
        (["--eval-data", "one.jsonl"], r"has 24 .*; rows of one prompt stay together.* one half 0 .*Fix: "),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    desk: Path, small_base: str, capsys: pytest.CaptureFixture[str], more: list[str], text: str
) -> None:
    import re

    write_jsonl(desk / "few.jsonl", [kind(random.Random(k), True) for k in range(12)])
    write_jsonl(desk / "one.jsonl", answered(1, 24))
    command = ["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", small_base, *SIZE, *more]
    assert cli.main(command) == 2
    assert re.search(text, capsys.readouterr().err)
    assert not Path("im-run").exists()


def test_too_few_evaluation_rows_are_found_before_the_pool_is_read(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And before a base model is asked for: nobody waits for a refusal."""
    write_jsonl(desk / "few.jsonl", [kind(random.Random(k), True) for k in range(12)])
    assert cli.main(["run", "gone.jsonl", "--eval-data", "few.jsonl", "--model", "./gone"]) == 2
    assert "--eval-data few.jsonl: it has 12 different rows" in capsys.readouterr().err
    assert not Path("im-run").exists()


def test_a_budget_decides_the_runs_and_drops_all_rows_first() -> None:
    sizes = Sizes(1000, 100.0, 64, 8, 1, 5_000.0, 5_000.0, 3, 630)
    speed = Speed(0.002, 0.001, 2.0)
    for minutes in (60.0, 30.0, 16.0):
        runs, full = runs_within(sizes, speed, minutes)
        assert sum(seconds_of(sizes, speed, runs, full).values()) <= 60 * minutes
        more = sum(seconds_of(sizes, speed, runs + 1, full).values())
        assert more > 60 * minutes or runs == 60
    assert [runs_within(sizes, speed, minutes)[1] for minutes in (60.0, 9.0)] == [True, False]
    with pytest.raises(RequestError, match=r"--budget-minutes 1: the smallest loop .* about \d+ minutes.*Fix: "):
        runs_within(sizes, speed, 1.0)

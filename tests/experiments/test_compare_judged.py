"""`compare --judge`: a win rate beside the loss, from the runs' own answers, asked for once."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from api_server import KEY, serving
from fitting import write_pool, write_scores
from tiny import make_tiny_llama

from im_lightning.cli import main
from im_lightning.data.loading import load_examples
from im_lightning.experiments.answers.win_rate import Pair, WinRate
from im_lightning.experiments.compare.judged import over_seeds
from im_lightning.ledger.ledger import RunLedger


def shorter(text: str, time: int) -> str:
    """A judge that prefers the answer with fewer characters."""
    a, b = re.search(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nSay", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"[[{'A' if len(a) < len(b) else 'B' if len(b) < len(a) else 'C'}]]"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--base-url", "http://x/v1", "--api-model", "j"],
            "they are of a judge, and none is asked",
        ),
        (["--judge-prompts", "5"], "add --judge, or leave them out"),
        (["--judge", "--judge-prompts", "0"], "--judge-prompts 0: nothing would be judged. Fix: give 1 or more"),
    ],
)
def test_a_judge_of_nothing_and_one_that_is_not_asked_are_refused(
    more: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["compare", "gone.jsonl", "--scores", "gone.parquet", "--eval-data", "gone.jsonl", "--model", "gone"]
    assert main([*words, "--tokens", "9", "--steps", "1", "--out", "out", *more]) == 2
    assert says in capsys.readouterr().err and not Path("out").exists()


def test_prompts_after_which_no_answer_fits_are_found_before_a_finetune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    make_tiny_llama(tmp_path / "small", hidden=16, layers=1, max_positions=128)
    write_pool(tmp_path / "pool.jsonl", n=60)
    write_scores(tmp_path / "scores.parquet", "pool.jsonl")
    words = ["compare", "pool.jsonl", "--scores", "scores.parquet", "--eval-data", "pool.jsonl", "--model", "small"]
    words += ["--tokens", "220", "--steps", "2", "--arms", "random", "--seeds", "1", "--out", "out", "--judge"]
    assert main([*words, "--base-url", "http://127.0.0.1:9/v1", "--api-model", "j", "--max-requests", "9"]) == 2
    said = capsys.readouterr().err
    assert "prompt and answer may take" in said and "128 positions. Fix: lower --max-length" in said
    assert not RunLedger("out/ledger").records(status=None)


def test_a_preference_of_some_seeds_is_none_of_the_arm() -> None:
    """Each seed's model wins or loses everywhere: 200 prompts say nothing of the next seed's."""
    pairs = [(seed, Pair(f"p{k}", s, s, (5, 5))) for seed, s in enumerate((1.0, 1.0, 1.0, 0.0)) for k in range(200)]
    assert WinRate.of([pair for _, pair in pairs]).rate.off(), "by prompts alone it looks sure"
    assert over_seeds(pairs).difference == pytest.approx(0.25) and over_seeds(pairs).p > 0.3
    assert math.isnan(over_seeds(pairs[:200]).p), "one seed is no test"
    alike = [(seed, Pair(f"p{k}", s, s, (5, 5))) for seed in range(4) for k, s in enumerate([1.0] * 9 + [0.0])]
    assert over_seeds(alike).p < 0.05
    without = [*alike, (0, Pair("p10", math.nan, 1.0, (5, 5)))]
    assert over_seeds(without).difference == pytest.approx(0.4), "a prompt without a verdict is left out"


def test_every_arm_has_a_win_rate_against_random(
    tmp_path: Path, small_base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_pool(tmp_path / "pool.jsonl", n=60)
    write_pool(tmp_path / "eval.jsonl", n=6, seed=9, tag="e")
    write_scores(tmp_path / "scores.parquet", "pool.jsonl")
    words = ["compare", "pool.jsonl", "--scores", "scores.parquet", "--eval-data", "eval.jsonl", "--model", small_base]
    words += ["--tokens", "220", "--steps", "2", "--arms", "base,random,longest", "--seeds", "2", "--out", "out"]
    words += ["--pool-draw", "same", "--learning-rate", "0.05", "--judge", "--judge-prompts", "4"]
    assert main(words) == 2
    assert "the endpoint: there is no --base-url" in capsys.readouterr().err
    with serving(tmp_path / "log", shorter) as server:
        words += ["--base-url", server.url, "--api-model", "judge-1", "--max-requests", "100"]
        assert main(words) == 0
        asked = len(server.answered)
        assert main([*words, "--overwrite"]) == 0
        assert len(server.answered) == asked, "verdicts that were paid for are asked for again"
    said = capsys.readouterr().out
    assert "win rate" in said
    found = {arm["arm"]: arm for arm in json.loads(Path("out/compare.json").read_text())["arms"]}
    runs = {run.run_id: run for run in RunLedger("out/ledger").records()}
    for arm in ("base", "longest"):
        wanted: list[float] = []
        for mine, other in zip(found[arm]["run_ids"], found["random"]["run_ids"], strict=True):
            assert {mine, other} <= runs.keys()
            pair = [load_examples(f"out/answers/{run}.jsonl") for run in (mine, other)]
            for a, b in zip(*pair, strict=True):
                x, y = len(a.response), len(b.response)
                wanted.append(0.5 if x == y else float(x < y))
        assert len(wanted) == 8 and found[arm]["win_rate"]["pairs"] == 8
        assert found[arm]["win_rate"]["rate"]["value"] == pytest.approx(sum(wanted) / 8)
    assert "win_rate" not in found["random"]

    for prompts, pairs, known in (("2", 4, len(runs)), ("6", 12, 2 * len(runs))):  # fewer are there, more are not
        words[words.index("--judge-prompts") + 1] = prompts
        with serving(tmp_path / f"log-{prompts}", shorter) as server:
            words[words.index("--base-url") + 1] = server.url
            assert main(words) == 0
        arms = {arm["arm"]: arm for arm in json.loads(Path("out/compare.json").read_text())["arms"]}
        assert arms["longest"]["win_rate"]["pairs"] == pairs and len(RunLedger("out/ledger").records()) == known

"""The benchmark: its arithmetic and its report. Its figures are no test: machines differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import registry
from benchmarks.__main__ import main
from benchmarks.examples import RESPONSE_WORDS, made_up_examples
from benchmarks.likelihoods import OurPass, PlainLoop, comparable
from benchmarks.registry import Ratio, Setting
from benchmarks.report import markdown, plain
from benchmarks.rows_gradients import _different_prompts
from benchmarks.timing import interleaved, ratio
from im_lightning.errors import InstructMiningError


def test_a_ratio_is_taken_within_rounds() -> None:
    """A load that lasts for one round would otherwise be counted against one side only."""
    assert ratio({"slow": [2.0, 20.0, 4.0], "fast": [1.0, 10.0, 2.0]}, "slow", "fast") == 2.0


def test_works_alternate() -> None:
    seen: list[str] = []
    times = interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert "".join(seen) == "ab" + "ab" + "ba"
    assert [len(v) for v in times.values()] == [2, 2]


def test_a_missed_bar_is_shown() -> None:
    ratios = [Ratio("x", 0.5, 0.75, "1 row/s", note="why"), Ratio("padding", 0.01, 0.03, "1 %", at_least=False)]
    assert [r.met for r in ratios] == [False, True]
    assert "| x | 0.50 | ≥ 0.75 | **no** | 1 row/s |  | why |" in markdown(ratios)
    assert "why" in plain(ratios)


def test_made_up_rows_have_the_lengths_of_real_ones() -> None:
    words = [len(e.response.split()) for e in made_up_examples(4000)]
    assert abs(np.log(np.median(words) / RESPONSE_WORDS[3])) < 0.1


def test_table_and_json_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(setting: Setting) -> Iterator[Ratio]:
        yield Ratio("synthetic work", 2.0, 1.5, f"{setting.repeats} rounds")

    registry.subjects()
    monkeypatch.setitem(registry._registered, "nothing", measure)
    out = tmp_path / "b.json"
    assert main(["--only", "nothing", "--markdown", "--json", str(out), "--repeats", "2"]) == 0
    assert "| synthetic work | 2.00 | ≥ 1.50 | yes | 2 rounds |" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["ratios"][0]["met"] is True
    assert written["machine"]["cpu"]
    assert written["machine"]["cores"]


def test_what_was_measured_outlives_a_subject_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of finetunes is not measured again because scoring could not be."""

    def measure(setting: Setting) -> Iterator[Ratio]:
        yield Ratio("synthetic work", 2.0, 1.5, "1 round")

    def fail(setting: Setting) -> Iterator[Ratio]:
        raise InstructMiningError("no")
        yield

    registry.subjects()
    monkeypatch.setitem(registry._registered, "first", measure)
    monkeypatch.setitem(registry._registered, "second", fail)
    out = tmp_path / "b.json"
    assert main(["--only", "first,second", "--json", str(out)]) == 1
    assert [one["work"] for one in json.loads(out.read_text())["ratios"]] == ["synthetic work"]


def test_what_is_timed_is_the_perplexity_of_a_plain_loop(tiny_llama: str, tmp_path: Path) -> None:
    """A pass whose model was loaded before has all that loading sets, and does the whole work each time."""
    rows = comparable(made_up_examples(40), 12)
    ours = OurPass(tiny_llama, "fp32", rows, tmp_path)
    loop = PlainLoop(ours)
    loop()
    for _ in range(2):
        ours()
        np.testing.assert_allclose(ours.values, loop.values, rtol=1e-4)
    assert ours.tokens > 0 and 0 <= ours.padding() < 0.5


def test_target_rows_share_no_prompt_with_the_pool(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": [{"content": text}]}) + "\n" for text in ("Add 1.", "add 1. ", "Add 2.")]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    assert _different_prompts(tmp_path / "rows.jsonl") == [lines[2], lines[0]]


def test_an_unknown_subject_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nonsense"]) == 2
    assert "there is no subject 'nonsense'" in capsys.readouterr().err

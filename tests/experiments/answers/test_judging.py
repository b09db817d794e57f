"""`judge` and `score-llm`: verdicts of an endpoint become numbers that say what they are worth."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_server import KEY, serving
from pools import write_jsonl

from im_lightning.cli import main
from im_lightning.data.score_table import ScoreTable
from im_lightning.endpoint.journal import Answer
from im_lightning.experiments.answers.judging import COMPARE, GRADE, Prompt, grade, read_prompt, verdict

SHOWN = re.compile(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nSay", re.DOTALL)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def answers(folder: Path, name: str, texts: list[str]) -> str:
    return write_jsonl(
        folder / f"{name}.jsonl", [{"prompt": f"Ask {k}", "response": text} for k, text in enumerate(texts)]
    )


def flags(url: str, *more: str) -> list[str]:
    speed = ["--backoff-seconds", "0.01", "--timeout-seconds", "20"]
    return ["--base-url", url, "--api-model", "judge-1", "--max-requests", "1000", *speed, *more]


def quality(text: str, time: int) -> str:
    """A judge that counts the word good, and gives its verdict after some thought."""
    first, second = (one.count("good") for one in SHOWN.search(text).groups())  # type: ignore[union-attr]
    return f"[[C]] comes to mind.\n[[{'A' if first > second else 'B' if second > first else 'C'}]]"


GOOD = ["good good", "good", "x", "good", "same", "good good x"]
OTHER = ["good", "good x", "good", "y", "same", "good"]


def test_two_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = answers(tmp_path, "weighted", GOOD), answers(tmp_path, "random", OTHER), str(tmp_path / "out")
    with serving(tmp_path / "log", quality) as server:
        assert main(["judge", a, "--against", b, *flags(server.url), "--out", out]) == 0
        said = capsys.readouterr().out
        assert "weighted against random, judged by judge-1 in both orders." in said
        assert "weighted is better in 50.0% of cases, a tie in 33.3%, worse in 16.7%." in said
        assert "Both orders agree in 100.0% of pairs." in said
        found = json.loads((tmp_path / "out" / "judge.json").read_text())
        scores = [(pair["first"] + pair["second"]) / 2 for pair in found["pairs"]]
        assert scores == [1, 0.5, 0, 1, 0.5, 1]
        assert found["win_rate"]["rate"]["value"] == pytest.approx(4 / 6)
        assert len(server.answered) == 10, "equal answers are not asked about"
        kept = map(json.loads, (tmp_path / "out" / "requests.jsonl").read_text().splitlines())
        orders = [line["about"] for line in kept if "about" in line]
        assert sorted(one["order"] for one in orders) == ["AB"] * 5 + ["BA"] * 5
        assert main(["judge", a, "--against", b, *flags(server.url), "--out", out]) == 0
        assert len(server.answered) == 10
        assert main(["judge", b, "--against", a, *flags(server.url), "--out", out]) == 2
        assert "it holds another result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (("weighted", "random"), ("weighted/answers", "random/answers")),
        ((".", "random"), ("answers", "random/answers")),
        (("x/seed-0", "y/seed-0"), ("x/seed-0/answers.jsonl", "y/seed-0/answers.jsonl")),
    ],
)
def test_files_of_one_name_are_told_apart(
    places: tuple[str, str], names: tuple[str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of one run lie in a folder of their own, and have the same name in each."""
    monkeypatch.chdir(tmp_path)
    for place, texts in zip(places, (["good"] * 12, ["bad"] * 12), strict=True):
        Path(place).mkdir(parents=True, exist_ok=True)
        answers(tmp_path / place, "answers", texts)
    a, b = (str(Path(place) / "answers.jsonl") for place in places)
    with serving(tmp_path / "log", quality) as server:
        assert main(["judge", a, "--against", b, *flags(server.url), "--out", "out"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{names[0]} against {names[1]}, judged by" in said and f"{names[0]} is better than {names[1]}: win" in said
    files = json.loads(Path("out/judge.json").read_text())["files"]
    assert (files["a"]["name"], files["b"]["name"]) == names


def test_a_judge_that_prefers_a_place_is_told_by_the_command(tmp_path: Path, capsys: Any) -> None:
    a, b = answers(tmp_path, "a", [f"one {k}" for k in range(20)]), answers(tmp_path, "b", ["two words"] * 20)
    with serving(tmp_path / "log", lambda text, time: "[[A]]") as server:
        assert main(["judge", a, "--against", b, *flags(server.url), "--out", str(tmp_path / "out")]) == 0
    assert "THE JUDGE ALWAYS PREFERS THE ANSWER SHOWN FIRST" in capsys.readouterr().out


def test_what_is_no_verdict_is_missing_with_its_reason(tmp_path: Path, capsys: Any) -> None:
    def reply(text: str, time: int) -> Any:
        if "Ask 0\n" in text:
            return {"content": "", "refusal": "I do not judge."}
        if "Ask 1\n" in text:
            return "Both are fine."
        return {"content": "I think", "finish": "length"} if "Ask 2\n" in text else quality(text, time)

    a, b = answers(tmp_path, "a", GOOD), answers(tmp_path, "b", OTHER)
    with serving(tmp_path / "log", reply) as server:
        assert main(["judge", a, "--against", b, *flags(server.url), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "2 verdicts are missing: refused: I do not judge." in said.err
    assert "2 verdicts are missing: no verdict [[A]], [[B]] or [[C]] in its answer\n" in said.err
    assert "in its answer, which was cut at its limit of tokens" in said.err
    assert "3 pairs have no verdict in both orders, and are left out." in said.out
    assert json.loads((tmp_path / "out" / "judge.json").read_text())["win_rate"]["pairs"] == 3


def test_without_a_judge_answers_are_held_against_references(tmp_path: Path, capsys: Any) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    a = answers(tmp_path, "a", ["the cat sat", "a  dog", "birds"])
    b = answers(tmp_path, "b", ["the mat", "a dog", "fish swim"])
    known = [("Ask 0", "the cat sat down"), ("Ask 0", "a cat sat"), ("Ask 1", "a dog"), ("Ask 2", "fish")]
    references = write_jsonl(tmp_path / "r.jsonl", [{"prompt": p, "response": r} for p, r in known])
    assert main(["judge", a, "--against", b, "--references", references, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "judge.json").read_text())["references"]
    assert found["exact_match"]["a"]["value"] == pytest.approx(1 / 3)

    def rouge(reference: str, text: str) -> float:
        return RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure

    of_a = [max(rouge("the cat sat down", "the cat sat"), rouge("a cat sat", "the cat sat")), 1.0, 0.0]
    of_b = [max(rouge("the cat sat down", "the mat"), rouge("a cat sat", "the mat")), 1.0, rouge("fish", "fish swim")]
    assert found["rouge_l"]["a"]["value"] == pytest.approx(np.mean(of_a))
    assert found["rouge_l"]["difference"]["value"] == pytest.approx(np.mean(np.subtract(of_a, of_b)))
    assert "ROUGE-L with the references: a 0." in said and "(3 instructions)" in said


def test_one_instruction_has_no_interval_in_what_is_printed(tmp_path: Path, capsys: Any) -> None:
    a, b = answers(tmp_path, "a", ["good"]), answers(tmp_path, "b", ["bad"])
    c = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "Ask 1", "response": "good"}])
    known = write_jsonl(tmp_path / "r.jsonl", [{"prompt": f"Ask {k}", "response": "good"} for k in range(2)])
    with serving(tmp_path / "log", quality) as server:
        both = ["--against", b, "--references", known, *flags(server.url), "--out", str(tmp_path / "out")]
        assert main(["judge", a, *both]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "win rate 1.000 (no interval: one instruction), over 1 instruction." in said and "nan" not in said
    assert "exact match with the references: a 1.000 (no interval: one instruction), b 0.000 (no interval" in said
    assert main(["judge", a, "--against", c, "--references", known, "--out", str(tmp_path / "other")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "difference not known (no instruction) (1 instruction)." in said


def test_references_of_other_prompts_are_found_before_the_judge_is_paid(tmp_path: Path, capsys: Any) -> None:
    a, b = answers(tmp_path, "a", GOOD), answers(tmp_path, "b", OTHER)
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Something else", "response": "x"}])
    with serving(tmp_path / "log", quality) as server:
        words = ["judge", a, "--against", b, "--references", other, *flags(server.url)]
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        assert "none of its prompts has a reference" in capsys.readouterr().err and not server.answered


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--references", "OTHER", "--prompt", "PROMPT"], "it is for a judge, and none is asked. Fix: name the judge"),
        ([], "nothing says what a good answer is. Fix: name a judge (--base-url, --api-model), or reference outputs"),
        (["--base-url", "http://localhost:9/v1"], "the endpoint: there is no --api-model"),
        (flags("http://localhost:9/v1"), "a judge compares two files of answers. Fix: name a second one, --against"),
        (["--against", "OTHER", *flags("http://localhost:9/v1")], "none of its 6 prompts is one of the 1 of"),
        (["--references", "OTHER"], "none of its prompts has a reference"),
        (
            ["--against", "OTHER", *flags("http://x/v1"), "--prompt", "PROMPT"],
            "it has no {second}. Fix: write {request}",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Something else", "response": "x"}])
    (tmp_path / "prompt.txt").write_text("{request} {first}")
    places = {"OTHER": other, "PROMPT": str(tmp_path / "prompt.txt")}
    given = [places.get(one, one) for one in arguments]
    assert main(["judge", answers(tmp_path, "a", GOOD), *given, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("[[A]]", 1.0),
        ("first [[A]], no: [[B]]", 0.0),
        ("so [[C]].", 0.5),
        ("[[D]] A", math.nan),
        ("<think>[[A]] it is</think>\nNeither.", math.nan),
    ],
)
def test_the_last_verdict_counts(text: str, score: float) -> None:
    assert verdict(Answer(text))[0] == pytest.approx(score, nan_ok=True)


def test_texts_cannot_break_out_of_their_places() -> None:
    """An answer may hold braces, or the name of another place."""
    filled = Prompt(COMPARE).filled(request="{first}", first="{second}", second="S")
    assert "[Request]\n{first}\n\n[Answer A]\n{second}\n\n[Answer B]\nS\n" in filled
    assert read_prompt(None, GRADE, ()).digest != Prompt(COMPARE).digest


# grades of single rows


ROWS = [{"prompt": f"Ask {k}", "response": f"Answer {k}", "source": "abc"[k % 3]} for k in range(6)]


def grader(text: str, time: int) -> Any:
    k = int(re.search(r"Answer (\d)", text)[1])  # type: ignore[index]
    odd = {3: {"content": "", "refusal": "No."}, 4: "Fine!", 5: "[[11]]"}
    return odd.get(k, f"Not bad. [[{k + 4}]]")


def test_grades_are_an_indicator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_jsonl(tmp_path / "pool.jsonl", ROWS), str(tmp_path / "graded.parquet")
    scores = str(tmp_path / "scores.parquet")
    assert main(["score", data, "--indicators", "mtld", "--out", scores]) == 0
    with serving(tmp_path / "log", grader) as server:
        for _ in range(2):
            assert main(["score-llm", data, "--scores", scores, *flags(server.url), "--out", out]) == 0
        assert len(server.answered) == 6
        assert main(["score-llm", data, "--scores", out, *flags(server.url), "--out", out]) == 2
    assert "it has a column 'llm_grade' already. Fix: give another --name" in capsys.readouterr().err
    table = ScoreTable.read(out)
    assert table.indicators == ["mtld", "llm_grade"] and table.source == list("abcabc")
    assert table.values["llm_grade"][:3].tolist() == [4.0, 5.0, 6.0] and np.isnan(table.values["llm_grade"][3:]).all()
    assert table.reasons["llm_grade"][3:] == [
        "refused: No.",
        "no grade such as [[7]] in its answer",
        "its grade 11 is not from 1 to 10",
    ]
    judge = table.keys["llm_grade"]["identity"]["judge"]
    assert judge["model"] == "judge-1" and judge["prompt"] == read_prompt(None, GRADE, ()).digest


def test_another_prompt_is_another_indicator(tmp_path: Path) -> None:
    """A rule fitted on one prompt's grades must refuse another's."""
    data = write_jsonl(tmp_path / "pool.jsonl", ROWS)
    (tmp_path / "prompt.txt").write_text("Grade {answer} to {request} as [[1]] to [[10]].")
    keys = []
    with serving(tmp_path / "log", lambda text, time: "[[7]]") as server:
        for more in ([], ["--prompt", str(tmp_path / "prompt.txt")]):
            out = str(tmp_path / f"g{len(keys)}.parquet")
            assert main(["score-llm", data, *flags(server.url), "--out", out, *more]) == 0
            keys.append(ScoreTable.read(out).keys["llm_grade"]["identity"])
    assert keys[0] != keys[1]


def test_the_cost_of_grades_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_jsonl(tmp_path / "pool.jsonl", ROWS), str(tmp_path / "g.parquet")
    assert main(["score-llm", data, *flags("http://localhost:9/v1"), "--dry-run", "--out", out]) == 0
    assert capsys.readouterr().out.startswith("6 requests, about ") and not Path(out).exists()


@pytest.mark.parametrize(
    ("text", "value"), [("[[7]]", 7.0), ("[[2]] then [[8.5]]", 8.5), ("[[0]]", math.nan), ("<think>[[3]]", math.nan)]
)
def test_the_last_grade_counts(text: str, value: float) -> None:
    assert grade(Answer(text))[0] == pytest.approx(value, nan_ok=True)

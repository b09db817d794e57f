"""`make-eval`: references that can be evaluated on, at a cost that was agreed to, and never paid for twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from api_server import KEY, serving

from im_lightning.cli import main
from im_lightning.data.loading import load_examples
from im_lightning.data.settings import Reading
from im_lightning.errors import DataError
from im_lightning.experiments.answers.prompts import read_prompts

ROWS: list[dict[str, Any]] = [
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    {"prompt": "Only asked."},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"conversations": ["First", "Second", "Third"]},
    {"question": "Several?", "answers": ["red", "blue"]},
    {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]},
    {"prompt": "Only asked.", "response": "The same prompt again."},
]
ASKED = [
    [("user", "Add.\n2 and 2")],
    [("user", "Only asked.")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "First"), ("assistant", "Second"), ("user", "Third")],
    [("user", "Several?")],
    [("user", "U")],
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    path = tmp_path / "test_set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def call(data: str, url: str, *more: str) -> int:
    out = str(Path(data).with_name("eval.jsonl"))
    speed = ["--backoff-seconds", "0.01", "--timeout-seconds", "20"]
    return main(["make-eval", data, "--out", out, "--base-url", url, "--api-model", "gpt-test", *speed, *more])


def test_prompts_are_read_with_and_without_answers(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = read_prompts(data, Reading())
    assert [[(turn.role, turn.content) for turn in one.history] for one in prompts] == ASKED
    assert (prompts[0].instruction, prompts[0].input) == ("Add.", "2 and 2")
    assert {one.response for one in prompts} == {""} and {one.source for one in prompts} == {"test_set"}
    assert "6 different prompts in 7 rows; each is taken once" in capsys.readouterr().err


def test_a_row_that_asks_nothing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "U"}\n{"title": "no prompt"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        read_prompts(str(path), Reading())


def test_a_set_of_prompts_alone_is_known_by_name(tmp_path: Path) -> None:
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]},
        {"prompt": ["Draft a mail.", "Check it."], "prompt_id": 1, "category": "writing", "reference": []},
    ]
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(f"mt-bench@{path}", Reading())
    assert [one.prompt for one in prompts] == ["Compose a post.", "Draft a mail."]
    with pytest.raises(DataError, match="no response"):
        load_examples(f"mt-bench@{path}")


def test_several_outputs_per_instruction(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(text: str, time: int) -> str:
        return f"Output {time} to {text}"

    with serving(tmp_path / "log", reply) as server:
        assert call(data, server.url, "--outputs", "3", "--max-requests", "100") == 0
        assert "18 reference outputs to 6 instructions, by gpt-test" in capsys.readouterr().out
        found = load_examples(str(tmp_path / "eval.jsonl"))
        assert Counter(one.prompt_id for one in found) == {p.prompt_id: 3 for p in read_prompts(data, Reading())}
        assert sorted(one.response for one in found[:3]) == [f"Output {k} to Add.\n2 and 2" for k in (1, 2, 3)]
        assert (found[0].instruction, found[0].input, found[0].source) == ("Add.", "2 and 2", "test_set")
        sent = server.answered[0]["body"]
        assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("gpt-test", 1.0, 512)
        first = (tmp_path / "eval.jsonl").read_bytes()
        assert call(data, server.url, "--outputs", "3", "--max-requests", "100") == 0
        assert (tmp_path / "eval.jsonl").read_bytes() == first
        assert call(data, server.url, "--outputs", "4", "--max-requests", "100") == 0
        assert len(server.answered) == 24, "only the new outputs are asked for"


def test_copies_of_one_answer_are_no_several_references(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some servers answer greedily whatever the temperature; at 0 that is what was asked for."""
    with serving(tmp_path / "log", lambda text, time: f"Output to {text}") as server:
        assert call(data, server.url, "--outputs", "3", "--max-requests", "100") == 0
        said = " ".join(capsys.readouterr().err.split())
        assert "that always answers greedily: 3 reference outputs tell no more than one" in said
        more = ("--max-requests", "100", "--temperature", "0", "--out", str(tmp_path / "zero.jsonl"))
        assert call(data, server.url, "--outputs", "3", *more) == 0
        assert "greedily" not in capsys.readouterr().err


def test_what_is_cut_or_refused_is_no_reference(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained models would be measured against half a sentence."""

    def reply(text: str, time: int) -> Any:
        return {"finish": "length"} if text == "U" else {"refusal": "No.", "content": ""} if text == "Hi" else "Fine."

    with serving(tmp_path / "log", reply) as server:
        assert call(data, server.url, "--max-requests", "100") == 0
    said = capsys.readouterr().err
    assert "left out: 1 outputs cut at 512 tokens; raise --max-answer-tokens" in said
    assert "left out: 1 outputs that were refused, the first: No." in said
    assert len(load_examples(str(tmp_path / "eval.jsonl"))) == 4


def test_thoughts_are_no_reference(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that thinks aloud; it takes no temperature but its own."""

    def reply(text: str, time: int) -> Any:
        return (
            "<think>Or?</think>" if text == "Hi" else f"<think>Hm, {text}</think>\n\nFine." if text == "U" else "Good."
        )

    with serving(tmp_path / "log", reply) as server:
        assert call(data, server.url, "--max-requests", "100", "--omit-temperature", "--temperature", "0") == 2
        cause = "--temperature 0: no temperature is sent with --omit-temperature. Fix: leave one of them out"
        assert cause in capsys.readouterr().err
        assert call(data, server.url, "--max-requests", "100", "--omit-temperature") == 0
        assert all("temperature" not in line["body"] for line in server.answered)
    said = capsys.readouterr().err
    assert "1 outputs begin with the model's thoughts, up to </think>, which are left out" in said
    assert "left out: 1 outputs that were refused, the first: the answer holds thoughts alone" in said
    assert Counter(one.response for one in load_examples(str(tmp_path / "eval.jsonl"))) == {"Good.": 4, "Fine.": 1}


def test_the_cost_is_said_before_it_is_spent(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path / "log") as server:
        prices = ["--price-in", "10", "--price-out", "30", "--outputs", "5"]
        assert call(data, server.url, *prices, "--max-cost", "2", "--dry-run") == 0
        said = capsys.readouterr().out
        assert (
            said.startswith("30 requests, about ") and "at most 15,360 to be answered" in said and "at most 0.4" in said
        )
        assert call(data, server.url, *prices) == 2
        assert "nothing limits what it may cost" in capsys.readouterr().err
        assert not server.answered
        assert call(data, server.url, *prices, "--max-cost", "0.018") == 1
        said = capsys.readouterr().err
        assert "--max-cost 0.018: the cap is reached" in said and "of 30 reference outputs are kept" in said
        assert not (tmp_path / "eval.jsonl").exists() and server.answered


def test_a_file_of_the_users_is_not_replaced(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval.jsonl").write_text('{"mine": 1}\n')
    assert call(data, "http://127.0.0.1:9/v1", "--max-requests", "9") == 2
    assert "this file exists, and is no file of answers" in capsys.readouterr().err

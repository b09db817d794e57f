"""If these failed, one odd row would stop the work on a pool, or vanish from it with nothing said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from api_server import KEY, serving
from tiny import make_tiny_llama

from im_lightning.cli import main
from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.tokenization import resolve_template
from im_lightning.errors import DataError
from im_lightning.experiments.loop.run import Loop
from im_lightning.ledger.ledger import RunLedger
from im_lightning.models.checkpoint import load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def turns(*said: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """A row of (role, text) turns; `more` goes to the last of them."""
    messages = [{"role": role, "content": text} for role, text in said]
    messages[-1] |= more
    return {"messages": messages}


ASKED = ("user", "Name a lake.")
ANSWERED = ("assistant", "Bala.")
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "map"}}}
TOOLS = {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]}

ODD: list[tuple[Any, str]] = [  # a row, or the bytes of its line; what of it is said
    ({"instruction": "Name a colour.", "output": ["red", "blue"]}, "output"),
    ({"prompt": "Name a colour.", "chosen": "red", "rejected": "loud"}, "chosen"),
    ({"instruction": "Name a colour."}, "response|output"),
    ({"instruction": 3, "output": "red"}, "instruction"),
    (turns(ASKED), "assistant"),
    ({"messages": []}, "messages"),
    ({"messages": json.dumps([{"role": "user", "content": "Hi"}])}, "JSON text"),
    ({"messages": ["Hi", {"role": "assistant", "content": "Ho"}]}, "not an object"),
    (turns(("narrator", "Once."), ANSWERED), "role 'narrator'"),
    (turns(ASKED, ("assistant", 7)), "not a string but a number"),
    (turns(("user", [{"type": "image", "url": "lake.png"}]), ANSWERED), "part that is not text"),
    (turns(ASKED, ANSWERED, weight=0.5), "weight 0.5"),
    (turns(ASKED, ANSWERED, train=False), "no response"),
    (turns(ASKED, ANSWERED, tool_calls=[{"function": {"name": "look", "arguments": "{"}}]), "not JSON"),
    (b'{"instruction": "Name a lake.", "output": "Ba', "JSON"),
    (b'{"instruction": "Name\x00a lake.", "output": "Bala."}', "JSON"),
    (b'{"instruction": "Name a lake.", "output": "\xff"}', "UTF-8"),
    (b"[" * 100_000 + b"]" * 100_000, "nested too deeply|JSON"),
    (b"42", "not an object|not a JSON object|a number"),
    (turns(("system", "Be terse."), ASKED, ANSWERED), "the chat template refuses it: .*no system turn"),
    (turns(ASKED, ("user", "Please."), ANSWERED), "the chat template refuses it: .*take turns"),
    (turns(ASKED, ANSWERED, tool_calls=[CALL]), "the chat template refuses it: .*tool_calls"),
    ({**turns(ASKED, ANSWERED), **TOOLS}, "the chat template refuses it: it leaves out the tools"),
    (turns(ASKED, ANSWERED, reasoning_content="A lake in Wales."), "refuses it: .*reasoning_content"),
]
REFUSED = [cause for _, cause in ODD if "refuses it" in cause]


def write_mixed(path: Path, rows: int) -> dict[int, str]:
    """A pool of `rows` in which the odd ones lie spread out; the line of each, with what is to be said of it."""
    step, odd, lines, places = rows // len(ODD), list(ODD), [], {}
    for i in range(rows):
        if i % step == step // 2 and odd:
            row, places[i + 1] = odd.pop(0)
            lines.append(row if isinstance(row, bytes) else json.dumps(row).encode())
        else:
            lines.append(json.dumps(turns(("user", f"Name hill {i}."), ("assistant", f"Box Hill {i % 7}."))).encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert len(places) == len(ODD)
    return places


def rejected(path: str | Path) -> dict[int, str]:
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert all(row["file"] == "pool.jsonl" and row["raw"] for row in found)
    return {row["line"]: row["cause"] for row in found}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return make_tiny_llama(tmp_path / "model", hidden=16, layers=1, chat_template=TEMPLATE)


SCORE = ["score", "pool.jsonl", "--out", "scores.parquet", "--indicators", "length_output,ppl,mtld", "--cache-dir", "c"]
QUARANTINE = ["--on-bad-row", "quarantine"]


@pytest.mark.parametrize("good", [76, pytest.param(1980, marks=pytest.mark.slow)])
def test_odd_rows_lie_apart_and_the_others_are_scored_trained_and_selected(
    good: int, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same rows are out in every command, those that the template refuses too, where no template is known."""
    places = write_mixed(Path("pool.jsonl"), good + len(ODD))
    assert main([*SCORE, "--model", model, *QUARANTINE]) == 0
    assert f"{len(ODD)} rows rejected" in capfd.readouterr().out
    table = ScoreTable.read("scores.parquet")
    assert len(table) == good and not table.coverage()[1]["missing"]
    found = rejected("scores.parquet.rejected.jsonl")
    assert list(found) == list(places)
    for line, cause in places.items():
        assert re.search(cause, found[line]), found[line]
    assert set(table.meta["refused"].values()) == {found[line] for line, cause in places.items() if cause in REFUSED}

    fit = [
        "fit", "--data.data=pool.jsonl", f"--data.model={model}", "--data.scores=scores.parquet",
        "--data.on_bad_row=quarantine", "--data.batch_size=64", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
        "--trainer.devices=1", "--trainer.logger=false", "--trainer.enable_checkpointing=false",
        "--mining.ledger=runs", "--mining.refit=false",
    ]  # fmt: skip
    assert main(fit) == 0
    (run,) = RunLedger("runs").records(status=None)
    assert run.pool_digest == table.pool_digest and run.subset["exposures"] == run.subset["rows_seen"] == good
    (aside,) = Path("im-lightning").glob("*/rejected.jsonl")
    assert rejected(aside) == found

    select = ["select", "scores.parquet", "pool.jsonl", "--method", "random", "--budget", str(good), "--out", "s.jsonl"]
    assert main([*select, *QUARANTINE]) == 0
    assert len(load_examples("s.jsonl")) == good and rejected("s.jsonl.rejected.jsonl") == found
    report = ["report", "--scores", "scores.parquet", "--data", "pool.jsonl", "--out", "report.html"]
    assert main([*report, *QUARANTINE]) == 0
    capfd.readouterr()
    assert main(["explain", "s.jsonl", "--text", "Box Hill 3.", *QUARANTINE, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["rows"]
    assert len(told) > 5 and [table.id[one["row"]] for one in told] == [one["id"] for one in told]


def test_all_refused_rows_are_named_at_once_before_a_model_is_loaded(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [turns(ASKED, ANSWERED), *(row for row, cause in ODD if cause in REFUSED), turns(ASKED, ANSWERED)]
    Path("pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(model, "model.safetensors").unlink()  # the tokenizer alone is left
    assert main([*SCORE, "--model", model]) == 1
    said = capfd.readouterr().err
    assert "pool.jsonl:2: the chat template refuses it" in said and "no system turn" in said
    others = ", ".join(f"pool.jsonl:{line}" for line in range(3, len(REFUSED) + 2))
    assert f"{len(REFUSED) - 1} more bad rows: {others}. Fix: use another --template, or mend the row" in said


def test_a_template_refuses_rows_in_python(model: str) -> None:
    rows = [turns(ASKED, ANSWERED), turns(("system", "Be terse."), ASKED, ANSWERED)]
    aside: list[Any] = []
    template = resolve_template("auto", load_tokenizer(model))
    kept = load_examples(rows, on_bad_row="quarantine", rejected=aside, refuses=template.refusal)
    assert len(kept) == 1 and "no system turn" in aside[0].cause and aside[0].id
    with pytest.raises(DataError, match=r"rows:2: the chat template refuses it: .*no system turn.*Fix: use another"):
        load_examples(rows, refuses=template.refusal)


ENDPOINT = ["--base-url", "http://127.0.0.1:9/v1", "--api-model", "m", "--dry-run"]


@pytest.mark.parametrize(
    "words",
    [
        ["make-eval", "odd.jsonl", "--out", "e.jsonl", *ENDPOINT],
        ["score-llm", "odd.jsonl", "--out", "g.parquet", *ENDPOINT],
        ["judge", "odd.jsonl", "--references", "good.jsonl", "--out", "judged"],
        ["judge", "good.jsonl", "--references", "odd.jsonl", "--out", "judged"],
        ["check", "odd.jsonl", "good.jsonl", "--near", "0"],
        ["check", "good.jsonl", "odd.jsonl", "--near", "0"],
    ],
    ids=" ".join,
)
def test_what_is_set_aside_is_said_with_its_place_and_cause(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    good, bad = json.dumps({"prompt": "Name a lake.", "response": "Bala."}), json.dumps({"title": "no prompt"})
    Path("good.jsonl").write_text(good + "\n")
    Path("odd.jsonl").write_text("\n".join([good, bad, bad]) + "\n")
    assert main([*words, *QUARANTINE]) in (0, 1)
    assert "odd.jsonl: 2 bad rows set aside, the first odd.jsonl:2: " in capsys.readouterr().err
    Path("odd.jsonl").write_text(f"{bad}\n{bad}\n")
    assert main([*words, *QUARANTINE]) == 1
    said = capsys.readouterr().err
    assert "odd.jsonl: none of its 2 rows can be used; the first: odd.jsonl:1: " in said


def test_a_prompt_that_the_template_refuses_is_not_answered(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [turns(ASKED, ANSWERED), turns(("system", "Be terse."), ASKED, ANSWERED)]
    rows.append(
        turns(("user", "Name a hill."), ANSWERED, tool_calls=[CALL])
    )  # refused for its answer, which is not used
    Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", "eval.jsonl", "--model", model, "--max-new-tokens", "2", "--out", "a.jsonl"]
    assert main(words) == 1
    assert "eval.jsonl:2: the chat template refuses it: " in capfd.readouterr().err
    assert main([*words, *QUARANTINE]) == 0
    assert "1 bad row set aside, the first eval.jsonl:2: the chat template refuses it: " in capfd.readouterr().err
    assert len(Path("a.jsonl").read_text().splitlines()) == 2


def test_python_hears_of_rows_that_it_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Name a lake.", "response": "Bala."}, {"title": "no prompt"}]
    load_examples(rows, on_bad_row="quarantine")
    assert "rows: 1 bad row set aside, the first rows:2: " in capsys.readouterr().err
    aside: list[Any] = []
    load_examples(rows, on_bad_row="quarantine", rejected=aside)
    assert len(aside) == 1 and not capsys.readouterr().err


def test_grades_go_beside_scores_that_lack_the_refused_rows(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pool with rows that the template refused can be graded: they are out there, too."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    places = write_mixed(Path("pool.jsonl"), 48 + len(ODD))
    assert main([*SCORE[:5], "length_output", "--cache-dir", "c", "--model", model, *QUARANTINE]) == 0
    capsys.readouterr()
    with serving(Path("log"), lambda text, time: "[[7]]") as server:
        asked = ["--base-url", server.url, "--api-model", "m", "--max-requests", "99", "--scores", "scores.parquet"]
        assert main(["score-llm", "pool.jsonl", "--out", "graded.parquet", *asked, *QUARANTINE]) == 0
    assert f"{len(places)} bad rows set aside" in capsys.readouterr().err
    table, graded = ScoreTable.read("scores.parquet"), ScoreTable.read("graded.parquet")
    assert graded.id == table.id and set(graded.values["llm_grade"]) == {7.0}


def test_a_loop_leaves_out_what_the_template_refuses(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("pool", 240), ("eval", 48)):
        write_mixed(Path(f"{name}.jsonl"), rows)
    size = ["--runs", "14", "--seeds", "2", "--device", "cpu", "--max-length", "64", "--lora-rank", "0"]
    command = ["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", model, *size, "--dry-run"]
    assert main([*command, *QUARANTINE]) == 0
    said = capsys.readouterr()
    assert "14 designed runs of " in said.out
    assert all(f"{name}.jsonl: {len(ODD)} bad rows set aside" in said.err for name in ("pool", "eval"))


def test_the_page_of_a_loop_leaves_out_what_the_template_refuses(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table did not say which rows these are: a loop of hours ended in an error, without its page."""

    def stops(loop: Loop, table: ScoreTable) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "_designed_runs", stops)
    for name, rows in (("pool", 120), ("eval", 48)):
        write_mixed(Path(f"{name}.jsonl"), rows)
    size = ["--runs", "14", "--seeds", "2", "--device", "cpu", "--max-length", "64", "--lora-rank", "0"]
    assert main(["run", "pool.jsonl", "--eval-data", "eval.jsonl", "--model", model, *size, *QUARANTINE]) == 130
    page = ["report", "--scores", "im-run/scores.parquet", "--data", "pool.jsonl", "--out", "report.html"]
    assert main([*page, *QUARANTINE]) == 0

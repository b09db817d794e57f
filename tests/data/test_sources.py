"""Published sets by name: each is read from its own form, with nothing of it lost or invented."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from im_lightning.cli import main
from im_lightning.data.file_io import records
from im_lightning.data.loading import Rejected, load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.sources import PUBLISHED, mixture
from im_lightning.errors import DataError, RequestError

LABELS = {"spam": {"value": 0.0, "count": 3}, "quality": {"value": 0.416, "count": 3}}


def message(id: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
    """A message of OASST1 as the file of flat messages has it."""
    return {
        "message_id": id, "parent_id": parent, "user_id": "8e95461f", "created_date": "2023-02-05T14:23:50",
        "text": text, "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False,
        "rank": None, "synthetic": False, "model_name": None, "message_tree_id": "t1",
        "tree_state": "ready_for_export", "labels": LABELS, **more,
    }  # fmt: skip


MESSAGES = [
    message("a", None, "prompter", "Why can't we divide by 0?"),
    message("b", "a", "assistant", "Second best.", rank=1),
    message("c", "a", "assistant", "Best.", rank=0),
    message("d", "a", "assistant", "Removed.", rank=2, deleted=True),
    message("e", "c", "prompter", "And 0/0?", rank=0),
    message("f", "e", "assistant", "Undefined."),
    message("g", "b", "prompter", "Nobody answers me."),
    message("h", None, "prompter", "¿Qué es?", lang="es", message_tree_id="t2"),
    message("i", "h", "assistant", "Eso.", lang="es", message_tree_id="t2"),
    message("j", None, "prompter", "Unanswered.", message_tree_id="t3"),
]


def nested(id: str) -> dict[str, Any]:
    node = next(one for one in MESSAGES if one["message_id"] == id)
    return {**node, "replies": [nested(one["message_id"]) for one in MESSAGES if one["parent_id"] == id]}


TREES = [
    {"message_tree_id": f"t{n}", "tree_state": "ready_for_export", "prompt": nested(id)}
    for n, id in enumerate("ahj", start=1)
]
ANSWER = {"author": "x", "author_id": 1, "author_profile": "https://stackoverflow.com/users/1"}
CODE = "<p>Use a <code>set</code>:</p>\n<pre><code>x_y = set(a)\nif 1 &lt; 2 * 3:\n    pass\n</code></pre>"
FILES: dict[str, tuple[str, list[dict[str, Any]], list[list[tuple[str, str]]]]] = {
    "alpaca": (
        "alpaca_data.json",
        [{"instruction": "Add.", "input": "2 and 2", "output": "4", "text": "Below is an instruction …"}],
        [[("user", "Add.\n2 and 2"), ("assistant", "4")]],
    ),
    "open-assistant": (
        "2023-04-12_oasst_ready.messages.jsonl.gz",
        MESSAGES,
        [
            [("user", "Why can't we divide by 0?"), ("assistant", "Best."),
             ("user", "And 0/0?"), ("assistant", "Undefined.")],
            [("user", "¿Qué es?"), ("assistant", "Eso.")],
        ],
    ),
    "stackexchange": (
        "train.jsonl",
        [
            {
                "qid": 4, "question": "<p>How <em>fast</em>?</p>", "date": "2008/07/31",
                "metadata": ["https://stackoverflow.com/questions/4"],
                "answers": [
                    {"answer_id": 7, **ANSWER, "pm_score": 2, "selected": False, "text": "<p>No.</p>"},
                    {"answer_id": 8, **ANSWER, "pm_score": 5, "selected": True, "text": CODE},
                ],
            },
            {
                "qid": 5, "question": "<p>Bad?</p>", "date": "2008/07/31", "metadata": [],
                "answers": [{"answer_id": 9, **ANSWER, "pm_score": 0, "selected": False, "text": "<p>So so.</p>"}],
            },
        ],
        [[("user", "How *fast*?"),
          ("assistant", "Use a `set`:\n\n```\nx_y = set(a)\nif 1 < 2 * 3:\n    pass\n```")]],
    ),
    "wikihow": (
        "wikihowAll.csv",
        [
            {"headline": "\nKeep it.,\nSell it.", "title": "How to Sell Art", "text": "Take photos.\n\n, Then sell."},
            {"headline": "Plant.", "title": "Grow Roses", "text": "Dig."},
            {"headline": "Nothing.", "title": "How to Wait", "text": ""},
        ],
        [
            [("user", "How to Sell Art?"), ("assistant", "Take photos.\n Then sell.")],
            [("user", "How to grow Roses?"), ("assistant", "Dig.")],
        ],
    ),
    "dolly": (
        "databricks-dolly-15k.jsonl",
        [
            {"instruction": "When?", "context": "It flew in 2000.", "response": "2000.", "category": "closed_qa"},
            {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
        ],
        [[("user", "When?\nIt flew in 2000."), ("assistant", "2000.")], [("user", "Why?"), ("assistant", "So.")]],
    ),
    "open-orca": (
        "1M-GPT4-Augmented.jsonl",
        [
            {"id": "niv.242684", "system_prompt": "", "question": "Q?", "response": "A."},
            {"id": "flan.564327", "system_prompt": "You are terse.", "question": "Q2?", "response": "A2."},
        ],
        [
            [("user", "Q?"), ("assistant", "A.")],
            [("system", "You are terse."), ("user", "Q2?"), ("assistant", "A2.")],
        ],
    ),
    "self-instruct": (
        "self_instruct.jsonl",
        [
            {"prompt": "Make a list of 10 ways.\n\nOutput:", "completion": " 1. Make a schedule.<|endoftext|>"},
            {"id": "user_oriented_task_0", "motivation_app": "Grammarly", "instruction": "Rewrite.",
             "instances": [{"input": "If you have", "output": "If so"}]},
            {"id": "user_oriented_task_1", "motivation_app": "Gmail", "instruction": "Answer.",
             "instances": {"input": [""], "output": ["Dear"]}},
            {"id": "seed_task_0", "name": "breakfast", "instruction": "Is there?", "is_classification": False,
             "instances": [{"input": "", "output": "Yes."}]},
        ],
        [
            [("user", "Make a list of 10 ways."), ("assistant", "1. Make a schedule.")],
            [("user", "Rewrite.\nIf you have"), ("assistant", "If so")],
            [("user", "Answer."), ("assistant", "Dear")],
            [("user", "Is there?"), ("assistant", "Yes.")],
        ],
    ),
    "lima": (
        "train.jsonl",
        [
            {"conversations": ["Can cells move?", "Yes."], "source": "stackexchange"},
            {"conversations": ["Hi", "Hello", "Bye", "See you"], "source": "multi_turn"},
            {"conversations": ["Only asked"], "source": "test"},
        ],
        [
            [("user", "Can cells move?"), ("assistant", "Yes.")],
            [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")],
        ],
    ),
    "gsm8k": (
        "train.jsonl",
        [{"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 24"}],
        [[("user", "How many?"), ("assistant", "She sold 48/2 = 24 clips.\n#### 24")]],
    ),
    "tulu-3": (
        "tulu.jsonl",
        [
            {"id": "oasst1_3", "source": "ai2-adapt-dev/oasst1_converted", "messages": [
                {"role": "system", "content": "S"}, {"role": "user", "content": "U"},
                {"role": "assistant", "content": "A"}]},
        ],
        [[("system", "S"), ("user", "U"), ("assistant", "A")]],
    ),
    "ultrachat": (
        "train_0.jsonl",
        [
            {"id": "0", "data": ["U", "A", "U2", "A2"]},
            {"prompt": "P", "prompt_id": "f0e3", "messages": [
                {"content": "P", "role": "user"}, {"content": "B", "role": "assistant"}]},
        ],
        [
            [("user", "U"), ("assistant", "A"), ("user", "U2"), ("assistant", "A2")],
            [("user", "P"), ("assistant", "B")],
        ],
    ),
}  # fmt: skip
"""Set → name of its published file, rows in its form, conversations that it holds."""


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def turns(data: Any) -> list[list[tuple[str, str]]]:
    return [[(turn.role, turn.content) for turn in example.messages] for example in load_examples(data)]


def test_every_set_is_read_here() -> None:
    """But mt-bench, which has no answers (`tests/experiments/answers/test_make_eval.py`)."""
    assert set(PUBLISHED) == {*FILES, "mt-bench"}


@pytest.mark.parametrize("name", FILES)
def test_a_set_is_read_from_its_published_file(name: str, tmp_path: Path) -> None:
    file, rows, wanted = FILES[name]
    data = f"{name}@{write(tmp_path / file, rows)}"
    assert turns(data) == wanted
    assert {example.source for example in load_examples(data)} == {name}


def test_an_instruction_keeps_its_input_apart(tmp_path: Path) -> None:
    """The Alpaca template puts inputs under a heading of their own."""
    one = load_examples(f"dolly@{write(tmp_path / 'd.jsonl', FILES['dolly'][1])}")[0]
    assert (one.instruction, one.input) == ("When?", "It flew in 2000.")


def test_trees_and_flat_messages_are_the_same_conversations(tmp_path: Path) -> None:
    trees = write(tmp_path / "ready.trees.jsonl.gz", TREES)
    assert turns(f"open-assistant@{trees}") == FILES["open-assistant"][2]


def test_all_ways_down_a_tree(tmp_path: Path) -> None:
    """Each answer counts once: the unanswered question after the second best leads to no copy of it."""
    flat = write(tmp_path / "m.jsonl", MESSAGES)
    first, best, second = FILES["open-assistant"][2][0][0], FILES["open-assistant"][2][0], ("assistant", "Second best.")
    assert turns(f"open-assistant:paths=all:lang=en@{flat}") == [best, [first, second]]


def test_what_is_left_out_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = write(tmp_path / "m.jsonl", MESSAGES)
    load_examples(f"OPEN-ASSISTANT:lang=en@{flat}")
    said = capsys.readouterr().err
    assert f"{flat} as open-assistant: left out: " in said
    assert "1 trees deleted or in another language" in said
    assert "1 messages deleted or in another language" in said and "1 trees without an answer" in said


def test_the_score_that_an_answer_needs(tmp_path: Path) -> None:
    file = write(tmp_path / "s.jsonl", FILES["stackexchange"][1])
    assert len(turns(f"stackexchange:min_score=0@{file}")) == 2
    with pytest.raises(DataError, match="it holds no rows"):
        load_examples(f"stackexchange:min_score=6@{file}")


def test_a_sample_is_the_same_each_time_and_in_order(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {k}.", "input": "", "output": str(k)} for k in range(50)]
    file = write(tmp_path / "a.jsonl", rows)
    drawn = [[int(e.response) for e in load_examples(f"alpaca:rows=9:seed={seed}@{file}")] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(one) == 9 and one == sorted(one) for one in drawn)
    counts = [0] * 50
    for seed in range(2000):
        for k in (int(e.response) for e in load_examples(f"alpaca:rows=5:seed={seed}@{file}")):
            counts[k] += 1
    assert all(140 < count < 260 for count in counts), counts  # 200 each, sd 13.4


def test_a_row_of_another_form_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "Q?", "response": "A."}, {"question": "Q?", "answer": "A."}])
    with pytest.raises(DataError) as error:
        load_examples(f"open-orca@{file}")
    assert f"{file}:2: it has no 'response', which rows of this set have (it has question, answer)" in str(error.value)


QUESTION: dict[str, Any] = {"message_id": "q", "role": "prompter", "text": "Q?", "lang": "en"}
ODD: list[tuple[str, dict[str, Any]]] = [
    ("gsm8k", {"question": "How many?", "answer": 24}),
    ("self-instruct", {"instruction": "Rewrite.", "instances": []}),
    ("self-instruct", {"instruction": "Rewrite.", "instances": ["a"]}),
    ("self-instruct", {"instruction": "Rewrite.", "instances": {"input": "a", "output": "Dear"}}),
    ("self-instruct", {"prompt": 3, "completion": "a"}),
    ("stackexchange", {"question": "<p>Q</p>", "answers": [{"text": "<p>A</p>"}]}),
    ("stackexchange", {"question": "<p>Q</p>", "answers": [{"text": "<p>A</p>", "pm_score": "many"}]}),
    ("stackexchange", {"question": "<p>Q</p>", "answers": {"text": "<p>A</p>", "pm_score": 2}}),
    ("lima", {"conversations": 3}),
    ("ultrachat", {"data": 3}),
    ("mt-bench", {"turns": 3}),
    ("mt-bench", {"turns": "Write."}),
    ("open-assistant", {"prompt": {**QUESTION, "replies": ["A."]}}),
    ("open-assistant", {"prompt": {**QUESTION, "replies": 3}}),
    ("open-assistant", {"prompt": {**QUESTION, "replies": [{"role": "assistant"}]}}),
    ("open-assistant", {"prompt": {**QUESTION, "replies": [{**QUESTION, "rank": "a"}, {**QUESTION, "rank": 0}]}}),
    ("open-assistant", {**QUESTION, "message_id": ["q"], "replies": [{"text": "A."}]}),
]  # fmt: skip
"""Rows with values of other kinds than those that their set has."""


@pytest.mark.parametrize(("name", "odd"), ODD)
def test_a_row_with_values_of_other_kinds_is_a_bad_row(name: str, odd: dict[str, Any], tmp_path: Path) -> None:
    good = FILES["self-instruct"][1] if name == "mt-bench" else FILES[name][1]
    if name == "mt-bench":
        good = [{"turns": ["Write.", "Again."]}]
    file = write(tmp_path / "a.jsonl", [odd, *good])
    source = PUBLISHED[name]
    options = {option: value[0] if isinstance(value, tuple) else value for option, value in source.options.items()}
    found = list(source.rows(records(Path(file)), options, Counter()))
    assert [(line, cause.split(" (")[0]) for line, _, cause in found if cause] == [
        (1, "it has not the form of this set")
    ]
    assert any(cause is None for _, _, cause in found)
    if name != "mt-bench":
        rejected: list[Rejected] = []
        load_examples(f"{name}@{file}", on_bad_row="quarantine", rejected=rejected)
        assert [(bad.file, bad.line) for bad in rejected] == [(file, 1)]
        with pytest.raises(DataError, match=r"a.jsonl:1: it has not the form of this set \("):
            load_examples(f"{name}@{file}")


def test_a_missing_package_is_no_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "markdownify", None)
    file = write(tmp_path / "s.jsonl", FILES["stackexchange"][1])
    with pytest.raises(RequestError, match=r"the set stackexchange, whose texts are HTML,"):
        load_examples(f"stackexchange@{file}", on_bad_row="quarantine")


def test_a_message_that_answers_itself_is_a_bad_row(tmp_path: Path) -> None:
    loop = [message("y", None, "prompter", "Q?"), message("y", "y", "assistant", "A.")]
    file = write(tmp_path / "m.jsonl", [*MESSAGES, *loop])
    rejected: list[Rejected] = []
    assert len(load_examples(f"open-assistant@{file}", on_bad_row="quarantine", rejected=rejected)) == 2
    assert [(bad.line, bad.cause) for bad in rejected] == [
        (len(MESSAGES) + 1, "it has not the form of this set (ValueError: a message answers itself)")
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("wikihow", "the set wikihow does not lie on the hub. Fix: download it (wikihowAll.csv), and write"),
        ("open-assistant:paths=some@f", "it does not take 'paths=some'. Fix: write some of rows=0, seed=0, lang=all, "),
        ("dolly:lang=en@f", "it does not take 'lang=en'"),
        ("dolly:rows=many@f", "it does not take 'rows=many'"),
        ("dolly:rows=-5@f", "it does not take 'rows=-5'"),
        ("dolly@nowhere.jsonl", "nowhere.jsonl: there is no such file"),
    ],
)
def test_what_cannot_be_read_is_refused(data: str, said: str) -> None:
    with pytest.raises(RequestError) as error:
        load_examples(data)
    assert said in str(error.value)


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user's files are called must not change what they hold."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dolly").mkdir()
    write(tmp_path / "dolly" / "own.jsonl", [{"prompt": "U", "response": "A"}])
    assert load_examples("dolly")[0].source == "own"


def test_sizes_and_weights_of_a_recipe() -> None:
    assert mixture({"dolly": 30, "wikihow@a.csv": 10}) == ["dolly:rows=30", "wikihow:rows=10@a.csv"]
    assert mixture({"dolly": 1, "gsm8k": 1, "rows": 7}) == ["dolly:rows=4", "gsm8k:rows=3"]
    for given in ({"dolly": 0.5}, {"dolly": 0}, {"dolly": 0, "rows": 9}):
        with pytest.raises(RequestError, match="give each a number of rows, or weights"):
            mixture(given)
    with pytest.raises(RequestError, match="there is no set 'cats'"):
        mixture({"cats": 9})


def test_the_source_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name travels to the table, where designs and mixtures look for it."""
    file = write(tmp_path / "wikihowAll.csv", FILES["wikihow"][1])
    out = str(tmp_path / "s.parquet")
    assert main(["score", file, "--source", "wikihow", "--indicators", "mtld", "--out", out]) == 0
    assert ScoreTable.read(out).source == ["wikihow", "wikihow"]
    assert main(["score", file, "--source", "cats", "--indicators", "mtld", "--out", out]) == 2
    assert "--source cats: there is no such set. Fix: use one of alpaca, open-assistant" in capsys.readouterr().err


def test_the_sources_of_a_recipe(tmp_path: Path, small_base: str) -> None:
    """A checkpoint keeps what the recipe meant: the data module comes back from its hyperparameters."""
    from im_lightning import InstructMiningDataModule

    rows = [{"instruction": f"Say {k}.", "context": "", "response": str(k), "category": "c"} for k in range(30)]
    sources = {f"dolly@{write(tmp_path / 'd.jsonl', rows)}": 20.0, f"gsm8k@{write(tmp_path / 'g.jsonl', GSM)}": 1.0}
    data = InstructMiningDataModule(sources=sources, model=small_base, run_dir=str(tmp_path / "run"))
    data.setup("fit")
    assert [data.pool.sources.count(name) for name in ("dolly", "gsm8k")] == [20, 1]
    again = InstructMiningDataModule(**dict(data.hparams))
    assert again.hparams == data.hparams
    for given in ({}, {"data": "pool.jsonl", "sources": sources}):
        with pytest.raises(RequestError, match=r"or sources .published sets"):
            InstructMiningDataModule(model=small_base, **given)


GSM = FILES["gsm8k"][1]


def test_a_sample_of_a_folder_is_of_all_its_files_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Published sets are downloaded in shards: rows=9 of three of them were 27."""
    (tmp_path / "shards").mkdir()
    files = [tmp_path / "shards" / f"{part}.jsonl" for part in range(3)]
    for part, file in enumerate(files):
        write(file, [{"instruction": f"Say {part}-{k}.", "input": "", "output": f"{part}-{k}"} for k in range(20)])
    read = [e.response for e in load_examples(f"alpaca:rows=9@{tmp_path / 'shards'}")]
    assert len(read) == 9 == len(set(read)) and len({one[0] for one in read}) > 1
    assert read == [e.response for e in load_examples(f"alpaca:rows=9@{tmp_path / 'shards'}")]
    assert len(load_examples([f"alpaca:rows=9@{file}" for file in files])) == 27, "files that are named one by one"
    capsys.readouterr()
    assert len(load_examples(f"alpaca:rows=70@{tmp_path / 'shards'}")) == 60
    said = capsys.readouterr().err
    assert said.count("asks for more") == 1 and "it has 60 rows where rows=70" in said
    write(files[1], [{"instruction": "No answer."}, {"instruction": "Say x.", "input": "", "output": "x"}])
    rejected: list[Rejected] = []
    assert len(load_examples(f"alpaca:rows=9@{tmp_path / 'shards'}", on_bad_row="quarantine", rejected=rejected)) == 9
    assert [(bad.file, bad.line) for bad in rejected] == [(str(files[1]), 1)]

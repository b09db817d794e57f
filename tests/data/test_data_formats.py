"""Formats: a row read as the wrong format trains the model on the wrong text, silently."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from im_lightning.data.example import Example
from im_lightning.data.formats import BadRow, convert, detect_format
from im_lightning.data.loading import check_answer, check_columns, check_format
from im_lightning.errors import RequestError


def turns(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in example.messages]


QA = [("user", "Hi"), ("assistant", "Hello")]

ROWS = {
    "alpaca": [
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": None, "output": "Hello", "messages": None},
        {"instruction": "Hi", "context": "", "response": "Hello", "category": "open_qa"},
        {"instruction": "Hi", "input": "", "output": "Hello", "prompt": "### Instruction: Hi ### Response:"},
        {"instruction": "Hi", "completion": "Hello"},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": "x", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        {"conversation": [{"from": "Human", "value": "Hi", "weight": None}, {"from": "chatgpt", "value": "Hello"}]},
        {"conversations": ["Hi", "Hello"]},
        {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ],
    "messages": [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {
            "prompt": "Hi",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "Hello"},
            ],
        },
    ],
    "prompt-response": [
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"question": "Hi", "answer": "Hello"},
        {"query": "Hi", "response": "Hello"},
        {"input": "Hi", "output": "Hello"},
        {"instruction": None, "question": "Hi", "response": "Hello", "system_prompt": ""},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
    ],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_formats_are_told_apart_and_mean_the_same(name: str, row: dict):
    """All spellings in use load without a flag; the named format reads what `auto` reads."""
    assert detect_format(row) == name
    assert turns(convert(row)) == QA
    assert convert(row, name) == convert(row)


def test_alpaca_keeps_the_border_between_instruction_and_input():
    """The Alpaca template has a heading for each; joined, the two would be one."""
    example = convert({"instruction": "Add.", "input": "2 2", "output": "4", "system": "Be brief."}, source="pool")
    assert (example.instruction, example.input, example.source) == ("Add.", "2 2", "pool")
    assert turns(example) == [("system", "Be brief."), ("user", "Add.\n2 2"), ("assistant", "4")]
    absent, empty = ({"instruction": "a", "output": "b"}, {"instruction": "a", "input": "", "output": "b"})
    assert convert(absent).id == convert(empty).id


def test_alpaca_history_comes_first():
    """LLaMA-Factory's multi-turn Alpaca rows keep earlier turns in `history`."""
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}
    assert turns(convert(row)) == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_multi_turn_with_system():
    """Turns keep their order and roles."""
    said = [("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "")]
    row = {"conversations": [{"from": role, "value": text} for role, text in said]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert turns(convert(row)) == list(zip(roles, ["s", "a", "b", "c", ""], strict=True))
    row = {"system": "s", "conversations": row["conversations"][1:]}
    assert turns(convert(row))[0] == ("system", "s")


@pytest.mark.parametrize("row", [{"instruction": "a", "output": ""}, {"prompt": "a", "response": ""}])
def test_an_empty_response_is_valid(row: dict):
    """The Alpaca file has such rows; they stay in the table, with a reason instead of a likelihood."""
    assert convert(row).response == ""


def test_own_source_goes_before_the_file():
    """Mixtures of sources are drawn by this field."""
    row = {"instruction": "a", "output": "b", "source": "dolly"}
    assert convert(row, source="pool").source == "dolly"
    assert convert({**row, "source": None}, source="pool").source == "pool"
    assert convert({**row, "source": 3}, source="pool").source == "pool"


BAD = [
    ([1, 2], "auto", "the row is not an object but a list"),
    ("text", "auto", "the row is not an object but a string"),
    (None, "auto", "the row is not an object but null"),
    ({}, "auto", "no response: its fields are those of no known format (it is empty)"),
    ({"text": "a"}, "auto", "no response: its fields are those of no known format (it has text)"),
    ({"instruction": "a", "input": "b"}, "auto", "no response: none of the fields output, response"),
    ({"instruction": "a", "output": None}, "auto", "no response: none of the fields output, response"),
    ({"instruction": "a", "output": 4}, "auto", "its field 'output' is not a string but a number"),
    ({"instruction": ["a"], "output": "b"}, "auto", "its field 'instruction' is not a string but a list"),
    ({"instruction": "a", "input": {"x": 1}, "output": "b"}, "auto", "its field 'input' is not a string but an object"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "auto", "its field 'history' is not a list of"),
    ({"prompt": "a", "response": True}, "auto", "its field 'response' is not a string but true or false"),
    ({"prompt": "a"}, "prompt-response", "no response: it has none of the fields"),
    ({"prompt": "a", "response": "b"}, "alpaca", "no instruction: its field 'instruction' is absent (it has prompt"),
    ({"prompt": "a", "response": "b"}, "sharegpt", "no response: none of the fields messages, conversations"),
    ({"conversations": []}, "auto", "no response: the conversation is empty"),
    ({"messages": "a"}, "messages", "its field 'messages' is not a list of turns but a string"),
    ({"messages": {"role": "user"}}, "auto", "its field 'messages' is not a list of turns but an object"),
    ({"messages": [{"role": "user", "content": "a"}]}, "auto", "no response: the conversation has no assistant turn"),
    ({"conversations": ["a", "b", "c"]}, "auto", "no response: the conversation ends with a user turn"),
    ({"messages": [1]}, "auto", "turn 1 of its field 'messages' is not an object but a number"),
    ({"messages": [{"role": "narrator", "content": "a"}]}, "auto", "turn 1 of its field 'messages' has the role 'narr"),
    ({"messages": [{"content": "a"}]}, "auto", "turn 1 of its field 'messages' has no role"),
    ({"messages": [{"role": "assistant", "content": None}]}, "auto", "turn 1 of its field 'messages' has no text"),
    ({"messages": [{"role": "assistant", "content": 1}]}, "auto", "is not a string but a number"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "auto", "has a part that is not text"),
]


@pytest.mark.parametrize(("row", "format", "cause"), BAD)
def test_bad_rows_say_what_is_wrong(row: object, format: str, cause: str):
    """The person who must mend the row needs the cause, not a KeyError."""
    with pytest.raises(BadRow) as caught:
        convert(row, format)
    assert cause in str(caught.value)


def test_unknown_format():
    """A mistyped format must not quietly mean `auto`."""
    with pytest.raises(RequestError, match=r"format 'alpacca': there is no such format. Fix: use one of auto, "):
        check_format("alpacca")


# nothing that carries content vanishes


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "How many?", "context": "A table of pumps.", "answer": "4"}, "How many?\nA table of pumps."),
        ({"prompt": "Translate.", "input": "The kettle.", "output": "De ketel."}, "Translate.\nThe kettle."),
        ({"query": "Who?", "passage": "Ada wrote it.", "hint": "A poet's child.", "response": "Ada"},
         "Who?\nAda wrote it.\nA poet's child."),
        ({"instruction": "Add.", "input": "2", "context": "on paper", "output": "4"}, "Add.\n2\non paper"),
        ({"instruction": "Add.", "input": "2 2", "context": "2 2", "output": "4"}, "Add.\n2 2"),
        ({"instruction": "", "input": "Name a lake.", "output": "Como"}, "Name a lake."),
        ({"question": "How many?", "context": "", "answer": "4"}, "How many?"),
    ],
)  # fmt: skip
def test_companions_of_the_prompt_join_it(row: dict, prompt: str) -> None:
    """A model that is asked about a passage which it is not shown learns to make answers up."""
    assert turns(convert(row))[0] == ("user", prompt)
    system = convert({**row, "system": "Be brief."})
    assert turns(system)[:2] == [("system", "Be brief."), ("user", prompt)]


def test_companions_have_the_border_of_an_input() -> None:
    """The Alpaca template sets them under a heading of their own; a row without one keeps the id it always had."""
    example = convert({"question": "How many?", "context": "A table.", "answer": "4"})
    assert (example.instruction, example.input) == ("How many?", "A table.")
    plain = convert({"question": "How many?", "context": "", "answer": "4"})
    assert plain.id == convert({"prompt": "How many?", "response": "4"}).id and plain.input is None


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"instruction": "a", "output": "b", "category": "qa", "id": "x7", "score": 3}, ["category"]),
        ({"prompt": "a", "response": "b", "thoughts": ["because", "so"], "note": " "}, ["thoughts"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "topic": ["t"]},
         ["topic"]),
        ({"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]}, []),
    ],
)  # fmt: skip
def test_text_that_is_not_used_is_named(row: dict, names: list[str]) -> None:
    unused: Counter[str] = Counter()
    convert(row, unused=unused)
    assert sorted(unused) == names


def test_columns_say_which_field_is_what() -> None:
    row = {"q": "Who?", "text": "Ada wrote it.", "a": "Ada", "prompt": "an old one", "source": "wiki"}
    columns = check_columns("prompt=q, context=text,response=a")
    unused: Counter[str] = Counter()
    example = convert(row, columns=columns, unused=unused)
    assert turns(example) == [("user", "Who?\nAda wrote it."), ("assistant", "Ada")] and example.source == "wiki"
    assert list(unused) == ["prompt"]
    turned = convert({"talk": ["Hi", "Hello"]}, columns={"messages": "talk"})
    assert turns(turned) == QA
    called = {"talk": ["Hi", "Hello"], "functions": [{"name": "f"}]}
    offered = convert(called, columns=check_columns("messages=talk,tools=functions"), unused=unused)
    assert offered.tools == '[{"name":"f"}]' and list(unused) == ["prompt"]
    with pytest.raises(BadRow, match=r"no response: "):
        convert({"q": "Who?"}, columns=columns)


def test_the_source_may_have_a_name_of_its_own() -> None:
    """Alone it changes nothing else of how the row is read, and is not listed among what was not used."""
    row, unused = {"prompt": "Hi", "response": "Hello", "origin": "web", "source": "file"}, Counter()
    for named in ("source=origin", "prompt=prompt,response=response,source=origin"):
        example = convert(row, source="pool", columns=check_columns(named), unused=unused)
        assert (example.source, example.prompt, example.response) == ("web", "Hi", "Hello")
    assert not unused
    assert convert({**row, "origin": None}, source="pool", columns={"source": "origin"}).source == "pool"
    for number in (3, 3.0):  # topics and clusters; of a column with holes pandas makes floats
        found = convert({**row, "origin": number}, source="pool", columns={"source": "origin"})
        assert found.source == "3"
    assert convert({**row, "origin": float("nan")}, source="pool", columns={"source": "origin"}).source == "pool"
    assert convert(row, source="pool", unused=unused).source == "file" and unused == {"origin": 1}


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (
            "prompt",
            "columns 'prompt': is not a list of names and fields. Fix: write NAME=FIELD,…, such as prompt=",
        ),
        ("prompt=q,answer=a", "columns: there is no column answer. Fix: name some of prompt, response, context"),
    ],
)
def test_wrong_columns_are_refused(columns: str, text: str) -> None:
    with pytest.raises(RequestError) as error:
        check_columns(columns)
    assert text in str(error.value)


# lists where a text is wanted

SEVERAL = [
    ({"question": "A colour?", "answers": ["red", "blue"]}, "its field 'answers' is a list of 2 texts where one"),
    ({"prompt": "A colour?", "response": ["red"]}, "its field 'response' is a list of one text where one is wanted"),
    ({"instruction": "A colour?", "output": ["red", "blue"]}, "its field 'output' is a list of 2 texts"),
    ({"question": "A colour?", "answers": {"text": ["red", "blue"], "answer_start": [0, 4]}}, "is a list of 2 texts"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "cause"), SEVERAL)
def test_several_answers_are_never_read_as_turns(row: dict, cause: str) -> None:
    """Read in turn, the second answer would be what the user says and the third what the model learns."""
    with pytest.raises(BadRow) as error:
        convert(row)
    assert cause in str(error.value) and str(error.value).endswith("--answer first takes the first")
    assert turns(convert(row, answer="first")) == [("user", "A colour?"), ("assistant", "red")]


def test_a_pair_of_preferences_is_refused_by_name() -> None:
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}
    with pytest.raises(BadRow) as error:
        convert(row)
    assert str(error.value) == (
        "several responses (chosen, rejected) where one is wanted; --answer chosen takes the one preferred"
    )
    assert turns(convert(row, answer="chosen")) == QA
    hi, hello = ({"role": role, "content": text} for role, text in QA)
    whole = {"chosen": [hi, hello], "rejected": [hi, {"role": "assistant", "content": "What?"}]}
    assert turns(convert(whole, answer="chosen")) == QA
    assert turns(convert({"prompt": "Hi", "chosen": [hello]}, answer="chosen")) == QA
    with pytest.raises(BadRow, match="--answer chosen"):
        convert(whole)


def test_turns_of_the_prompt_that_the_chosen_ones_lack_stay() -> None:
    """A system turn beside a pair that repeats the question was dropped, and passed for used."""
    system, (hi, hello) = {"role": "system", "content": "Be brief."}, [{"role": r, "content": c} for r, c in QA]
    once = [("system", "Be brief."), *QA]
    for prompt, chosen in (([system, hi], [hi, hello]), ([system, hi], [system, hi, hello]), ([system, hi], [hello])):
        unused: Counter[str] = Counter()
        row = {"prompt": prompt, "chosen": chosen, "rejected": None}
        assert turns(convert(row, answer="chosen", unused=unused)) == once and not unused
    for prompt, named in (("Hi", []), ("Be brief.", ["prompt"]), ([system], ["prompt"])):
        unused = Counter()
        assert turns(convert({"prompt": prompt, "completion": [hi, hello]}, unused=unused)) == QA
        assert list(unused) == named


def test_unknown_answer() -> None:
    with pytest.raises(RequestError, match=r"answer 'best': is not known. Fix: use one of error, first, chosen"):
        check_answer("best")


@pytest.mark.parametrize("nothing", [None, [], float("nan")])
def test_null_nan_and_an_empty_list_are_absent(nothing: object) -> None:
    """Parquet and pandas fill the fields of other formats with one of them."""
    row = {"instruction": "Hi", "input": nothing, "output": "Hello", "messages": nothing, "answers": nothing}
    assert convert(row).id == convert({"instruction": "Hi", "output": "Hello"}).id
    with pytest.raises(BadRow, match="no response"):
        convert({"instruction": "Hi", "output": nothing})


def test_json_text_in_a_column_is_said_as_such() -> None:
    with pytest.raises(BadRow, match=r"its field 'messages' is JSON text, not a list of turns; parse it"):
        convert({"messages": '[{"role": "user", "content": "Hi"}]'}, "messages")


# marks on turns

TWO = [("user", "2+2?"), ("assistant", "5"), ("user", "Sure?"), ("assistant", "No, 4.")]


def marked(form: str, mark: str, *values: object) -> dict:
    """A conversation of two answers whose turns carry a mark."""
    names = {"messages": ("role", "content"), "conversations": ("from", "value")}[form]
    turns = [dict(zip(names, turn, strict=True)) for turn in TWO]
    return {form: [{**turn, mark: value} for turn, value in zip(turns, values, strict=True)]}


@pytest.mark.parametrize("form", ["messages", "conversations"])
@pytest.mark.parametrize(
    ("mark", "no", "yes"), [("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True), ("loss", 0, None)]
)
def test_marks_say_which_answers_are_trained(form: str, mark: str, no: object, yes: object) -> None:
    """An answer kept as the context of its correction must not be learnt."""
    example = convert(marked(form, mark, None, no, None, yes))
    assert [m.trained for m in example.messages] == [True, False, True, True]
    assert example.id != convert(marked(form, mark, None, None, None, None)).id
    assert convert(marked(form, mark, None, yes, None, yes)).id == convert(marked(form, "note", 1, 2, 3, 4)).id
    first = convert(marked(form, mark, None, yes, None, no))
    assert turns(first) == TWO[:2], "what comes after the last trained answer is of no use to it"


def test_a_row_whose_every_answer_is_marked_out_has_no_response() -> None:
    with pytest.raises(
        BadRow, match=r"no response: every answer is marked as not to be trained \(weight, train, loss\)"
    ):
        convert(marked("messages", "weight", None, 0, None, 0))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((None, 0.5, None, 1), "turn 2 of its field 'messages' has the loss 0.5; a turn is trained (1, true) or not"),
        (
            (True, 1, None, 1),
            "turn 1 of its field 'messages' is marked to be trained (loss) and is not the assist",
        ),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(values: tuple, text: str) -> None:
    with pytest.raises(BadRow) as error:
        convert(marked("messages", "loss", *values))
    assert text in str(error.value)


# tools and reasoning

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def test_tools_and_reasoning_are_kept_as_they_are() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "4 degrees", "tool_call_id": "c1"},
            {"role": "assistant", "content": "4.", "reasoning_content": "The tool says so."},
        ],
        "tools": '[{"type": "function", "function": {"name": "weather"}}]',
    }
    example = convert(row)
    assert [m.role for m in example.messages] == ["user", "assistant", "tool", "assistant"]
    fields = [json.loads(m.fields) if m.fields else {} for m in example.messages]
    assert fields[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert fields[2] == {"tool_call_id": "c1"} and fields[3] == {"reasoning_content": "The tool says so."}
    assert json.loads(example.tools)[0]["function"]["name"] == "weather"
    assert convert({**row, "tools": None}).id != example.id


@pytest.mark.parametrize(
    ("turn", "tools", "text"),
    [
        (
            {"tool_calls": "weather()"},
            None,
            "the tool calls of turn 2 of its field 'messages' are not a list of objects",
        ),
        (
            {"tool_calls": [{"function": {"name": "w", "arguments": "{"}}]},
            None,
            "the arguments of a tool call in",
        ),
        (
            {"tool_calls": [{"name": "w", "arguments": "{"}]},
            None,
            "the arguments of a tool call in",
        ),
        ({"content": "x"}, "[", "its field 'tools' is not JSON"),
        ({"content": "x"}, {"name": "weather"}, "its field 'tools' is not a list but an object"),
    ],
)
def test_tools_that_cannot_be_read_are_refused(turn: dict, tools: object, text: str) -> None:
    with pytest.raises(BadRow) as error:
        convert({"messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", **turn}], "tools": tools})
    assert text in str(error.value)


def test_the_form_before_tool_calls_is_one_of_them() -> None:
    """OpenAI's `function_call` beside a text would otherwise be dropped, and the text trained without it."""
    turn = {"role": "assistant", "content": "Let me look.", "function_call": CALL["function"]}
    old = convert({"messages": [{"role": "user", "content": "Weather?"}, turn]})
    new = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}
    assert old.id == convert({"messages": [{"role": "user", "content": "Weather?"}, new]}).id


def test_a_call_without_a_function_in_between_has_its_arguments_as_an_object() -> None:
    """Qwen's templates take this form, too: of a text they would write a text, with its quotes escaped."""
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]}
    example = convert({"messages": [{"role": "user", "content": "Weather?"}, answer]})
    assert json.loads(example.messages[1].fields)["tool_calls"] == [{"name": "weather", "arguments": {"city": "Oslo"}}]


@pytest.mark.parametrize("row", [{"instruction": "a", "output": "b"}, {"prompt": "a", "response": "b"}])
def test_tools_beside_a_prompt_are_handed_on(row: dict) -> None:
    assert json.loads(convert({**row, "tools": [{"name": "weather"}]}).tools) == [{"name": "weather"}]
    assert convert({**row, "tools": []}).id == convert(row).id


def test_the_name_of_a_speaker_is_no_part_of_the_text() -> None:
    """Sets of many speakers carry one on every turn; only a tool's turn needs it."""
    named = {"messages": [{"role": role, "content": text, "name": f"n{text}"} for role, text in QA]}
    assert convert(named).id == convert({"messages": [{"role": role, "content": text} for role, text in QA]}).id


def test_one_mark_against_another_leaves_the_answer_out() -> None:
    row = marked("messages", "weight", None, 1, None, 1)
    row["messages"][1]["train"] = False
    assert [m.trained for m in convert(row).messages] == [True, False, True, True]


@pytest.mark.parametrize("where", ["extra", "tools", "tool_calls"])
def test_values_nested_deeply_are_no_crash(where: str) -> None:
    """A file of a million rows must not end in a traceback for one of them."""
    deep = json.loads("[" * 900 + '"x"' + "]" * 900)
    row: dict = {"messages": [{"role": role, "content": text} for role, text in QA], where: deep}
    if where == "tool_calls":
        row["messages"][1] |= {where: [{"function": {"name": "f", "arguments": row.pop(where)}}]}
    unused: Counter[str] = Counter()
    example = convert(row, unused=unused)
    assert turns(example) == QA and list(unused) == ["extra"] * (where == "extra")
    assert bool(example.tools) == (where == "tools") and bool(example.messages[1].fields) == (where == "tool_calls")


def test_tools_that_are_no_json_are_refused() -> None:
    """In memory a row may hold anything."""
    with pytest.raises(BadRow, match=r"its tools or tool calls cannot be written as JSON \(Object of type set"):
        convert({"instruction": "a", "output": "b", "tools": [{1, 2}]})

"""If these failed, a subset or a score table could not go to the Hugging Face ecosystem and back unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from im_lightning import ScoreTable, load_examples, to_dataset
from im_lightning.data.hf import load_hub
from im_lightning.errors import DataError, RequestError

ALPACA = [
    {"instruction": "Add.", "input": "2 and 2", "output": "4", "source": "sums"},
    {"instruction": "Say hi.", "output": "hi", "extra": {"kept": 1}},
]
MESSAGES = [
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "c?"), ("assistant", ""))]},
]


@pytest.mark.parametrize("rows", [ALPACA, MESSAGES])
def test_rows_come_back_as_the_same_examples(rows: list) -> None:  # type: ignore[type-arg]
    """Ids too: a subset pushed to the hub must still match its score table."""
    dataset = to_dataset(rows)
    back, direct = load_examples(dataset), load_examples(rows)
    assert [e.id for e in back] == [e.id for e in direct]
    assert [e.source for e in back] == [e.source for e in direct]
    assert [e.id for e in load_examples(dataset.to_iterable_dataset())] == [e.id for e in direct]
    if rows is ALPACA:
        assert dataset[1]["extra"] == {"kept": 1} and dataset[0]["extra"] is None


def test_examples_become_conversations(tmp_path: Path) -> None:
    examples = load_examples(ALPACA)
    dataset = to_dataset(examples)
    assert dataset.column_names == ["id", "source", "messages"]
    assert dataset[1]["messages"] == [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}]
    assert dataset["id"][0] == examples[0].id
    dataset.to_parquet(tmp_path / "subset.parquet")  # and files of it are read like any others
    assert [e.response for e in load_examples(tmp_path / "subset.parquet")] == ["4", "hi"]


def test_a_score_table_keeps_values_and_reasons() -> None:
    values = {"ppl": [1.5, np.nan, 3.0], "predicted_log_loss": [0.1, np.nan, 0.3]}
    table = ScoreTable(range(3), ["x", "y", "z"], ["a", "b", "a"], values, {"ppl": [None, "empty response", None]})
    dataset = to_dataset(table)
    assert dataset.num_rows == 3 and dataset["row"][:] == [0, 1, 2] and dataset["source"][:] == ["a", "b", "a"]
    np.testing.assert_array_equal(np.array(dataset["ppl"][:]), values["ppl"])
    assert dataset["ppl_reason"][:] == [None, "empty response", None]
    best = dataset.sort("predicted_log_loss")
    assert best["id"][0] == "x"


def test_what_cannot_be_is_refused() -> None:
    import datasets

    with pytest.raises(RequestError, match=r"to_dataset: it holds no rows.*ScoreTable"):
        to_dataset([])
    with pytest.raises(RequestError, match="it holds int, str"):
        to_dataset([1, "a"])  # type: ignore[list-item]
    both = datasets.DatasetDict({"train": to_dataset(ALPACA), "test": to_dataset(ALPACA)})
    with pytest.raises(RequestError, match=r"data: is a DatasetDict of train, test.*data\['train'\]"):
        load_examples(both)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"messages": "Hi"}, r"row 2: field 'messages' holds a string, unlike the rows before it"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, r"row 2: field 'messages' holds a list"),
        ({"score": 2**70}, r"row 2: field 'score' holds a number"),
        ({"score": object()}, r"row 2: field 'score' holds a object"),
    ],
)
def test_mixed_content_is_named_by_row_and_field(bad: dict, said: str) -> None:  # type: ignore[type-arg]
    """Not pyarrow's words alone, which name neither."""
    rows = [{**MESSAGES[0], "score": 1}, MESSAGES[1], {**MESSAGES[0], **bad}, MESSAGES[0]]
    with pytest.raises(DataError, match=rf"^to_dataset, {said}.*Fix: write the field in one form in all rows"):
        to_dataset(rows)


def test_a_config_of_a_data_set_is_chosen_not_guessed(tmp_path: Path) -> None:
    """A folder laid out like a data set of the hub, with two configs."""
    told = "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: de\n  data_files: de.jsonl\n---\n"
    (tmp_path / "README.md").write_text(told)
    for name in ("en", "de"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"instruction": "Say hi in {name}.", "output": "hi"}}\n')
    name = str(tmp_path)
    assert [row["instruction"] for row in load_hub(name, "de", "train")] == ["Say hi in de."]
    for config in (None, "fr"):
        with pytest.raises(RequestError, match=r"the data set's configs are en, de. Fix: name one: .*/en:train"):
            load_hub(name, config, None)


def test_marks_of_turns_come_back_and_calls_are_not_lost_in_silence() -> None:
    """A call-only answer would have become an empty one, and an answer that is context alone would be trained."""
    said = (("user", "a?", {}), ("assistant", "no", {"weight": 0}), ("user", "b?", {}), ("assistant", "yes", {}))
    marked = {"messages": [{"role": role, "content": text, **mark} for role, text, mark in said]}
    examples = load_examples([marked, *MESSAGES])
    assert not all(turn.trained for turn in examples[0].messages)
    assert [e.id for e in load_examples(to_dataset(examples))] == [e.id for e in examples]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    asked = {"role": "user", "content": "?"}
    for answer in (call, thought):
        with pytest.raises(RequestError, match=r"it has tools, tool calls or reasoning, .*pass the rows as dicts"):
            to_dataset(load_examples([{"messages": [asked, answer]}]))

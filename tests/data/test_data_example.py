"""`Example`: ids decide what is cached and what is kept out of training, so they must follow the content exactly."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from im_lightning._utils.hashing import digest_json
from im_lightning.data.example import Example, Message


def example(response: str = "4", source: str = "", **fields) -> Example:
    return Example((Message("user", "2+2?"), Message("assistant", response)), source=source, **fields)


def test_id_is_blake2b_of_the_canonical_content():
    """Another id for the same row would throw away every stored score."""
    fields = {"messages": [["user", "2+2?"], ["assistant", "4"]], "instruction": None, "input": None}
    data = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    expected = hashlib.blake2b(len(data).to_bytes(8, "little") + data, digest_size=16).hexdigest()
    assert example().id == expected


def test_source_is_no_part_of_the_id_but_everything_else_is():
    """A copy of an evaluation row under another source must still be recognised, and unlike rows kept apart."""
    assert example(source="a").id == example(source="b").id
    others = [
        example("5"),
        example(instruction="2+2?", input=""),
        example(instruction="2", input="+2?"),
        Example((Message("system", "2+2?"), Message("assistant", "4"))),
    ]
    assert len({example().id, *(other.id for other in others)}) == 5


@pytest.mark.parametrize("text", ["\ud800", "\x00", "é\n" * 500_000], ids=["surrogate", "nul", "one-megabyte"])
def test_odd_texts_have_ids(text: str):
    """One odd row must not end the scoring of a pool."""
    assert len(example(text).id) == 32
    assert example(text).id != example("?").id


def test_examples_are_hashable_and_survive_pickling():
    """Loaders with workers send examples between processes."""
    first = example()
    assert pickle.loads(pickle.dumps(first)) == first
    assert len({first, example()}) == 1
    assert first.id == pickle.loads(pickle.dumps(first)).id


def test_parts_of_a_conversation():
    """Lengths and texts judged by indicators are those of the last exchange."""
    turns = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    conversation = Example((*turns, Message("assistant", "d")))
    assert (conversation.prompt, conversation.response, conversation.history) == ("c", "d", turns)
    assert Example((Message("assistant", "d"),)).prompt == ""


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "ü"]), st.text()), max_size=4),
    st.none() | st.text(),
    st.none() | st.text(),
)
def test_id_is_the_digest_of_canonical_json_for_any_text(turns, instruction, given):
    """The id is written out by hand for speed; a character escaped otherwise would orphan every stored score."""
    content = {"messages": [list(turn) for turn in turns], "instruction": instruction, "input": given}
    value = Example(tuple(Message(*turn) for turn in turns), instruction, given).id
    assert value == digest_json(content)


def test_ids_of_the_first_release_still_hold():
    """Frozen values: caches of users are keyed by them."""
    assert example().id == "99ee2fef8f52c92fedbfc00439759e74"
    assert example('a"\\\n\x7f\u2028é😀', instruction="i", input="").id == "2979914540a2f4ba1e98d3adb807ea73"
    assert example(5).id == "69ed788a5581f1b8fdd2020b16dbe885"

"""docs/data_formats.md: what becomes of conversations under the chat templates that are in use.

If the table were wrong, a reader would train a model on other tokens than the page says, for hours.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
from template_table import CASES, EACH, outcome, table, templates, tokenizer_for, trained

from im_lightning.data.prompt_templates import Refused, Turn
from im_lightning.data.tokenization import encode_examples, resolve_template

PAGE = (Path(__file__).parents[2] / "docs" / "data_formats.md").read_text(encoding="utf-8")
ALL = dict(templates())


@pytest.mark.parametrize("name", ALL)
def test_no_cell_is_silently_wrong(name: str) -> None:
    """Trained tokens decode to the response and what closes it, or the row is refused with the template's reason."""
    tokenizer = tokenizer_for(ALL[name])
    for case in (*CASES, EACH):
        found = outcome(tokenizer, case)
        assert found in ("all", "last") or found.startswith("refused: "), (case, found)


CHANGE_EARLIER = ["qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "phi3", "phi3_5", "gptoss"]


@pytest.mark.parametrize("name", CHANGE_EARLIER)
def test_templates_that_change_earlier_answers_train_each_in_its_own_history(name: str) -> None:
    """By default the last alone; with the option three sequences, the text of each what would be generated from."""
    tokenizer = tokenizer_for(ALL[name])
    assert outcome(tokenizer, "three turns") == "last" and outcome(tokenizer, EACH) == "all"
    example = CASES["three turns"]
    template = resolve_template("chat", tokenizer, "each")
    (one,) = encode_examples([example], tokenizer, template)
    assert len(one.earlier) == 2
    for k, sequence in zip((1, 3, 5), (*one.earlier, one), strict=True):
        start = int(np.argmax(sequence.loss_mask))
        assert sequence.loss_mask[start:].all(), "one answer, at the end"
        past = [{"role": m.role, "content": m.content} for m in example.messages[:k]]
        asked = template._text(past, True)  # type: ignore[attr-defined]  # with the day that does not pass
        before = tokenizer.decode(sequence.input_ids[:start]).removeprefix("<s>")
        assert before.startswith(asked.removeprefix("<s>")), (before, asked)  # a thought may stand between, empty
        assert tokenizer.decode(sequence.input_ids[sequence.response_mask]) == example.messages[k].content


@pytest.mark.parametrize("name", ["qwen3", "glm4moe"])
def test_a_call_before_the_answer_is_trained_in_its_own_history(name: str) -> None:
    tokenizer = tokenizer_for(ALL[name])
    assert outcome(tokenizer, "tools") == "last"
    (one,) = encode_examples([CASES["tools"]], tokenizer, resolve_template("chat", tokenizer, "each"))
    (call,) = one.earlier
    assert "Oslo" in tokenizer.decode(call.input_ids[call.response_mask]) and len(call.input_ids) < len(one.input_ids)


@pytest.mark.parametrize("name", ["phi3_training", "phi3_5_training"])
def test_an_end_that_is_marked_apart_closes_the_last_answer(name: str) -> None:
    """The marks of Phi-3's training templates are one more than the answers: EOS after the last."""
    tokenizer = tokenizer_for(ALL[name])
    assert [end for _, end in trained(tokenizer, CASES["three turns"])] == ["<|end|>", "<|end|>", "<|end|>\n</s>"]


def test_a_template_with_marks_and_nested_texts_gives_the_same_turns_by_either() -> None:
    """Two ways to one mask; only a space before an answer may count to its prompt or to the answer."""

    def plain(turn: Turn) -> tuple[str, str, bool]:
        return turn.response.removeprefix(" "), turn.end, turn.trained

    example, agreed = CASES["three turns"], 0
    for text in ALL.values():
        template = resolve_template("chat", tokenizer_for(text))
        shown = [{"role": m.role, "content": m.content} for m in example.messages]
        marked = template._marked(example.messages, shown, None)  # type: ignore[attr-defined]
        with contextlib.suppress(Refused):
            nested = template._nested(example.messages, shown, template._text)  # type: ignore[attr-defined]
            assert marked is None or [plain(t) for t in marked] == [plain(t) for t in nested]
            agreed += marked is not None
    assert agreed >= 15


def test_the_table_of_the_page_is_what_is_found() -> None:
    assert len(ALL) == 72 and PAGE.rstrip().endswith(table())


def test_every_kind_of_the_page_has_its_test() -> None:
    """A test that was renamed or lost leaves a promise that nothing holds."""
    tests, named = Path(__file__).parents[1], re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) >= 20
    for path, name in named:
        assert f"def {name}(" in (tests / path).read_text(encoding="utf-8"), (path, name)


def test_refusals_are_as_many_as_the_page_lets_one_count() -> None:
    """A refusal that goes away, or a new one, changes what users can train on: the number is kept in view."""
    rows = [line.strip("|").split(" | ") for line in table().splitlines()[2:]]
    refused = sum((names.count("`") // 2) * sum("refused: " in cell for cell in cells) for names, *cells in rows)
    assert refused == 77 and f"{refused} of {72 * (len(CASES) + 1)} cells are refusals" in PAGE

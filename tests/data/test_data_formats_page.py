"""docs/data_formats.md: what becomes of conversations under the chat templates that are in use.

If the table were wrong, a reader would train a model on other tokens than the page says, for hours.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from template_table import CASES, outcome, table, templates, tokenizer_for

from im_lightning.data.prompt_templates import Refused, Turn
from im_lightning.data.tokenization import resolve_template

PAGE = (Path(__file__).parents[2] / "docs" / "data_formats.md").read_text(encoding="utf-8")
ALL = dict(templates())


@pytest.mark.parametrize("name", ALL)
def test_no_cell_is_silently_wrong(name: str) -> None:
    """Trained tokens decode to the response and what closes it, or the row is refused with the template's reason."""
    tokenizer = tokenizer_for(ALL[name])
    for case in CASES:
        found = outcome(tokenizer, case)
        assert found in ("all", "last") or found.startswith("refused: "), (case, found)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_6", "phi3", "phi3_5", "gptoss"])
def test_templates_that_do_not_nest_train_three_turns(name: str) -> None:
    assert outcome(tokenizer_for(ALL[name]), "three turns") == "last"


def test_a_template_with_marks_and_nested_texts_gives_the_same_turns_by_either() -> None:
    """Two ways to one mask; only a space before an answer may count to its prompt or to the answer."""

    def plain(turn: Turn) -> tuple[str, str, bool]:
        return turn.response.removeprefix(" "), turn.end, turn.trained

    example, agreed = CASES["three turns"], 0
    for text in ALL.values():
        template = resolve_template("chat", tokenizer_for(text))
        shown = [{"role": m.role, "content": m.content} for m in example.messages]
        marked = template._marked(example.messages, shown, template._text, None)  # type: ignore[attr-defined]
        with contextlib.suppress(Refused):
            nested = template._nested(example.messages, shown, template._text)  # type: ignore[attr-defined]
            assert marked is None or [plain(t) for t in marked] == [plain(t) for t in nested]
            agreed += marked is not None
    assert agreed >= 15


def test_the_table_of_the_page_is_what_is_found() -> None:
    assert len(ALL) == 72 and PAGE.rstrip().endswith(table())


def test_refusals_are_as_many_as_the_page_lets_one_count() -> None:
    """A refusal that goes away, or a new one, changes what users can train on: the number is kept in view."""
    rows = [line.strip("|").split(" | ") for line in table().splitlines()[2:]]
    refused = sum((names.count("`") // 2) * sum("refused: " in cell for cell in cells) for names, *cells in rows)
    assert refused == 77 and f"{refused} of {72 * len(CASES)} cells are refusals" in PAGE

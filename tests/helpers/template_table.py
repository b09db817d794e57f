"""What becomes of conversations under every chat template that TRL ships: the table of docs/data_formats.md.

    PYTHONPATH=.:tests/helpers python tests/helpers/template_table.py

prints it. The tokenizer is byte-level, with each template's own special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tiny import make_tokenizer

from im_lightning import Example, Message, RequestError, encode_examples, resolve_template

CALL = json.dumps(
    {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}
)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather of a city.", "parameters": CITY}
THOUGHT = json.dumps({"reasoning_content": "Two and two make four."})
CASES = {
    "one turn": Example((Message("user", "Name a lake."), Message("assistant", "Lake Como."))),
    "three turns": Example(
        tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(
            ("2+2?", "4", "3+3?", "6, I think.", "Sure?", "Yes.")
        ))
    ),
    "system": Example((Message("system", "Be terse."), Message("user", "Name a lake."), Message("assistant", "Bala."))),
    "tools": Example(
        (
            Message("user", "Weather in Oslo?"),
            Message("assistant", "", fields=CALL),
            Message("tool", "4 degrees"),
            Message("assistant", "It is 4 degrees."),
        ),
        tools=json.dumps([{"type": "function", "function": WEATHER}]),
    ),
    "reasoning": Example((Message("user", "2+2?"), Message("assistant", "4", fields=THOUGHT))),
    "thought in the text": Example((Message("user", "2+2?"), Message("assistant", "<think>\ntwo\n</think>\n\n4"))),
}  # fmt: skip
EACH = "three turns, each"
_SPECIAL = re.compile(r"<[|｜][^<>{}\s]*[|｜]>|<[|][a-z_]+>|<[a-z_]+[|]>|<(?:start|end)_of_[a-z]+>|\[/?INST\]|</s>")


def templates() -> Iterator[tuple[str, str]]:
    """Name and text of every chat template in TRL's package."""
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations, "the tests need trl"
    folder = Path(next(iter(spec.submodule_search_locations))) / "chat_templates"
    for path in sorted(folder.glob("*.jinja")):
        yield path.stem, path.read_text(encoding="utf-8")


def tokenizer_for(template: str) -> Any:
    """A byte-level tokenizer with the special tokens that a template names."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(sorted(set(_SPECIAL.findall(template))), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer: Any, example: Example, turns: str = "last") -> list[tuple[str, str]]:
    """(response, what closes it) of each stretch of trained tokens, as text."""
    (row,) = encode_examples([example], tokenizer, resolve_template("chat", tokenizer, turns), 4096)
    out = []
    for encoded in (*row.earlier, row):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.loss_mask.astype(int), [0]]))).reshape(-1, 2)
        for begin, end in edges.tolist():
            ids, inside = encoded.input_ids[begin:end], encoded.response_mask[begin:end]
            out.append((tokenizer.decode(ids[inside]), tokenizer.decode(ids[~inside])))
    return out


def outcome(tokenizer: Any, case: str) -> str:
    """ "all" (every answer is trained), "last" (the last one alone), or why the row is refused."""
    case, turns = ("three turns", "each") if case == EACH else (case, "last")
    example = CASES[case]
    answers = [message for message in example.messages if message.role == "assistant"]
    try:
        found = trained(tokenizer, example, turns)
    except RequestError as error:
        cause = re.search(r"…\): (.*)\. Fix: ", str(error))
        assert cause, error
        return "refused: " + re.sub(r"it cannot render the conversation \(\w+: (.*)\)", r"\1", cause[1])
    assert len(found) in (1, len(answers)), (case, found)
    for (response, end), answer in zip(found, answers[-len(found) :], strict=True):
        assert end.strip(), (case, "nothing closes", response)
        if answer.fields:
            wanted = ("Oslo", "weather") if answer.fields == CALL else ("Two and two make four.", answer.content)
            assert all(part in response for part in wanted) and "2+2?" not in response, (case, response)
        else:
            assert response.removeprefix(" ") == answer.content, (case, response)
    return "all" if len(found) == len(answers) else "last"


def table() -> str:
    """The table, in Markdown: one row per different outcome, with the templates that have it."""
    rows: dict[tuple[str, ...], list[str]] = {}
    cases = list(CASES)
    cases.insert(2, EACH)
    for name, text in templates():
        rows.setdefault(tuple(outcome(tokenizer_for(text), case) for case in cases), []).append(name)
    lines = [f"| templates | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    lines += [f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join(cells)} |" for cells, names in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

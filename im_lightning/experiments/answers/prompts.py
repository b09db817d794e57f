"""The prompts of data: what is asked, each once, whether or not the row has an answer; and rows of new answers.

Commands import this for the settings of answering, which stand here and not where torch is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from im_lightning._utils.progress import log
from im_lightning.data.example import Example, Message
from im_lightning.data.file_io import Source, rows_with
from im_lightning.data.formats import TURNS, convert
from im_lightning.data.json_array import Record
from im_lightning.data.loading import Refuses, check_answer, check_columns, find_sources, load_examples
from im_lightning.data.settings import Reading
from im_lightning.data.structured_fields import BadRow
from im_lightning.errors import RequestError, message


@dataclass(frozen=True)
class Generating:
    """How answers are made."""

    max_new_tokens: int = 512
    """Most tokens of an answer; longer ones are cut, and counted."""
    temperature: float = 0.0
    """0 takes the most likely token each time; else tokens are drawn."""
    seed: int = 0
    """Decides what is drawn."""
    batch_tokens: int = 8192
    """Tokens per batch, prompts, answers and padding."""
    precision: str = "auto"
    """auto, fp32 or bf16."""
    device: str = "auto"
    """cpu, cuda or auto."""


def read_prompts(data: str | Sequence[str], reading: Reading, refuses: Refuses | None = None) -> list[Example]:
    """Every different prompt of the data, in order, as an example whose last response is empty.

    Args:
        data: Evaluation sets.
        reading: How rows are read.
        refuses: `Template.refusal`: prompts that the template cannot render are bad rows, too.

    Raises:
        RequestError: the data name nothing that can be read.
        DataError: bad rows, or no rows.
    """
    columns = check_columns(reading.columns)
    check_answer(reading.answer)  # there is none to choose from here, but a misspelt word is one
    names = [data] if isinstance(data, str) else list(data)
    sources = [_open_ended(source, reading, columns) for source in find_sources(names)]
    read = load_examples(
        sources,
        format=reading.format,
        on_bad_row=reading.on_bad_row,
        columns=reading.columns,
        refuses=refuses and (lambda one: refuses(unanswered(one))),
    )
    prompts = {one.prompt_id: unanswered(one) for one in read}
    if len(prompts) < len(read):
        log(f"{', '.join(names)}: {len(prompts):,} different prompts in {len(read):,} rows; each is taken once")
    return list(prompts.values())


def unanswered(example: Example) -> Example:
    """The example with an empty last response."""
    return replace(example, messages=(*example.history, Message("assistant", "")))


def _open_ended(source: Source, reading: Reading, columns: Mapping[str, str]) -> Source:
    """The rows of a source, those without an answer with an empty one."""

    def records() -> Iterator[Record]:
        for line, row, cause in source.records():
            if cause is None and isinstance(row, Mapping):
                row = next((one for one in _ways(row, columns) if _reads(one, reading.format, columns)), row)
            yield line, row, cause

    return Source(source.name, source.stem, records)


def _ways(row: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """The row; with one of its several answers; with an empty answer; its turns with an empty one at the end."""
    yield row
    for name, value in row.items():
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value) and name not in TURNS:
            yield {**row, name: value[0]}
    yield {**row, columns.get("response", "response"): ""}
    for name in (columns.get("messages", "messages"), *TURNS):
        if isinstance(row.get(name), list) and row[name]:
            end: Any = "" if isinstance(row[name][-1], str) else {"role": "assistant", "content": ""}
            yield {**row, name: [*row[name], end]}


def _reads(row: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> bool:
    try:
        convert(row, format, "", columns)
    except BadRow:
        return False
    return True


def answered_row(prompt: Example, answer: str, id: str) -> dict[str, Any]:
    """A prompt with an answer, as a row that `load_examples` reads back: with its input apart, if it has one."""
    about = {"id": id, "source": prompt.source, **({"tools": json.loads(prompt.tools)} if prompt.tools else {})}
    if prompt.instruction is not None and len(prompt.messages) == 2:
        return {**about, "instruction": prompt.instruction, "input": prompt.input or "", "output": answer}
    turns = [{"role": turn.role, "content": turn.content, **json.loads(turn.fields or "{}")} for turn in prompt.history]
    return {**about, "messages": [*turns, {"role": "assistant", "content": answer}]}


_ALPACA, _TURNS = ("id", "source", "instruction", "input", "output"), ("id", "source", "messages")
is_answers = rows_with(_ALPACA, _TURNS, (*_ALPACA, "tools"), (*_TURNS, "tools"))
"""Whether a file holds rows as `answered_row` makes them."""


def chat(prompt: Example) -> list[dict[str, str]]:
    """The prompt as an endpoint takes it.

    Raises:
        RequestError: it has tools or tool calls, which are not sent.
    """
    if prompt.tools or any(turn.role == "tool" or '"tool_calls"' in turn.fields for turn in prompt.history):
        cause = "it has tools or tool calls, and an endpoint would be asked without them"
        what = f"the prompt {prompt.prompt_id} ({prompt.messages[0].content[:40]!r} …)"
        raise RequestError(message(what, cause, "leave such rows out of what is asked"))
    return [{"role": turn.role, "content": turn.content} for turn in prompt.history]


def by_prompt(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Prompt id → its examples, in order: several answers to one instruction stay together."""
    out: dict[str, list[Example]] = {}
    for example in examples:
        out.setdefault(example.prompt_id, []).append(example)
    return out

"""Rows, examples and score tables as Hugging Face `datasets`; the way back is `load_examples(dataset)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    from datasets import Dataset


def to_dataset(data: ScoreTable | Iterable[Example] | Iterable[Mapping[str, Any]]) -> Dataset:
    """A `datasets.Dataset` of a score table, of examples, or of rows as dicts, in the same order.

    A table gives its columns (row, id, source, the scores, `<indicator>_reason` where a value is missing). Examples
    give `messages` (a list of {"role", "content"}, the conversational form that TRL's `SFTTrainer` and chat templates
    read), `id` and `source`. Rows keep their own fields; one that some rows lack is None there.

    Raises:
        RequestError: there are no rows, or they are of several kinds.

    >>> to_dataset([{"instruction": "Add 2 and 2.", "output": "4"}])["output"][0]
    '4'
    """
    import datasets

    if isinstance(data, ScoreTable):
        return datasets.Dataset(data.to_arrow())
    rows: list[Any] = list(data)
    if rows and all(isinstance(row, Example) for row in rows):
        return datasets.Dataset.from_list([_plain(row) for row in rows])
    if rows and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)
        return datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    kinds = sorted({type(row).__name__ for row in rows})
    cause = f"it holds {', '.join(kinds)}" if rows else "it holds no rows"
    raise RequestError(message("to_dataset", cause, "pass a ScoreTable, a list of Examples, or a list of dicts"))


def _plain(example: Example) -> dict[str, Any]:
    turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
    return {"id": example.id, "source": example.source, "messages": turns}

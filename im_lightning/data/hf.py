"""Rows, examples and score tables as Hugging Face `datasets`; the way back is `load_examples(dataset)`."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.structured_fields import kind_of
from im_lightning.errors import DataError, RequestError, message

if TYPE_CHECKING:
    from datasets import Dataset


def to_dataset(data: ScoreTable | Iterable[Example] | Iterable[Mapping[str, Any]]) -> Dataset:
    """A `datasets.Dataset` of a score table, of examples, or of rows as dicts, in the same order.

    A table gives its columns (row, id, source, the scores, `<indicator>_reason` where a value is missing). Examples
    give `messages` (a list of {"role", "content"}, the conversational form that TRL's `SFTTrainer` and chat templates
    read), `id` and `source`. Rows keep their own fields; one that some rows lack is None there.

    Raises:
        RequestError: there are no rows, or they are of several kinds.
        DataError: a field holds values of several kinds, or one that Arrow has no type for; names the first such row.

    >>> to_dataset([{"instruction": "Add 2 and 2.", "output": "4"}])["output"][0]
    '4'
    """
    import datasets
    import pyarrow as pa

    if isinstance(data, ScoreTable):
        return datasets.Dataset(data.to_arrow())
    rows: list[Any] = list(data)
    if rows and all(isinstance(row, Example) for row in rows):
        return datasets.Dataset.from_list([_plain(row) for row in rows])
    if rows and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        try:
            return datasets.Dataset.from_dict(columns)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise _mixed(columns, error) from error
    kinds = sorted({type(row).__name__ for row in rows})
    cause = f"it holds {', '.join(kinds)}" if rows else "it holds no rows"
    raise RequestError(message("to_dataset", cause, "pass a ScoreTable, a list of Examples, or a list of dicts"))


def _mixed(columns: Mapping[str, list[Any]], error: Exception) -> DataError:
    """Names the field and the first row (from 0) that no one Arrow type can hold together with those before it."""
    import datasets

    def fails(name: str, count: int) -> bool:
        try:
            datasets.Dataset.from_dict({name: columns[name][:count]})
        except Exception:  # whatever it is, the whole raised it too
            return True
        return False

    for name, values in columns.items():
        if fails(name, len(values)):
            row = bisect.bisect_left(range(1, len(values) + 1), True, key=lambda count: fails(name, count))
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            cause = f"field {name!r} holds {kind_of(values[row])}, which does not go with the rows before it ({reason})"
            remedy = "write the field in one form in all rows, or as JSON text (json.dumps), or leave it out"
            return DataError(message(f"to_dataset, row {row}", cause, remedy))
    return DataError(message("to_dataset", str(error), "write each field in one form in all rows"))


def _plain(example: Example) -> dict[str, Any]:
    turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
    return {"id": example.id, "source": example.source, "messages": turns}

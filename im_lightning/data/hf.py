"""Data sets of the Hugging Face hub; rows, examples and score tables as `datasets`, and back by `load_examples`."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from im_lightning.data.example import Example
from im_lightning.data.file_io import decode_row, decoders
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.structured_fields import kind_of
from im_lightning.errors import DataError, RequestError, message

if TYPE_CHECKING:
    from datasets import Dataset


def to_dataset(data: ScoreTable | Iterable[Example] | Iterable[Mapping[str, Any]]) -> Dataset:
    """A `datasets.Dataset` of a score table, of examples, or of rows as dicts, in the same order.

    A table gives its columns (row, id, source, the scores, `<indicator>_reason` where a value is missing). Examples
    give `messages` (a list of {"role", "content"}, the conversational form that TRL's `SFTTrainer` and chat templates
    read; with `weight` 0 or 1 on the answers of one that leaves some of them out of training), `id` and `source`. Rows
    keep their own fields; one that some rows lack is None there.

    Raises:
        RequestError: there are no rows, or they are of several kinds, or an example has tools, tool calls or reasoning.
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
            cause = f"field {name!r} holds {kind_of(values[row])}, unlike the rows before it ({reason})"
            remedy = "write the field in one form in all rows, or as JSON text (json.dumps), or leave it out"
            return DataError(message(f"to_dataset, row {row}", cause, remedy))
    return DataError(message("to_dataset", str(error), "write each field in one form in all rows"))


def _plain(example: Example) -> dict[str, Any]:
    if example.tools or any(turn.fields for turn in example.messages):
        cause = "it has tools, tool calls or reasoning, for which turns of role and content have no place"
        raise RequestError(
            message(f"to_dataset, the example {example.id}", cause, "pass the rows as dicts, as they were read")
        )
    marked = not all(turn.trained for turn in example.messages)
    turns: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in example.messages]
    for turn, said in zip(turns, example.messages, strict=True):
        turn |= {"weight": int(said.trained)} if marked and said.role == "assistant" else {}
    return {"id": example.id, "source": example.source, "messages": turns}


def written_rows(data: Any) -> Any:
    """The rows of a `datasets` data set without the nulls that fill its objects (`file_io.decoders`); other data as
    they are."""
    ours = type(data).__module__.startswith("datasets.")  # a column of one has features, too, and no type
    kind = getattr(getattr(data, "features", None), "type", None) if ours else None
    by = {} if kind is None else decoders(kind, json_texts=False)
    return (decode_row(row, by) for row in data) if by else data


def load_hub(name: str, config: str | None, split: str | None) -> Iterable[dict[str, Any]]:
    """The rows of a data set on the hub, or in a folder laid out like one.

    Raises:
        RequestError: it cannot be loaded, or has several configs or splits; names them.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds: offline, unknown name or split, gated, bad files
        whole = f"{name}/{config}" if config else name
        configs = (
            _configs(name) if isinstance(error, ValueError) else []
        )  # no config is named, or one that is not there
        if configs and config not in configs and (config or len(configs) > 1):
            cause = f"the data set's configs are {', '.join(configs)}"
            remedy = f"name one: {name}/{configs[0]}:{split or 'train'}"
            raise RequestError(message(whole, cause, remedy)) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        cause = (
            f"there is no such file, and the Hugging Face data set cannot be loaded ({type(error).__name__}: {reason})"
        )
        remedy = "check the name, the split and the network, or download the files and name them"
        raise RequestError(message(f"{whole}:{split}" if split else whole, cause, remedy)) from error
    if split is not None or not isinstance(found, Mapping):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    if "train" in found:
        return found["train"]
    splits = ", ".join(map(str, found))
    raise RequestError(
        message(name, f"it has several splits ({splits}) and none is called train", f"name one: {name}:SPLIT")
    )


def _configs(name: str) -> list[str]:
    """The configs of a data set; none where they cannot be found out."""
    import datasets

    try:
        return list(datasets.get_dataset_config_names(name))
    except Exception:  # as many kinds; the first error is the one to tell of
        return []

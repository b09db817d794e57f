"""The losses of single evaluation examples: one parquet file per run, all its sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from im_lightning._utils.files import atomic_path
from im_lightning.errors import DataError, RequestError, message

_COLUMNS = {"evaluation": "string", "id": "string", "sum_nats": "double", "tokens": "int64"}
_EDGES = {"edge_nats": "double", "edge_tokens": "int64"}
"""Of a file that has them, null in sets where they were not told apart."""


class ExampleLosses(NamedTuple):
    """Per-example evaluation losses: ids, summed NLL in nats (float64 [n]), supervised tokens (int64 [n]), and both of
    the first and last token of each answer alone (None where they were not told apart)."""

    ids: list[str]
    sums: np.ndarray
    counts: np.ndarray
    edge_sums: np.ndarray | None = None
    edge_counts: np.ndarray | None = None


def example_losses(
    what: str,
    ids: Sequence[str],
    sums: Sequence[float],
    counts: Sequence[int],
    edge_sums: Sequence[float] | None = None,
    edge_counts: Sequence[int] | None = None,
) -> ExampleLosses:
    """As arrays; an error names `what` they are of.

    Raises:
        RequestError: they differ in length.
    """
    given = {"sums": sums, "counts": counts, "edge_sums": edge_sums, "edge_counts": edge_counts}
    columns = {
        name: np.asarray(column, dtype=np.float64 if name.endswith("sums") else np.int64)
        for name, column in given.items()
        if column is not None
    }
    if len(columns) % 2 or any(len(column) != len(ids) for column in columns.values()):
        *names, last = (f"{len(column)} {name}" for name, column in columns.items())
        cause = f"{len(ids)} ids, {', '.join(names)} and {last}"
        raise RequestError(message(what, cause, "give one of each per example"))
    return ExampleLosses(list(ids), **columns)


def write_losses(path: Path, sets: Mapping[str, ExampleLosses]) -> None:
    """Atomic; set by set, in the order given."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "evaluation": [name for name, one in sets.items() for _ in one.ids],
        "id": [i for one in sets.values() for i in one.ids],
        "sum_nats": np.concatenate([one.sums for one in sets.values()]),
        "tokens": np.concatenate([one.counts for one in sets.values()]),
    }
    kinds = dict(_COLUMNS)
    if any(one.edge_sums is not None for one in sets.values()):
        kinds |= _EDGES
        for name, field in zip(_EDGES, ("edge_sums", "edge_counts"), strict=True):
            columns[name] = []
            for one in sets.values():
                known = getattr(one, field)
                columns[name] += [None] * len(one.ids) if known is None else known.tolist()
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_losses(path: Path) -> dict[str, ExampleLosses]:
    """By evaluation set.

    Raises:
        RequestError: there is no such file.
        DataError: it is torn or foreign.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        cause = "this run has no per-example losses in the ledger"
        raise RequestError(message(str(path), cause, "name a run of `im-lightning runs`, or make the run again"))
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        more = _EDGES if set(_EDGES) <= set(table.column_names) else {}
        for name, kind in (_COLUMNS | more).items():
            if str(table.column(name).type) != kind or (table.column(name).null_count and name not in more):
                raise ValueError(f"its column {name} holds {table.column(name).type}")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        remedy = "delete it; the run itself is kept in its JSON file"
        raise DataError(message(str(path), f"it is not a file of losses ({error})", remedy)) from error
    names = np.asarray(table.column("evaluation").to_pylist(), dtype=object)
    found = {}
    for name in dict.fromkeys(names.tolist()):
        part = table.filter(pa.array(names == name))
        known = bool(more) and not part.column("edge_nats").null_count
        columns = ["sum_nats", "tokens", *(more if known else ())]
        found[name] = ExampleLosses(part.column("id").to_pylist(), *(part.column(c).to_numpy() for c in columns))
    return found

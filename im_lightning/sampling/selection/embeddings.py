"""The vectors of a scored pool: those that its `knn_<i>` was calculated from, out of the score store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.files import scratch_array
from im_lightning._utils.json_diff import differences
from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding
from im_lightning.errors import DataError, RequestError, message
from im_lightning.indicators.built_in import KNN
from im_lightning.models.fingerprint import cache_root

if TYPE_CHECKING:
    from im_lightning.scoring.settings import Setup

_CHUNK = 1 << 14


def embedding_identity(table: ScoreTable) -> dict[str, Any]:
    """What the vectors behind the table's `knn_<i>` were made by.

    Raises:
        RequestError: the table has no such column, or columns of different vectors.
    """
    found = {}
    for name in table.indicators:
        identity = (table.keys.get(name) or {}).get("identity") or {}
        if KNN.match(name) and "embedding" in identity:
            found[name] = identity["embedding"]
    if not found:
        cause = "has no knn_<i>, whose embeddings say which rows are alike"
        remedy = "score the pool with one (im-lightning score DATA --model MODEL --indicators knn_6,...), or pass the "
        raise RequestError(message("the score table", cause, remedy + "vectors (--embeddings vectors.npy)"))
    first, *others = found.values()
    if any(other != first for other in others):
        cause = f"{', '.join(found)} come from different embeddings"
        raise RequestError(message("the score table", cause, "pass the vectors (--embeddings vectors.npy)"))
    return dict(first)


def stored_vectors(table: ScoreTable, cache_dir: str | os.PathLike[str] | None = None) -> NDArray[np.float32]:
    """Unit vectors of the table's N rows, float32 [N, d], perhaps a memory map; NaN where an example has none.

    The key of the table's `knn_<i>` column names the embedding, its ids the examples; `cache_dir` is the score store.

    Raises:
        RequestError: the table does not name an embedding, or the store lacks vectors of its rows.
    """
    import pyarrow as pa

    from im_lightning.scoring.store import Join, Store

    root = cache_root(cache_dir)
    store = Store(root, "embedding", {"embedding": embedding_identity(table)}, {})
    encoded = pa.array(table.id, type=pa.string()).dictionary_encode()
    known = store.lookup_vectors(Join(encoded.dictionary))
    if not known.present.all():
        missing = int((~known.present).sum())
        cause = f"the score store {root} lacks the embeddings of {missing:,} of {len(known.present):,} examples"
        remedy = (
            "name the store that the pool was scored with (--cache-dir, cache_dir=); or score the pool anew with an "
            "empty one, which keeps them there; or pass the vectors (--embeddings vectors.npy)"
        )
        raise RequestError(message(str(store.folder), cause, remedy))
    if len(known.vectors) == len(table):  # no duplicates: the distinct examples are the rows
        return known.vectors
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    rows = scratch_array((len(table), known.vectors.shape[1]), root)
    for start in range(0, len(codes), _CHUNK):
        rows[start : start + _CHUNK] = known.vectors[codes[start : start + _CHUNK]]
    return rows


def example_vectors(
    examples: Sequence[Example],
    identity: dict[str, Any],
    model: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> NDArray[np.float32]:
    """Unit vectors of n other examples by the embedding of that identity, float32 [n, d]; NaN where there is none.

    What the score store has is read from it; the rest is made by `model`, in the passes that score, and kept there.

    Raises:
        RequestError: the store lacks some, and the model is not named or is another one.
    """
    from im_lightning.scoring.columns import DistinctPool, VectorWork
    from im_lightning.scoring.plan import vectors_pass
    from im_lightning.scoring.store import Store, check_writable

    root, pool = cache_root(cache_dir), DistinctPool(examples)
    known = Store(root, "embedding", {"embedding": identity}, {}).lookup_vectors(pool.join)
    vectors, missing = known.vectors, int((~known.present).sum())
    if missing:
        name = model or (identity.get("model") or {}).get("name")
        if name is None:
            cause = f"the score store {root} lacks the embeddings of {missing:,} of them, and their model is not named"
            remedy = "name the one that the pool's knn_<i> was scored by (--target-model)"
            raise RequestError(message("the targets", cause, remedy))
        setup = _setup_of(identity, name, root)
        check_writable(root)
        work = VectorWork(pool, Store(root, "embedding", {"embedding": identity}, setup.embedding_numerics))
        vectors_pass(pool, work, setup, "embeddings of the targets").run()
        vectors = work.vectors
    return np.asarray(vectors[pool.codes], dtype=np.float32)


def _setup_of(identity: dict[str, Any], model: str, root: Path) -> Setup:
    """How vectors of that identity are made by the model.

    Raises:
        RequestError: by this model they are others.
    """
    from im_lightning.data.tokenization import TEMPLATES
    from im_lightning.scoring.settings import ScorerModels, Setup

    embed, own = identity.get("text", "both"), identity.get("model") or {}
    setups: list[Setup] = []
    if identity.get("kind") == "sentence-transformers":
        long = int("long texts" in identity)
        setups.append(Setup(Encoding(cache_dir=str(root)), ScorerModels(model, embed=embed), long_rows=long))
    else:
        length = int(identity.get("max_length", 1024))
        named = [Encoding(model, own.get("revision"), template, length, str(root)) for template in TEMPLATES]
        setups += [Setup(one, ScorerModels(embed=embed)) for one in named]
    found = setups[0].embedding
    for setup in setups:
        with contextlib.suppress(RequestError):  # it has no chat template
            if setup.embedding == identity:
                return setup
    other = "; ".join(one.text("of the pool", "by it") for one in differences(identity, found))
    cause = f"it does not make the vectors that the pool's knn_<i> was scored by ({other})"
    remedy = "name that model; or score the targets as the pool was (im-lightning score TARGET --indicators knn_1 …)"
    raise RequestError(message(f"--target-model {model}", cause, remedy))


def read_vectors(path: str | os.PathLike[str], rows: int) -> NDArray[np.float32]:
    """Vectors from a `.npy` file, one per row of the score table, as a memory map.

    Raises:
        RequestError: there is no such file. DataError: it holds something else, or another number of rows.
    """
    if not Path(path).is_file():
        raise RequestError(message(str(path), "there is no such file", "name a .npy file of one vector per row"))
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        cause = f"is not a .npy array ({(str(error).splitlines() or ['?'])[0]})"
        raise DataError(message(str(path), cause, "write it with numpy.save")) from error
    return checked_vectors(array, rows, str(path))


def checked_vectors(array: Any, rows: int, what: str = "embeddings") -> NDArray[np.float32]:
    """Refuses what is not one vector of numbers per row.

    Raises:
        DataError: names the shape and type.
    """
    if not isinstance(array, np.ndarray) or array.ndim != 2 or len(array) != rows or array.dtype.kind != "f":
        shape = getattr(array, "shape", type(array).__name__)
        cause = f"it holds {shape} {getattr(array, 'dtype', '')}".rstrip()
        raise DataError(message(what, cause, f"give floats of shape [{rows}, d], one vector per row of the table"))
    return array


def rows_with_vectors(vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
    """bool [N]: rows whose vector is finite and not zero; a part at a time, since it may be a memory map."""
    there = np.zeros(len(vectors), dtype=np.bool_)
    for start in range(0, len(vectors), _CHUNK):
        part = vectors[start : start + _CHUNK]
        there[start : start + _CHUNK] = np.isfinite(part).all(axis=1) & part.any(axis=1)
    return there

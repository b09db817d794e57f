"""`im-lightning check`: which rows of a pool are in an evaluation set, as they are or in another guise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from im_lightning._utils.outputs import Replacing
from im_lightning.data.settings import Reading
from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    from im_lightning.data.loading import LoadedRow
    from im_lightning.data.overlap.search import Embed, Overlap

SUMMARY = "find rows of a pool that are in an evaluation set: exact, normalised, same prompt, near, semantic"
EXAMPLE = "im-lightning check pool.jsonl eval.jsonl --out overlaps.jsonl"
POSITIONAL = ("pool", "evaluation")

_READING, _REPLACING = Reading(), Replacing()
_SHOWN = 70  # characters of a text
_SEMANTIC = 0.9
_MEANINGS = {
    "exact": "the same content",
    "normalised": "the same but for case, white space and punctuation",
    "prompt": "the same prompt, another answer",
    "near": "Jaccard similarity of the shingles {near:g} or more",
    "semantic": "cosine of the embeddings {semantic:g} or more",
}


def run(
    pool: str,
    evaluation: list[str],
    near: float = 0.8,
    embedding_model: str | None = None,
    semantic: float = _SEMANTIC,
    device: str = "auto",
    show: int = 3,
    out: str | None = None,
    reading: Reading = _READING,
    replacing: Replacing = _REPLACING,
) -> int:
    """Looks for rows that should not be trained on, since they give away what they are evaluated on.

    Each row of the pool is counted once, in the strongest of: exact (the same content), normalised (but for case,
    white space and punctuation), prompt (the same prompt, another answer), near (shingles of five characters with a
    Jaccard similarity of --near or more; none is missed) and, with an embedding model, semantic (paraphrases). The exit
    status is 1 if there is any, else 0.

    Args:
        pool: A file, folder or data set.
        evaluation: Evaluation sets, one or several.
        near: Least Jaccard similarity of near rows; 0 leaves them out.
        embedding_model: Also look for rows of the same meaning, by this model (folder, hub id, or minilm).
        semantic: Least cosine of such rows.
        device: Of the embedding model: cpu, cuda, mps or auto.
        show: Pairs shown of each kind.
        out: Also write every pair found, as JSON Lines.
        reading: Format of the rows.
        replacing: What may be replaced.
    """
    from dataclasses import asdict, fields

    from im_lightning._utils.answer import answer
    from im_lightning.data.file_io import check_rows_path, rows_with
    from im_lightning.data.loading import Rejected, iter_rows, no_rows, note_rejected, write_rows
    from im_lightning.data.overlap.search import Overlap, find_overlaps
    from im_lightning.models.device import resolve_device

    resolve_device(device)  # names a wrong one, with or without a model
    if embedding_model is None and semantic != _SEMANTIC:
        cause = "rows of the same meaning are found by an embedding model, and none is named"
        remedy = "add --embedding-model (a folder, a hub id or minilm), or leave it out"
        raise RequestError(message(f"--semantic {semantic:g}", cause, remedy))
    if out is not None:
        check_rows_path(out)
        replacing.check(out, "file of overlaps", rows_with([field.name for field in fields(Overlap)]))
    bad: dict[str, list[Rejected]] = {"evaluation": [], "pool": []}
    evaluated = list(iter_rows(evaluation, rejected=bad["evaluation"], **asdict(reading)))
    if not evaluated:
        raise no_rows(evaluation, bad["evaluation"])
    embed = None if embedding_model is None else _embedder(embedding_model, device)
    counted = _Counted(iter_rows(pool, rejected=bad["pool"], **asdict(reading)))
    found = list(find_overlaps(counted, evaluated, near or None, embed, semantic))
    if not counted.count:
        raise no_rows(pool, bad["pool"])
    note_rejected(evaluation, bad["evaluation"])
    note_rejected(pool, bad["pool"])
    if out is not None:
        write_rows(out, [asdict(one) for one in found])
    kinds = [k for k in _MEANINGS if (k != "near" or near) and (k != "semantic" or embed is not None)]
    meanings = {kind: _MEANINGS[kind].format(near=near, semantic=semantic) for kind in kinds}
    head = f"{counted.count:,} rows of {pool}, against {len(evaluated):,} of {', '.join(evaluation)}\n\n"
    counts = {kind: _counts(kind, meaning, found) for kind, meaning in meanings.items()}
    record = {
        "pool": {"path": pool, "rows": counted.count},
        "evaluation": {"paths": evaluation, "rows": len(evaluated)},
        "rejected": sum(map(len, bad.values())),
        "kinds": counts,
        "overlaps": [asdict(one) for one in found],
    }
    answer(record, head + _text(counts, found, show))
    return 1 if found else 0


class _Counted:
    """Rows, and how many have been read."""

    def __init__(self, rows: Iterator[LoadedRow]) -> None:
        self.rows, self.count = rows, 0

    def __iter__(self) -> Iterator[LoadedRow]:
        for row in self.rows:
            self.count += 1
            yield row


def _embedder(model: str, device: str) -> Embed:
    """Unit vectors by an embedding model, as `knn_<i>` takes them."""
    from im_lightning.indicators.knn import unit_rows
    from im_lightning.models.device import resolve_device
    from im_lightning.models.embedding import embed, embedding_text, load_embedder

    loaded = load_embedder(model, device=resolve_device(device))
    return lambda examples: unit_rows(embed(loaded, [embedding_text(example) for example in examples]))


def _of(kind: str, found: list[Overlap]) -> list[Overlap]:
    """Those of one kind, the most similar first."""
    return sorted((one for one in found if one.kind == kind), key=lambda one: -one.similarity)


def _counts(kind: str, meaning: str, found: list[Overlap]) -> dict[str, Any]:
    of = _of(kind, found)
    return {"rows": len(of), "evaluation_rows": len({one.evaluation_row for one in of}), "meaning": meaning}


def _text(counts: dict[str, dict[str, Any]], found: list[Overlap], show: int) -> str:
    """Counts by kind, and the first pairs of each."""
    from im_lightning._utils.text_tables import Column, terminal_width, text_table

    cells, pairs = [], []
    for kind, one in counts.items():
        cells.append([kind, f"{one['rows']:,}", f"{one['evaluation_rows']:,}", one["meaning"]])
        for pair in _of(kind, found)[:show]:
            how = f" ({pair.similarity:.3f})" if kind in ("near", "semantic") else ""
            pairs += ["", f"{kind}{how}: {pair.place} and {pair.evaluation_place}"]
            pairs += [f"  {_short(pair.text)}", f"  {_short(pair.evaluation_text)}"]
    columns = [Column("kind", right=False), Column("rows"), Column("evaluation rows"), Column("meaning", False, rank=1)]
    end = f"{len(found):,} of the pool's rows are in the evaluation set, by the strongest of these kinds."
    if not found:
        end = "None of the pool's rows is in the evaluation set, by any of these kinds."
    table = text_table(columns, cells, terminal_width())
    return "\n".join([table, *pairs, "", end])


def _short(text: str) -> str:
    """One line of a text, shortened."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"

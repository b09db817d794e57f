"""Which rows were taken, which were not, and why: `decisions.parquet` beside every selection and weighted fit.

`Basket` takes rows in an order until a budget of rows or tokens is reached; `Decisions` keeps why the others were not.

Columns: `row`, `id`, `source`; `taken` (null where every epoch resamples); `probability` (that the draw takes it;
null where rows are not drawn by weight); `reason` (why it was not taken, null for a row that was); `duplicate_of` (row
of the pool taken in its place, or null); `target` (the one, from 0, that it was taken for; only with targets);
`predicted_log_loss` and `contribution_<indicator>`, in nats: how far the indicator moves the rule's prediction of this
row from that of the pool's mean (under a law with an offset: its index).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.files import atomic_path
from im_lightning.data.score_table import PREDICTED, ScoreTable
from im_lightning.errors import DataError, RequestError, message
from im_lightning.sampling.draws.systematic import Floats, Rows, group_sums, inclusion_probabilities
from im_lightning.sampling.selection.ranking import Quotas

if TYPE_CHECKING:
    from im_lightning.rule.linear_rule import LinearRule

FILE = "decisions.parquet"
CONTRIBUTION = "contribution_"
NOT_ELIGIBLE = "it is not eligible"
NOT_REACHED = "others were taken before it"
_NOT_DRAWN = "the draw did not take it"
_COLUMNS = ("row", "id", "source", "taken", "probability", "reason", "duplicate_of")


TOLERANCE = 0.01
"""Share by which the tokens of a subset may miss the number asked for."""

_BLOCK = 1024  # rows compared with the taken ones at a time


class Basket:
    """What was taken so far.

    Args:
        rows: Rows to take, or None for a budget of tokens.
        target: Tokens to take (± `TOLERANCE`), or None for a budget of rows.
        tokens: int64 [N], tokens per row of the pool; needed with `target`.
        vectors: [N, d], one per row of the pool, perhaps a memory map; needed with `max_similarity`.
        max_similarity: A row whose cosine with a taken row is this or more is passed over (Liu et al. 2024, DEITA).
        quotas: How many rows each group may give; a row of a group that has given them is passed over.
        prompts: int64 [N], the prompt of each row, of which one row at most is taken; None for any number.
    """

    def __init__(
        self,
        rows: int | None,
        target: int | None = None,
        tokens: NDArray[np.int64] | None = None,
        vectors: NDArray[np.float32] | NDArray[np.float16] | None = None,
        max_similarity: float | None = None,
        quotas: Quotas | None = None,
        prompts: Rows | None = None,
    ) -> None:
        self.prompts = prompts
        self.rows, self.target, self.tokens = rows, target, tokens
        self.vectors, self.max_similarity, self.quotas = vectors, max_similarity, quotas
        self.taken: list[int] = []  # the rows, in the order taken
        self.total = 0  # their tokens, 0 where none are counted
        self.duplicates: dict[int, int] = {}  # near-duplicates met, and the taken row that each is most like
        self.over_quota: set[int] = set()  # rows met whose group had given its rows
        self.target_of: dict[int, int] = {}  # for which target each row was taken
        self.answered: NDArray[np.int64] | None = None  # int64 [prompts], the row taken of each; −1 for none
        if prompts is not None:
            self.answered = np.full(int(prompts.max(initial=-1)) + 1, -1, dtype=np.int64)
        self._low = 0 if target is None else math.ceil(target * (1 - TOLERANCE))
        self._high = 0 if target is None else math.floor(target * (1 + TOLERANCE))
        self._kept = np.empty((0, 0), dtype=np.float32)

    @property
    def full(self) -> bool:
        return self.total >= self._low if self.rows is None else len(self.taken) >= self.rows

    def open(self, rows: Rows) -> NDArray[np.bool_]:
        """bool [n]: those of the rows of whose prompt none was taken."""
        if self.answered is None or self.prompts is None:
            return np.ones(len(rows), dtype=np.bool_)
        return np.asarray(self.answered[self.prompts[rows]] < 0)

    def most(self, left: NDArray[np.bool_]) -> int:
        """How many of the rows `left` (bool [N]) it can take at most."""
        return int(left.sum()) if self.prompts is None else len(np.unique(self.prompts[left]))

    def close(self, left: NDArray[np.bool_], drawn: Rows) -> None:
        """Takes the rows that were drawn out of those `left`, and all that it can take no more."""
        left[drawn] = False
        if self.prompts is not None:
            left &= self.open(np.arange(len(left)))

    def wanted(self, left: NDArray[np.bool_], weights: Floats | None = None) -> int:
        """How many of the rows `left` (bool [N]), drawn by weights [N] or all alike, are likely to fill it; with a
        margin where tokens are counted."""
        if self.rows is not None:
            return self.rows - len(self.taken)
        if self.tokens is None or self.target is None or not left.any():
            return 1
        mean = self.tokens[left].mean() if weights is None else weights @ self.tokens / weights.sum()
        return max(1, math.ceil(1.05 * (self.target - self.total) / max(float(mean), 1e-9)))

    def fill(self, order: Rows) -> None:
        """Takes rows in that order until it is full."""
        plain = self.max_similarity is None and self.quotas is None and self.prompts is None
        if self.rows is not None and plain:
            self.taken += order[: self.rows - len(self.taken)].tolist()
            return
        for start in range(0, len(order), _BLOCK):
            if self.full:
                return
            block, since = order[start : start + _BLOCK], len(self.taken)
            block = block[self.open(block)]
            if self.quotas is not None:
                open_groups = self.quotas.left[self.quotas.group[block]] > 0
                self.over_quota.update(block[~open_groups].tolist())
                block = block[open_groups]
            for row in block[self._unlike(block)].tolist():
                self.offer(row, since)

    def offer(self, row: int, since: int = 0) -> bool:
        """Takes a row unless it is full, the row has too many tokens, or its prompt or one too similar was taken
        (those before the first `since` were compared already)."""
        if self.full or not self.open(np.array([row]))[0]:
            return False
        count = 0 if self.tokens is None else int(self.tokens[row])
        if self.rows is None and self.total + count > self._high:
            return False
        if self.quotas is not None and not self.quotas.allows(row):
            self.over_quota.add(row)
            return False
        if self.max_similarity is not None:
            vector = self.unit(np.array([row]))[0]
            if len(self.taken) > since:
                similarity = self._kept[since : len(self.taken)] @ vector
                if similarity.max() >= self.max_similarity:
                    self.duplicates[row] = self.taken[since + int(similarity.argmax())]
                    return False
            self._keep(vector)
        if self.quotas is not None:
            self.quotas.take(row)
        if self.answered is not None and self.prompts is not None:
            self.answered[self.prompts[row]] = row
        self.taken.append(row)
        self.total += count
        return True

    def _unlike(self, block: Rows) -> NDArray[np.bool_]:
        """bool [n]: the rows that are no near-duplicate of one taken so far."""
        if self.max_similarity is None or not self.taken:
            return np.ones(len(block), dtype=bool)
        similarity = self.unit(block) @ self._kept[: len(self.taken)].T
        unlike = similarity.max(axis=1) < self.max_similarity
        for at in np.flatnonzero(~unlike).tolist():
            self.duplicates[int(block[at])] = self.taken[int(similarity[at].argmax())]
        return unlike

    def _keep(self, vector: NDArray[np.float32]) -> None:
        n = len(self.taken)
        if n == len(self._kept):
            grown = np.empty((max(64, 2 * n), len(vector)), dtype=np.float32)
            grown[:n] = self._kept[:n] if n else grown[:0]
            self._kept = grown
        self._kept[n] = vector

    def unit(self, rows: Rows) -> NDArray[np.float32]:
        """The vectors of those rows, scaled to length 1, float32 [n, d]."""
        if self.vectors is None:
            raise RuntimeError("a similarity needs vectors")
        return unit_vectors(self.vectors, rows)


def take_tokens(order: Rows, tokens: NDArray[np.int64], target: int) -> NDArray[np.int64] | None:
    """Rows in `order` (int64 [n], of `tokens` each) until `target` tokens, ± `TOLERANCE`.

    A row that would overshoot is passed over; so only the last few rows can be out of order. None if there are not
    enough tokens.
    """
    basket = Basket(None, target, tokens)
    basket.fill(np.arange(len(order)))
    return order[basket.taken] if basket.full else None


def unit_vectors(vectors: NDArray[np.float32] | NDArray[np.float16], rows: Rows) -> NDArray[np.float32]:
    """The vectors of those rows, scaled to length 1, float32 [n, d]."""
    part = np.asarray(vectors[rows], dtype=np.float32)
    part /= np.sqrt(np.einsum("rd,rd->r", part, part))[:, None]
    return part


class Decisions:
    """Taken or not, and why; filled while rows are chosen.

    Args:
        eligible: bool [N], rows that may be chosen at all.
    """

    def __init__(self, eligible: NDArray[np.bool_]) -> None:
        self.taken = np.zeros(len(eligible), dtype=np.bool_)
        self.probability = np.full(len(eligible), np.nan)
        self.duplicate_of = np.full(len(eligible), -1, dtype=np.int64)
        self.target = np.full(len(eligible), -1, dtype=np.int64)
        self._texts = ["", NOT_ELIGIBLE]
        self._code = np.where(eligible, 0, 1).astype(np.int16)

    @property
    def reason(self) -> list[str | None]:
        """Why each row was not taken; None for those that were."""
        return [self._texts[code] or None for code in self._code.tolist()]

    def leave_out(self, rows: Rows, reason: str) -> None:
        """Enters a reason for rows that have none yet."""
        self._texts.append(reason)
        self._code[rows[self._code[rows] == 0]] = len(self._texts) - 1

    def without(self, usable: NDArray[np.bool_], reason: str) -> NDArray[np.bool_]:
        """Enters the reason for all rows that are not usable; returns `usable`."""
        self.leave_out(np.flatnonzero(~usable), reason)
        return usable

    def first_draw(self, weights: Floats, rows: int, groups: Rows | None = None) -> None:
        """Keeps the probabilities of the first draw; later ones only fill up what it lost. Of each of the `groups`
        (int64 [N]) it takes one row at most."""
        if np.isnan(self.probability).all():
            there = int(np.count_nonzero(group_sums(weights, groups)))
            self.probability = inclusion_probabilities(weights, min(rows, there), groups)

    def take(self, rows: Rows) -> None:
        """Enters the rows taken; all others that have no reason were not reached."""
        self.taken[rows] = True
        rest = np.flatnonzero(~self.taken)
        self.leave_out(rest, NOT_REACHED if np.isnan(self.probability).all() else _NOT_DRAWN)
        self._code[rows] = 0

    def close(self, basket: Basket, group: str) -> None:
        """Enters what the basket took and passed over."""
        duplicates = np.array(list(basket.duplicates), dtype=np.int64)
        self.duplicate_of[duplicates] = list(basket.duplicates.values())
        self.leave_out(duplicates, "a row much like it was taken")
        self.leave_out(np.array(sorted(basket.over_quota), dtype=np.int64), f"the quota of its {group} was full")
        if basket.prompts is not None and basket.answered is not None:
            self.one_per_prompt(basket.prompts, basket.answered)
        self.target[list(basket.target_of)] = list(basket.target_of.values())
        self.take(np.array(basket.taken, dtype=np.int64))

    def one_per_prompt(self, prompts: Rows, answered: Rows) -> None:
        """Enters the rows whose prompt (int64 [N]) was taken with another answer: `answered`, int64 [prompts], has the
        row taken of each, or −1."""
        instead = answered[prompts]
        passed = np.flatnonzero((instead >= 0) & (instead != np.arange(len(instead))) & (self._code == 0))
        self.duplicate_of[passed] = instead[passed]
        self.leave_out(passed, "a row of the same prompt was taken")

    def write(
        self,
        path: str | os.PathLike[str],
        table: ScoreTable,
        rule: LinearRule | None,
        drawn: bool = True,
        phi: Floats | None = None,
    ) -> None:
        """Writes the file atomically; `taken` is null where nothing is `drawn` once, but resampled each epoch. `phi`
        are the table's regressors under the rule, where they are known already."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        none = np.isnan(self.probability)
        columns: dict[str, Any] = {
            "row": table.row,
            "id": pa.array(table.id, pa.string()),
            "source": pa.array([text.encode("utf-8", "replace").decode() for text in table.source], pa.string()),
            "taken": pa.array(self.taken, mask=None if drawn else np.ones(len(self.taken), dtype=np.bool_)),
            "probability": pa.array(self.probability, mask=none),
            "reason": pa.DictionaryArray.from_arrays(pa.array(self._code, mask=self._code == 0), self._texts),
            "duplicate_of": pa.array(
                table.row[np.maximum(self.duplicate_of, 0)] if len(table) else table.row, mask=self.duplicate_of < 0
            ),
        }
        if (self.target >= 0).any():
            columns["target"] = pa.array(self.target, mask=self.target < 0)
        if rule is not None:
            columns |= contributions(rule, rule.phi(table) if phi is None else phi)
        with atomic_path(path) as temporary:
            pq.write_table(pa.table(columns), temporary)


def contributions(rule: LinearRule, phi: Floats) -> dict[str, Floats]:
    """The rule's prediction of N rows and what each indicator adds to it: column → float64 [N], NaN without a value."""
    known = np.isfinite(phi).all(axis=1)
    centred = phi - (phi[known].mean(axis=0) if known.any() else 0.0)
    out = {PREDICTED: rule.log_loss(phi)}
    for column in dict.fromkeys(rule.columns):
        mine = np.array([one == column for one in rule.columns])
        out[CONTRIBUTION + (column or "its source")] = centred[:, mine] @ rule.coef_[mine]
    return out


def decisions_file(name: str | os.PathLike[str]) -> Path:
    """The file of decisions that a name stands for: itself, that beside a subset, or the newest of a fit's folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted((path / "decisions").glob("*.parquet"), key=lambda file: file.stat().st_mtime)
        return found[-1] if found else path / "decisions" / "*.parquet"
    beside = path.with_name(f"{path.name}.{FILE}")
    return beside if beside.is_file() else path


def read_decision(path: str | os.PathLike[str], wanted: str) -> dict[str, Any]:
    """One row of a decisions file, by row number or id; of rows of one id the first.

    Returns:
        Column → value; `rows`: how many rows have this id; `place`: of a row that was taken, which of the taken ones it
        is in the order of the pool, from 1.

    Raises:
        RequestError: there is no such file, or no such row.
        DataError: the file is torn or something else.
    """
    import pyarrow.compute as pc

    keys = _read(path, ["row", "id", "taken"])
    by = "id" if len(wanted) == 32 else "row"
    if by == "row" and not wanted.isdecimal():
        cause = "it is neither the number of a row nor an id"
        remedy = "give a number from 0 on, the 32 digits of an id, or --text with words of the row"
        raise RequestError(message(f"row {wanted}", cause, remedy))
    at = pc.indices_nonzero(pc.equal(keys[by], wanted if by == "id" else int(wanted))).to_pylist()
    if not at:
        last = pc.max(keys["row"]).as_py()
        cause = f"{path} has no such row (its {len(keys):,} rows end with row {last})"
        raise RequestError(message(f"{by} {wanted}", cause, "give a row of the pool that was chosen from"))
    found = _read(path).slice(at[0], 1).to_pylist()[0]
    same = pc.sum(pc.equal(keys["id"], found["id"])).as_py()
    place = pc.sum(keys["taken"].slice(0, at[0] + 1)).as_py() if found["taken"] else None
    return {**found, "rows": same, "place": place}


def decided_ids(path: str | os.PathLike[str]) -> list[str]:
    """Ids of the rows of a decisions file, in the order of the pool; raises as `read_decision`."""
    return [str(one) for one in _read(path, ["id"])["id"].to_pylist()]


def read_decisions(path: str | os.PathLike[str], table: ScoreTable) -> Any:
    """The decisions on all rows of a score table, without what the rule says of them: a `pyarrow.Table`.

    Raises:
        RequestError: there is no such file, or it is of another pool.
        DataError: the file is torn or something else.
    """
    found = _read(path, list(_COLUMNS))
    if found["id"].to_pylist() != table.id:
        cause = f"its {len(found):,} rows are not the {len(table):,} of the score table"
        raise RequestError(message(str(path), cause, "name the decisions on the rows of these scores"))
    return found


def why(row: Mapping[str, Any]) -> str:
    """What became of a row, in words."""
    if row["taken"]:
        return "It was taken" + ("." if row.get("target") is None else f", for target {row['target']}.")
    if row["taken"] is None and row["reason"] is None:
        return "Every epoch resamples."
    instead = "" if row["duplicate_of"] is None else f", row {row['duplicate_of']}"
    return f"It was not taken: {row['reason']}{instead}."


def _read(path: str | os.PathLike[str], columns: list[str] | None = None) -> Any:
    """The file as a `pyarrow.Table`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        remedy = "name the file that im-lightning select wrote beside its subset, or a fit into its folder"
        raise RequestError(message(str(path), "there is no such file", remedy))
    try:
        names = pq.ParquetFile(path).schema_arrow.names
        if not set(_COLUMNS) <= set(names):
            raise ValueError(f"it has the columns {', '.join(names[:8])}")
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        cause = f"it does not hold decisions ({str(error).splitlines()[0]})"
        raise DataError(message(str(path), cause, "write it again with im-lightning select")) from error

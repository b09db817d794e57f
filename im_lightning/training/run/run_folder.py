"""What a run used, frozen: score table, rule and weights, in one folder per digest of the inputs.

    <default_root_dir>/im-lightning/<digest>/
        inputs.json       what the digest is of, and of which sources the rows were; written last
        table.parquet     scores of the pool (absent where nothing was scored)
        rule.json         the rule (absent without one)
        weights.parquet   row, id, eligible, weight (float64)
        rejected.jsonl    bad rows of pool and evaluation sets that were set aside (absent without any)
        subsets/*.json    rows of fixed subsets, one file per draw
        base/*.json       evaluation loss of the base model

Runs with equal inputs share it. A resumed run looks here before the score store, so that a lost cache, a refitted rule
file or another machine's rounding changes nothing. The digest is of inputs, never of floats.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from im_lightning._utils.files import atomic_path, parse_json, umask, write_json
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import log
from im_lightning.data.loading import Rejected, write_rows
from im_lightning.data.overlap.keys import Mask
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import DataError, InstructMiningError, RequestError, message
from im_lightning.rule.linear_rule import LinearRule, Regressors
from im_lightning.sampling.rows import Choice
from im_lightning.sampling.selection.decisions import Decisions
from im_lightning.sampling.weights.quality_weights import RowWeights

SCHEMA = 1
FOLDER = "im-lightning"  # not im_lightning: a folder of that name hides the package from scripts beside it
_WEIGHTS = {"eligible": "bool", "weight": "double"}  # what is read of weights.parquet
_AGAIN = "delete the folder, and it is made again from the score store"


@dataclass(frozen=True)
class RunInputs:
    """What a run trains on: what its folder holds, and the rows drawn.

    Args:
        folder: Where it is frozen.
        inputs: What its digest is of.
        table: Scores of the pool of N rows, or None where nothing was scored.
        rule: The rule, or None.
        weights: Of the pool's rows, with what the weighting said.
        scored: Regressors of the table under the rule, or None where nothing was scored.
        rows: The fixed subset, int64, or None where every epoch draws by `weights`.
        design: How the rows came about.
    """

    folder: Path
    inputs: dict[str, Any]
    table: ScoreTable | None
    rule: LinearRule | None
    weights: RowWeights
    scored: Regressors | None = None
    rows: np.ndarray | None = None
    design: dict[str, Any] = field(default_factory=dict)


class Change(NamedTuple):
    """What differs between two descriptions: where (keys from the outermost on), before and now."""

    path: tuple[str, ...]
    old: Any
    new: Any

    def __str__(self) -> str:
        """`budget: 300 → 400`."""
        return f"{'.'.join(self.path)}: {_short(self.old)} → {_short(self.new)}"


def frozen_folder(root: str | os.PathLike[str], inputs: Mapping[str, Any]) -> Path:
    """Where runs with these inputs keep what they used."""
    return Path(root) / FOLDER / digest_json(inputs)


def is_frozen(folder: Path) -> bool:
    return (folder / "inputs.json").is_file()


def freeze(run: RunInputs, ids: list[str], rejected: Sequence[Rejected] = ()) -> bool:
    """Writes the folder; it appears whole or not at all.

    Returns:
        Whether it is this one; if another process was first, its folder stays.
    """
    parent = run.folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{run.folder.name}.", dir=parent))
    except OSError as error:
        remedy = "choose a writable default_root_dir for the Trainer, or pass run_dir="
        raise InstructMiningError(message(str(parent), f"cannot be written: {error.strerror}", remedy)) from error
    try:
        if run.table is not None:
            run.table.write(temporary / "table.parquet")
        if run.rule is not None:
            run.rule.save(temporary / "rule.json")
        _write_weights(temporary / "weights.parquet", run.weights, ids)
        if rejected:
            write_rows(temporary / "rejected.jsonl", rejected)
        write_json(temporary / "inputs.json", {"schema": SCHEMA, "inputs": run.inputs, "report": run.weights.report})
        temporary.chmod(0o777 & ~umask())
        try:
            temporary.rename(run.folder)
        except OSError:
            if is_frozen(run.folder):
                return False
            run.folder.mkdir(exist_ok=True)  # an empty or half-made folder of that name: fill it
            for path in sorted(temporary.iterdir(), key=lambda p: p.name == "inputs.json"):
                path.replace(run.folder / path.name)
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def thaw(folder: Path) -> RunInputs:
    """Reads the folder.

    Raises:
        DataError: a file is missing, torn or foreign; names it.
    """
    stamps = tuple(stamp(folder / name) for name in ("inputs.json", "table.parquet", "rule.json", "weights.parquet"))
    return _thaw(folder, stamps)


@lru_cache(maxsize=2)  # dozens of short fits in one process share one table
def _thaw(folder: Path, stamps: tuple[Any, ...]) -> RunInputs:
    path = folder / "inputs.json"
    try:
        noted = parse_json(path.read_bytes())
        inputs, report, schema = dict(noted["inputs"]), dict(noted["report"]), noted["schema"]
        rows = int(inputs["pool"]["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(message(str(path), f"it does not describe a frozen run ({error})", _AGAIN)) from error
    if schema != SCHEMA:
        cause = f"its schema is {schema!r}, and this version of im-lightning reads {SCHEMA}"
        raise DataError(message(str(path), cause, "use the version that wrote it, or start a new fit"))
    table = ScoreTable.read(folder / "table.parquet") if (folder / "table.parquet").exists() else None
    rule = LinearRule.load(folder / "rule.json") if (folder / "rule.json").exists() else None
    weights, eligible = _read_weights(folder / "weights.parquet", rows)
    return RunInputs(folder, inputs, table, rule, RowWeights(weights, eligible, report))


def keep_subset(folder: Path, draw: Mapping[str, Any], rows: np.ndarray, design: Mapping[str, Any]) -> None:
    """Writes the rows of a fixed subset, once per draw."""
    write_json(subset_path(folder, draw), {"draw": draw, "rows": rows.tolist(), "design": design})


def subset_path(folder: Path, draw: Mapping[str, Any]) -> Path:
    return folder / "subsets" / f"{digest_json(draw)}.json"


def read_subset(folder: Path, draw: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Rows (int64) and design of a subset drawn before; None if it was not.

    Raises:
        DataError: the file is torn.
    """
    path = subset_path(folder, draw)
    if not path.exists():
        return None
    try:
        value = parse_json(path.read_bytes())
        return np.array(value["rows"], dtype=np.int64), dict(value["design"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"it does not hold a subset ({error})"
        raise DataError(message(str(path), cause, "delete it, and it is drawn again")) from error


def decisions_path(folder: Path, draw: Mapping[str, Any]) -> Path:
    return folder / "decisions" / f"{digest_json(draw)}.parquet"


def is_another_draw(folder: Path, draw: Mapping[str, Any]) -> bool:
    """Whether a frozen folder has not decided this draw; what an earlier version froze without decisions stays so."""
    decided = decisions_path(folder, draw)
    drawn = draw["kind"] == "fixed" and not subset_path(folder, draw).exists()
    return drawn or (decided.parent.exists() and not decided.exists())


def keep_decisions(run: RunInputs, choice: Choice, left_out: Mapping[str, Mask], groups: np.ndarray | None) -> None:
    """Writes why each row was drawn or not into the run's folder, for `im-lightning explain`; once per draw. `groups`
    int64 [N], where one row of each is drawn at most."""
    if run.table is None or run.scored is None:
        return
    path = decisions_path(run.folder, choice.draw_inputs)
    decided = Decisions(np.ones(len(run.table), dtype=np.bool_))
    for reason, mask in left_out.items():
        decided.without(~mask, reason.replace("_", " "))
    decided.without(run.weights.eligible, "the rule has no prediction of it")
    if not choice.replacement and choice.budget is not None:
        decided.first_draw(run.weights.weights, choice.budget, groups)
    if run.rows is not None:
        if groups is not None:
            answered = np.full(int(groups.max()) + 1, -1, dtype=np.int64)
            answered[groups[run.rows]] = run.rows
            decided.one_per_prompt(groups, answered)
        decided.take(run.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    decided.write(path, run.table, run.rule, drawn=run.rows is not None, phi=run.scored.phi)
    log(f"why a row is drawn or not: im-lightning explain ROW {run.folder}")


def changes(old: Any, new: Any, where: tuple[str, ...] = ()) -> list[Change]:
    """What differs between two JSON-like descriptions, in order of appearance.

    >>> [str(change) for change in changes({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})]
    ['b.c: 2 → 3']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [one for k in keys for one in changes(old.get(k), new.get(k), (*where, str(k)))]
    return [] if old == new else [Change(where, old, new)]


def refuse_changes(what: str, found: list[Change], remedy: str, on_mismatch: str) -> None:
    """Raises a RequestError that says what changed, or says it and goes on (`on_mismatch="warn"`)."""
    cause = "the run's inputs are not what they were: " + "; ".join(map(str, found))
    if on_mismatch == "warn":
        log(f"{what}: {cause}; going on, as on_mismatch=warn asks")
        return
    raise RequestError(message(what, cause, f"{remedy}, or pass on_mismatch=warn to go on regardless"))


def resume_changes(
    state: Mapping[str, Any], inputs: dict[str, Any], draw: dict[str, Any], choice: Choice, options: Any
) -> list[Change]:
    """What differs between a checkpoint's state of the data module and a fit that resumes it, where that is accepted.

    Args:
        state: The checkpoint's.
        inputs, draw: What the fit's weights, and its rows besides these, depend on.
        choice: By which refits inside the fit weigh the pool, also where it begins without a rule.
        options: The data module's `run_dir` and `on_mismatch`.

    Raises:
        RequestError: something differs, and `on_mismatch` is "error".
    """
    found = changed_inputs(state["inputs"], inputs)
    if options.run_dir:
        found = [change for change in found if change.path[0] != "rule"]  # the frozen rule is the run's
    drawn = changes(state["draw"], draw)
    if not state["sampler"]["position"]:  # no batch is counted yet, as when a Tuner looks for the batch size
        drawn = [change for change in drawn if change.path[0] != "batch_size"]
    found += drawn
    if "weighting" in (refits := state.get("refits", {})):  # earlier versions did not say
        named = {change.path for change in found}
        weighed = changes(refits["weighting"], asdict(choice.weighting), ("weighting",))
        found += [change for change in weighed if change.path not in named]
    if found:
        remedy = f"restore them, or pass run_dir={state['run_dir']} (what it used), if it is the rule's file"
        refuse_changes("resume", found, remedy, options.on_mismatch)
    return found


def changed_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between the inputs of a run and those asked for. What runs of earlier versions did not say (that
    weights are of draws with replacement, which their draw says; versions of indicators; the rows' sources) is taken to
    be the same."""

    def told(part: str, key: str) -> dict[str, Any]:
        before, now = old.get(part), new.get(part)
        if not isinstance(before, Mapping) or not isinstance(now, Mapping) or key not in now:
            return {}
        return {part: {key: now[key], **before}}

    pool = {name: value for name, value in old["pool"].items() if name in new["pool"]}  # sources, where they count now
    old = {**old, "pool": pool}
    later = {**told("weighting", "replacement"), **told("scoring", "versions"), **told("pool", "sources")}
    return changes({**old, **later}, new)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 32 and " " not in text else text


def _write_weights(path: Path, weights: RowWeights, ids: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"row": np.arange(len(ids), dtype=np.int64), "id": pa.array(ids, pa.string())}
    table = pa.table({**columns, "eligible": weights.eligible, "weight": weights.weights})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def _read_weights(path: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=list(_WEIGHTS), page_checksum_verification=True)
        for name, kind in _WEIGHTS.items():
            column = table.column(name)
            if str(column.type) != kind or column.null_count:
                raise ValueError(f"its column {name} holds {column.type}")
        weights = table.column("weight").to_numpy().astype(np.float64)
        eligible = table.column("eligible").to_numpy().astype(bool)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(message(str(path), f"it is torn or foreign ({error})", _AGAIN)) from error
    if len(weights) != rows:
        raise DataError(message(str(path), f"it holds {len(weights)} weights for {rows} rows", _AGAIN))
    return weights, eligible


def stamp(path: Path) -> tuple[int, int] | None:
    """Size and modification time; None where there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns

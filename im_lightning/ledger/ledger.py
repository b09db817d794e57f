"""`RunLedger`: a folder with one JSON file per finetune run, written by many processes without a lock.

`<run_id>.json` holds the record, `<run_id>.losses.parquet` its per-example evaluation losses (for paired tests),
`<run_id>.statistics.json` how its training losses went with the indicators, `<run_id>.config.yaml` the arguments of
`im-lightning fit`.
Files appear whole or not at all. A file that turns out torn or invalid is set aside as `<name>.rejected` and named;
JSON that was never a run (a recipe, another tool's file) is named and left where it is.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from im_lightning._utils.display import Displayed
from im_lightning._utils.files import parse_json, plain, write_json, write_text
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import already_there, log, progress
from im_lightning.errors import DataError, InstructMiningError, RequestError, message
from im_lightning.ledger.display import plot_runs, run_frame
from im_lightning.ledger.losses import ExampleLosses, example_losses, read_losses, write_losses
from im_lightning.ledger.record import FORMAT, SCHEMA_VERSION, RunRecord

RULE_FORMAT = "im_lightning.rule"
RULE_FILE = "rule.json"
STATISTICS_FORMAT = "im_lightning.statistics"
_STATISTICS = ".statistics.json"


class RunLedger(Displayed):
    """The accumulated runs of one folder. Reading never creates the folder; `make` and adding do.

    Args:
        path: The ledger's folder, for example `runs/`.

    Attributes:
        path: The folder.
        rejected: (file name, cause) of what the last reading found unusable.

    Raises:
        RequestError: the path is a file.

    >>> RunLedger("no-such-folder").records()
    []
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.rejected: list[tuple[str, str]] = []
        self._named: set[str] = set()
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(message(str(path), "it is a file, and a ledger is a folder", "name the ledger's folder"))

    def make(self) -> None:
        """Makes the folder where there is none, and tries to write in it: whoever works for hours asks beforehand.

        Raises:
            InstructMiningError: runs could not be kept there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            cause = f"no run can be kept in this ledger: {error.strerror or error}"
            raise InstructMiningError(message(str(self.path), cause, "choose a writable folder (ledger=)")) from error

    def add(self, record: RunRecord, replace: bool = False) -> Path:
        """Writes one run atomically.

        Args:
            record: The run; it is validated first.
            replace: Whether a complete run of the same id may be overwritten. One that is not complete always may.

        Returns:
            The file written.

        Raises:
            DataError: a field of the record is wrong.
            RequestError: the ledger has another complete run of this id.
        """
        record.validate()
        path = self.path / f"{record.run_id}.json"
        if path.name.endswith(_STATISTICS):
            cause = "a file of that name would hold the statistics of another run"
            raise RequestError(message(f"run {record.run_id}", cause, "give the run another id (new_run_id())"))
        value = record.to_json()
        RunRecord.from_json(value, str(path))  # what is written must be readable
        if path.exists() and not replace:
            old = _parse(path)
            if isinstance(old, dict) and old.get("status") == "complete" and old != value:
                cause = "the ledger already has another complete run of this id"
                raise RequestError(message(str(path), cause, "give the new run an id of its own (new_run_id())"))
        write_json(path, value)
        return path

    def records(self, purpose: str | Sequence[str] | None = None, status: str | None = "complete") -> list[RunRecord]:
        """The runs, sorted by time and id.

        Args:
            purpose: One purpose or several; None for all.
            status: One status; None for all.

        Returns:
            Possibly none; a folder that does not exist has none. Unusable files are named on standard error and
            in `rejected`, and the torn and invalid ones set aside.
        """
        purposes = (purpose,) if isinstance(purpose, str) else purpose
        self.rejected = []
        found: dict[str, RunRecord] = {}
        for path in sorted(self.path.glob("*.json")) if self.path.is_dir() else []:
            if path.name.endswith(_STATISTICS):
                continue
            record = self._read(path)
            if record is not None:
                found[record.run_id] = record
        wanted = [
            r
            for r in found.values()
            if (purposes is None or r.purpose in purposes) and (status is None or r.status == status)
        ]
        return sorted(wanted, key=lambda r: (r.when, r.run_id))

    def __repr__(self) -> str:
        return f"RunLedger({str(self.path)!r})"

    def to_pandas(self) -> Any:
        """One row per run of any status: id, time, purpose, kind, status, rows, tokens, steps, seconds, `loss_<set>`
        (nats per token) and the subset's means `mean_<indicator>`, as a `pandas.DataFrame`."""
        return run_frame(self.records(status=None))

    def plot(self, axes: Any = None) -> list[Any]:
        """Draws the loss of the complete runs in the order of their time, a panel per evaluation set.

        Args:
            axes: Axes of matplotlib, one per evaluation set; by default those of a new figure.

        Returns:
            The axes.
        """
        return plot_runs(self.records(), axes)

    @staticmethod
    def digest(records: Iterable[RunRecord]) -> str:
        """Digest of a set of runs, whatever their order: what a rule says it was fitted on. Scores, which may be added
        later, are no part of it."""
        values = [(r.run_id, {k: v for k, v in r.to_json().items() if k != "scores"}) for r in records]
        return digest_json(sorted((run_id, digest_json(value)) for run_id, value in values))

    def add_losses(
        self,
        run_id: str,
        evaluation: str,
        ids: Sequence[str],
        sums: Sequence[float],
        counts: Sequence[int],
        edge_sums: Sequence[float] | None = None,
        edge_counts: Sequence[int] | None = None,
    ) -> Path:
        """Keeps the per-example losses of one run on one evaluation set; a set added again replaces the old one.

        Args:
            run_id: The run.
            evaluation: Name of the evaluation set.
            ids: [n] example ids, in the set's order.
            sums: [n] summed NLL in nats.
            counts: [n] supervised tokens.
            edge_sums: [n] nats of the first and last token of each answer alone, where they were told apart.
            edge_counts: [n] the number of these tokens.

        Raises:
            RequestError: they differ in length.
        """
        added = example_losses(f"losses of run {run_id}", ids, sums, counts, edge_sums, edge_counts)
        path = self._losses_path(run_id)
        write_losses(path, {**self._known_losses(run_id), evaluation: added})
        return path

    def losses(self, run_id: str) -> dict[str, ExampleLosses]:
        """Per-example losses by evaluation set.

        Raises:
            RequestError: the run kept none.
            DataError: the file is torn or foreign.
        """
        return read_losses(self._losses_path(run_id))

    def add_config(self, run_id: str, text: str) -> Path:
        """Keeps the arguments of a run's fit (YAML): `im-lightning fit --config` makes it again from them."""
        path = self.path / f"{run_id}.config.yaml"
        write_text(path, text)
        return path

    def add_statistics(self, run_id: str, statistics: Mapping[str, Any]) -> Path:
        """Keeps how a run's training losses went with the indicators; what was kept before is replaced.

        Args:
            run_id: The run.
            statistics: JSON-like; see `statistics`.
        """
        path = self._statistics_path(run_id)
        write_json(path, {"format": STATISTICS_FORMAT, "run_id": run_id, **plain(dict(statistics))})
        return path

    def statistics(self, run_id: str) -> dict[str, Any]:
        """How a run's training losses went with the indicators, as `InstructMiningCallback` kept it.

        Returns:
            steps (optimiser steps), pool_seen (share of the pool's rows trained on), ess (effective sample size of the
            weights, rows); and where the pool was scored: indicators, examples, pearson and slope (by indicator; nats
            per token and unit of φ), r2, by_decile (scale → mean loss in nats per token of the deciles, lowest
            first) and decile_examples, of first exposures, and the same under `repeat`; left_out (examples without an
            indicator or a loss); deciles_of (the rule's predicted_log_loss, or an indicator), deciles
            ([step, decile 1–10, mean loss since the last step, …] of that scale) and other_deciles (of the others).
            What is not known is None.

        Raises:
            RequestError: the run kept none.
            DataError: the file is torn or foreign.
        """
        path = self._statistics_path(run_id)
        if not path.exists():
            cause = "this run has no live statistics in the ledger"
            raise RequestError(message(str(path), cause, "name a run of `im-lightning runs`, or make the run again"))
        value = _parse(path)
        if not isinstance(value, dict) or value.get("format") != STATISTICS_FORMAT:
            cause = value.cause if isinstance(value, _Unread) else f'"format" is not "{STATISTICS_FORMAT}"'
            remedy = "delete it; the run itself is kept in its JSON file"
            raise DataError(message(str(path), f"it does not hold a run's statistics: {cause}", remedy))
        return value

    def _statistics_path(self, run_id: str) -> Path:
        return self.path / f"{run_id}{_STATISTICS}"

    def _known_losses(self, run_id: str) -> dict[str, ExampleLosses]:
        """The sets kept by now. A torn file is set aside: what is added must not be lost because of it."""
        path = self._losses_path(run_id)
        try:
            return self.losses(run_id) if path.exists() else {}
        except DataError as error:
            aside = path.with_name(path.name + ".rejected")
            with contextlib.suppress(OSError):
                path.replace(aside)
            log(f"ledger: {error} (set aside as {aside.name})")
            return {}

    def _losses_path(self, run_id: str) -> Path:
        return self.path / f"{run_id}.losses.parquet"

    def _read(self, path: Path) -> RunRecord | None:
        value = _parse(path)
        if path.name == RULE_FILE or (isinstance(value, dict) and value.get("format") == RULE_FORMAT):
            return None  # a rule beside its runs
        if isinstance(value, _Unread):
            remedy = "restore it from a copy, or make the run again"
            self._reject(path, message(str(path), value.cause, remedy), set_aside=value.torn)
            return None
        try:
            record = RunRecord.from_json(value, str(path))
        except DataError as error:  # a run of another version, or what was never a run, stays where it is
            invalid = isinstance(value, dict) and value.get("format") == FORMAT
            self._reject(path, str(error), set_aside=invalid and value.get("schema_version") == SCHEMA_VERSION)
            return None
        if record.run_id != path.stem:
            cause = f"it holds the run {record.run_id}, which belongs in {record.run_id}.json"
            self._reject(path, message(str(path), cause, "rename it, or delete the copy"), set_aside=False)
            return None
        return record

    def _reject(self, path: Path, cause: str, set_aside: bool) -> None:
        self.rejected.append((path.name, cause))
        after = "left out"
        if set_aside:
            try:
                path.replace(path.with_name(path.name + ".rejected"))
                after = f"set aside as {path.name}.rejected"
            except OSError:  # a ledger that we may only read
                pass
        if path.name not in self._named:
            self._named.add(path.name)
            log(f"ledger: {cause} ({after})")


class _Unread(NamedTuple):
    cause: str
    torn: bool


class KeyedRuns:
    """The runs of one purpose in a ledger, by what decides them: found by their key, or made.

    A key is a digest of everything that decides a run's numbers. So an interrupted experiment goes on where it was, and
    nothing that was made under other settings is ever taken over.

    Args:
        ledger: Where they are kept.
        purpose: compare, search, or designed.
        whole: Whether a run has all that is asked for; one that has not is made anew.
        key_of: The key of a run, or nothing; by default that of its subset.

    Attributes:
        made: How many were made.
        replayed: How many were found.
    """

    def __init__(
        self,
        ledger: RunLedger,
        purpose: str,
        whole: Callable[[RunRecord], bool] = lambda record: True,
        key_of: Callable[[RunRecord], Hashable] = lambda record: record.subset.get("key"),
    ) -> None:
        self._by_key = {key: r for r in ledger.records(purpose) if whole(r) and (key := key_of(r))}
        self.made = self.replayed = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._by_key

    def find_or_make(self, key: Hashable, make: Callable[[], RunRecord]) -> RunRecord:
        """The run of this key; `make` must leave it in the ledger under that key."""
        record = self._by_key.get(key)
        if record is not None:
            self.replayed += 1
            already_there()
            return record
        record = self._by_key[key] = make()
        self.made += 1
        return record


def designed_runs(
    ledger: RunLedger, seeds: Sequence[tuple[int, int]], make: Callable[[int, int], RunRecord]
) -> list[RunRecord]:
    """The designed runs of these (subset seed, training seed), found in the ledger or made, in their order."""
    known = KeyedRuns(
        ledger, "designed", key_of=lambda record: (record.subset.get("seed"), record.seeds.get("training"))
    )
    records = []
    with progress("  designed finetunes", len(seeds), "runs") as bar:
        for pair in seeds:
            records.append(known.find_or_make(pair, partial(make, *pair)))
            bar.advance()
    return records


def _parse(path: Path) -> Any:
    try:
        content = path.read_bytes()
        return parse_json(content.decode("utf-8"))
    except OSError as error:
        return _Unread(f"it cannot be read ({error.strerror or error})", torn=False)
    except ValueError as error:  # broken UTF-8 or JSON: a run's file cut short, or a file of the user's, as JSON Lines
        ours = FORMAT.encode() in content[:200] and getattr(error, "msg", "") != "Extra data"
        return _Unread(f"it is not whole JSON ({error})", torn=ours)

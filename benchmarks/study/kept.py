"""The study's numbers in the repository (docs/study/), without texts, paths and names of machines; and back again.

So the stages that take hours can be gone on with elsewhere, and every table is made again from what is kept.

    scores.parquet    the pool's indicators, with what they cost; rate.json, rule….json, mix.json, reward.json
    rates.jsonl.gz    runs of the stage rate          runs.jsonl.gz   designed runs; transfer, merged.jsonl.gz: others
    compare.jsonl.gz  runs of the comparison, with the losses of each verdict example; compare-….jsonl.gz: others
    kinds.json        id of a verdict example → its kind
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.study.sets import Sizes
from im_lightning._utils.files import atomic_path, write_text
from im_lightning.data.loading import load_examples
from im_lightning.errors import InstructMiningError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import MERGED, RunRecord

KEPT = Path(__file__).resolve().parents[2] / "docs" / "study"
CHEAP = ("stopped", "merged")
BESIDE = ("arms", "all-weights", "curve", "fourfold", "everything", *CHEAP)


class Shared(NamedTuple):
    """Runs of a comparison beside the registered one that another comparison has made, key and all.

    Args:
        source: The comparison that has them.
        arms: Theirs.
        times: Of a run's steps.
    """

    source: str
    arms: tuple[str, ...]
    times: int = 1


SHARED = {
    "arms": Shared("compare", ("random",)),
    "curve": Shared("compare", ("random", "by-source", "weighted")),
    "fourfold": Shared("compare-curve", ("random",), 4),
    "everything": Shared("compare", ("random",)),
    **{name: Shared("compare", ("random",)) for name in CHEAP},
}
COMPARED = ("compare", *(f"compare-{name}" for name in BESIDE))
LEDGERS = {
    "rates": "rates",
    "runs": "runs",
    "transfer": "transfer/runs",
    "merged": "merged",
    **{name: f"{name}/ledger" for name in COMPARED},
}
COSTS = "scores.parquet.cost.json"
RULES = tuple(f"rule-{name}.json" for name in CHEAP)
FILES = ("scores.parquet", "rate.json", COSTS, "rule.json", *RULES, "mix.json", "reward.json")
_LOSSES = ("ids", "sums", "counts", "edge_sums", "edge_counts")
_PATH = re.compile(r"(?<![\w.])/[\w.-]+/|[A-Z]:\\")


def keep(out: Path, kept: Path = KEPT, mixtures: int = Sizes().mixtures) -> None:
    """Copies what the stages have left so far; what is kept already and not in `out` stays.

    Merged runs are kept once there are as many as `mixtures`: without the adapters of their blocks, which are not kept,
    nobody could go on with a part of them.

    Raises:
        InstructMiningError: a number's file holds a path.
    """
    kept.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (out / name).exists():
            if name.endswith(".json"):
                write_text(kept / name, _clean(name, (out / name).read_text(encoding="utf-8")))
            else:
                shutil.copyfile(out / name, kept / name)
    for name, folder in LEDGERS.items():
        ledger = RunLedger(out / folder)
        records = {record.run_id: record for record in ledger.records() if record.status == "complete"}
        if name == "merged" and sum(record.kind == MERGED for record in records.values()) < mixtures:
            continue
        lines = {**_lines(kept / f"{name}.jsonl.gz"), **{i: _line(ledger, r, name) for i, r in records.items()}}
        if lines:
            text = "".join(lines[run_id] + "\n" for run_id in sorted(lines))
            _write(kept / f"{name}.jsonl.gz", _clean(name, text))
    if (verdict := out / "data" / "verdict.jsonl").exists():
        kinds = {example.id: example.source for example in load_examples(str(verdict))}
        write_text(kept / "kinds.json", json.dumps(dict(sorted(kinds.items())), indent=0) + "\n")


def restore(out: Path, kept: Path = KEPT) -> None:
    """Puts what is kept where the stages look for it, unless they have left it there themselves."""
    for name in FILES:
        if (kept / name).exists() and not (out / name).exists():
            shutil.copyfile(kept / name, out / name)
    for name, folder in LEDGERS.items():
        ledger, lines = RunLedger(out / folder), _lines(kept / f"{name}.jsonl.gz")
        there = {record.run_id for record in ledger.records()}
        for run_id, line in lines.items():
            if run_id not in there:
                ledger.make()
                value = json.loads(line)
                for evaluation, losses in value.pop("losses", {}).items():
                    ledger.add_losses(run_id, evaluation, **losses)
                ledger.add(RunRecord.from_json(value["record"], f"{name} {run_id}"))


def take_over(out: Path, name: str, seeds: int, steps: int) -> list[str]:
    """Copies the runs that the comparison `name` would make again into its ledger; the ids of those that it lacked.

    Random rows under a rule of other indicators are other runs: they are looked for among the rows that it predicts.

    Args:
        out: Folder of the stages.
        name: One of `BESIDE`.
        seeds: How many it has; a run of another seed is left.
        steps: Of a run at the usual number of tokens.
    """
    if name not in SHARED:
        return []
    shared = SHARED[name]
    source, ledger = RunLedger(out / LEDGERS[shared.source]), RunLedger(out / LEDGERS[f"compare-{name}"])
    there, found = {record.run_id for record in ledger.records()}, []
    for record in source.records("compare"):
        wanted = record.subset["arm"] in shared.arms and record.subset["seed"] < seeds
        if record.run_id in there or record.status != "complete":
            continue
        if wanted and record.steps == shared.times * steps:
            ledger.make()
            for evaluation, one in source.losses(record.run_id).items():
                ledger.add_losses(record.run_id, evaluation, *(getattr(one, field) for field in _LOSSES))
            ledger.add(record)
            found.append(record.run_id)
    return found


def kept_runs(name: str, kept: Path = KEPT) -> list[dict[str, Any]]:
    """Lines of a kept ledger: record, and losses by evaluation set where they are kept."""
    return [json.loads(line) for line in _lines(kept / f"{name}.jsonl.gz").values()]


def _line(ledger: RunLedger, record: RunRecord, name: str) -> str:
    value: dict[str, Any] = {"record": {**record.to_json(), "loggers": {}}}
    if name in COMPARED:
        value["losses"] = {
            evaluation: {
                "ids": one.ids,
                **{
                    field: [float(f"{v:.7g}") if field.endswith("sums") else int(v) for v in column]
                    for field in _LOSSES[1:]
                    if (column := getattr(one, field)) is not None
                },
            }
            for evaluation, one in ledger.losses(record.run_id).items()
        }
    return json.dumps(value, separators=(",", ":"))


def _lines(path: Path) -> dict[str, str]:
    """run id → line."""
    if not path.exists():
        return {}
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return {json.loads(line)["record"]["run_id"]: line.rstrip("\n") for line in stream}


def _write(path: Path, text: str) -> None:
    """The same bytes for the same text: no time, no name in the header."""
    held = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, held, mtime=0) as stream:
        stream.write(text.encode())
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(held.getvalue())


def _clean(name: str, text: str) -> str:
    if found := _PATH.search(text):
        cause = f"it holds a path: …{text[max(0, found.start() - 60) : found.end() + 20]}…"
        raise InstructMiningError(message(name, cause, "numbers alone are kept: leave the field out in kept.py"))
    return text

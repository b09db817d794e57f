"""Draws the study's sets: a pool, by kind rows to fit on, to search on and for the verdict, and rows to score by."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from im_lightning._utils.files import write_text
from im_lightning.data.overlap.keys import normalised
from im_lightning.errors import RequestError, message

KINDS = ("lima", "dolly", "gsm8k", "seed_tasks", "alpaca_gpt4")
"""What is evaluated, each a set of its own."""
POOL = ("alpaca", "self_instruct", "alpaca_gpt4", "lima", "dolly", "gsm8k", "roleplay")
"""Sources of the pool, in shares as equal as their rows allow. seed_tasks is evaluated and in no pool."""
TARGET = ",".join(f"{kind}={1 / len(KINDS):g}" for kind in sorted(KINDS))
"""What the rule predicts: the mean of the five kinds' losses."""
SEED = 20261130


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the study's, and `FAST` to try the way."""

    pool: int = 2500  # rows
    fit: int = 24  # rows of each kind that the runs are evaluated on
    targets: int = 16  # … that loss_drop and gradient_similarity go towards
    search: int = 60  # … that choices are made on (29 of seed_tasks, which has no more)
    verdict: int = 100  # … that are opened once
    pairs: int = 60  # rows of each source that the reward model is trained on
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)
    rate_runs: int = 2  # random subsets per rate
    runs: int = 135  # designed runs, the repeats among them: sixty subsets to buy evidence from, sixty to test it on
    repeats: int = 15
    rows: int = 256  # of a run, and of an arm
    batch: int = 8
    transfer: int = 15  # subsets that are finetuned on at another rank and rate
    blocks: int = 9  # of as many rows as a run, whose adapters are merged: three more than the design has regressors
    twins: int = 12
    mixtures: int = 24
    seeds: int = 10  # of the comparison
    seeds_beside: int = 3  # of those beside it
    permutations: int = 999
    unopened: int = 0  # rows of each kind left alone: a trial must not look at the study's verdict rows


FAST = Sizes(
    pool=200, fit=4, search=4, verdict=6, targets=3, pairs=4, rates=(2e-4, 1e-3), rate_runs=1, runs=12, repeats=2,
    transfer=4, blocks=9, twins=4, mixtures=9, rows=16, seeds=2, seeds_beside=1, permutations=20,
    unopened=Sizes.verdict,
)  # fmt: skip


def read_rows(folder: Path, source: str) -> list[dict[str, str]]:
    """The rows of one source, `SOURCE.jsonl.gz`, in the file's order."""
    file = folder / f"{source}.jsonl.gz"
    if not file.is_file():
        needed = ", ".join(f"{name}.jsonl.gz" for name in sorted({*KINDS, *POOL}))
        raise RequestError(message(str(file), "there is no such file", f"give the folder of {needed} as --data"))
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return [{**json.loads(line), "source": source} for line in stream]


def split(data: Path, out: Path, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Writes pool.jsonl, fit/KIND.jsonl, search/KIND.jsonl, verdict, targets and pairs.jsonl, unless they are there.

    No prompt is in two of them: rows are drawn by prompt, of each kind first the verdict's, then to fit, targets, to
    search, and what is left may go into the pool; pairs are of what the pool leaves.

    Returns:
        set → source → rows.
    """
    sets: dict[str, list[dict[str, str]]] = {"verdict": [], "pool": [], "targets": [], "pairs": []}
    taken: set[str] = set()
    left: dict[str, list[dict[str, str]]] = {}
    for k, source in enumerate(sorted({*KINDS, *POOL})):
        rows = read_rows(data, source)
        rows = [rows[i] for i in np.random.default_rng([SEED, k]).permutation(len(rows))]
        fresh = []
        for row in rows:
            key = normalised(f"{row['instruction']} {row['input']}")
            if key not in taken:
                taken.add(key)
                fresh.append(row)
        if source in KINDS:
            fresh = fresh[sizes.unopened :]
            ends = np.cumsum([sizes.verdict, sizes.fit, sizes.targets, sizes.search]).tolist()
            sets["verdict"] += fresh[: ends[0]]
            sets[f"fit/{source}"] = fresh[ends[0] : ends[1]]
            sets["targets"] += fresh[ends[1] : ends[2]]
            sets[f"search/{source}"] = fresh[ends[2] : ends[3]]
            fresh = fresh[ends[3] :]
        left[source] = fresh
    for source, count in equal_shares({name: len(left[name]) for name in POOL}, sizes.pool).items():
        sets["pool"] += left[source][:count]
        sets["pairs"] += left[source][count : count + sizes.pairs]
    sets["pool"] = [sets["pool"][i] for i in np.random.default_rng([SEED, 99]).permutation(len(sets["pool"]))]
    for name, rows in sets.items():
        path = out / f"{name}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {name: _count(rows) for name, rows in sets.items()}


def equal_shares(available: Mapping[str, int], total: int) -> dict[str, int]:
    """Rows of each source: equal, but what a small source lacks is spread over the others.

    >>> equal_shares({"a": 10, "b": 100, "c": 100}, 70)
    {'a': 10, 'b': 30, 'c': 30}
    """
    out = dict.fromkeys(available, 0)
    rest, open_ = min(total, sum(available.values())), list(available)
    while rest and open_:
        share = max(1, rest // len(open_))
        for name in list(open_):
            more = min(share, available[name] - out[name], rest)
            out[name] += more
            rest -= more
            if out[name] == available[name]:
                open_.remove(name)
    return out


def _count(rows: list[dict[str, str]]) -> dict[str, int]:
    return dict(sorted(Counter(row["source"] for row in rows).items()))

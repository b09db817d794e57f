"""Scoring an unchanged pool again: from examples in memory to a written table, nothing computed."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.registry import Ratio, Setting, benchmark
from im_lightning.data.example import Example

_INDICATORS = ("mtld", "mtld_lexicalrichness")
_BAR_SECONDS, _BAR_ROWS = 10.0, 1_000_000


@benchmark("store")
def store(setting: Setting) -> Iterator[Ratio]:
    from im_lightning.data.loading import load_examples
    from im_lightning.scoring.api import score_examples

    n = 50_000 if setting.quick else _BAR_ROWS
    data = setting.folder / "pool.jsonl"
    _write_rows(data, n)
    start = time.perf_counter()
    examples = load_examples(str(data))
    reading = time.perf_counter() - start
    fill(examples, setting)
    seconds, processor = [], []
    for _ in range(min(3, setting.repeats)):
        for example in examples:
            object.__setattr__(example, "_id", "")  # a new process has no ids yet
        gc.collect()
        start, busy = time.perf_counter(), time.process_time()
        table = score_examples(examples, _INDICATORS, cache_dir=setting.folder / "store")
        table.write(setting.folder / "scores.parquet")
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    median = sorted(seconds)[len(seconds) // 2]
    start = time.perf_counter()
    for example in examples[:50_000]:
        object.__setattr__(example, "_id", "")
        _ = example.id
    ids = (time.perf_counter() - start) / min(n, 50_000)
    yield Ratio(
        f"second scoring of {n:,} unchanged rows, seconds per million",
        median * _BAR_ROWS / n,
        _BAR_SECONDS,
        f"{median:.1f} s, no model loaded",
        f"{reading:.1f} s to read the input before",
        at_least=False,
        digits=1,
        note=f"{len(_INDICATORS)} stored columns, {sorted(processor)[len(processor) // 2]:.1f} s of processor time; "
        f"content ids alone take {ids * 1e6:.1f} s per million",
        details={"seconds": seconds, "processor_seconds": processor, "reading": reading, "seconds_per_id": ids},
    )


def _write_rows(path: Path, n: int) -> None:
    from benchmarks.examples import made_up_examples

    base = made_up_examples(min(n, 20_000))
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            row = base[i % len(base)]
            shown = {"instruction": f"{row.instruction} {i}", "input": "", "output": row.response}
            file.write(json.dumps(shown) + "\n")


def fill(examples: Sequence[Example], setting: Setting) -> None:
    """Stored values as if the pool had been scored, in parts of 100,000."""
    from im_lightning.data.settings import Encoding
    from im_lightning.indicators.base import get_indicators
    from im_lightning.scoring.settings import Setup
    from im_lightning.scoring.store import Store

    setup = Setup(Encoding(cache_dir=str(setting.folder / "store")))
    values = np.random.default_rng(0).random(len(examples))
    for indicator in get_indicators(_INDICATORS):
        parts = Store(setup.root, indicator.name, setup.identity_of(indicator), setup.numerics_of(indicator))
        for start in range(0, len(examples), 100_000):
            ids = [example.id for example in examples[start : start + 100_000]]
            parts.append(ids, values[start : start + 100_000], [None] * len(ids))

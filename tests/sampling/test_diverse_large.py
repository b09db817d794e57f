"""If this failed, "diverse" would not be there for large pools: an hour, or all memory, for a million rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys, time
import numpy as np
from im_lightning.data.score_table import ScoreTable
from im_lightning.sampling.selection.select import choose_rows

n, d, k = 1_000_000, 64, 10_000
rng = np.random.default_rng(0)
out = np.lib.format.open_memmap(sys.argv[1], mode="w+", dtype=np.float32, shape=(n, d))
centres = rng.standard_normal((2000, d), dtype=np.float32)
for start in range(0, n, 50_000):
    out[start : start + 50_000] = centres[rng.integers(0, 2000, 50_000)] + 0.7 * rng.standard_normal((50_000, d), dtype=np.float32)
out.flush()
del out
vectors = np.load(sys.argv[1], mmap_mode="r")
table = ScoreTable(np.arange(n), [str(i) for i in range(n)], ["a"] * n, {"length_output": rng.integers(1, 300, n).astype(float)})
start = time.process_time()
found = choose_rows(table, None, k, "diverse", embeddings=vectors, max_similarity=0.9)
seconds = time.process_time() - start
status = open("/proc/self/status").read()  # ru_maxrss begins with the memory of the process that started this one
memory = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
print(json.dumps({"rows": len(set(found.rows.tolist())), "seconds": seconds, "gib": memory, **found.report["diverse"]}))
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_of_a_million(tmp_path: Path) -> None:
    """Minutes of one thread, and memory far below the 3.6 TiB of all pairs."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "vectors.npy")], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told)
    assert told["rows"] == 10_000 and told["candidates"] == 100_000
    assert told["seconds"] < 300 and told["gib"] < 2.0
    assert told["coverage"] > 0.7

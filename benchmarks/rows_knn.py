"""Exact knn_6 against faiss and scikit-learn, its memory, and a slice of a million vectors from a memory map.

The vectors are clustered, as embeddings of instruction data are, with near-duplicates among them.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.registry import Ratio, Setting, benchmark
from benchmarks.timing import interleaved, ratio

_WIDTH, _RANK = 384, 6
_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from im_lightning.indicators.knn import neighbour_distances
vectors = np.load(sys.argv[1], mmap_mode="r")
neighbour_distances(vectors, [6])
status = Path("/proc/self/status")  # on Linux ru_maxrss begins with the parent's memory
lines = status.read_text().splitlines() if status.exists() else []
high = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
print(high[0] if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def made_up_vectors(n: int, seed: int = 0) -> NDArray[np.float32]:
    """n unit vectors around n / 50 centres of unequal popularity, one in a hundred a near-duplicate of another."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, n // 50), _WIDTH), dtype=np.float32)
    vectors = rng.standard_normal((n, _WIDTH), dtype=np.float32)
    vectors += centres[(len(centres) * rng.random(n) ** 2).astype(np.int64)]
    copies = rng.choice(n, n // 100, replace=False)
    vectors[copies] = vectors[rng.choice(n, n // 100)]
    vectors[copies] += 1e-3 * rng.standard_normal((len(copies), _WIDTH), dtype=np.float32)
    vectors /= np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    return vectors


@benchmark("knn")
def knn(setting: Setting) -> Iterator[Ratio]:
    import faiss
    from sklearn.neighbors import NearestNeighbors

    from im_lightning.indicators.knn import neighbour_distances

    n = 5_000 if setting.quick else 20_000
    vectors = made_up_vectors(n)
    found: dict[str, NDArray] = {}

    def with_faiss() -> None:
        index = faiss.IndexFlatL2(_WIDTH)
        index.add(vectors)
        found["faiss"] = np.sqrt(np.maximum(index.search(vectors, _RANK + 1)[0][:, _RANK], 0.0))

    def with_sklearn() -> None:
        search = NearestNeighbors(algorithm="brute", n_jobs=-1).fit(vectors)
        found["scikit-learn"] = search.kneighbors(n_neighbors=_RANK)[0][:, _RANK - 1]

    def ours() -> None:
        found["ours"] = neighbour_distances(vectors, [_RANK])[:, 0]

    works = {"faiss": with_faiss, "scikit-learn": with_sklearn, "ours": ours}
    times = interleaved(works, setting.repeats, most_seconds=240.0)
    rate = {name: n / median(seconds) for name, seconds in times.items()}
    off = {name: float(np.abs(found[name] - found["ours"]).max()) for name in ("faiss", "scikit-learn")}
    half = 1.0 * n * n * _WIDTH  # of 2 n^2 d operations: each pair once
    ours_rate = f"{rate['ours']:,.0f} rows/s, {half / median(times['ours']) / 1e9:,.0f} Gflop/s on half the pairs"
    for name, bar in (("faiss", 1.0), ("scikit-learn", 1.3)):
        kind = "IndexFlatL2" if name == "faiss" else "brute force"
        yield Ratio(
            f"exact knn_{_RANK} of {n:,} × {_WIDTH} against {name} {kind}",
            ratio(times, name, "ours"),
            bar,
            ours_rate,
            f"{rate[name]:,.0f} rows/s",
            note=f"largest difference of a distance {off[name]:.1e} ({name} subtracts squares); the matrix product of "
            "numpy's BLAS is what is left",
            details={"seconds": times, "largest_difference": off},
        )
    yield _memory(setting, vectors)
    yield _slice_of_a_million(setting)


def _memory(setting: Setting, vectors: NDArray[np.float32]) -> Ratio:
    path = setting.folder / "vectors.npy"
    np.save(path, vectors)
    command = [sys.executable, "-c", _MEMORY, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    gib = int(run.stdout.split()[-1]) * unit / 2**30
    return Ratio(
        f"memory of a process for exact knn_{_RANK} of {len(vectors):,} × {_WIDTH}",
        gib,
        1.0,
        f"{gib:.2f} GiB, interpreter and vectors included",
        f"{4 * len(vectors) ** 2 / 2**30:.2f} GiB for the N × N matrix",
        at_least=False,
    )


def _slice_of_a_million(setting: Setting) -> Ratio:
    """Blocks of a memory-mapped float16 pool of 1,000,000: time of a slice, times the number of slices."""
    import time

    from im_lightning.indicators._knn_exact import BLOCK, Block, Candidates, rows_of

    n = 100_000 if setting.quick else 1_000_000
    path = setting.folder / "million.f16"
    pool = np.memmap(path, dtype=np.float16, mode="w+", shape=(n, _WIDTH))
    for start in range(0, n, 50_000):
        pool[start : start + 50_000] = made_up_vectors(50_000, seed=start)[: n - start]
    pool.flush()
    found, block = Candidates(n, _RANK + 4), Block(BLOCK)
    columns = range(BLOCK, min(n - BLOCK, (12 if setting.quick else 40) * BLOCK), BLOCK)
    rows = rows_of(pool, 0, BLOCK)
    seconds = []
    for j in columns:
        begun = time.perf_counter()
        block.multiply(rows, rows_of(pool, j, j + BLOCK), None, None)
        block.offer_rows(found, 0, j)
        block.offer_columns(found, j, 0)
        seconds.append(time.perf_counter() - begun)
    blocks = math.ceil(n / BLOCK)
    pairs = blocks * (blocks + 1) / 2
    hours = pairs * median(seconds) / 3600
    alive = found.similarity.nbytes + found.index.nbytes + found.floor.nbytes + block.buffer.nbytes
    path.unlink()
    return Ratio(
        f"exact knn_{_RANK} of {n:,} × {_WIDTH} from float16 on disk, {len(seconds)} of {pairs:,.0f} pairs of blocks",
        alive / 2**30,
        1.0,
        f"{alive / 2**30:.2f} GiB beside the file; {median(seconds):.3f} s per pair of blocks, {hours:.1f} h in all",
        f"{4 * n**2 / 2**30:,.0f} GiB for the N × N matrix",
        at_least=False,
        note="the value is memory in GiB; above 200,000 rows a CPU searches approximately unless a GPU is there",
        details={"seconds": seconds},
    )

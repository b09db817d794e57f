#!/usr/bin/env bash
# Guess: Every vector of an HNSW index is found by asking for itself: 4,000 random vectors in 16 dimensions are an
# easy case. Thousands of copies of one row beside them, as a pool with a repeated answer has, cost speed, not recall.
#
# What happens: With 3,000 copies of one vector inserted before the others, about three of ten other vectors no longer
# find themselves at the default settings: the copies fill each other's neighbour lists, and the search stays among
# them. The same copies inserted last do far less harm, so recall depends on the order of the rows; so it pays to drop
# exact copies before a near-duplicate search, not by it.
#
# Versions: faiss-cpu 1.15.1, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#         1 copies first: 1.000 of the other vectors find themselves
#         1 copies last : 1.000 of the other vectors find themselves
#      1000 copies first: 0.932 of the other vectors find themselves
#      1000 copies last : 0.983 of the other vectors find themselves
#      3000 copies first: 0.713 of the other vectors find themselves
#      3000 copies last : 0.948 of the other vectors find themselves
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile faiss-cpu==1.15.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import faiss
import numpy as np

faiss.omp_set_num_threads(1)
rows = np.random.default_rng(0).normal(size=(4000, 16)).astype("float32")


def finds_itself(copies, first):
    same, others = np.repeat(rows[:1], copies, axis=0), rows[1:]
    index = faiss.IndexHNSWFlat(16, 32)
    index.add(np.vstack([same, others] if first else [others, same]))
    found = index.search(others, 1)[1][:, 0] - (copies if first else 0)
    return float((found == np.arange(len(others))).mean())


seen = {(n, first): finds_itself(n, first) for n in (1, 1000, 3000) for first in (True, False)}
for (n, first), share in seen.items():
    print(f"{n:5} copies {'first' if first else 'last ':5}: {share:.3f} of the other vectors find themselves")

assert seen[1, True] > 0.99
assert seen[3000, True] < 0.85 < 0.9 < seen[3000, False]
EOF

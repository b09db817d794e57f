#!/usr/bin/env bash
# Guess: Semantic deduplication treats near-duplicates as groups: with A near B and B near C the three are one group
# and one row is kept, whatever order the rows come in.
#
# What happens: Rows are taken in turn and compared only with those kept so far. A, B, C keeps two rows (C is far from
# A, and B is gone); B, A, C keeps one. Shuffling a pool changes how many rows survive.
#
# Versions: semhash 0.5.0, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     ABC keeps ['A', 'C'] drops ['B for A']
#     CBA keeps ['C', 'A'] drops ['B for C']
#     BAC keeps ['B'] drops ['A for B', 'C for B']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile semhash==0.5.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from semhash import SemHash

ANGLE = {"A": 0, "B": 20, "C": 40}  # cosine 0.94 between neighbours, 0.77 between A and C


class Encoder:
    def encode(self, inputs, **kwargs):
        radians = np.radians([ANGLE[row] for row in inputs])
        return np.column_stack([np.cos(radians), np.sin(radians)]).astype("float32")


kept = {}
for order in ("ABC", "CBA", "BAC"):
    result = SemHash.from_records(list(order), model=Encoder()).self_deduplicate(threshold=0.9)
    kept[order] = result.selected
    dropped = [(row.record, row.duplicate_of) for row in result.filtered]
    print(order, "keeps", result.selected, "drops", [f"{row} for {of}" for row, of in dropped])

assert kept == {"ABC": ["A", "C"], "CBA": ["C", "A"], "BAC": ["B"]}
EOF

#!/usr/bin/env bash
# Guess: MinHashLSH(threshold=0.9, num_perm=128) returns most rows whose Jaccard similarity is at or a little above
# 0.9, and some false alarms beside them.
#
# What happens: It chooses 5 bands of 25 rows, and at Jaccard 0.9 finds about a third of the pairs; at 0.95 still only
# four of five. The threshold is the point at which false positives and false negatives weigh the same, not a floor on
# recall. weights=(0.1, 0.9), with lower threshold, brings them back.
#
# Versions: datasketch 2.0.0, numpy 2.4.6, scipy 1.17.1, on Python 3.11.
#
# Output seen:
#     threshold 0.9: 5 bands of 25
#     Jaccard 0.9: found 0.31 of the pairs, 0.31 by the formula of the bands
#     Jaccard 0.95: found 0.78 of the pairs, 0.80 by the formula of the bands
#     Jaccard 0.99: found 1.00 of the pairs, 1.00 by the formula of the bands
#     threshold 0.8, weights (0.1, 0.9): 14 bands of 9; Jaccard 0.9: found 1.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile datasketch==2.0.0 numpy==2.4.6 scipy==1.17.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
from datasketch import MinHash, MinHashLSH


def sketch(words):
    made = MinHash(num_perm=128)
    made.update_batch([word.encode() for word in words])
    return made


def found(jaccard, bands, pairs=400):
    n = 0
    for i in range(pairs):  # of 200 words in either row, jaccard * 200 are in both
        shared = round(200 * jaccard)
        rest = 200 - shared
        both = [f"{i} shared {k}" for k in range(shared)]
        left = both + [f"{i} left {k}" for k in range(rest // 2)]
        right = both + [f"{i} right {k}" for k in range(rest - rest // 2)]
        index = MinHashLSH(num_perm=128, params=bands)
        index.insert("left", sketch(left))
        n += index.query(sketch(right)) == ["left"]
    return n / pairs


index = MinHashLSH(num_perm=128, threshold=0.9)
print("threshold 0.9:", index.b, "bands of", index.r)
seen = {}
for jaccard in (0.9, 0.95, 0.99):
    seen[jaccard] = found(jaccard, (index.b, index.r))
    expected = 1 - (1 - jaccard**index.r) ** index.b
    print(f"Jaccard {jaccard}: found {seen[jaccard]:.2f} of the pairs, {expected:.2f} by the formula of the bands")
low = MinHashLSH(num_perm=128, threshold=0.8, weights=(0.1, 0.9))
kept = found(0.9, (low.b, low.r))
print(f"threshold 0.8, weights (0.1, 0.9): {low.b} bands of {low.r}; Jaccard 0.9: found {kept:.2f}")

assert (index.b, index.r) == (5, 25)
assert seen[0.9] < 0.45 and 0.7 < seen[0.95] < 0.92 and kept > 0.9
EOF

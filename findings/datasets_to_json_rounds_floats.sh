#!/usr/bin/env bash
# Guess: Dataset.to_json writes each float so that it reads back as it was, like json.dumps and Dataset.to_csv.
#
# What happens: It writes ten decimals: 0.1 + 0.2 becomes 0.3, 1/3 loses its last digits, and a sampling weight of
# 2e-11, as a softmax over a large pool gives, becomes 0.0, so that row can no longer be drawn. to_csv keeps every
# bit. double_precision=15, the most it takes, saves the small weight but not the last digit of 1/3.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     kept in memory:     [2e-11, 0.3333333333333333, 0.30000000000000004, 1234.5]
#     to_json:            [0.0, 0.3333333333, 0.3, 1234.5]
#     double_precision=15: [2e-11, 0.333333333333333, 0.3, 1234.5]
#     to_csv:             [2e-11, 0.3333333333333333, 0.30000000000000004, 1234.5]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore - <<'EOF'
import json

from datasets import Dataset, disable_progress_bars

disable_progress_bars()
weights = [2e-11, 1 / 3, 0.1 + 0.2, 1234.5]
rows = Dataset.from_dict({"weight": weights})


def as_json(**settings):
    rows.to_json("rows.jsonl", **settings)
    return [json.loads(line)["weight"] for line in open("rows.jsonl")]


rows.to_csv("rows.csv")
csv = [float(line) for line in open("rows.csv").read().split()[1:]]
print("kept in memory:    ", rows["weight"][:])
print("to_json:           ", as_json())
print("double_precision=15:", as_json(double_precision=15))
print("to_csv:            ", csv)

assert csv == rows["weight"][:] == weights
assert as_json() == [0.0, 0.3333333333, 0.3, 1234.5]
assert as_json(double_precision=15)[0] == 2e-11 and as_json(double_precision=15)[1] != 1 / 3
EOF

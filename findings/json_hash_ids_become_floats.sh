#!/usr/bin/env bash
# Guess: Rows that carry the 64-bit hash of their text as an id come back from JSON lines with the same ids, or the
# reader says that they do not fit.
#
# What happens: Half of all 64-bit hashes are above the largest signed integer. One such row turns the whole column
# into float64, in pyarrow's JSON reader and so in load_dataset('json'): every id loses its last bits, also those that
# would fit, nothing warns, and two rows whose hashes differ in a low bit get one id. pandas reads the same file as
# uint64.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6, xxhash 4.1.0, on Python 3.11.
#
# Output seen:
#     load_dataset float64  ids kept: 0 of 5, distinct: 4
#     pyarrow      double   ids kept: 0 of 5, distinct: 4
#     pandas       uint64   ids kept: 5 of 5, distinct: 5
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6 xxhash==4.1.0
cd "$work"
export HF_HOME="$work/hf"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore - <<'EOF'
import json

import pandas as pd
import pyarrow.json
import xxhash
from datasets import disable_progress_bars, load_dataset

disable_progress_bars()
ids = [xxhash.xxh64_intdigest(text.encode()) for text in ("yes", "no", "maybe", "it depends")]
ids.append(ids[0] ^ 1)
with open("rows.jsonl", "w") as out:
    out.writelines(json.dumps({"id": id_}) + chr(10) for id_ in ids)
rows = load_dataset("json", data_files="rows.jsonl", split="train")
table = pyarrow.json.read_json("rows.jsonl")
frame = pd.read_json("rows.jsonl", lines=True)
for name, kind, read in (
    ("load_dataset", rows.features["id"].dtype, rows["id"][:]),
    ("pyarrow", table.schema.field("id").type, table["id"].to_pylist()),
    ("pandas", frame.id.dtype, frame.id.tolist()),
):
    kept = sum(int(a) == b for a, b in zip(read, ids))
    print(f"{name:12} {kind!s:8} ids kept: {kept} of {len(ids)}, distinct: {len(set(read))}")

assert max(ids) >= 2**63 > min(ids)
assert rows.features["id"].dtype == "float64" and len(set(rows["id"])) == len(ids) - 1
assert frame.id.tolist() == ids
EOF

#!/usr/bin/env bash
# Guess: Shards of .jsonl.zst can be joined with cat, since the format allows several frames in one file, and every
# way of reading it gives all rows: zstandard.decompress as well as its stream reader.
#
# What happens: zstandard.decompress returns the first frame and drops the rest without a word; the stream reader of
# the same package, pandas and pyarrow read on to the end.
#
# Versions: zstandard 0.25.0, pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     zstandard.decompress           1 of 3 rows
#     ZstdDecompressor().decompress  1 of 3 rows
#     stream_reader                  3 of 3 rows
#     pyarrow.input_stream           3 of 3 rows
#     pandas.read_json               3 of 3 rows
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile zstandard==0.25.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import io

import pandas as pd
import pyarrow
import zstandard

shards = [b'{"row": 1}' + b"\n", b'{"row": 2}' + b"\n" + b'{"row": 3}' + b"\n"]
joined = b"".join(zstandard.compress(shard) for shard in shards)
with open("joined.jsonl.zst", "wb") as out:
    out.write(joined)
seen = {
    "zstandard.decompress": zstandard.decompress(joined).count(b"\n"),
    "ZstdDecompressor().decompress": zstandard.ZstdDecompressor().decompress(joined).count(b"\n"),
    "stream_reader": zstandard.ZstdDecompressor().stream_reader(io.BytesIO(joined)).read().count(b"\n"),
    "pyarrow.input_stream": pyarrow.input_stream("joined.jsonl.zst").read().count(b"\n"),
    "pandas.read_json": len(pd.read_json("joined.jsonl.zst", lines=True)),
}
for name, rows in seen.items():
    print(f"{name:30} {rows} of 3 rows")

assert list(seen.values()) == [1, 1, 3, 3, 3]
EOF

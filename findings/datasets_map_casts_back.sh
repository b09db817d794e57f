#!/usr/bin/env bash
# Guess: Dataset.map stores what the function returns: an integer id padded to the text '007' is from then on the text
# '007', or the change of type is refused.
#
# What happens: A column that exists keeps its type where the new values can be cast to it: '007' is written as the
# integer 7, without a word, even where remove_columns takes the old column away in the same call. Only under a new
# name does the text stay text.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     the function returns: ['007', '042']
#     over the old column:  [7, 42] Value('int64')
#     under a new name:     ['007', '042'] Value('string')
#     old column removed:   [7, 42] Value('int64')
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore - <<'EOF'
from datasets import Dataset, disable_progress_bars

disable_progress_bars()
rows = Dataset.from_dict({"id": [7, 42]})
padded = lambda row: {"id": f"{row['id']:03d}"}
same = rows.map(padded)
new = rows.map(lambda row: {"key": f"{row['id']:03d}"})
removed = rows.map(padded, remove_columns="id")
print("the function returns:", [padded(row)["id"] for row in rows])
print("over the old column: ", same["id"][:], same.features["id"])
print("under a new name:    ", new["key"][:], new.features["key"])
print("old column removed:  ", removed["id"][:], removed.features["id"])

assert same["id"][:] == removed["id"][:] == [7, 42] and same.features["id"].dtype == "int64"
assert new["key"][:] == ["007", "042"]
EOF

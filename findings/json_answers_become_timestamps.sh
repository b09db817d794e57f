#!/usr/bin/env bash
# Guess: an answer that stands in quotation marks in a JSON-lines file is a string after load_dataset("json").
#
# What happens: Where every answer of the file looks like a date, the column becomes a timestamp, and the answer to
# "When ...?" is a datetime with an hour that nobody wrote. One answer of another form in the same file, and all are
# strings again: a shard of questions about dates has another type than the whole set.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, on Python 3.11.
#
# Output seen:
#     all dates: Value('timestamp[s]') 1969-07-20 00:00:00
#     one other answer: Value('string') 1969-07-20
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile datasets==5.2.0 pyarrow==26.0.1
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import json
from pathlib import Path

from datasets import load_dataset

rows = [
    {"prompt": "When did Apollo 11 land?", "response": "1969-07-20"},
    {"prompt": "When did the Berlin Wall fall?", "response": "1989-11-09"},
]
seen = {}
for name, extra in (("all dates", []), ("one other answer", [{"prompt": "And Rome?", "response": "in 476"}])):
    path = Path(f"{len(extra)}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + extra))
    data = load_dataset("json", data_files=str(path), split="train")
    seen[name] = str(data.features["response"].dtype)
    print(f"{name}: {data.features['response']} {data[0]['response']}")

assert seen == {"all dates": "timestamp[s]", "one other answer": "string"}
EOF

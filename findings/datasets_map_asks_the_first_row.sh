#!/usr/bin/env bash
# Guess: A function under Dataset.map that gives a new column to some rows only (a score to the rows that can be scored)
# makes that column with None in the others, or fails. Rows without a score are common in an instruction pool.
#
# What happens: The columns of each 1,000 rows are those of the first of them. Has that row no score, the scores of the
# other 999 are dropped without a word; has it one and another has not, the call ends in a KeyError. So the outcome
# hangs on one row in a thousand. from_generator does the same. The streamed map keeps all the scores.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     rows that get no score, of 1,000:      [0]            ['text']
#     rows that get no score, of 1,000:      [1]            KeyError: 'score'
#     rows that get no score, of 2,000:      [0, 1000]      ['text']
#     rows that get no score, of 2,000:      [0]            KeyError: 'score'
#     from_generator, of 1,000:              [0]            ['text']
#     streamed, of 1,000:                    [0]            999 rows have a score
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


def pool(size, empty):
    return Dataset.from_dict({"text": ["" if row in empty else f"answer {row}" for row in range(size)]})


def score(row):
    if row["text"]:
        row["score"] = float(len(row["text"]))
    return row


def shown(what, size, empty, outcome):
    print(f"{what + f', of {size:,}:':38} {empty!s:14} {outcome}")
    return outcome


outcomes = []
for size, empty in ((1000, [0]), (1000, [1]), (2000, [0, 1000]), (2000, [0])):
    try:
        outcome = pool(size, empty).map(score).column_names
    except KeyError as error:
        outcome = f"KeyError: {error}"
    outcomes.append(shown("rows that get no score", size, empty, outcome))
rows = list(pool(1000, [0]))
made = Dataset.from_generator(lambda: (score(dict(row)) for row in rows))
outcomes.append(shown("from_generator", 1000, [0], made.column_names))
streamed = sum(row.get("score") is not None for row in pool(1000, [0]).to_iterable_dataset().map(score))
shown("streamed", 1000, [0], f"{streamed} rows have a score")

lost, failed = ["text"], "KeyError: 'score'"
assert outcomes == [lost, failed, lost, failed, lost] and streamed == 999
EOF

#!/usr/bin/env bash
# Guess: A byte-level BPE tokenizer needs no unknown token, since every text is bytes: one trained on a pool encodes any
# row, and what is decoded is what was encoded. (A small scorer model of one's own begins with such a tokenizer.)
#
# What happens: The trainer knows only the bytes that it has met. Any other is left out of the tokens, with no error and
# no unknown token: after training on rows without digits 75 and 90 are nothing, and two rows become one. With
# BpeTrainer(initial_alphabet=ByteLevel.alphabet()) nothing is lost.
#
# Versions: tokenizers 0.23.3, on Python 3.11.
#
# Output seen:
#     trained on the rows: 'Raise it by % to $.' and 'Raise it by % to $.', same tokens: True
#     with the alphabet:   'Raise it by 75% to $300.' and 'Raise it by 90% to $240.', same tokens: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile tokenizers==0.23.3
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

POOL = [
    "Raise the price by five % and say why.",
    "Write it to a friend who likes $ and poems.",
    "Explain what a budget is.",
] * 10
ROWS = ["Raise it by 75% to $300.", "Raise it by 90% to $240."]


def round_trip(**options):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(POOL, trainers.BpeTrainer(vocab_size=400, show_progress=False, **options))
    one, two = (made.encode(row).ids for row in ROWS)
    return made.decode(one), made.decode(two), one == two


lost = round_trip()
kept = round_trip(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
for name, (one, two, same) in (("trained on the rows:", lost), ("with the alphabet:", kept)):
    print(f"{name:20} {one!r} and {two!r}, same tokens: {same}")

assert lost == ("Raise it by % to $.", "Raise it by % to $.", True)
assert kept == (*ROWS, False)
EOF

#!/usr/bin/env bash
# Guess: MTLD is one published measure with one threshold (0.72), so three libraries give one number for one list of
# words.
#
# What happens: They agree on some texts and not on others. Five different words, a short answer, score 5.0 in
# lexicalrichness and 0.0 in lexical-diversity and taaled: the richest short answer or the poorest, by library. On a
# repetitive text of 52 words there are three values, for the libraries differ in how they end a factor (taaled's and
# lexical-diversity's need ten words). A threshold taken from one library does not carry over.
#
# Versions: lexicalrichness 0.5.1, lexical-diversity 0.1.1, taaled 0.32, on Python 3.11.
#
# Output seen:
#     five different words       lexicalrichness    5.0 lexical-diversity    0.0 taaled    0.0
#     one word, four times       lexicalrichness    2.0 lexical-diversity   1.49 taaled   1.49
#     13 words, four times over  lexicalrichness   9.53 lexical-diversity  10.33 taaled  10.13
#     40 words of a story        lexicalrichness  74.67 lexical-diversity  74.67 taaled  74.67
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile lexicalrichness==0.5.1 lexical-diversity==0.1.1 taaled==0.32
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import contextlib
import io

from lexical_diversity import lex_div
from lexicalrichness import LexicalRichness

with contextlib.redirect_stdout(io.StringIO()):  # a note about plots
    from taaled import ld

texts = {
    "five different words": "one two three four five",
    "one word, four times": "yes yes yes yes",
    "13 words, four times over": "the cat sat on the mat and the dog sat on the log " * 4,
    "40 words of a story": "when the rain came down the children ran home and their mother gave them warm soup with "
    "bread because every one of them was cold and the dog shook water over all the floor while father laughed "
    "at the mess",
}
seen = {}
for name, text in texts.items():
    words = text.split()
    values = LexicalRichness(text).mtld(), lex_div.mtld(words), ld.lexdiv(words).mtld
    seen[name] = [round(float(value), 2) for value in values]
    print(f"{name:26} lexicalrichness {seen[name][0]:6} lexical-diversity {seen[name][1]:6} taaled {seen[name][2]:6}")

assert seen["five different words"] == [5.0, 0.0, 0.0]
assert len(set(seen["13 words, four times over"])) == 3
EOF

#!/usr/bin/env bash
# Guess: In a union the types are tried in the order written, so a setting of type Union[str, dict], a text first,
# takes any text from the command line as that text; Union[str, int] does keep '7' as text.
#
# What happens: A text that YAML reads as a mapping becomes the dict although str comes first: the prefix 'Answer:
# yes' arrives as {'Answer': True}. Text with a colon and a space is common in prompts; the same argument of type str
# alone keeps it.
#
# Versions: jsonargparse 4.53.0, pyyaml 6.0.3, on Python 3.11.
#
# Output seen:
#     Union[str, int]   '7'                    -> '7'
#     Union[str, bool]  'yes'                  -> 'yes'
#     Union[str, dict]  'Answer in one word'   -> 'Answer in one word'
#     Union[str, dict]  'Answer: yes'          -> {'Answer': True}
#     <class 'str'>     'Answer: yes'          -> 'Answer: yes'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile jsonargparse==4.53.0 pyyaml==6.0.3
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
from typing import Union

from jsonargparse import ArgumentParser


def parsed(kind, text):
    parser = ArgumentParser()
    parser.add_argument("--prefix", type=kind)
    return parser.parse_args([f"--prefix={text}"]).prefix


seen = {}
for kind, text in (
    (Union[str, int], "7"),
    (Union[str, bool], "yes"),
    (Union[str, dict], "Answer in one word"),
    (Union[str, dict], "Answer: yes"),
    (str, "Answer: yes"),
):
    seen[kind, text] = parsed(kind, text)
    print(f"{str(kind).replace('typing.', ''):17} {text!r:22} -> {seen[kind, text]!r}")

assert seen[Union[str, int], "7"] == "7" and seen[Union[str, bool], "yes"] == "yes"
assert seen[Union[str, dict], "Answer: yes"] == {"Answer": True}
assert seen[str, "Answer: yes"] == "Answer: yes"
EOF

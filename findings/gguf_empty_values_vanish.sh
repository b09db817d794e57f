#!/usr/bin/env bash
# Guess: A key written to a GGUF file's metadata is there when the file is read: an empty system prompt as an empty
# string, no stop words as an empty list.
#
# What happens: add_string('') and add_array([]) return without writing the key, so a reader cannot tell 'empty' from
# 'never set' and takes its own default; a list of empty strings, the number 0 and False are written. And a list of
# integers is always stored as 32-bit: one too large for that passes add_array and fails only when the file is
# written.
#
# Versions: gguf 0.19.0, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     written: {'prompt': '', 'stop': [], 'blanks': ['', ''], 'zero': 0, 'flag': False, 'ids': [1, 2]}
#     read:    {'blanks': ['', ''], 'zero': 0, 'flag': False, 'ids': [1, 2]}
#     list with 2**31: 'i' format requires -2147483648 <= number <= 2147483647
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile gguf==0.19.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import gguf
import struct


def write(**values):
    out = gguf.GGUFWriter("x.gguf", "llama")
    for key, value in values.items():
        kind = {str: out.add_string, list: out.add_array, int: out.add_uint32, bool: out.add_bool}[type(value)]
        kind(f"own.{key}", value)
    try:
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
    finally:
        out.close()
    return {k[4:]: f.contents() for k, f in gguf.GGUFReader("x.gguf").fields.items() if k.startswith("own.")}


values = {"prompt": "", "stop": [], "blanks": ["", ""], "zero": 0, "flag": False, "ids": [1, 2]}
read = write(**values)
print("written:", values)
print("read:   ", read)
try:
    write(ids=[1, 2**31])
    failed = False
except struct.error as error:
    failed = True
    print("list with 2**31:", error)

assert read == {"blanks": ["", ""], "zero": 0, "flag": False, "ids": [1, 2]}
assert failed
EOF

"""The command of a sweep file: its macros, and the part of it that is `im-lightning fit`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from im_lightning.study.sweep_parameters import short, wrong

ARGS = ("args", "args_no_equals", "args_no_boolean_flags", "args_no_hyphens", "args_json")
_DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
_HEADS = (("im-lightning", "fit"), ("python", "-m", "im_lightning.cli", "fit"))
MACRO = re.compile(r"\$\{(\w+)(?::([^}]*))?\}")


def read_command(value: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """The arguments after `im-lightning fit`, macros other than the trial's own replaced."""
    given = value.get("command", list(_DEFAULT_COMMAND))
    if not isinstance(given, list) or not given:
        raise wrong(path, "command", f"it is {short(given)}", "give a list of words")
    words: list[str] = []
    for word in map(str, given):
        macro = MACRO.fullmatch(word)
        if macro and macro[1] in ARGS:
            words.append(word)
            continue
        if macro and macro[1] == "env":
            continue
        for found in MACRO.finditer(word):
            if found[1] == "program" and "program" not in value:
                raise wrong(path, "program", "it is missing, and command names it", "write program: im-lightning")
            if found[1] not in ("program", "interpreter", "envvar"):
                known = ", ".join(f"${{{name}}}" for name in ("env", "interpreter", "program", "envvar:NAME", *ARGS))
                raise wrong(path, "command", f"the macro {found[0]} is not supported", f"use {known}")
        words.append(MACRO.sub(lambda m: _filled(m, value, os.environ), word))
    head = next((h for h in _HEADS if tuple(words[: len(h)]) == h), None)
    if head is None:
        text = " ".join(words[:4])
        remedy = "let it begin with ${env} im-lightning fit; other programs need wandb's own agent"
        raise wrong(path, "command", f"it runs {text!r}, and trials run in one process as im-lightning fit", remedy)
    if not any((m := MACRO.fullmatch(w)) and m[1] in ARGS for w in words):
        raise wrong(path, "command", "the trial's arguments have no place in it", "add ${args}")
    return tuple(words[len(head) :])


def _filled(macro: re.Match[str], value: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    if macro[1] == "program":
        return str(value["program"])
    return "python" if macro[1] == "interpreter" else environment.get(macro[2], macro[2])

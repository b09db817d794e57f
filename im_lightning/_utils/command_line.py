"""Texts of a command line: what docstrings say of its arguments, and lists separated by commas."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable


def arguments_of(function: Callable[..., object]) -> tuple[str, dict[str, str]]:
    """The description of a command and of each of its arguments, from its Google-style docstring."""
    from docstring_parser import parse

    parsed = parse(function.__doc__ or "")
    description = "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)
    return description, {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}


def fields_of(kind: type) -> dict[str, str]:
    """What the texts under the fields of a settings dataclass say."""
    from docstring_parser import parse_from_object

    described = {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(kind).params}
    return {name: described.get(name, "") for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]


def comma_list(text: str | None) -> list[str] | None:
    """`"a,b"` as `["a", "b"]`; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def null_for_none(word: str) -> str:
    """A value, or `--name=value`, that Python wrote: None as YAML has it, alone or in a list or dict.

    >>> null_for_none("--data.budget=None"), null_for_none("{'a': None}"), null_for_none("Nonesuch")
    ('--data.budget=null', '{"a": null}', 'Nonesuch')
    """
    name, equals, text = word.partition("=") if word.startswith("--") else ("", "", word)
    if "None" not in text:
        return word
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError):  # a text
        return word
    return word if isinstance(value, str) else f"{name}{equals}{json.dumps(value)}"

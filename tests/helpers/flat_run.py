"""A command's `run` called with one value per flag, as the command line calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from inspect import Parameter, signature
from typing import Any, get_type_hints


def flat(run: Callable[..., int]) -> Callable[..., int]:
    """`run` with the fields of its settings in place of the settings; what is not given has the command's default."""
    hints = get_type_hints(run)

    def call(**given: Any) -> int:
        arguments: dict[str, Any] = {}
        for name, parameter in signature(run).parameters.items():
            kind = hints[name]
            if is_dataclass(kind):
                fields = {f: given.pop(f) for f in kind.__dataclass_fields__ if f in given}
                default: Any = parameter.default
                arguments[name] = kind(**fields) if default is Parameter.empty else replace(default, **fields)
        return run(**arguments, **given)

    return call

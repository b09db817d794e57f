"""The parser of a command, made from its function: a flag per argument, described by what the docstring says of it.

The arguments are added one by one: jsonargparse's `add_function_arguments` names flags with underscores, gives a
settings dataclass nested flags, and lets a switch take a value.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from im_lightning._utils.command_line import arguments_of, fields_of
from im_lightning._utils.text_tables import shell_lines, terminal_width

_SOURCE = "Published set in whose form DATA is, such as wikihow; for one of several write NAME@FILE in DATA."


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the example as it is, so that it can be copied, and names whole (lowest-ppl)."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


@dataclass(frozen=True)
class _Argument:
    """One argument of a command; without a default it must be given."""

    name: str
    hint: Any
    text: str
    default: Any = inspect.Parameter.empty


def parser_of(name: str, module: Any) -> tuple[ArgumentParser, dict[str, Any]]:
    """The parser of `module.run`, from its signature and docstring; and its parameters that are settings dataclasses.

    Such a parameter gives a flag per field, described by the text under the field; a default instance in the signature
    overrides the fields' own defaults. Fields named in `module.REQUIRED` must be given.
    """
    hints = get_type_hints(module.run)
    summary, texts = arguments_of(module.run)
    width = min(79, terminal_width())
    about = "\n\n".join(textwrap.fill(part, width) for part in summary.split("\n\n"))
    example = textwrap.indent(shell_lines(module.EXAMPLE, terminal_width() - 2), "  ")
    parser = ArgumentParser(
        prog=f"im-lightning {name}",
        description=f"{about}\n\nexample:\n{example}",
        epilog=textwrap.fill("as every command: --json, -q and -v (im-lightning --help)", width),
        formatter_class=_Formatter,
        exit_on_error=False,
    )
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(module.run).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint):
            groups[parameter.name] = hint
            arguments = _of_fields(hint, parameter.default, getattr(module, "REQUIRED", ()))
        else:
            arguments = [_Argument(parameter.name, hint, texts.get(parameter.name, ""), parameter.default)]
        for argument in arguments:
            _add(parser, argument, argument.name in getattr(module, "POSITIONAL", ()))
    if "data" in getattr(module, "POSITIONAL", ()):
        parser.add_argument("--source", help=_SOURCE)
    return parser, groups


def _of_fields(kind: Any, default: Any, required: Sequence[str]) -> list[_Argument]:
    """One argument per field of a settings dataclass."""
    hints, texts = get_type_hints(kind), fields_of(kind)
    arguments = []
    for field in fields(kind):
        value = field.default if default is inspect.Parameter.empty else getattr(default, field.name)
        if value is MISSING or field.name in required:
            arguments.append(_Argument(field.name, _not_none(hints[field.name]), texts[field.name]))
        else:
            arguments.append(_Argument(field.name, hints[field.name], texts[field.name], value))
    return arguments


def _add(parser: Any, argument: _Argument, positional: bool) -> None:
    """Adds one argument to the parser: positional, or a flag that takes one value, several, or none."""
    item = _item_type(argument.hint)
    given: dict[str, Any] = {"type": argument.hint, "help": argument.text}
    if positional:
        if item is not None:
            given |= {"type": item, "nargs": "+"}
        if argument.default is not inspect.Parameter.empty:
            given |= {"nargs": "?" if item is None else "*", "default": argument.default}
        parser.add_argument(argument.name, **given)
        return
    if argument.default is inspect.Parameter.empty:
        given["required"] = True
    elif argument.default is False:
        given = {"action": "store_true", "help": argument.text}
    else:
        given["default"] = argument.default
        if item is not None:
            given |= {"type": item, "nargs": "+"}
    parser.add_argument("--" + argument.name.replace("_", "-"), dest=argument.name, **given)


def _not_none(hint: Any) -> Any:
    """`str | None` as `str`."""
    kinds = get_args(hint)
    return kinds[0] if len(kinds) == 2 and kinds[1] is type(None) else hint


def _item_type(hint: Any) -> Any:
    """The type of one value of an argument that takes several (`list[int] | None`); None for other arguments."""
    return next((get_args(kind)[0] for kind in (hint, *get_args(hint)) if get_origin(kind) is list), None)

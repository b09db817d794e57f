"""`im-lightning`: finds the command, reads its arguments, runs it, turns errors into exit statuses.

A command is a module of `im_lightning.commands` with `SUMMARY`, `EXAMPLE` and either `run`, a typed function whose
docstring becomes the help, or `main(argv)` if it parses its own arguments. Only the chosen one is imported.
Exit status: 0 done, 1 the work failed, 2 the request was wrong.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from im_lightning import __version__
from im_lightning.errors import InstructMiningError, RequestError

COMMANDS = {
    "demo": "the whole loop on a small made-up pool, offline, ending in a table",
    "score": "score examples with indicators; write a Parquet table",
    "design": "write a sweep file of designed runs for a scored pool; say what they can tell, and cost",
    "select": "write the rows that a rule chooses, in their own format",
    "fit": "finetune with the data module, the module and the callback (LightningCLI)",
    "sweep": "run a wandb sweep file without a server: many short finetunes in one process",
    "runs": "list the finetune runs of a ledger",
    "refit": "fit the rule on the runs of a ledger; print the regression table",
    "search": "search for the number of rows to finetune on; report on a set that the search did not see",
    "compare": "finetune on the rule's rows and on the baselines, at equal tokens and steps; print the table",
    "report": "write one self-contained HTML page: pool, rule, runs, weights, examples, comparison",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"im-lightning {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"im-lightning: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"im_lightning.commands.{name}")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if hasattr(module, "main"):
                return int(module.main(rest))
            return int(module.run(**_parse(name, module, rest)) or 0)
    except InstructMiningError as error:
        print(f"im-lightning {name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    except KeyboardInterrupt:
        print(
            f"\nim-lightning {name}: interrupted; what was finished is kept, run the same command to go on",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) went away: nothing is wrong
        sys.stderr.close()
        return 0


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Our own warnings are sentences for the user; those of libraries keep their place, which a report needs."""
    ours = "im_lightning" in Path(filename).parts
    print(f"warning: {message}" if ours else f"{category.__name__} in {filename}:{lineno}: {message}", file=sys.stderr)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: im-lightning COMMAND [arguments]",
            "",
            "Score instruction data, learn from finetune runs which of it helps, and finetune on weights.",
            "",
            *lines,
            "",
            "im-lightning COMMAND --help shows the arguments of a command and an example.",
        ]
    )


def _parse(name: str, module: Any, argv: list[str]) -> dict[str, Any]:
    """Arguments of `module.run`, read from its signature and docstring; argparse exits with 2 where they are wrong.

    A parameter that is a settings dataclass gives a flag per field, described by the text under the field; a default
    instance in the signature overrides the fields' own defaults. Fields named in `module.REQUIRED` must be given.
    """
    import inspect
    import textwrap
    from argparse import RawDescriptionHelpFormatter
    from dataclasses import is_dataclass
    from typing import get_type_hints

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from im_lightning._utils.command_line import arguments_of

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Leaves the example on one line, so that it can be copied."""

    hints = get_type_hints(module.run)
    summary, described = arguments_of(module.run)
    about = "\n\n".join(textwrap.fill(part, width=79) for part in summary.split("\n\n"))
    parser = ArgumentParser(
        prog=f"im-lightning {name}",
        description=f"{about}\n\nexample:\n  {module.EXAMPLE}",
        formatter_class=Formatter,
    )
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(module.run).parameters.values():
        hint, default = hints[parameter.name], parameter.default
        if is_dataclass(hint):
            groups[parameter.name] = hint
            _add_fields(parser, hint, None if default is inspect.Parameter.empty else default, module)
        else:
            given = {} if default is inspect.Parameter.empty else {"default": default}
            _add(parser, parameter.name, hint, described.get(parameter.name, ""), module, given)
    values = vars(parser.parse_args(argv))
    for argument, kind in groups.items():
        values[argument] = kind(**{f: values.pop(f) for f in kind.__dataclass_fields__})
    return values


def _add_fields(parser: Any, kind: Any, default: Any, module: Any) -> None:
    """One flag per field of a settings dataclass."""
    from dataclasses import MISSING, fields
    from typing import get_type_hints

    from im_lightning._utils.command_line import fields_of

    hints, described = get_type_hints(kind), fields_of(kind)
    for one in fields(kind):
        value = one.default if default is None else getattr(default, one.name)
        required = value is MISSING or one.name in getattr(module, "REQUIRED", ())
        given = {} if required else {"default": value}
        _add(parser, one.name, _not_none(hints[one.name]) if required else hints[one.name], described[one.name], module,
             given)  # fmt: skip


def _add(parser: Any, name: str, hint: Any, text: str, module: Any, given: dict[str, Any]) -> None:
    """One argument: positional, a flag that takes one value, several, or none."""
    from typing import get_args, get_origin

    if name in getattr(module, "POSITIONAL", ()):
        several = get_origin(hint) is list
        parser.add_argument(
            name, type=get_args(hint)[0] if several else hint, help=text, **({"nargs": "+"} if several else {})
        )
        return
    flag = "--" + name.replace("_", "-")
    if not given:
        parser.add_argument(flag, dest=name, type=hint, required=True, help=text)
    elif hint is bool and given["default"] is False:
        parser.add_argument(flag, dest=name, action="store_true", help=text)
    elif (item := _item_type(hint)) is not None:
        parser.add_argument(flag, dest=name, type=item, nargs="+", help=text, **given)
    else:
        parser.add_argument(flag, dest=name, type=hint, help=text, **given)


def _not_none(hint: Any) -> Any:
    """`str | None` as `str`."""
    from typing import get_args

    kinds = get_args(hint)
    return kinds[0] if len(kinds) == 2 and kinds[1] is type(None) else hint


def _item_type(hint: Any) -> Any:
    """The type of one value of an argument that takes several (`list[int] | None`); None for other arguments."""
    from typing import get_args, get_origin

    return next((get_args(kind)[0] for kind in (hint, *get_args(hint)) if get_origin(kind) is list), None)


if __name__ == "__main__":
    sys.exit(main())

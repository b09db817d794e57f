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
    """Arguments of `module.run`, read from its signature and docstring; argparse exits with 2 where they are wrong."""
    import inspect
    import textwrap
    from argparse import RawDescriptionHelpFormatter
    from typing import get_args, get_type_hints

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from im_lightning.commands import arguments_of

    positional: tuple[str, ...] = getattr(module, "POSITIONAL", ())
    hints = get_type_hints(module.run)
    summary, described = arguments_of(module.run)

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Leaves the example on one line, so that it can be copied."""

    about = "\n\n".join(textwrap.fill(part, width=79) for part in summary.split("\n\n"))
    parser = ArgumentParser(
        prog=f"im-lightning {name}",
        description=f"{about}\n\nexample:\n  {module.EXAMPLE}",
        formatter_class=Formatter,
    )
    for parameter in inspect.signature(module.run).parameters.values():
        hint, text = hints[parameter.name], described.get(parameter.name, "")
        if parameter.name in positional:
            if getattr(hint, "__origin__", hint) is list:
                parser.add_argument(parameter.name, type=get_args(hint)[0], nargs="+", help=text)
            else:
                parser.add_argument(parameter.name, type=hint, help=text)
            continue
        flag = "--" + parameter.name.replace("_", "-")
        if parameter.default is inspect.Parameter.empty:
            parser.add_argument(flag, dest=parameter.name, type=hint, required=True, help=text)
        elif hint is bool and parameter.default is False:
            parser.add_argument(flag, dest=parameter.name, action="store_true", help=text)
        elif (item := _item_type(hint)) is not None:
            parser.add_argument(flag, dest=parameter.name, type=item, nargs="+", default=parameter.default, help=text)
        else:
            parser.add_argument(flag, dest=parameter.name, type=hint, default=parameter.default, help=text)
    return vars(parser.parse_args(argv))


def _item_type(hint: Any) -> Any:
    """The type of one value of an argument that takes several (`list[int] | None`); None for other arguments."""
    from typing import get_args, get_origin

    return next((get_args(kind)[0] for kind in (hint, *get_args(hint)) if get_origin(kind) is list), None)


if __name__ == "__main__":
    sys.exit(main())

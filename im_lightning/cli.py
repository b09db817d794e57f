"""`im-lightning`: finds the command, reads its arguments, runs it, turns errors into exit statuses.

A command is a module of `im_lightning.commands` with `SUMMARY`, `EXAMPLE` and either `run`, a typed function whose
docstring becomes the help, or `main(argv)` if it parses its own arguments. Only the chosen one is imported.
Exit status: 0 done, 1 the work failed, 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from im_lightning import __version__
from im_lightning._utils.answer import FLAGS, Manner
from im_lightning.errors import InstructMiningError, RequestError

COMMANDS = {
    "run": "the whole loop on your data: scores, designed runs, rule, and whether it paid; goes on where it was",
    "demo": "the whole loop on a small synthetic pool, offline, ending in a table",
    "score": "score examples with indicators; write a Parquet table",
    "check": "find rows of a pool that are in an evaluation set: exact, normalised, same prompt, near, semantic",
    "plan": "say whether scoring, runs and selection can pay for a pool, or whether to train on everything",
    "design": "write a sweep file of designed runs for a scored pool; say what they can tell, and cost",
    "select": "write the rows that a rule chooses, in their own format",
    "explain": "say why a row of a pool was taken or not, and what each indicator has to do with it",
    "fit": "finetune with the data module, the module and the callback (LightningCLI)",
    "sweep": "run a wandb sweep file without a server: many short finetunes in one process",
    "runs": "list the finetune runs of a ledger",
    "refit": "fit the rule on the runs of a ledger; print the regression table",
    "transfer": "finetune a small base's subsets on another base; say whether both rank them alike",
    "mix": "find the mixture of sources that the runs predict best; print it beside the natural one",
    "search": "search for the number of rows to finetune on; report on a set that the search did not see",
    "compare": "finetune on the rule's rows and on the baselines, at equal tokens and steps; print the table",
    "make-eval": "ask a model behind an endpoint for reference outputs: an evaluation set, within a cap on its cost",
    "generate": "answer an evaluation set with a finetuned model",
    "judge": "compare two models' answers, by a model that is asked or with references; win rate with its interval",
    "score-llm": "grade every row by a model that is asked; write the grades as an indicator",
    "recipe": "print one of the recipes that come with the package, or write them all into a folder",
    "report": "write one self-contained HTML page: pool, rule, runs, weights, examples, comparison",
    "completion": "print a script for bash, zsh, fish, … that completes commands, flags and their choices",
    "clean": "list what fits and commands keep beside their outputs; --remove removes it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
    """
    manner, arguments = Manner.taken(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"im-lightning {__version__}")
        return 0
    try:
        with manner.applied():
            return _status(arguments[0], arguments[1:], manner)
    except BrokenPipeError:  # the reader of our output (head, less) went away: nothing is wrong
        sys.stderr.close()
        return 0


def _status(name: str, rest: list[str], manner: Manner) -> int:
    """Runs a command; its exit status."""
    if name not in COMMANDS:
        from difflib import get_close_matches

        known = f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}"
        near = get_close_matches(name, COMMANDS, 1)
        return manner.failed("im-lightning", known + (f"; did you mean {near[0]}?" if near else ""), 2)
    module = importlib.import_module(f"im_lightning.commands.{name.replace('-', '_')}")
    try:
        if hasattr(module, "main"):
            return int(module.main(rest))
        return int(module.run(**_parse(name, module, rest)) or 0)
    except InstructMiningError as error:
        status = 2 if isinstance(error, RequestError) else 1
        return manner.failed(f"im-lightning {name}", str(error), status, error)
    except KeyboardInterrupt:
        kept = "interrupted; what was finished is kept, run the same command to go on"
        return manner.failed(f"\nim-lightning {name}", kept, 130)


def _overview() -> str:
    from im_lightning._utils.text_tables import term_list, terminal_width, wrapped

    width = terminal_width()
    listed = [term_list([(f"  {name}", text) for name, text in one.items()], width) for one in (COMMANDS, FLAGS)]
    parts = [
        "usage: im-lightning COMMAND [arguments]",
        "Score instruction data, learn from finetune runs which of it helps, and finetune on weights.",
        "im-lightning COMMAND --help shows the arguments of a command and an example. Every command takes:",
        "Besides what you name, they keep: values of indicators in $IM_LIGHTNING_CACHE or ~/.cache/im_lightning; the "
        "inputs of fits in im-lightning/; scores.parquet.cost.json beside a score table; sweeps/ for sweeps. "
        "im-lightning clean lists and removes the second and third.",
    ]
    usage, what, help, kept = (wrapped(part, width) for part in parts)
    return "\n\n".join([usage, what, listed[0], help, listed[1], kept])


def _parse(name: str, module: Any, argv: list[str]) -> dict[str, Any]:
    """Arguments of `module.run`.

    Raises:
        RequestError: an argument is unknown, missing or of the wrong type.
    """
    from im_lightning._utils.command_line import misspelt, no_such_option, wrong_argument
    from im_lightning._utils.force import accepted, with_names
    from im_lightning._utils.parser import parser_of

    parser, groups = parser_of(name, module)
    argv, names = with_names(argv)
    options = list(parser._option_string_actions)
    see = f"see im-lightning {name} --help"
    if unknown := misspelt(argv, options):
        raise no_such_option(unknown, [*options, *FLAGS], see)
    try:
        values = vars(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise wrong_argument(error.message, argv, options, see) from error
    if (source := values.pop("source", None)) is not None:
        from im_lightning.data.sources import with_source

        values["data"] = with_source(source, values["data"])
    if names is not None:
        accepted(names)
        values["force"] = names
    for group, kind in groups.items():
        values[group] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
    return values


if __name__ == "__main__":
    sys.exit(main())

"""`im-lightning completion`: what a shell needs to complete commands, flags and their choices, without starting us."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from im_lightning._utils.answer import FLAGS, answer
from im_lightning.errors import RequestError, message

SUMMARY = "print a script for bash, zsh, fish, … that completes commands, flags and their choices"
EXAMPLE = "im-lightning completion bash > ~/.local/share/bash-completion/completions/im-lightning"
POSITIONAL = ("shell",)


def run(shell: str) -> int:
    """Prints a script for a shell. Make it again after an update.

    For bash, mkdir -p ~/.local/share/bash-completion/completions first, where that folder is missing; for zsh its place
    is a file _im-lightning in $fpath.

    Args:
        shell: bash, zsh, tcsh, fish or powershell.
    """
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        known = ", ".join(shtab.SUPPORTED_SHELLS)
        raise RequestError(message(shell, "there is no completion for this shell", f"name one of {known}"))
    script = shtab.complete(_whole_parser(shtab.FILE), shell)
    answer({"shell": shell, "script": script}, script)
    return 0


def _whole_parser(file: Any) -> argparse.ArgumentParser:
    """All commands with their flags; `file` marks what may be a path."""
    from im_lightning import commands
    from im_lightning._utils.parser import parser_of

    whole = argparse.ArgumentParser(prog="im-lightning")
    parsers = whole.add_subparsers()
    for flag in FLAGS:
        whole.add_argument(flag, action="store_true")
    for found in pkgutil.iter_modules(commands.__path__):
        name, module = found.name.replace("_", "-"), importlib.import_module(f"im_lightning.commands.{found.name}")
        parents = [parser_of(name, module)[0]] if hasattr(module, "run") else []
        parser = parsers.add_parser(name, help=module.SUMMARY, parents=parents, add_help=not parents)
        flags = {flag: {"action": "store_true"} for flag in FLAGS} | ({} if parents else _of_fit())
        for flag, how in flags.items():
            parser.add_argument(flag, **how)
        choices = _choices(name)
        for action in parser._actions:
            if known := choices.get((action.option_strings or [action.dest])[-1]):
                action.choices = known
            elif action.nargs != 0 and not action.choices and "str" in str(getattr(action, "_typehint", str)):
                action.complete = file  # type: ignore[attr-defined]
            action.help = None if action.help is None else action.help.replace("%", "%%")
    return whole


def _of_fit() -> dict[str, dict[str, Any]]:
    """Flags of `fit`, whose parser is Lightning's: those of the Trainer, of our classes, and the switches."""
    import inspect

    from im_lightning._lightning import Trainer
    from im_lightning.commands.fit import DRY_RUN
    from im_lightning.training.callback import InstructMiningCallback
    from im_lightning.training.datamodule import InstructMiningDataModule
    from im_lightning.training.module import InstructTuningModule

    parts = {"data": InstructMiningDataModule, "model": InstructTuningModule, "mining": InstructMiningCallback}
    parts |= {"trainer": Trainer}
    names = [f"--{part}.{name}" for part, kind in parts.items() for name in inspect.signature(kind).parameters]
    return {DRY_RUN: {"action": "store_true"}} | {n: {} for n in ("--config", "--export", "--ckpt_path", *names)}


def _choices(command: str) -> dict[str, Sequence[str]]:
    """Flag or argument → the names that it takes, where it takes names."""
    from shtab import SUPPORTED_SHELLS

    from im_lightning.commands.recipe import by_name
    from im_lightning.data.formats import FORMATS
    from im_lightning.data.loading import ANSWERS, ON_BAD_ROW
    from im_lightning.data.tokenization import TEMPLATES
    from im_lightning.experiments.compare.equal_tokens import POOL_DRAWS
    from im_lightning.experiments.search.proposals import METHODS as SEARCHES
    from im_lightning.experiments.search.run import OBJECTIVES
    from im_lightning.ledger.record import KINDS
    from im_lightning.models.device import PRECISIONS
    from im_lightning.rule.fit import METHODS as FITS
    from im_lightning.rule.mixture_law import METHODS as MIXTURE_LAWS
    from im_lightning.sampling.selection.methods import METHODS as SELECTIONS
    from im_lightning.sampling.weights.quality_weights import METHODS as WEIGHTINGS
    from im_lightning.scoring.settings import ENGINES

    methods = {
        "select": SELECTIONS,
        "refit": FITS,
        "search": SEARCHES,
        "mix": ("auto", *MIXTURE_LAWS),
    }
    found = {"method": methods.get(command, ()), "objective": OBJECTIVES, "pool-draw": POOL_DRAWS, "engine": ENGINES}
    found |= {"format": FORMATS, "on-bad-row": ON_BAD_ROW, "answer": ANSWERS, "template": TEMPLATES}
    found |= {"weighting": WEIGHTINGS, "precision": PRECISIONS, "dtype": PRECISIONS, "kind": KINDS}
    found |= {"device": ("auto", "cpu", "cuda", "mps")}
    if command == "fit":
        of = {"model": ("dtype",), "data": ("format", "on-bad-row", "answer", "template", "weighting", "precision")}
        return {f"--{part}.{n.replace('-', '_')}": list(found[n]) for part, names in of.items() for n in names}
    recipes = [word for key, path in by_name().items() for word in (path.stem, key)]
    positional = {"recipe": {"name": recipes}, "completion": {"shell": list(SUPPORTED_SHELLS)}}
    return {**positional.get(command, {}), **{f"--{name}": list(names) for name, names in found.items()}}

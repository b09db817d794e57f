"""Reading a wandb sweep file: every key known, every form checked, the command taken apart.

What a server would decide is decided here the same way: the arguments of a trial are the words that wandb's agent
would write. What is not understood is refused by name; nothing is skipped in silence.

The command of a sweep file: its macros, and the part of it that is `im-lightning fit`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from im_lightning._utils.command_line import null_for_none, recipe_remedy
from im_lightning._utils.hashing import digest_json
from im_lightning.errors import RequestError, message
from im_lightning.experiments.sweep.parameters import Parameter, read_parameters, short, wrong

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


METHODS = ("grid", "random", "bayes")
_FOR_THE_SERVER = ("name", "description", "project", "entity", "apiVersion", "kind", "controller")
_KEYS = ("program", "command", "method", "metric", "parameters", "run_cap", "early_terminate", *_FOR_THE_SERVER)


@dataclass(frozen=True)
class Metric:
    """What bayes optimises and early stopping looks at: a logged name, its better direction, a value that suffices."""

    name: str
    maximize: bool = False
    target: float | None = None

    def reached(self, value: float) -> bool:
        """Whether a trial with this value ends the sweep."""
        if self.target is None:
            return False
        return value >= self.target if self.maximize else value <= self.target


@dataclass(frozen=True)
class EarlyStop:
    """Hyperband as wandb's sweeps have it: `bands` are positions in the metric's history where trials are compared."""

    bands: tuple[int, ...]
    eta: float


@dataclass(frozen=True)
class SweepFile:
    """A sweep, checked.

    Args:
        path: The file.
        method: grid, random or bayes.
        parameters: In the file's order.
        command: Arguments of `im-lightning fit`; macros for the trial's own arguments still stand in it.
        metric: None where the file has none.
        run_cap: Most trials, or None.
        early: Early stopping, or None.
        digest: Of what decides the trials: a changed file does not go on where another one was.
    """

    path: str
    method: str
    parameters: tuple[Parameter, ...]
    command: tuple[str, ...]
    metric: Metric | None
    run_cap: int | None
    early: EarlyStop | None
    digest: str

    def arguments(self, values: Mapping[str, Any]) -> list[str]:
        """The words of `im-lightning fit` for one trial, as wandb's agent would write them, null as `null`.

        Args:
            values: Parameter name → value.
        """
        nested: dict[str, Any] = {}
        for parameter in self.parameters:
            into = nested
            for key in parameter.path[:-1]:
                into = into.setdefault(key, {})
            into[parameter.path[-1]] = values[parameter.name]
        words = {k: v if isinstance(v, str) else null_for_none(str(v)) for k, v in nested.items()}
        written = {
            "args": [f"--{k}={v}" for k, v in words.items()],
            "args_no_equals": [word for k, v in words.items() for word in (f"--{k}", v)],
            "args_no_hyphens": [f"{k}={v}" for k, v in words.items()],
            "args_no_boolean_flags": [
                f"--{k}" if nested[k] is True else f"--{k}={v}" for k, v in words.items() if nested[k] is not False
            ],
            "args_json": [json.dumps(nested)],
        }
        out: list[str] = []
        for word in self.command:
            macro = MACRO.fullmatch(word)
            out += written[macro[1]] if macro else [word]
        return out

    def with_arguments(self, words: Sequence[str]) -> SweepFile:
        """The sweep with more arguments in the command, in front of the trial's own."""
        if not words:
            return self
        at = next(k for k, word in enumerate(self.command) if MACRO.fullmatch(word))
        command = (*self.command[:at], *words, *self.command[at:])
        return replace(self, command=command, digest=digest_json([self.digest, *words]))

    @property
    def trials(self) -> int | None:
        """How many trials there are in all; None without an end."""
        count = None
        if self.method == "grid":
            count = 1
            for parameter in self.parameters:
                count *= len(parameter.grid or ())
        caps = [n for n in (count, self.run_cap) if n is not None]
        return min(caps) if caps else None


def read_sweep(path: str) -> SweepFile:
    """Reads and checks a sweep file.

    Raises:
        RequestError: no such file, no YAML, or a key, method or form that is unknown or not supported; names it.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error})"
        remedy = recipe_remedy(path, "name a sweep file, such as those in recipes/")
        raise RequestError(message(path, cause, remedy)) from error
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(message(path, f"it is not YAML ({' '.join(str(error).split())})", "mend it")) from error
    return check_sweep(value, path)


def check_sweep(value: Any, path: str) -> SweepFile:
    """The sweep that a parsed file describes; errors as `read_sweep`."""
    if not isinstance(value, Mapping):
        raise RequestError(message(path, "it does not hold a mapping", "write method, parameters and command"))
    for key in value:
        if key not in _KEYS:
            raise wrong(path, str(key), "this key is not supported", f"use {', '.join(_KEYS)}")
    for key in ("method", "parameters"):
        if key not in value:
            raise wrong(path, key, "it is missing", "every sweep has a method and parameters")
    method = value["method"]
    if method not in METHODS:
        raise wrong(path, "method", f"there is no {short(method)}", f"use one of {', '.join(METHODS)}")
    parameters = read_parameters(value["parameters"], path)
    metric = None if value.get("metric") is None else _metric(value["metric"], path)
    early = None if value.get("early_terminate") is None else _early(value["early_terminate"], path)
    if metric is None and (method == "bayes" or early is not None):
        what = "method bayes" if method == "bayes" else "early_terminate"
        raise wrong(path, "metric", f"it is missing, and {what} needs it", "give its name and goal")
    _check_method(method, parameters, path)
    cap = value.get("run_cap")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise wrong(path, "run_cap", f"it is {short(cap)}", "give the number of trials")
    command = read_command(value, path)
    decides = {k: value.get(k) for k in ("method", "metric", "parameters", "early_terminate", "command", "program")}
    return SweepFile(path, method, parameters, command, metric, cap, early, digest_json(decides))


def _check_method(method: str, parameters: tuple[Parameter, ...], path: str) -> None:
    for p in parameters:
        where = f"parameters.{p.name}"
        if method == "grid" and p.grid is None:
            remedy = "list values, or use random or bayes"
            raise wrong(path, where, f"a grid has no values of {p.distribution}", remedy)
        if method != "random" and p.probabilities:
            raise wrong(
                path, f"{where}.probabilities", f"{method} has no use for them", "use random, or leave them out"
            )


def _metric(value: Any, path: str) -> Metric:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise wrong(path, "metric", "it has no name", "write name: im/eval_loss/<evaluation set>")
    for key in value:
        if key not in ("name", "goal", "target"):
            raise wrong(path, f"metric.{key}", "this key is not supported", "use name, goal, target")
    goal = value.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise wrong(path, "metric.goal", f"there is no {short(goal)}", "use minimize or maximize")
    target = value.get("target")
    if target is not None and (isinstance(target, bool) or not isinstance(target, int | float)):
        raise wrong(path, "metric.target", f"it is {short(target)}", "give a number")
    return Metric(value["name"], goal == "maximize", None if target is None else float(target))


def _early(value: Any, path: str) -> EarlyStop:
    if not isinstance(value, Mapping) or value.get("type") != "hyperband":
        kind = value.get("type") if isinstance(value, Mapping) else value
        raise wrong(path, "early_terminate.type", f"there is no {short(kind)}", "use hyperband")
    for key in value:
        if key not in ("type", "min_iter", "max_iter", "s", "eta"):
            remedy = "use type, min_iter, eta, or type, max_iter, s, eta"
            raise wrong(path, f"early_terminate.{key}", "this key is not supported", remedy)
    numbers = {k: v for k, v in value.items() if k != "type"}
    for key, number in numbers.items():
        known = isinstance(number, int | float) and not isinstance(number, bool)
        if not known or number < 1 or (key == "eta" and number <= 1):
            least = "more than 1" if key == "eta" else "1 or more"
            raise wrong(path, f"early_terminate.{key}", f"it is {short(number)}", f"give {least}")
    eta = numbers.get("eta", 3)
    if "min_iter" in numbers and "max_iter" not in numbers:
        bands = [int(numbers["min_iter"] * eta**k) for k in range(40)]
    elif "max_iter" in numbers and "s" in numbers and "min_iter" not in numbers:
        bands = [int(numbers["max_iter"] / eta ** (k + 1)) for k in range(int(numbers["s"]))]
    else:
        given = ", ".join(numbers) or "neither"
        raise wrong(path, "early_terminate", f"it gives {given}", "give min_iter, or max_iter and s")
    return EarlyStop(tuple(sorted({b for b in bands if b >= 1})), float(eta))

"""Texts of a command line: what docstrings say of its arguments, comma lists, and what was wrong with it."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from pathlib import Path

from im_lightning.errors import RequestError, message

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
_NOISE = re.compile(r"Does not validate|Subtypes: |Errors:|Given value|Subclass types|- a (dict|class)|.*'NoneType'>")


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


def words_of(flag: str, text: str | None) -> list[str]:
    """The words of an option that holds several in one text, parted as a shell does; none of None.

    Raises:
        RequestError: a quote in it is not closed.
    """
    try:
        return shlex.split(text or "")
    except ValueError as error:
        cause = f"it cannot be parted into words: {str(error)[:1].lower()}{str(error)[1:]}"
        raise RequestError(message(f"{flag} {text}", cause, "close every quote in it")) from error


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


def misspelt(argv: Sequence[str], options: Collection[str]) -> str | None:
    """The first word that looks like an option and is none, nor the beginning of one, nor lies under one.

    >>> misspelt(["pool.jsonl", "--out=o", "--buget", "3"], ["--out", "--budget"])
    '--buget'
    """
    own = [o for o in options if not o.endswith(".help")]  # jsonargparse's, of an option that takes a class
    open_ended = [o for o in own if not any(other.startswith(f"{o}.") for other in own)]
    for word in argv:
        name = word.partition("=")[0]
        if not re.fullmatch(r"--[\w.-]+", name) or any(name.startswith(f"{o}.") for o in open_ended):
            continue
        if not any(o.startswith(name) for o in options):
            return name
    return None


def no_such_option(name: str, options: Collection[str], see: str) -> RequestError:
    """The error for a misspelt option, with the one that may be meant.

    >>> str(no_such_option("--subset_sise", ["--out", "--subset-size"], "see --help"))
    '--subset_sise: there is no such option (did you mean --subset-size?). Fix: see --help.'
    """
    plain = name.replace("_", "-").lower()
    spelt = {o.replace("_", "-"): o for o in options if o.startswith("--") and not o.endswith("help")}
    ends = [o for o in spelt if o.rpartition(".")[2] == plain.lstrip("-")]
    near = ends or get_close_matches(plain, spelt, n=1, cutoff=0.65)
    cause = "there is no such option" + (f" (did you mean {spelt[near[0]]}?)" if near else "")
    return RequestError(message(name, cause, see))


def wrong_argument(text: str, argv: Sequence[str], options: Collection[str], see: str) -> RequestError:
    """The error for what a parser (jsonargparse) did not take, in one line.

    Args:
        text: The parser's words, of one line or twenty.
        argv: What was typed.
        options: All options there are, with their dashes.
        see: The remedy where nothing better is known.

    >>> dump = "Parser key 'budget': Expected a <class 'int'>. Got value: lots".replace("'budget'", '"budget"')
    >>> str(wrong_argument(dump, ["--budget", "lots"], ["--budget"], "see --help"))
    "--budget: 'lots' is not a whole number. Fix: see --help."
    """
    if "config" in text and (gone := next((one for one in _files(argv) if not Path(one).exists()), None)):
        return RequestError(message(f"--config {gone}", "there is no such file", recipe_remedy(gone, see)))
    if found := re.match(r'Parser key "(?:fit\.)?([^"]+)"', text):
        return RequestError(message(_place(found[1], argv, options), _unfit(text[found.end() :]), see))
    if found := re.search(r"does not accept option '([^']+)'|Key '([^']+)' is not expected", text):
        return no_such_option(f"--{found[1] or found[2]}", options, see)
    if found := re.match(r"argument (\S+?): (expected|ignored explicit)", text):
        cause = "a value is missing after it" if found[2] == "expected" else "it is a switch, and takes no value"
        return RequestError(message(found[1].partition("/")[0], cause, see))
    if "arguments are required: " in text:
        if name := misspelt(argv, options):
            return no_such_option(name, options, see)
        names = [n.removeprefix("--").removeprefix("fit.") for n in text.partition("required: ")[2].split(", ")]
        missing = [_option(n, options) or n.upper() for n in names]
        return RequestError(message(", ".join(missing), "must be given", see))
    if found := re.match(r"unrecognized arguments: (.+)", text, re.DOTALL):
        if name := misspelt(argv, options):
            return no_such_option(name, options, see)
        return RequestError(message(found[1], "nothing here takes this word", see))
    what = f"--config {', '.join(_files(argv))}" if "config:" in text else "arguments"
    return RequestError(message(what, _short(text), see))


def recipe_remedy(file: str, otherwise: str) -> str:
    """What to do about a file that is not there: the package has the recipes.

    >>> recipe_remedy("recipes/none.yaml", "check it")
    'write the recipes here (im-lightning recipe --out recipes), or check it'
    """
    first = "write the recipes here (im-lightning recipe --out recipes), or " if "recipes/" in file else ""
    return first + otherwise


def _option(key: str, options: Collection[str]) -> str | None:
    """The option that sets a key of the parser; None for a positional argument."""
    return next((o for o in (f"--{key}", f"--{key.replace('_', '-')}") if o in options), None)


def _place(key: str, argv: Sequence[str], options: Collection[str]) -> str:
    """Where a wrong value stands: the option, or the key in a file of arguments."""
    option = _option(key, options)
    files = _files(argv)
    if option not in (None, "--config") and files and not any(a.partition("=")[0] == option for a in argv):
        return f"{key} in {', '.join(files)}"
    return option or key


def _files(argv: Sequence[str]) -> list[str]:
    """The files of arguments that are named."""
    return re.findall(r"--config[= ](\S+)", " ".join(argv))


def _unfit(text: str) -> str:
    """What the parser says of a value: the kinds that it is none of, or else the reasons that tell something."""
    value = re.search(r"(?:Given|Got) value: (.*)", text, re.DOTALL)
    given = re.sub(r"\s+", " ", value[1]).strip() if value else ""
    given = given if len(given) <= 60 else given[:59] + "…"
    kinds = [k.rpartition(".")[2] for k in re.findall(r"Expected (?:an? )?<class '([\w.]+)'>", text)]
    known = list(dict.fromkeys(_KINDS[k] for k in kinds if k in _KINDS))
    if known and all(k in _KINDS or k == "NoneType" for k in kinds) and "class_path" not in text:
        return f"{given!r} is not {' or '.join(known)}"
    return _short(text)


def _short(text: str) -> str:
    lines = [line.strip(" -:") for line in text.splitlines() if not _NOISE.match(line.strip(" -"))]
    lines = [re.sub(r'^Parser key "[^"]*": ?', "", line) for line in lines]
    lines = [re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", line) for line in lines]
    short = "; ".join({line.replace('"', "'"): None for line in lines if line})
    return short if len(short) <= 300 else short[:299] + "…"

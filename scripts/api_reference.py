"""Writes docs/api.md: the public names of the package and its commands, from signatures and docstrings.

Signatures and docstrings are read from the source (griffe), not from imported modules. `--check` writes nothing and
exits with 1 where the file is out of date.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import griffe

import im_lightning
from im_lightning.cli import COMMANDS
from im_lightning.commands import fields_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"


def main(check: bool) -> int:
    """Writes the page, or compares it with what would be written."""
    text = page()
    if check:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current != text:
            print(f"{PAGE.relative_to(ROOT)} is out of date: run scripts/api_reference", file=sys.stderr)
        return int(current != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page() -> str:
    """The whole reference as Markdown."""
    package = griffe.load("im_lightning", search_paths=[ROOT], docstring_parser=griffe.Parser.google)
    names = [name for name in im_lightning.__all__ if not name.startswith("_")]
    lines = [
        "# API reference",
        "",
        "Made from the docstrings by `scripts/api_reference`. Everything here is imported as `from im_lightning import",
        "…`. Missing values are NaN with a reason; losses are in nats per token; lower is better.",
        "",
        " · ".join(f"[`{name}`](#{name.lower()})" for name in names),
        "",
        "Commands: " + " · ".join(f"[`{name}`](#im-lightning-{name})" for name in COMMANDS),
        "",
    ]
    for name in names:
        home = package[f"{im_lightning._HOME[name]}.{name}"]
        lines += [f"## {name}", "", *_object(home.final_target if home.is_alias else home)]
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"im_lightning.commands.{name}")
        lines += [f"## im-lightning {name}", "", summary[0].upper() + summary[1:] + ".", ""]
        lines += ["```console", f"$ {module.EXAMPLE}", "```", ""]
        run = package[f"commands.{name}"].members.get("run")
        lines += _docstring(run, _groups(module.run)) if run is not None else [f"See `im-lightning {name} --help`.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _object(found: Any) -> list[str]:
    lines = ["```python", _signature(found), "```", "", *_docstring(found)]
    if found.is_class:
        for member in found.all_members.values():
            member = member.final_target if member.is_alias else member
            ours = member.path.startswith("im_lightning.")
            public = not member.name.startswith("_")
            if ours and public and member.docstring and (member.is_function or "property" in member.labels):
                lines += [f"### {found.name}.{member.name}", "", *_member(member)]
    return lines


def _member(member: Any) -> list[str]:
    if member.is_function:
        return ["```python", _signature(member), "```", "", *_docstring(member)]
    return _docstring(member)


def _signature(found: Any) -> str:
    call = found.all_members.get("__init__") if found.is_class else found
    if call is None or not getattr(call, "parameters", None):
        return found.name + ("()" if found.is_function else "")
    given = [_parameter(p) for p in call.parameters if p.name not in ("self", "cls")]
    returns = f" -> {call.returns}" if found.is_function and call.returns else ""
    line = f"{found.name}({', '.join(given)}){returns}"
    if len(line) <= 100:
        return line
    return f"{found.name}(\n    " + ",\n    ".join(given) + f",\n){returns}"


def _parameter(parameter: Any) -> str:
    stars = {"variadic positional": "*", "variadic keyword": "**"}.get(str(parameter.kind.value), "")
    hint = f": {parameter.annotation}" if parameter.annotation else ""
    default = f" = {parameter.default}" if parameter.default is not None and not stars else ""
    return f"{stars}{parameter.name}{hint}{default}"


def _groups(run: Any) -> dict[str, dict[str, str]]:
    """Parameters of a command that are settings dataclasses, with the text under each field."""
    return {name: fields_of(hint) for name, hint in get_type_hints(run).items() if is_dataclass(hint)}


def _docstring(found: Any, flags: dict[str, dict[str, str]] | None = None) -> list[str]:
    if found.docstring is None:
        return []
    lines: list[str] = []
    for section in found.docstring.parsed:
        lines += list(_section(section, flags))
    return lines


def _section(section: Any, flags: dict[str, dict[str, str]] | None) -> Iterator[str]:
    kind = section.kind.value
    if kind == "text":
        yield from [section.value.replace("\n    ", "\n"), ""]
    elif kind == "examples":
        for what, text in section.value:
            yield from ["```pycon", text, "```", ""] if what.value == "examples" else [text, ""]
    elif kind in ("parameters", "attributes", "raises", "returns", "yields", "warns"):
        yield from [f"**{kind.capitalize()}**", ""]
        for item in section.value:
            name = getattr(item, "name", "") or ""
            if flags is not None and name in flags:
                yield from (f"- `{_flag(field)}`: {text}" for field, text in flags[name].items())
                continue
            if flags is not None:
                name = _flag(name)
            label = f"`{name}`" if name else f"`{item.annotation}`" if item.annotation else ""
            description = " ".join(item.description.split())
            yield f"- {label}: {description}" if label else f"- {description}"
        yield ""
    else:
        yield from [str(section.value), ""]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

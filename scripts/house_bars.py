"""What `scripts/trace_walks` measures on the source: lengths, calls, folders, and which files need which."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

LONGEST, MEDIAN, SKIPS, POSITIONAL, IN_FOLDER, SIBLINGS, NEEDED = 400, 180, 15, 8, 14, 3, 10
LINES, LINES_WITH_BENCHMARKS = 29_000, 30_600
KINDS = ("commands", "indicators", "report/sections")
"""Folders of alternatives: a reader opens one of their files."""
STAGES = ("rule", "scoring")


@dataclass(frozen=True)
class Bar:
    """One measure.

    Args:
        name: Of what.
        value: As measured.
        wanted: The bar; "" for a number without one.
        kept: Whether it is kept.
    """

    name: str
    value: str
    wanted: str
    kept: bool


def at_most(name: str, value: float, most: int, where: str = "") -> Bar:
    """A number with an upper bound."""
    return Bar(name, f"{value:,}{f' ({where})' if where else ''}", f"at most {most:,}", value <= most)


def table(bars: list[Bar]) -> str:
    """One line per bar."""
    lines = ["| measure | today | bar | |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {b.name} | {b.value} | {b.wanted} | {'' if b.kept else 'missed'} |" for b in bars)])


def length(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def measure(package: Path) -> list[Bar]:
    """All bars of the package in this folder, and of `benchmarks/` beside it."""
    files = sorted(package.rglob("*.py"))
    names = {path: path.relative_to(package).as_posix() for path in files}
    lengths = {names[path]: length(path) for path in files}
    longest = max(lengths, key=lambda name: lengths[name])
    above = sum(n > LONGEST for n in lengths.values())
    total = sum(lengths.values())
    beside = sum(length(path) for path in (package.parent / "benchmarks").rglob("*.py"))
    modules = [n for name, n in lengths.items() if not name.endswith("__init__.py")]
    skips = sum(path.read_text(encoding="utf-8").count("# fmt: skip") for path in files)
    calls = long_calls(package)
    kinds = tuple(f"{package.name}/{room}" for room in KINDS)
    full = {name: n for name, n in folders(package).items() if n > IN_FOLDER and name not in kinds}
    return [
        at_most("longest file, lines", lengths[longest], LONGEST, f"{longest}; {above} above"),
        at_most(f"median of {len(modules)} files without `__init__.py`, lines", int(median(modules)), MEDIAN),
        at_most("lines of the package", total, LINES),
        at_most("lines with `benchmarks/`", total + beside, LINES_WITH_BENCHMARKS),
        at_most("`# fmt: skip`", skips, SKIPS),
        at_most(f"calls with more than {POSITIONAL} positional arguments", len(calls), 0, ", ".join(calls)),
        at_most(f"folders of more than {IN_FOLDER} files (those of kinds left out)", len(full), 0, _shown(full)),
        *(_needs(package, room) for room in STAGES),
        *(_siblings(package, room) for room in KINDS if list(package.rglob(f"{room}/*.py"))),
    ]


def long_calls(package: Path) -> list[str]:
    """Calls of the package's own functions and classes with more than POSITIONAL positional arguments.

    A starred argument counts once. Each as "file:line name number".
    """
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    own = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, kinds)} | {"cls"}
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and len(node.args) > POSITIONAL and _called(node) in own:
                where = f"{path.relative_to(package).as_posix()}:{node.lineno}"
                found.append(f"{where} {_called(node)} {len(node.args)}")
    return found


def _called(call: ast.Call) -> str:
    name: Any = call.func
    return name.id if isinstance(name, ast.Name) else name.attr if isinstance(name, ast.Attribute) else ""


def folders(package: Path) -> dict[str, int]:
    """Files per folder, `__init__.py` left out."""
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    return dict(Counter(path.parent.relative_to(package.parent).as_posix() for path in files))


def neighbours(folder: Path, package: Path) -> dict[str, set[str]]:
    """Per file of the folder (not of those below it) the files of the same folder that it imports, anywhere in it."""
    files = {path.stem: path for path in folder.glob("*.py") if path.name != "__init__.py"}
    prefix = ".".join((package.name, *folder.relative_to(package).parts))
    out = {}
    for stem, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        out[stem] = {one for one in files if f"{prefix}.{one}" in names} - {stem}
    return out


def closure(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that `start` needs, itself left out."""
    found: set[str] = set()
    open_ = [start]
    while open_:
        new = graph[open_.pop()] - found
        found |= new
        open_ += new
    return found - {start}


def _needs(package: Path, room: str) -> Bar:
    """The file of the room, or of a folder in it, that needs most files of its own folder, one through the other."""
    worst = (0, "")
    for folder in sorted({path.parent for path in (package / room).rglob("*.py")}):
        graph = neighbours(folder, package)
        for stem in graph:
            worst = max(worst, (len(closure(graph, stem)), (folder / stem).relative_to(package).as_posix()))
    return at_most(f"`{room}/`: most files of its own folder that one needs", worst[0], NEEDED, worst[1])


def _siblings(package: Path, room: str) -> Bar:
    """The file of a folder of kinds that imports most of its siblings."""
    most: dict[str, int] = {}
    for folder in sorted(package.rglob(room)):
        graph = neighbours(folder, package)
        most |= {(folder / stem).relative_to(package).as_posix(): len(found) for stem, found in graph.items()}
    worst = max(most, key=lambda name: most[name])
    return at_most(f"`{room}/`: most siblings that one imports", most[worst], SIBLINGS, worst)


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())

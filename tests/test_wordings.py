"""One name for one thing, and that of the field: what wordings.txt lists stands nowhere but there."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("im_lightning", "benchmarks", "scripts", "docs", "recipes", "findings")
KINDS = {"", ".py", ".md", ".sh", ".yaml", ".html", ".j2", ".css", ".js", ".ipynb"}
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *(one for folder in FOLDERS for one in sorted((ROOT / folder).rglob("*")))]
    if path.is_file() and path.suffix in KINDS and "__pycache__" not in path.parts
}


def wordings() -> dict[str, tuple[str, list[str]]]:
    """Pattern → what to write instead, and the globs of the places where it may stand."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in (ROOT / "tests" / "wordings.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            found[next(reversed(found))][1].extend(line.split())
        elif line and not line.startswith("#"):
            pattern, _, instead = line.partition(" => ")
            found[pattern] = (instead, [])
    return found


@pytest.mark.parametrize("pattern", wordings())
def test_odd_wordings_stand_where_they_are_listed_and_nowhere_else(pattern: str) -> None:
    instead, places = wordings()[pattern]
    assert instead, "what should a writer say?"
    spaced = pattern.replace(" ", r"[\s#]+")  # over the end of a line, in a comment too
    look = re.compile(rf"(?<!\w)(?:{spaced})(?!\w)", re.IGNORECASE)
    where = {
        name: [text.count("\n", 0, hit.start()) + 1 for hit in hits]
        for name, text in TEXTS.items()
        if (hits := list(look.finditer(text)))
    }
    new = [f"{name}:{at[0]}" for name, at in where.items() if not any(fnmatch(name, place) for place in places)]
    assert not new, f"{pattern!r}: write {instead!r} in {', '.join(new)}"
    gone = [place for place in places if not any(fnmatch(name, place) for name in where)]
    assert not gone, f"{pattern!r} stands no longer in {', '.join(gone)}: take them out of tests/wordings.txt"

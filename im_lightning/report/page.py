"""Makes the page: reads the inputs, asks every section for its parts, renders them, writes HTML and PNG files."""

from __future__ import annotations

import os
import shutil
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from im_lightning import __version__
from im_lightning._utils.files import atomic_path, write_text
from im_lightning._utils.outputs import Replacing, starting_with
from im_lightning._utils.progress import progress
from im_lightning.errors import RequestError, message
from im_lightning.report.inputs import read_inputs
from im_lightning.report.parts import Section
from im_lightning.report.sections import make_sections
from im_lightning.report.svg import PALETTE
from im_lightning.report.text import clean

DARK = {
    "ink": "#e6edf3",
    "muted": "#9aa4af",
    "grid": "#30363d",
    "accent": "#5b9dff",
    "warm": "#f0883e",
    "good": "#3fb980",
    "bad": "#f2708b",
    "violet": "#a78bfa",
}
EXPLAINED = "docs/statistics.md of im_lightning explains every number."


_is_report = starting_with('<meta name="generator" content="im_lightning', '<p class="small">Made by im_lightning ')
_is_figure = starting_with("im_lightning")  # among a PNG file's own notes


def write_report(
    out: str | os.PathLike[str], title: str = "im_lightning report", replacing: Replacing | None = None, **named: Any
) -> Path:
    """Writes the page, and its figures as PNG beside it in `<out without .html>_figures/`.

    Args:
        out: The HTML file.
        title: Heading of the page.
        replacing: What may be replaced; by default whatever lies there.
        named: The inputs, as `read_inputs` takes them.

    Returns:
        The page.

    Raises:
        RequestError: `out` is no HTML file, an input is not there, or another file is.
        DataError: an input is torn.
        InstructMiningError: the page cannot be written.
    """
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise RequestError(message(f"--out {out}", "the report is an HTML page", "end its name in .html"))
    replacing = replacing or Replacing(overwrite=True)
    replacing.check(path, "report", _is_report)
    earlier = path.exists() and path.stat().st_size > 0
    inputs = read_inputs(**named)
    sections = make_sections(inputs)
    folder = path.with_name(f"{path.stem}_figures")
    for figure in (figure for section in sections for figure in section.figures):
        replacing.check(_png(folder, figure.key), "figure of this report", lambda png: earlier or _is_figure(png))
    write_text(path, render(sections, inputs.named, title))
    _write_figures(folder, sections)
    return path


def write_demo_report(folder: Path, budget: int) -> Path:
    """The report of a finished demo, `report.html` in its folder.

    Args:
        folder: The demo's.
        budget: Rows to draw, for the weights.
    """
    names = {"ledger": "ledger", "rule": "rule.json", "scores": "scores.parquet", "compare": "comparison.json"}
    found: dict[str, Any] = {name: str(folder / file) for name, file in names.items() if (folder / file).exists()}
    data = [str(folder / "pool.jsonl")] if (folder / "pool.jsonl").exists() and "scores" in found else []
    return write_report(
        folder / "report.html", "im_lightning demo: a synthetic pool", data=data, budgets=[budget], **found
    )


def render(sections: Sequence[Section], named: Sequence[tuple[str, str]], title: str) -> str:
    """The page as HTML. Everything but our own SVG is escaped by the template, and cleaned before."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = lambda svg: Markup(svg)  # svg.py made it, and escaped its texts
    script = (Path(__file__).parent / "templates" / "tables.js").read_text(encoding="utf-8")
    made = f"Made by im_lightning {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    return environment.get_template("page.html.j2").render(
        title=title,
        made=made,
        version=__version__,
        sections=list(sections),
        summary=[line for s in sections for line in s.short],
        inputs=list(named),
        palette=PALETTE,
        dark=DARK,
        explained=EXPLAINED,
        script=Markup(script),  # ours alone: the page runs no script of another digest
        script_digest=b64encode(sha256(script.encode()).digest()).decode(),
    )


def _png(folder: Path, key: str) -> Path:
    return folder / f"{key}.png"


def _write_figures(folder: Path, sections: Sequence[Section]) -> None:
    """PNG files; those of an earlier report of this name go, for they may be of sections that this one lacks."""
    if folder.is_dir():
        for old in filter(_is_figure, folder.glob("*.png")):
            old.unlink()
    figures = [figure for section in sections for figure in section.figures]
    with progress("figures as PNG", len(figures), "figures") as bar:
        for figure in figures:
            with atomic_path(_png(folder, figure.key)) as temporary:
                temporary.write_bytes(figure.png)
            bar.advance()
    if not figures and folder.is_dir() and not any(folder.iterdir()):
        shutil.rmtree(folder)

"""`im-lightning explain`: why a row of a pool was taken or not, in words."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from im_lightning.data.settings import Reading
from im_lightning.errors import RequestError, message

SUMMARY = "say why a row of a pool was taken or not, and what each indicator has to do with it"
EXAMPLE = "im-lightning explain 17 subset.jsonl"
POSITIONAL = ("row", "decisions")
_READING = Reading()
_SHOWN = 10  # rows of one text


def run(
    row: str | None = None,
    *,
    decisions: str,
    text: str | None = None,
    data: list[str] | None = None,
    reading: Reading = _READING,
) -> int:
    """Reads the decisions that a selection or a weighted fit left behind, and says what became of a row of the pool.

    Args:
        row: Number of the row in the pool (not in the subset), from 0: the first line of a pool.jsonl is row 0. Or its
            id.
        decisions: The subset that im-lightning select wrote, a file of decisions, or a fit's folder under
            im-lightning/.
        text: Instead of a row: words that stand in it. Where several rows have them, they are listed.
        data: For a text, the files of the pool; by default those in the subset's manifest.
        reading: How the pool is read for a text, as it was for score.
    """
    from im_lightning._utils.answer import answer
    from im_lightning._utils.text_tables import terminal_width, wrapped
    from im_lightning.sampling.selection.decisions import FILE, decisions_file, read_decision, why

    width, subset = terminal_width(), decisions.removesuffix(f".{FILE}")
    if (row is None) == (text is None):
        remedy = f"give one of them, as in {EXAMPLE}"
        raise RequestError(message("row, --text", "one of them is needed and not both", remedy))
    if text is not None:
        rows = _rows_with(text, subset, decisions_file(decisions), data, reading)
        if len({one["id"] for one in rows}) > 1:
            lines = [f"row {one['row']}: {one['text']}" for one in rows[:_SHOWN]]
            lines += [f"and {len(rows) - _SHOWN:,} more"] if len(rows) > _SHOWN else []
            head = f"{len(rows):,} rows of the pool have this text; name one by its number:"
            answer({"rows": rows}, "\n".join(wrapped(line, width) for line in [head, *lines]))
            return 0
        row = rows[0]["id"]
    found = read_decision(decisions_file(decisions), str(row))
    shown = "\n".join(wrapped(line, width) if line else "" for line in _sentences(found, subset))
    table = _contributions(found, width)
    answer({**found, "why": why(found)}, f"{shown}\n\n{table}" if table else shown)
    return 0


def _rows_with(
    text: str, subset: str, decisions: Path, data: list[str] | None, reading: Reading
) -> list[dict[str, Any]]:
    """Number, id and beginning of the pool's rows in which a text stands, whatever its case and white space.

    Raises:
        RequestError: there are none, or the files of the pool are not known.
    """
    from im_lightning._utils.files import parse_json
    from im_lightning.data.loading import load_examples
    from im_lightning.sampling.selection.decisions import decided_ids

    manifest = Path(f"{subset}.manifest.json")
    try:
        files = data or parse_json(manifest.read_bytes())["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"{manifest} does not say which files the pool has ({type(error).__name__})"
        raise RequestError(message("--text", cause, "name them with --data")) from error
    known = set(decided_ids(decisions))  # a row that the template refused when the pool was scored has no number
    rows = (one for one in load_examples(files, rejected=[], **asdict(reading)) if one.id in known)
    found, wanted = [], _plain(text)
    for number, example in enumerate(rows):
        if wanted in _plain("\n".join(turn.content for turn in example.messages)):
            found.append({"row": number, "id": example.id, "text": " ".join(example.prompt.split())[:80]})
    if not found:
        cause = f"no row of {', '.join(files)} has this text"
        raise RequestError(message(f"--text {text!r}", cause, "give fewer words, as they stand in the row"))
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _sentences(found: dict[str, Any], subset: str) -> list[str]:
    """What became of the row, and by what chance."""
    from im_lightning.sampling.selection.decisions import why

    of = f", source {found['source']}" if found["source"] else ""
    lines = [f"row {found['row']} of the pool, counted from 0{of}, id {found['id']}"]
    if found["rows"] > 1:
        lines[0] += f" (one of {found['rows']} rows of this content)"
    lines.append(why(found))
    if found["place"] is not None:
        where = Path(subset).name if Path(subset).is_file() else "the subset"
        lines[-1] += f" It is number {found['place']} of the rows in {where}, counted from 1."
    if found["probability"] is not None:
        lines.append(f"A draw by these weights takes it with probability {found['probability']:.3g}.")
    return lines


def _contributions(found: dict[str, Any], width: int) -> str:
    """What each indicator adds to the rule's prediction; "" without a rule."""
    import math

    from im_lightning._utils.text_tables import Column, text_table, wrapped
    from im_lightning.data.score_table import PREDICTED
    from im_lightning.sampling.selection.decisions import CONTRIBUTION

    if PREDICTED not in found:
        return ""
    parts = {name[len(CONTRIBUTION) :]: value for name, value in found.items() if name.startswith(CONTRIBUTION)}
    if math.isnan(found[PREDICTED]):
        return wrapped("The rule has no prediction of it: an indicator is missing.", width)
    by_size = sorted(parts.items(), key=lambda part: -abs(part[1]))
    rows = [[name, f"{value:+.4f}", "better" if value < 0 else "worse" if value > 0 else ""] for name, value in by_size]
    columns = [Column("indicator", right=False), Column("adds, nats"), Column("than the pool's mean", right=False)]
    head = (
        f"The rule predicts a log loss of {found[PREDICTED]:.4f}, {sum(parts.values()):+.4f} from the pool's mean row:"
    )
    return f"{wrapped(head, width)}\n{text_table(columns, rows, width)}"

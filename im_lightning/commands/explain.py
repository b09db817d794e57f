"""`im-lightning explain`: why a row of a pool was taken or not, in words."""

from __future__ import annotations

from typing import Any

SUMMARY = "say why a row of a pool was taken or not, and what each indicator has to do with it"
EXAMPLE = "im-lightning explain 17 subset.jsonl"
POSITIONAL = ("row", "decisions")


def run(row: str, decisions: str) -> int:
    """Reads the decisions that a selection or a weighted fit left behind, and says what became of a row.

    Args:
        row: Number of the row in the pool, from 0, or its id.
        decisions: The subset that im-lightning select wrote, a file of decisions, or a fit's folder under
            im-lightning/.
    """
    from im_lightning._utils.answer import answer
    from im_lightning._utils.text_tables import terminal_width, wrapped
    from im_lightning.sampling.selection.decisions import decisions_file, read_decision, why

    found = read_decision(decisions_file(decisions), row)
    width = terminal_width()
    text = "\n".join(wrapped(line, width) if line else "" for line in _sentences(found))
    table = _contributions(found, width)
    answer({**found, "why": why(found)}, f"{text}\n\n{table}" if table else text)
    return 0


def _sentences(found: dict[str, Any]) -> list[str]:
    """What became of the row, and by what chance."""
    from im_lightning.sampling.selection.decisions import why

    of = f" of {found['source']}" if found["source"] else ""
    lines = [f"row {found['row']}{of}, id {found['id']}"]
    if found["rows"] > 1:
        lines[0] += f" (one of {found['rows']} rows of this content)"
    lines.append(why(found))
    if found["probability"] is not None:
        lines.append(f"A draw by these weights takes it with probability {found['probability']:.3g}.")
    return lines


def _contributions(found: dict[str, Any], width: int) -> str:
    """What each indicator adds to the rule's prediction; "" without a rule."""
    import math

    from im_lightning._utils.text_tables import Column, text_table
    from im_lightning.data.score_table import PREDICTED
    from im_lightning.sampling.selection.decisions import CONTRIBUTION

    if PREDICTED not in found:
        return ""
    parts = {name[len(CONTRIBUTION) :]: value for name, value in found.items() if name.startswith(CONTRIBUTION)}
    if math.isnan(found[PREDICTED]):
        return "The rule has no prediction of it: an indicator is missing."
    by_size = sorted(parts.items(), key=lambda part: -abs(part[1]))
    rows = [[name, f"{value:+.4f}", "better" if value < 0 else "worse" if value > 0 else ""] for name, value in by_size]
    columns = [Column("indicator", right=False), Column("adds, nats"), Column("than the pool's mean", right=False)]
    head = (
        f"The rule predicts a log loss of {found[PREDICTED]:.4f}, {sum(parts.values()):+.4f} from the pool's mean row:"
    )
    return f"{head}\n{text_table(columns, rows, width)}"

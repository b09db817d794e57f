"""What a score table cost: seconds per pass, noted in a file beside it, over all calls that wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from im_lightning._utils.files import parse_json, write_json
from im_lightning.scoring.coverage import Step


def cost_path(table: str | Path) -> Path:
    """`scores.parquet` → `scores.parquet.cost.json`."""
    return Path(f"{table}.cost.json")


def note_cost(table: str | Path, steps: Iterable[Step]) -> None:
    """Adds the passes of one scoring to the file beside the table; one that found everything in the store adds none."""
    known = _read(table)
    for step in steps:
        seconds = known.get(step.label, 0.0) + step.seconds
        known[step.label] = round(seconds, 3)
    write_json(cost_path(table), {"seconds": known})


def read_cost(table: str | Path) -> float | None:
    """Seconds that scoring took in all; None where nothing was noted."""
    known = _read(table)
    return sum(known.values()) if known else None


def _read(table: str | Path) -> dict[str, float]:
    try:
        value = parse_json(cost_path(table).read_bytes())["seconds"]
        return {str(label): float(seconds) for label, seconds in value.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none was noted, or the file is not ours

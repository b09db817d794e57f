"""`im-lightning runs`: the finetune runs of a ledger, and how many more a refit needs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from im_lightning._utils.text_tables import Column, terminal_width, text_table, wrapped
from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    from im_lightning.ledger.ledger import RunLedger
    from im_lightning.ledger.record import RunRecord

SUMMARY = "list the finetune runs of a ledger"
EXAMPLE = "im-lightning runs runs/"
POSITIONAL = ("ledger",)


def run(ledger: str) -> int:
    """Lists the finetune runs of a ledger, by time, and says how many more a refit needs.

    Args:
        ledger: Folder of the ledger.
    """
    book = open_ledger(ledger)
    records = book.records(status=None)
    sets = list(dict.fromkeys(name for r in records for name in r.evaluation))
    columns = [
        Column("run", right=False),
        Column("when (UTC)", right=False, rank=9),
        Column("purpose", right=False),
        Column("status", right=False, rank=1),
        Column("rows", rank=2),
        *(Column("loss" if len(sets) == 1 else f"loss on {name}") for name in sets),
        Column("tokens", rank=3),
    ]
    width = terminal_width()
    print(text_table(columns, [_cells(r, sets) for r in records], width))
    print()
    for line in _totals(ledger, records):
        print(wrapped(line, width))
    return 0


def open_ledger(path: str) -> RunLedger:
    """The ledger of a command.

    Raises:
        RequestError: the folder is not there, or has no run.
    """
    from im_lightning.ledger.ledger import RunLedger
    from im_lightning.ledger.regime import fit_command

    book = RunLedger(path)
    if not book.path.exists():
        raise RequestError(
            message(path, "there is no such ledger", f"check the path, or make runs: `{fit_command([])}`")
        )
    if not book.records(status=None):
        unusable = f"; unusable: {', '.join(name for name, _ in book.rejected)}" if book.rejected else ""
        cause = f"there are no runs in this folder{unusable}"
        raise RequestError(message(path, cause, f"make runs into it: `{fit_command([])}`"))
    return book


def _cells(record: RunRecord, sets: list[str]) -> list[str]:
    size = record.subset.get("size")
    losses = [record.loss(name) for name in sets]
    return [
        record.run_id,
        f"{record.when:%Y-%m-%d %H:%M}",
        record.purpose,
        record.status,
        f"{size:,}" if isinstance(size, int) else "",
        *("" if math.isnan(loss) else f"{loss:.4f}" for loss in losses),
        f"{record.tokens:,}",
    ]


def _totals(ledger: str, records: list[RunRecord]) -> list[str]:
    from im_lightning.indicators.transforms import default_regressors
    from im_lightning.ledger.regime import count_runs, group_regimes, list_regimes, more_runs, runs_missing

    lines = [f"{len(records)} run{'s' if len(records) != 1 else ''}: {count_runs(records)}"]
    designed = [r for r in records if r.purpose == "designed" and r.status == "complete"]
    names = default_regressors(n for r in designed for n in r.phi_means)
    sets = list(dict.fromkeys(name for r in designed for name in r.evaluation))
    missing = [runs_missing(records, evaluation=name) for name in sets] or [runs_missing(records)]
    regimes = group_regimes(designed, names, sets[0] if sets else None)
    if len(regimes) > 1:
        lines.append(f"the designed runs are of {len(regimes)} regimes; a refit takes one (--regime RUN):")
        lines.append(list_regimes(regimes))
    if max(missing) == 0:
        which = f" --evaluation {sets[0]}" if len(sets) > 1 else ""
        which += f" --regime {regimes[0].records[0].run_id}" if len(regimes) > 1 else ""
        out = f"{ledger.rstrip('/')}/rule.json"
        lines.append(f"enough for a refit on {', '.join(names)}: im-lightning refit {ledger} --out {out}{which}")
    else:
        of = f" on {', '.join(names)}" if names else ""
        lines.append(f"a refit{of} needs {max(missing)} more: {more_runs(records, max(missing))}")
    return lines

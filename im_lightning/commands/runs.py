"""`im-lightning runs`: the finetune runs of a ledger, and how many more a refit needs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from im_lightning._utils.text_tables import Column, terminal_width, text_table, wrapped
from im_lightning.errors import RequestError, message
from im_lightning.ledger.record import TRAINED

if TYPE_CHECKING:
    from pathlib import Path

    from im_lightning.ledger.ledger import RunLedger
    from im_lightning.ledger.record import RunRecord

SUMMARY = "list the finetune runs of a ledger"
EXAMPLE = "im-lightning runs runs/"
POSITIONAL = ("ledger",)
LEAST_RUNS = 6
SIGNAL = math.sqrt(2.0)  # times the scatter of repeats: below, noise is more than half of the variance of the runs
FAINT = 0.005  # sd of log loss, where no repeat tells the noise
BLIND = "these runs cannot tell subsets apart: raise the learning rate or the steps"
_MAKE = "`im-lightning run pool.jsonl --eval-data eval.jsonl`, or `im-lightning design` and `im-lightning sweep`"


def run(ledger: str) -> int:
    """Lists the finetune runs of a ledger, by time, and says how many more a refit needs.

    From six designed runs on it says whether different subsets differ more than repeats of one do.

    Args:
        ledger: Folder of the ledger.
    """
    from im_lightning._utils.answer import answer

    answer(*listing(ledger))
    return 0


def listing(ledger: str) -> tuple[dict[str, Any], str]:
    """The runs as records, and as a table with what follows from them."""
    records = open_ledger(ledger).records(status=None)
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
    lines = _totals(ledger, records)
    text = [text_table(columns, [_cells(r, sets) for r in records], width), "", *(wrapped(one, width) for one in lines)]
    return {"ledger": ledger, "runs": [r.to_json() for r in records], "notes": lines}, "\n".join(text)


def open_ledger(path: str) -> RunLedger:
    """The ledger of a command.

    Raises:
        RequestError: the folder is not there, or has no run.
    """
    from im_lightning.ledger.ledger import RunLedger

    book = RunLedger(path)
    if not book.path.exists():
        remedy = (
            f"check the path: `im-lightning run` keeps its runs in im-run/runs, a sweep in runs; or make some: {_MAKE}"
        )
        raise RequestError(message(path, "there is no such ledger", remedy))
    if not book.records(status=None):
        unusable = f"; unusable: {', '.join(name for name, _ in book.rejected)}" if book.rejected else ""
        cause = f"there are no runs in this folder{unusable}"
        raise RequestError(message(path, cause, f"make some: {_MAKE}; or name another folder"))
    return book


def _cells(record: RunRecord, sets: list[str]) -> list[str]:
    from im_lightning.ledger.curve import stopped_text

    size = record.subset.get("size")
    losses = [record.loss(name) for name in sets]
    return [
        record.run_id,
        f"{record.when:%Y-%m-%d %H:%M}",
        record.purpose if record.kind == TRAINED else f"{record.purpose}, {record.kind}",
        ", ".join(filter(None, (record.status, stopped_text(record)))),
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
    lines += [text for name in sets if (text := scatter_text(regimes[0].records, name, len(sets) > 1))]
    if max(missing) == 0:
        which = f" --evaluation {sets[0]}" if len(sets) > 1 else ""
        which += f" --regime {regimes[0].records[0].run_id}" if len(regimes) > 1 else ""
        out = f"{ledger.rstrip('/')}/rule.json"
        lines.append(f"enough for a refit on {', '.join(names)}: im-lightning refit {ledger} --out {out}{which}")
    elif open_trials := open_sweeps(ledger):
        lines.append(f"a refit needs {max(missing)} more; {open_trials}")
    else:
        of = f" on {', '.join(names)}" if names else ""
        lines.append(f"a refit{of} needs {max(missing)} more: {more_runs(records, max(missing))}")
    return lines


def scatter_text(records: list[RunRecord], evaluation: str, named: bool = False) -> str:
    """Between-subset against repeat scatter of the runs of a regime, from six on; nothing for fewer."""
    import numpy as np
    from scipy.stats import f

    by_subset: dict[str, list[float]] = {}
    for record in records:
        if record.has_loss(evaluation):
            by_subset.setdefault(record.subset_key, []).append(math.log(record.loss(evaluation)))
    if sum(map(len, by_subset.values())) < LEAST_RUNS or len(by_subset) < 3:
        return ""
    repeated = [losses for losses in by_subset.values() if len(losses) > 1]
    between = float(np.std([np.mean(losses) for losses in by_subset.values()], ddof=1))
    text = f"log loss{f' on {evaluation}' if named else ''}: different subsets differ by sd {between:.3g}"
    if not repeated:
        hint = f"; {BLIND}" if between < FAINT else ""
        return f"{text}; no subset was repeated, so the scatter of repeats is not known{hint}"
    freedom = sum(len(losses) - 1 for losses in repeated)
    within = math.sqrt(sum(np.var(losses) * len(losses) for losses in repeated) / freedom)
    text += f", repeats of one by sd {within:.3g} ({freedom} degree{'s' if freedom > 1 else ''} of freedom)"
    if between < SIGNAL * within:
        return f"{text}: {BLIND}"
    chance = float(f.sf((between / within) ** 2, len(by_subset) - 1, freedom)) if within else 0.0
    return text + ("" if chance < 0.05 else "; not enough repeats to show that subsets differ more: repeat some more")


def open_sweeps(ledger: str) -> str:
    """What of the sweeps under sweeps/ that made this ledger's runs is still to be run; nothing where all is done."""
    from pathlib import Path

    from im_lightning._utils.files import parse_json
    from im_lightning.errors import InstructMiningError
    from im_lightning.experiments.sweep.file import read_sweep

    for path in sorted(Path("sweeps").glob("*/sweep.json")):
        try:
            state = parse_json(path.read_bytes())
            trials, file = state["trials"], read_sweep(state["file"])
            done = [t for t in trials if t["status"] == "done" and t["value"] is not None]
            if file.metric is not None and any(file.metric.reached(t["value"]) for t in done):
                continue
        except (InstructMiningError, OSError, ValueError, KeyError, TypeError):  # of another program, or moved
            continue
        here = any(t["ledger"] and Path(t["ledger"]).resolve() == Path(ledger).resolve() for t in trials)
        left = (file.trials or 0) - sum(t["status"] in ("done", "stopped") for t in trials)
        if here and left > 0:
            which = "1 trial" if left == 1 else f"{left} trials"
            return f"{which} of {state['file']} still to run: {_going_on(path.parent, state, file.digest)}"
    return ""


def _going_on(folder: Path, state: dict[str, Any], digest: str) -> str:
    """The command that goes on with the sweep of a folder, as far as its state says: in another one, or with another
    seed, the same file would begin anew."""
    import shlex
    from pathlib import Path

    words = ["im-lightning", "sweep", str(state["file"])]
    words += [] if folder == Path("sweeps") / Path(state["file"]).stem else ["--out", str(folder)]
    words += ["--seed", str(state["seed"])] if state.get("seed") else []
    more = ", with the --arguments, --stop-at and --eval-at that it was begun with"
    return shlex.join(words) + ("" if state.get("digest") == digest else more)

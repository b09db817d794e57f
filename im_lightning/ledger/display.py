"""Runs of a ledger as a pandas table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from im_lightning._utils.display import panels
from im_lightning.ledger.record import RunRecord


def run_frame(records: Sequence[RunRecord]) -> Any:
    """One row per run; see `RunLedger.to_pandas`."""
    import pandas as pd

    rows = [
        {
            "run_id": r.run_id,
            "when": r.when,
            "purpose": r.purpose,
            "kind": r.kind,
            "status": r.status,
            "rows": r.subset.get("size"),
            "tokens": r.tokens,
            "steps": r.steps,
            "seconds": r.seconds,
            **{f"loss_{name}": one.get("loss") for name, one in r.evaluation.items()},
            **{f"mean_{name}": mean for name, mean in r.indicator_means.items()},
        }
        for r in records
    ]
    return pd.DataFrame(rows)


def plot_runs(records: Sequence[RunRecord], axes: Any = None) -> list[Any]:
    """Draws loss against the runs in their order; see `RunLedger.plot`."""
    names = list(dict.fromkeys(name for r in records for name in r.evaluation))
    drawn = panels(len(names), axes)
    for ax, name in zip(drawn, names, strict=True):
        for purpose in dict.fromkeys(r.purpose for r in records if name in r.evaluation):
            places = [k for k, r in enumerate(records) if r.purpose == purpose and name in r.evaluation]
            ax.plot([k + 1 for k in places], [records[k].loss(name) for k in places], "o", label=purpose)
        ax.set(xlabel="run", ylabel=f"loss on {name}, nats per token")
        ax.legend()
    return drawn

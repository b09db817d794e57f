"""The demo at sizes that say nothing and take seconds."""

from __future__ import annotations

from pathlib import Path

from im_lightning.experiments.demo.playground.base import BaseSettings
from im_lightning.experiments.demo.playground.judges import JudgeSettings
from im_lightning.experiments.demo.settings import DemoSettings
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.fit import fit_rule

MINI = DemoSettings(
    name="miniature",
    base=BaseSettings(hidden=32, layers=1, heads=2, steps=40, batch=16, block=32, documents=1000, warmup=5),
    judges=JudgeSettings(pairs=200, reward_steps=5, hidden=32, layers=1, rows=200, unieval_steps=6, unieval_batch=16),
    designed_rows=240, fold_rows=200, fit_rows=32, report_rows=32, runs=13, repeats=1, subset_rows=40, seeds=2,
    conclusive=False,
)  # fmt: skip


def ols_rule(folder: Path) -> str:
    """A least-squares rule on the demo's designed runs, beside its folder. At these sizes it does not beat the mean,
    and is refused without force."""
    path = folder.parent / "ols.json"
    if not path.exists():
        fit_rule(RunLedger(folder / "ledger").records("designed"), "ols", evaluation="fit").save(path)
    return str(path)

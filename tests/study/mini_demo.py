"""The demo at sizes that say nothing and take seconds."""

from __future__ import annotations

from im_lightning.study.demo_settings import DemoSettings
from im_lightning.study.playground.base import BaseSettings

MINI = DemoSettings(
    name="miniature",
    base=BaseSettings(hidden=32, layers=1, heads=2, steps=40, batch=16, block=32, documents=1000, warmup=5),
    designed_rows=240, fold_rows=200, fit_rows=32, report_rows=32, runs=9, repeats=1, subset_rows=40, seeds=2,
    conclusive=False,
)  # fmt: skip

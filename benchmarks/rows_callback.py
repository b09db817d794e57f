"""What `InstructMiningCallback` costs: training steps with it and without it, block by block, in one and the same fit.

A block is a window of the callback's, so that each block with it pays for one flush and one line in a logger. Windows
are shorter here than by default (50 steps), which makes it look dearer than it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.checkpoints import Size, make_checkpoint
from benchmarks.registry import Ratio, Setting, benchmark
from benchmarks.timing import now
from im_lightning._lightning import Callback, Trainer, submodule
from im_lightning._utils.progress import silence

TINY = Size("3 M", 160, 432, 6, 5, 4096)
HUNDRED = Size("100 M", 640, 1728, 12, 10, 32000)
_INDICATORS = ("length_input", "length_output", "ppl", "mtld", "knn_6", "reward", "naturalness", "coherence",
               "understandability")  # fmt: skip

_CHARACTERS = 1500  # of a response, more than the tokens allowed


@benchmark("callback")
def callback(setting: Setting) -> Iterator[Ratio]:
    """A 3 M model, and beside --quick a 100 M one, both with LoRA, whose steps are shorter than full ones."""
    yield from _size(setting, TINY, every=10, pairs=3 if setting.quick else 4 * setting.repeats, batch=8, bar=0.05)
    if not setting.quick:
        yield from _size(setting, HUNDRED, every=5, pairs=setting.repeats, batch=2, bar=0.01)


class Alternating(Callback):
    """Passes the steps of every second block on to the callback measured, and times the blocks.

    Args:
        inner: The callback.
        every: Steps per block.

    Attributes:
        seconds: Of the blocks "with" and "without", in order.
        inside: Of each block with it, seconds spent in its hooks.
    """

    def __init__(self, inner: Any, every: int) -> None:
        self.inner, self.every = inner, every
        self.seconds: dict[str, list[float]] = {"with": [], "without": []}
        self.inside: list[float] = []
        self._begun: float | None = None
        self._hooks, self._on = 0.0, False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.inner.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.inner.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            before = now()
            self.inner.on_train_batch_start(trainer, pl_module, batch, batch_idx)
            after = now()
            if self._begun is not None:
                end = after if self._on else before  # the flush belongs to the block whose losses it reads
                self.seconds["with" if self._on else "without"].append(end - self._begun)
                if self._on:
                    self.inside.append(self._hooks + after - before)
            self._on, self._begun, self._hooks = not self._on, now(), 0.0
        elif self._on:
            before = now()
            self.inner.on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self._hooks += now() - before

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._on:
            before = now()
            self.inner.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._hooks += now() - before


def _size(setting: Setting, size: Size, every: int, pairs: int, batch: int, bar: float) -> Iterator[Ratio]:
    checkpoint = make_checkpoint(setting.folder, size, setting.examples)
    blocks = 2 * (pairs + 1)  # the first two warm up
    watch = _fit(setting, checkpoint, every, blocks, batch)
    on, off = (watch.seconds[name][1:] for name in ("with", "without"))
    extra = [a / b - 1 for a, b in zip(on, off, strict=True)]
    spent = [a / (b - a) for a, b in zip(watch.inside[1:], on, strict=True)]
    step = f"{1e3 * median(off) / every:,.1f} ms per step without it"
    what = f"{size.name} LoRA, {batch} rows per step, {len(_INDICATORS)} indicators, a window every {every} steps"
    details = {"seconds": {"with": on, "without": off}, "in_hooks": watch.inside[1:], "parameters": size.parameters}
    yield Ratio(
        f"the callback's hooks, share of a training step: {what}",
        fmean(spent),
        bar,
        f"{1e6 * fmean(watch.inside[1:]) / every:,.0f} µs per step",
        step,
        at_least=False,
        digits=4,
        note="time spent in the callback, flush and logging included",
        details=details,
    )
    low, high = np.quantile(extra, (0.25, 0.75))
    yield Ratio(
        f"a training step with the callback, more than without it: {what}",
        median(extra),
        bar,
        f"{1e3 * median(on) / every:,.1f} ms per step",
        step,
        at_least=False,
        digits=4,
        note=f"median of {len(extra)} pairs of neighbouring blocks, quartiles {low:+.1%} and {high:+.1%}",
        details=details,
    )


def _fit(setting: Setting, checkpoint: str, every: int, blocks: int, batch: int) -> Alternating:
    """One fit of so many blocks, plus the step that closes the last."""
    from im_lightning.training.callback import InstructMiningCallback
    from im_lightning.training.datamodule import InstructMiningDataModule
    from im_lightning.training.module import InstructTuningModule

    folder = setting.folder / f"callback-{Path(checkpoint).name}"
    folder.mkdir()
    steps = blocks * every + 1
    pool, rule = _inputs(setting, folder, rows=steps * batch + 1)
    data = InstructMiningDataModule(
        pool, model=checkpoint, scores=str(folder / "scores.parquet"), rule=rule, budget=steps * batch,
        batch_size=batch, max_length=64, resample_each_epoch=True,
    )  # fmt: skip
    inner = InstructMiningCallback(str(folder / "runs"), refit=False, evaluate_base=False, log_every_n_steps=every)
    watch = Alternating(inner, every)
    with silence():
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1, callbacks=[watch], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            logger=submodule("loggers").CSVLogger(folder),
        )  # fmt: skip
        trainer.fit(InstructTuningModule(checkpoint, dtype="fp32"), datamodule=data)
    return watch


def _inputs(setting: Setting, folder: Path, rows: int) -> tuple[str, str]:
    """Files of a pool with synthetic scores, and a rule on them. Responses are repeated until they are cut: rows of
    equal length, or the steps of two blocks would not be alike."""
    from im_lightning.data.loading import load_examples
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.indicators.transforms import default_transforms
    from im_lightning.rule.linear_rule import LinearRule

    pool, rng = folder / "pool.jsonl", np.random.default_rng(0)
    with pool.open("w", encoding="utf-8") as stream:
        for example in setting.examples[:rows]:
            response = f"{example.response} " * -(-_CHARACTERS // (len(example.response) + 1))
            stream.write(json.dumps({"instruction": example.instruction, "output": response}) + "\n")
    examples = load_examples(str(pool))
    values = {name: np.exp(rng.normal(1.0, 0.5, len(examples))) for name in _INDICATORS}
    keys = {name: {"identity": {"indicator": name, "version": 1}, "numerics": {}} for name in values}
    ids, sources = [e.id for e in examples], [e.source for e in examples]
    table = ScoreTable(range(len(examples)), ids, sources, values, {}, keys)
    table.write(folder / "scores.parquet")
    names = list(_INDICATORS)
    LinearRule(
        "made up", 1.0, rng.normal(0.0, 0.1, len(names)), names, default_transforms(table, names),
        identities={name: keys[name]["identity"] for name in names},
    ).save(folder / "rule.json")  # fmt: skip
    return str(pool), str(folder / "rule.json")

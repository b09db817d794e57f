"""MTLD of 10,000 responses against the package lexicalrichness, in its mode."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import numpy as np

from benchmarks.registry import Ratio, Setting, benchmark
from benchmarks.timing import interleaved, ratio

_ROWS = 10_000


@benchmark("mtld")
def mtld(setting: Setting) -> Iterator[Ratio]:
    try:
        from lexicalrichness import LexicalRichness
    except ImportError:
        return  # comes with the development extra
    from im_lightning.indicators.mtld import mtld_of_texts

    texts = [example.response for example in setting.examples[:_ROWS]]
    found: dict[str, np.ndarray] = {}

    def theirs() -> None:
        values = np.full(len(texts), np.nan)
        for position, text in enumerate(texts):
            rich = LexicalRichness(text)
            if rich.words:
                values[position] = rich.mtld(threshold=0.72)
        found["theirs"] = values

    def ours() -> None:
        found["ours"] = mtld_of_texts(texts, "lexicalrichness")

    def strict() -> None:
        mtld_of_texts(texts, "strict")

    times = interleaved({"lexicalrichness": theirs, "ours": ours, "strict": strict}, max(setting.repeats, 7))
    equal = bool(np.array_equal(found["ours"], found["theirs"], equal_nan=True))
    rate = {name: len(texts) / median(seconds) for name, seconds in times.items()}
    yield Ratio(
        f"MTLD of {len(texts):,} responses against lexicalrichness, in its mode",
        ratio(times, "lexicalrichness", "ours"),
        5.0,
        f"{rate['ours']:,.0f} rows/s",
        f"{rate['lexicalrichness']:,.0f} rows/s",
        note=f"values {'equal' if equal else 'NOT equal'}; default mode {rate['strict']:,.0f} rows/s; Python strings "
        "(lower-casing, other alphabets) and Arrow's hash of the words are what is left",
        details={"seconds": times, "equal": equal},
    )

"""The tables of `scripts/benchmark_evidence`, and the sentence that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.evidence.budget import SHARES
from benchmarks.evidence.measure import BY_SOURCE, RANDOM
from benchmarks.evidence.quality import gain_interval, paired_interval
from benchmarks.evidence.ways import REFERENCE
from im_lightning._utils.text_tables import Column, text_table, wrapped

WANTED, WANTED_LOW, WANTED_SHARE = -0.03, -0.12, 0.2
"""The quality of sixty full runs is reached where the difference of Spearman is at least the first, the lower limit of
its interval at least the second, and what was spent at most the third of their compute."""

Found = Sequence[dict[str, Any]]


def difference(found: Found, way: str, share: float) -> tuple[float, float, float] | None:
    """Spearman of a way less that of all full runs, and its interval; None where a seed has no prediction."""
    cells = [one["cells"][way][f"{share:g}"] for one in found]
    if any("predicted" not in one for one in cells):
        return None
    actual = [np.array(one["actual"]) for one in found]
    predicted = [np.array(one["predicted"]) for one in cells]
    reference = [np.array(one["cells"][REFERENCE]["1"]["predicted"]) for one in found]
    return paired_interval(actual, predicted, reference)


def table(found: Found, width: int) -> str:
    """Everything for standard output."""
    parts = [_head(found, width), text_table(_COLUMNS, _rows(found), width), wrapped(verdict(found), width)]
    refused = {one["why"] for seed in found for way in seed["cells"].values() for one in way.values() if one["why"]}
    parts.append("\n".join(wrapped(f"No rule (—): {why}.", width) for why in sorted(refused)))
    parts.append(_gains(found, width))
    return "\n\n".join(part for part in parts if part)


_COLUMNS = [
    Column("way", right=False),
    Column("budget"),
    Column("what", right=False, rank=2),
    Column("FLOPs"),
    Column("seconds", rank=1),
    Column("Spearman"),
    Column("less that of all runs", right=False),
    Column("R²"),
]


def _head(found: Found, width: int) -> str:
    sizes, whole = found[0]["sizes"], found[0]["whole"]
    marks = "" if sizes["conclusive"] else "TOO SMALL TO CONCLUDE. "
    seeds = ", ".join(str(one["seed"]) for one in found)
    further = sizes.get("further", "further full runs of another design")
    clock = sizes.get("clock", "processor seconds")
    text = (
        f"{marks}Held-out quality on {sizes['test_runs']} {further}; seeds {seeds}. "
        f"{sizes['runs']} full runs take {whole['flops']:.2e} FLOPs and {whole['seconds']:,.0f} {clock}: the "
        "shares below are of that. In brackets 95 % intervals, paired over the further runs (and over generator "
        "seeds, where there are several); one draw of evidence per generator seed."
    )
    return wrapped(text, width)


def _rows(found: Found) -> list[list[str]]:
    rows = []
    for way in found[0]["cells"]:
        for share in SHARES:
            cells = [one["cells"][way][f"{share:g}"] for one in found]
            gap = difference(found, way, share)
            if gap is None:
                rows.append([way, f"{share:g}", _what(cells[0]), *[""] * 2, "—", "", ""])
                continue
            told = "" if way == REFERENCE and share == 1 else "{:+.2f} ({:+.2f} to {:+.2f})".format(*gap)
            r2 = [one["r2"] for one in cells]
            rows.append([
                way, f"{share:g}", _what(cells[0]), *(f"{_mean(cells, name):.3f}" for name in ("flops", "seconds")),
                f"{_mean(cells, 'spearman'):.2f}", told, "" if None in r2 else f"{np.mean(r2):.2f}",
            ])  # fmt: skip
    return rows


def _what(one: dict[str, Any]) -> str:
    """In words; of merged runs how they agree with their twins, too."""
    agreement = one["agreement"]
    return one["what"] if agreement is None else f"{one['what']} (Spearman with twins {agreement:.2f})"


def _mean(cells: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([one[name] for one in cells]))


def reached(found: Found) -> list[tuple[str, float]]:
    """(way, share of compute spent) that have the quality of all full runs at a fifth of their compute or less."""
    out = []
    for way in found[0]["cells"]:
        for share in SHARES:
            gap = difference(found, way, share)
            if gap is None or share > WANTED_SHARE:
                continue
            spent = _mean([one["cells"][way][f"{share:g}"] for one in found], "flops")
            if spent <= WANTED_SHARE * 1.02 and gap[0] >= WANTED and gap[1] >= WANTED_LOW:
                out.append((way, spent))
    return out


def verdict(found: Found) -> str:
    """Which ways reach what is wanted."""
    wanted = f"difference of Spearman {WANTED} or more, lower limit {WANTED_LOW} or more"
    ways = [f"{way} ({spent:.3f})" for way, spent in reached(found)]
    told = f"it is reached by {', '.join(ways)}" if ways else "no way reaches it"
    return f"The quality of all full runs ({wanted}) at a fifth of their compute: {told}."


def _gains(found: Found, width: int) -> str:
    """Gains of the weights, where every seed has them."""
    arms = [arm for arm in found[0]["finetunes"] if all(arm in one["finetunes"] for one in found)]
    if RANDOM not in arms:
        return ""
    rows = []
    for arm in arms:
        told = [f"{_mean([{'loss': np.mean(one['finetunes'][arm])} for one in found], 'loss'):.3f}"]
        for other in (RANDOM, BY_SOURCE):
            gains = [np.subtract(one["finetunes"][other], one["finetunes"][arm]) for one in found]
            told.append("" if arm in (RANDOM, other) else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain_interval(gains)))
        rows.append([arm, *told])
    columns = [Column("rows drawn by", right=False), Column("loss"), Column("gain on random", right=False)]
    text = text_table([*columns, Column("gain on by-source", right=False)], rows, width)
    count = len(found[0]["finetunes"][RANDOM])
    note = (
        f"Loss on rows that no rule has seen, nats per token, {count} comparison seeds each; gains are falls of loss."
    )
    return f"{wrapped(note, width)}\n{text}"

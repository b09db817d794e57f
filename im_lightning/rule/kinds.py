"""How a fit mixes kinds of runs: which merged runs count beside trained ones, as how much, and what is corrected.

The rule, in full. Trained runs count 1 each. Merged runs count only where their twins (trained runs whose rows were
drawn in the shares of a mixture) show that they agree: four twins or more, and a correlation of their log losses
(Pearson's) above 0 with a one-sided p of 0.1 or less. That is lenient: merged runs that only add noise cost a fit
little, for 3 bounds what they count, and a stricter test on a dozen twins would leave out good ones. Then

1. where a mixture has a twin, the twin stands for it, and the merged run is left out;
2. the log losses of the others are lowered by the mean difference between merged runs and their twins;
3. each counts w = B / Σ α², at most 1: B blocks, the sum over all shares of all merged runs that count. They share the
   noise of B finetunes (a mixture has Σ α² of the variance of one), so that together they tell what their blocks would
   tell as B runs; more mixtures of the same blocks tell no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from im_lightning._utils.files import plain
from im_lightning._utils.numbers import number_or_dash
from im_lightning.errors import RequestError, message
from im_lightning.ledger.record import MERGED, TRAINED
from im_lightning.ledger.regime import more_runs
from im_lightning.ledger.run_table import FitData
from im_lightning.rule.validation.univariate import FEWEST, correlation

_AGREEMENT = (
    "agreement of merged runs with their {twins} trained twins: Pearson {pearson} ({pearson_low} to {pearson_high}), "
    "Spearman {spearman} ({spearman_low} to {spearman_high}); in brackets 95 % intervals; merged less trained, log "
    "loss {shift} ± {sd} (sd)"
)
LEVEL = 0.1
_NUMBERS = ("pearson", "pearson_low", "pearson_high", "spearman", "spearman_low", "spearman_high")


def mix_kinds(data: FitData, kind: str = "all", known: Mapping[str, Any] | None = None) -> FitData:
    """The runs as a fit takes them; the rule is that of this module.

    Args:
        data: All designed runs of a regime.
        kind: "all", or "trained" to leave merged runs out.
        known: What an earlier fit found on more of these runs, which counts here too.

    Raises:
        RequestError: an unknown kind; merged runs only, and none that count.
    """
    if kind not in ("all", TRAINED):
        raise RequestError(message(f"kind {kind!r}", "a fit has no such choice", f"use all or {TRAINED}"))
    merged = np.array([r.kind == MERGED for r in data.records])
    if not merged.any():
        return data
    found = dict(known or _agreement(data, merged))
    if kind == TRAINED:
        found |= {"used": False, "reason": "as asked for"}
    twinned = {r.mixture_key for r in data.records if r.kind == TRAINED}
    alone = merged & np.array([r.mixture_key not in twinned for r in data.records])
    kept = np.flatnonzero(~merged | (alone & found["used"]))
    found |= {"runs": int(merged.sum()), "counted": int((alone & found["used"]).sum())}
    if not len(kept):
        remedy = more_runs(data.records, FEWEST)
        raise RequestError(message("refit", f"there are merged runs alone, left out {found['reason']}", remedy))
    if known is None:
        blocks = {one["run_id"] for r in data.records if r.kind == MERGED for one in r.made["blocks"].values()}
        squares = sum(a**2 for r, k in zip(data.records, alone, strict=True) if k for a in r.made["alpha"].values())
        found |= {"blocks": len(blocks), "weight": min(1.0, len(blocks) / squares) if squares else 1.0}
    weight = found["weight"]
    shifts = {name: math.nan if found["shifts"].get(name) is None else found["shifts"][name] for name in data.targets}
    targets = {name: np.where(merged, values - shifts[name], values) for name, values in data.targets.items()}
    weights = data.weights * np.where(merged, weight, 1.0)
    lowered = replace(data, y=data.y - merged * found["shift"], targets=targets, weights=weights)
    return replace(lowered.take(kept), kinds=plain(found))


def _agreement(data: FitData, merged: np.ndarray) -> dict[str, Any]:
    """How the merged runs agree with their twins, and whether that lets them count."""
    twins: dict[str, list[int]] = {}
    for place, record in enumerate(data.records):
        if record.kind == TRAINED and record.mixture_key:
            twins.setdefault(record.mixture_key, []).append(place)
    pairs = [(k, twins[r.mixture_key]) for k, r in enumerate(data.records) if merged[k] and r.mixture_key in twins]
    out: dict[str, Any] = {"twins": len(pairs), "shift": 0.0, "shifts": {}, "used": False}
    out["scale"] = sorted({float(r.made["s"]) for r in data.records if r.kind == MERGED})
    if len(pairs) < FEWEST:
        return {**out, "reason": f"since {len(pairs)} of them have a trained twin, and {FEWEST} are needed"}
    a, b = _of_pairs(data.y, pairs)
    told = correlation(a, b)
    for name, values in data.targets.items():
        gaps = np.subtract(*_of_pairs(values, pairs))
        out["shifts"][name] = float(gaps[np.isfinite(gaps)].mean()) if np.isfinite(gaps).any() else math.nan
    out |= {name: told[name] for name in _NUMBERS} | {"shift": float((a - b).mean()), "sd": float((a - b).std(ddof=1))}
    if told["pearson"] > 0 and told["p"] <= 2 * LEVEL:
        return {**out, "used": True, "reason": ""}
    return {**out, "reason": "since they are not shown to agree with their twins"}


def _of_pairs(values: np.ndarray, pairs: list[tuple[int, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Of values [n] those of the merged runs, and the means of those of their twins."""
    return values[[k for k, _ in pairs]], np.array([values[twins].mean() for _, twins in pairs])


def kinds_lines(kinds: Mapping[str, Any]) -> list[str]:
    """What was mixed, for a summary."""
    used = kinds["used"]
    what = (
        f"merged runs: {kinds['runs']} of {kinds['blocks']} blocks, s {', '.join(f'{s:.3g}' for s in kinds['scale'])}"
    )
    if used:
        what += (
            f"; {kinds['counted']} count beside the trained runs, each {kinds['weight']:.2g} of one, their log losses "
            f"lowered by {kinds['shift']:.3g}; the others' twins stand for them (they share the noise of their blocks, "
            "which the intervals of coefficients do not know)"
        )
    else:
        what += f"; LEFT OUT, {kinds['reason']}"
    if "pearson" not in kinds:
        return [what]
    told = {name: number_or_dash(kinds[name], ".2f") for name in _NUMBERS}
    told |= {"twins": kinds["twins"], "shift": f"{kinds['shift']:+.3g}", "sd": f"{kinds['sd']:.3g}"}
    return [what, _AGREEMENT.format(**told)]

"""What runs record beside the regressors of a fit: weights, means of hats, source shares, lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from im_lightning.errors import RequestError, message
from im_lightning.rule.record import RunRecord
from im_lightning.rule.regime import run_names


def run_weights(records: Sequence[RunRecord], weights: Mapping[str, float] | None) -> np.ndarray:
    """Weights of the runs in a fit, float64 [n], mean 1.

    Args:
        records: [n] runs.
        weights: run id → weight; 1 where none is given.

    Raises:
        RequestError: an unknown run, or a weight that is not positive.
    """
    given = dict(weights or {})
    unknown = [name for name in given if name not in {r.run_id for r in records}]
    if unknown:
        cause = f"no run of the fit has the id {', '.join(unknown[:3])}"
        raise RequestError(message("weights", cause, "name runs of the fit (im-lightning runs LEDGER)"))
    out = np.array([float(given.get(r.run_id, 1.0)) for r in records])
    if not (np.isfinite(out).all() and (out > 0).all()):
        raise RequestError(message("weights", "one is not a positive number", "leave a run out of the ledger instead"))
    return out / out.mean()


def hat_means(
    records: Sequence[RunRecord], names: Sequence[str]
) -> tuple[dict[str, tuple[list[float], np.ndarray]], str]:
    """(indicator → (knots, means of the hats [n, K + 1]), ""), or ({}, why there are none)."""
    lacking = [r for r in records if any(n not in r.basis_means for n in names)]
    if lacking:
        return {}, f"{run_names(lacking)} recorded no basis means of {', '.join(_lacked(lacking[0], names))}"
    out = {}
    for name in names:
        knots = [float(k) for k in records[0].basis_means[name]["knots"]]
        width = knots[-1] - knots[0]
        for record in records:
            other = record.basis_means[name]["knots"]
            if len(other) != len(knots) or not np.allclose(other, knots, rtol=0, atol=1e-3 * max(width, 1e-12)):
                return {}, f"the knots of {name} differ between {records[0].run_id} and {record.run_id} (another pool?)"
        means = np.array([r.basis_means[name]["means"] for r in records], dtype=np.float64)
        if not np.isfinite(means).all():
            return {}, f"the basis means of {name} are missing in some run"
        out[name] = (knots, means)
    return out, ""


def _lacked(record: RunRecord, names: Sequence[str]) -> list[str]:
    return [n for n in names if n not in record.basis_means]


def source_shares(records: Sequence[RunRecord]) -> dict[str, np.ndarray]:
    """source → float64 [n], its share of each run; {} where some run does not record them."""
    every = [r.subset.get("source_shares") or {} for r in records]
    if not all(every) or any(share is None for shares in every for share in shares.values()):
        return {}
    names = sorted({name for shares in every for name in shares})
    return {name: np.array([float(shares.get(name, 0.0)) for shares in every]) for name in names}


def mean_length(records: Sequence[RunRecord]) -> tuple[str, np.ndarray] | None:
    """Name and values [n] of the mean φ of the length of the responses, else of the inputs; None without both."""
    for name in ("length_output", "length_input"):
        values = np.array([r.phi_means.get(name, math.nan) for r in records], dtype=np.float64)
        if np.isfinite(values).all() and values.std() > 0:
            return name, values
    return None

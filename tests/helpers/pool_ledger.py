"""Ledgers whose runs trained on real subsets of a scored pool, so that they have basis means; with a known truth."""

from __future__ import annotations

import numpy as np
from simulated_ledger import PHI, make_record, make_table

from im_lightning.indicators.transforms import Transform, basis_means, mean_phi, pool_knots

TRANSFORMS = {n: Transform(*PHI[n]) for n in PHI}


def pool_ledger(n=40, seed=0, noise=0.005, effect=None, repeats=0, sources=False):
    """(records, table): each run's log loss is the mean of `effect(phi [N, 3])` over its 60 rows, plus noise.

    Runs lean to random directions of φ and of its square, so that bends show. With `sources`, the rows of the pool
    belong to two sources and each run leans to one of them.
    """
    rng = np.random.default_rng(seed)
    table = make_table(1500, seed=seed)
    phi = np.column_stack([t.apply(table.values[k]) for k, t in TRANSFORMS.items()])
    knots = pool_knots(table, TRANSFORMS)
    z = (phi - phi.mean(axis=0)) / phi.std(axis=0)
    source = rng.integers(0, 2, len(table)) if sources else np.zeros(len(table), dtype=int)
    value = 0.3 * z[:, 0] if effect is None else effect(z)
    records = []
    for k in range(n):
        if k >= n - repeats:
            first = records[k - (n - repeats)]
            fields = {"phi": first.phi_means, "basis": first.basis_means, "mean": first.truth}
            shares, subset = first.subset["source_shares"], k - (n - repeats)
        else:
            lean = z @ rng.normal(0, 0.7, 3) + (z**2) @ rng.normal(0, 0.4, 3)
            lean += source * rng.normal(0, 2.5) if sources else 0.0
            if sources and k % 4 == 0:
                lean = np.where(source == k // 4 % 2, lean, -50.0)
            p = np.exp(lean - lean.max())
            exposures = np.bincount(rng.choice(len(p), 60, p=p / p.sum()), minlength=len(p))
            fields = {
                "phi": mean_phi(table, TRANSFORMS, exposures),
                "basis": basis_means(table, TRANSFORMS, knots, exposures),
                "mean": float(exposures @ value / exposures.sum()),
            }
            at = np.bincount(source, exposures, minlength=2) / exposures.sum()
            shares, subset = {f"s{j}": float(v) for j, v in enumerate(at) if v > 0}, k
        y = 0.9 + fields["mean"] + noise * rng.standard_normal()
        record = make_record(k, dict(fields["phi"]), float(np.exp(y)), subset=subset, basis_means=fields["basis"])
        record.subset["source_shares"] = dict(shares)
        record.truth = fields["mean"]
        records.append(record)
    return records, table


def valley(z):
    """Both extremes of the first indicator are bad: what no linear rule can say."""
    return 0.25 * np.abs(z[:, 0]) - 0.05 * z[:, 2]

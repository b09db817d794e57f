"""`scripts/benchmark_mixtures`: mixture, rule and both, against random rows and each other, on the demo's pool.

The demo knows how good each source and each row is. The law of mixtures and the rule are fitted on the same designed
runs; every arm has the same supervised tokens and steps, and each seed candidate rows of its own. A folder that
`scripts/demo` left, or an interrupted one of this script, is gone on in.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import status_of
from im_lightning._utils.files import write_json
from im_lightning._utils.numbers import half_width, holm, p_text
from im_lightning._utils.progress import log
from im_lightning._utils.text_tables import Column, terminal_width, text_table
from im_lightning.experiments.compare.arms import title_of
from im_lightning.experiments.compare.statistics import BASE, REFERENCE, compare
from im_lightning.experiments.demo.result import Arms
from im_lightning.experiments.demo.run import ORACLE, Demo
from im_lightning.experiments.demo.settings import FAST, FULL
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.mixture_law import fit_mixture_law
from im_lightning.sampling.weights.mixture import best_mixture

ARMS = (REFERENCE, "mix", "weighted", "mix+rule", "by-source")
"""All are compared with each other; the base and good rows alone stand beside them."""


class Mixed(Demo):
    """A demo whose arms are those, with a mixture that is fitted on its designed runs."""

    @property
    def arms(self) -> list[str]:
        return [BASE, *ARMS, ORACLE]

    def fit_mixture(self, designed: list[RunRecord]) -> str:
        """The mixture's file; rows of a fold are mixed as those of the pool."""
        law = fit_mixture_law(designed, "fit")
        sources = Counter(row["source"] for row in self.fold(0))
        made = best_mixture(law, sources, self.settings.subset_rows)
        path = self.folder.path / "mix.json"
        made.save(path)
        log(f"  law: {law.rule.method}, R² held out {law.rule.held_out_r2:.2f}; mix {_rounded(made.shares)}")
        return str(path)


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {name: round(share, 3) for name, share in shares.items()}


def measure(demo: Mixed) -> dict[str, Any]:
    """The tables as text, and their numbers."""
    demo.make_data()
    demo.make_base()
    if (judges := demo.settings.judges) is not None:
        demo.make_judges(judges)
    table = demo.score()
    designed = demo.designed_runs()
    rule = demo.refit(designed)
    arms = demo.compare(table, demo.fit_mixture(designed))
    losses = arms.losses
    sums = arms.example_sums(demo.ledger)
    found = {}
    for other, arm in combinations(ARMS, 2):
        pair = {name: losses[name] for name in (other, arm)}
        found[arm, other] = compare(pair, other, examples=sums)[1]
    corrected = holm([one.p for one in found.values()])
    pairs = [
        {
            "arm": arm,
            "against": other,
            "difference": one.difference,
            "half_width": one.difference_half_width,
            "p_holm": float(p),
        }
        for ((arm, other), one), p in zip(found.items(), corrected, strict=True)
    ]
    return {
        "seeds": demo.settings.seeds,
        "rule": {"method": rule.method, "r2": rule.held_out_r2},
        "losses": losses,
        "good": {arm: arms.facts(arm)["good_share"] for arm in arms.known},
        "pairs": pairs,
        "rendered": f"{_arms_text(arms)}\n\n{_pairs_text(pairs)}",
    }


def _arms_text(arms: Arms) -> str:
    rows = []
    for arm, values in arms.losses.items():
        good = f"{arms.facts(arm)['good_share']:.2f}" if arm in arms.known else ""
        rows.append([title_of(arm), good, f"{np.mean(values):.3f}"])
    return text_table([Column("arm", right=False), Column("good rows"), Column("loss")], rows, terminal_width())


def _pairs_text(pairs: list[dict[str, Any]]) -> str:
    columns = [Column("arm", right=False), Column("against", right=False), Column("difference")]
    columns += [Column("±", right=False), Column("Holm p")]
    rows = [
        [
            title_of(one["arm"]),
            title_of(one["against"]),
            f"{one['difference']:+.3f}",
            half_width(one["half_width"]),
            p_text(one["p_holm"]),
        ]
        for one in pairs
    ]
    return text_table(columns, rows, terminal_width())


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark_mixtures", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="a demo's folder, or a new one")
    parser.add_argument("--seed", type=int, default=0, help="generator seed of the pool, as of the demo")
    parser.add_argument("--fast", action="store_true", help="the demo's small form, which concludes nothing")
    given = parser.parse_args(argv)

    def run() -> int:
        found = measure(Mixed(given.out, replace(FAST if given.fast else FULL, seed=given.seed)))
        write_json(given.out / "mixtures.json", found)
        print(found["rendered"])
        return 0

    return status_of("benchmark_mixtures", run)


if __name__ == "__main__":
    sys.exit(main())

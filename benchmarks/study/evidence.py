"""The ways to evidence on the study's own runs: half of the subsets to buy from, the other half to test on.

Nothing is trained. Of the kept runs every way takes what its budget buys, by the rules of `benchmarks.evidence`; so the
table of docs/cost.md for the synthetic pool has one beside it for a real LLaMA and real rows.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.budget import SHARES, Prices, flops
from benchmarks.evidence.measure import cell
from benchmarks.evidence.ways import WAYS, Bought, fitted, log_losses
from benchmarks.study.kept import COSTS, kept_runs
from benchmarks.study.sets import SEED, TARGET
from im_lightning._utils.files import plain
from im_lightning.errors import RequestError, message
from im_lightning.ledger.curve import at_point
from im_lightning.ledger.record import MERGED, RunRecord
from im_lightning.models.cost import Cost, total

EARLY = 0.2
"""Share of its steps after which a designed run is evaluated, too: what runs that end there would say."""
INDICATORS = ("length_input", "length_output", "ppl", "mtld", "knn_6")
"""Those of the text alone, as on the synthetic pool."""
PASSES = {
    "loss_drop": ("ppl_tuned",),
    "gradient_similarity": ("gradients of the targets", "gradients", "gradient_similarity"),
}
"""Indicator of rows → what `score` notes of its cost."""
WITHOUT = ("small", "0.1", "0.5")
"""In the name of a way: its runs were not made here."""
FEWEST = 20
"""Subsets of each half, for a table."""


class KeptWorld:
    """The kept runs as a world of `benchmarks.evidence.ways`.

    Args:
        kept: Folder of the numbers.
        out: Folder of the rules.

    Raises:
        RequestError: fewer than twice `FEWEST` subsets are kept.
    """

    evaluation, indicators = TARGET, INDICATORS

    def __init__(self, kept: Path, out: Path) -> None:
        self.kept, self.out = kept, out
        first: dict[str, RunRecord] = {}
        for one in kept_runs("runs", kept):
            record = RunRecord.from_json(one["record"], "runs")
            known = first.setdefault(record.subset_key, record)
            if record.seeds["training"] < known.seeds["training"]:  # the others are its repeats
                first[record.subset_key] = record
        if len(first) < 2 * FEWEST:
            cause = f"{len(first)} subsets are kept there, {2 * FEWEST} are the least"
            raise RequestError(message(str(kept), cause, "go on with the stage runs"))
        order = np.random.default_rng(SEED).permutation(len(first))
        records = [first[key] for key in sorted(first)]
        half = len(records) // 2
        self.designed, self.tests = ([records[at] for at in part] for part in (order[:half], order[half : 2 * half]))

    @cached_property
    def prices(self) -> Prices:
        trained, read = (
            float(np.mean([r.compute[name] for r in self.designed])) for name in ("tokens_trained", "tokens_evaluated")
        )
        return Prices(trained, read / 2, self.designed[0].steps)  # evaluated twice: early, and at the end

    @cached_property
    def mean_flops(self) -> float:
        return float(np.mean([flops(r) for r in self.designed]))

    @cached_property
    def run_seconds(self) -> dict[tuple[str, float | None], float]:
        """Wall seconds on the machine of the runs, both evaluations included."""
        early = [seen.seconds for r in self.designed if (seen := at_point(r, EARLY)) is not None]
        return {
            ("base", None): float(np.mean([r.seconds for r in self.designed])), ("base", EARLY): float(np.mean(early)),
        }  # fmt: skip

    def scoring(self, name: str) -> Cost:
        """What an indicator of rows cost, over the whole pool."""
        noted = json.loads((self.kept / COSTS).read_text(encoding="utf-8"))
        return total(Cost(noted["flops"][part], noted["seconds"][part]) for part in PASSES[name])


def merged(world: KeptWorld, budget: float) -> Bought:
    """What the stage merged made, where the budget buys all of it."""
    runs = [RunRecord.from_json(one["record"], "merged") for one in kept_runs("merged", world.kept)]
    cost = total(r.cost for r in runs)
    if not runs or cost.flops > budget * world.mean_flops:
        return Bought(
            "", Cost(), why="blocks, twins and mixtures cost more" if runs else "the stage merged was not run"
        )
    mixtures = sum(r.kind == MERGED for r in runs)
    blocks = sum(r.kind != MERGED and 1 in r.subset["shares_wanted"].values() for r in runs)
    what = f"{blocks} blocks, {len(runs) - blocks - mixtures} twins, {mixtures} mixtures"
    return fitted(world, what, cost, [r for r in runs if r.purpose != "block"])


def ways(kept: Path, rules: Path) -> dict[str, Any]:
    """What `benchmarks.evidence.table` prints of one world, JSON-like; `rules` is a folder for the rules."""
    world = KeptWorld(kept, rules)
    runs, actual = len(world.designed), log_losses(world.tests, world.evaluation)
    whole = Cost(world.mean_flops, world.run_seconds["base", None]) * runs
    known = {name: way for name, way in WAYS.items() if not any(part in name for part in WITHOUT)}
    cells = {
        name: {f"{share:g}": cell(way(world, share * runs), world, whole, actual) for share in SHARES}
        for name, way in {**known, "merged runs": merged}.items()
    }
    sizes: dict[str, Any] = {"runs": runs, "test_runs": len(actual), "conclusive": runs >= 60}
    sizes |= {"further": "full runs of the other half of the design"}
    sizes |= {"clock": "wall seconds (two runs at a time, evaluated twice)"}
    found = {"seed": SEED, "sizes": sizes, "whole": whole.to_json(), "actual": actual, "cells": cells, "finetunes": {}}
    return dict(plain(found))

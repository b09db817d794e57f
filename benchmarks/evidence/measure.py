"""One generator seed measured: every way at every share, and finetunes on rows drawn by their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.budget import SHARES
from benchmarks.evidence.playground import Playground, Sizes
from benchmarks.evidence.quality import r_squared, spearman
from benchmarks.evidence.ways import FINETUNED, REFERENCE, WAYS, Bought, World, log_losses
from im_lightning._utils.files import plain, write_json
from im_lightning._utils.progress import log
from im_lightning.data.settings import Encoding, Reading
from im_lightning.experiments.compare.arms import ArmRunner, ArmsSettings, Cell
from im_lightning.experiments.finetuning import Study
from im_lightning.models.cost import Cost
from im_lightning.training.shared_base import shared_base

RANDOM, BY_SOURCE, WEIGHTED = "random", "by-source", "weighted"
FINETUNED_AT = (0.2, 1.0)


def measure(out: Path, sizes: Sizes, finetunes: bool) -> dict[str, Any]:
    """The numbers of one generator seed, JSON-like; written to `ways.json` in its folder."""
    world = Playground(out, sizes)
    log(f"generator seed {sizes.demo.seed}: {out}")
    world.prepare()
    actual = log_losses(world.tests, world.evaluation)
    whole = Cost(world.mean_flops, world.run_seconds["base", None]) * sizes.demo.runs
    cells: dict[str, dict[str, Any]] = {}
    bought: dict[tuple[str, float], Bought] = {}
    for name, way in WAYS.items():
        for share in SHARES:
            one = bought[name, share] = way(world, share * sizes.demo.runs)
            cells.setdefault(name, {})[f"{share:g}"] = cell(one, world, whole, actual)
        log(f"  {name}: {', '.join(_short(c) for c in cells[name].values())}")
    result = {
        "seed": sizes.demo.seed,
        "sizes": {"runs": sizes.demo.runs, "test_runs": len(actual), "conclusive": sizes.demo.conclusive},
        "whole": whole.to_json(),
        "common": world.scoring(sizes.demo.indicators[-1]).to_json(),
        "prices": vars(world.prices),
        "actual": actual,
        "cells": cells,
        "finetunes": finetuned(world, bought) if finetunes else {},
    }
    write_json(out / "ways.json", plain(result))
    return dict(plain(result))


def cell(one: Bought, world: World, whole: Cost, actual: np.ndarray) -> dict[str, Any]:
    """What a way made of a budget, JSON-like."""
    out: dict[str, Any] = {"what": one.what, "why": one.why, "agreement": one.agreement}
    predictions = one.predictions(world.tests)
    if one.why or predictions is None:
        return out
    method = "" if one.rule is None else one.rule.method
    out |= {"flops": one.cost.flops / whole.flops, "seconds": one.cost.seconds / whole.seconds, "method": method}
    r2 = None if one.ranked_by else r_squared(actual, predictions)
    return {**out, "predicted": predictions, "spearman": float(spearman(actual, predictions)), "r2": r2}


def _short(one: dict[str, Any]) -> str:
    return f"{one['spearman']:.2f}" if "spearman" in one else "—"


def label(way: str, share: float) -> str:
    """Name of the arm of a way's weights."""
    return f"{way}, {share:g}"


@shared_base()
def finetuned(world: Playground, bought: dict[tuple[str, float], Bought]) -> dict[str, list[float]]:
    """Arm → loss on the report set, one per comparison seed: random rows, those by source shares alone, and those by
    the weights of the ways' rules. A comparison seed has its own candidate rows, and all arms its tokens and steps."""
    s, f = world.settings, world.folder
    lengths = world.score().values["length_output"]
    settings = ArmsSettings(
        Study([str(f.pool)], str(f.scores), force="weak-rule,other-base,worse-target"),
        Encoding(str(f.base), cache_dir=str(f.cache)),
        Reading(),
        s.tuning,
        eval_data=str(f.evaluation["report"]),
        tokens=round(s.subset_rows * (float(np.nanmean(lengths)) + 1.0)),
        steps=s.steps,
    )
    runner = ArmRunner(settings, world.ledger, f.work)
    reference = str(bought[REFERENCE, 1.0].path)
    arms = [(RANDOM, RANDOM, reference), (BY_SOURCE, BY_SOURCE, reference)]
    for way in FINETUNED:
        for share in FINETUNED_AT:
            if (path := bought[way, share].path) is not None:
                arms.append((label(way, share), WEIGHTED, str(path)))
    cells = []
    for fold in range(s.seeds):
        seed = 1000 * s.seed + 500 + fold
        cells += [(name, Cell(arm, seed, str(f.fold(fold)), rule)) for name, arm, rule in arms]
    records = runner.run(runner.keyed([one for _, one in cells]))
    out: dict[str, list[float]] = {}
    for (name, _), record in zip(cells, records, strict=True):
        out.setdefault(name, []).append(record.loss(runner.evaluation))
    return out

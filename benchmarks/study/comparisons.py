"""The stages that compare arms on the verdict sets: the registered comparison, and others, which are described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.evidence.budget import flops
from benchmarks.study.command import FORCE, INDICATORS, MODEL, Study
from benchmarks.study.evidence import EARLY
from benchmarks.study.kept import CHEAP, take_over
from benchmarks.study.sets import TARGET
from im_lightning._utils.progress import log
from im_lightning.errors import RequestError, message
from im_lightning.ledger.curve import at_point
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.linear_rule import LinearRule

ARMS = "base,random,by-source,mix,weighted,mix+rule"
BESIDE: dict[str, tuple[str, ...]] = {
    "arms": ("--arms", "random,top,longest,lowest-ppl,ifd,reward,diverse,worst"),
    "all-weights": ("--arms", "random,by-source,weighted", "--lora-rank", "0", "--learning-rate", "5e-5"),
    "curve": ("--arms", "random,by-source,weighted", "--curve"),
    "fourfold": ("--arms", "random,by-source,weighted"),
    "everything": ("--arms", "random,full"),
}
"""Comparisons beside the registered one, three seeds each: described, not tested."""
TIMES = {"fourfold": 4}
"""Of a run's tokens and steps that an arm has there."""
EVIDENCE = 0.2
"""Of the compute of sixty full runs: what the runs of the stage cheap that end early may cost."""


def compare_stage(study: Study) -> None:
    """The registered comparison: opens the verdict sets."""
    _compare(study, "compare", "--mixture", study.at("mix.json"), "--arms", ARMS, "--seeds", str(study.sizes.seeds))


def beside_stage(study: Study) -> None:
    """Other arms, full finetuning, the curve of random rows, four times the tokens, all rows (once).

    The vectors of the arm diverse are in the store of scores, which may be gone: they are made again then.
    """
    study.command(
        "score", study.at("data", "pool.jsonl"), *MODEL, "--embedding-model", "minilm", "--indicators", "knn_6",
        "--out", study.at("vectors.parquet"),
    )  # fmt: skip
    for name, more in BESIDE.items():
        seeds = 1 if name == "everything" else study.sizes.seeds_beside
        if there := take_over(study.out, name, seeds, study.sizes.rows // study.sizes.batch):
            log(f"compare-{name}: {len(there)} of its runs are those of another comparison")
        _compare(study, f"compare-{name}", *more, "--seeds", str(seeds), times=TIMES.get(name, 1))


def cheap_stage(study: Study) -> None:
    """Cheap ways to evidence in place of the designed runs: rules of runs that end early, and of merged ones, and what
    rows drawn by their weights are worth beside random rows."""
    sizes, runs = study.sizes, RunLedger(study.out / "stopped")
    if not runs.records():
        runs.make()
        for record in early_runs(RunLedger(study.out / "runs").records("designed")):
            runs.add(replace(record, loggers={}))
    full = LinearRule.load(study.out / "rule.json").feature_names_in_
    for name in CHEAP:
        rule, at = study.out / f"rule-{name}.json", ("--at", str(EARLY)) if name == "stopped" else ()
        if not rule.exists():
            more = (*at, "--target", TARGET, "--permutations", str(sizes.permutations))
            study.command("refit", study.at(name), "--indicators", INDICATORS, "--out", study.at(rule.name), *more)
        if sorted(LinearRule.load(rule).feature_names_in_) == sorted(full):
            take_over(study.out, name, sizes.seeds_beside, sizes.rows // sizes.batch)
        more = ("--arms", "random,weighted", "--seeds", str(sizes.seeds_beside))
        _compare(study, f"compare-{name}", *more, rule=rule.name, ledger=name)


def early_runs(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The first subsets' runs, as many as cost, stopped early, a fifth of sixty runs to the end with one evaluation."""
    first = sorted((r for r in records if not r.seeds["training"]), key=lambda r: (r.created, r.run_id))
    first = [r for r in first if at_point(r, EARLY) is not None]
    spent = np.cumsum([flops(r, EARLY) for r in first])
    return first[: int(np.searchsorted(spent, EVIDENCE * 60 * np.mean([flops(r) for r in first]), side="right"))]


def _compare(
    study: Study, name: str, *more: str, times: int = 1, rule: str = "rule.json", ledger: str = "runs"
) -> None:
    sizes = study.sizes
    study.command(
        "compare", study.at("data", "pool.jsonl"), "--scores", study.at("scores.parquet"), *MODEL,
        "--rule", study.at(rule), "--ledger", study.at(ledger), "--eval-data", study.at("data", "verdict.jsonl"),
        "--tokens", str(times * _tokens_of_a_run(study)), "--steps", str(times * sizes.rows // sizes.batch),
        "--pool-draw", "same", *more, FORCE, "--out", study.at(name),
    )  # fmt: skip


def _tokens_of_a_run(study: Study) -> int:
    """Supervised tokens of the median designed run: what an arm may use."""
    tokens = [record.tokens for record in RunLedger(study.out / "runs").records()]
    if not tokens:
        raise RequestError(message(study.at("runs"), "there are no runs", "run the stage runs first"))
    return int(np.median(tokens))

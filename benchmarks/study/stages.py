"""The stages of the study: each a few commands of the package, in order; all go on where they were interrupted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Hashable, Set
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from benchmarks.study.command import FORCE, INDICATORS, MODEL, Study
from benchmarks.study.comparisons import beside_stage, cheap_stage, compare_stage
from benchmarks.study.evidence import EARLY
from benchmarks.study.figures import figures
from benchmarks.study.kept import keep
from benchmarks.study.reward import train
from benchmarks.study.sets import KINDS, POOL, TARGET, split
from benchmarks.study.tables import markdown
from im_lightning._utils.files import write_text
from im_lightning._utils.progress import log
from im_lightning.commands.recipe import folder as recipes
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import MERGED
from im_lightning.models.fingerprint import local_folder
from im_lightning.rule.linear_rule import LinearRule

RECIPE = recipes() / "02_designed_runs" / "designed_run.yaml"
OTHER = ("64", "2e-4")
"""LoRA rank and learning rate of the stage transfer; the study's are 16 and what the stage rate chose."""
BEGIN, END = "<!-- scripts/study tables: begin -->", "<!-- scripts/study tables: end -->"
"""Between them the page docs/study.md has what the stage tables writes."""


def split_stage(study: Study) -> None:
    """Draws the sets, and looks for what the pool shares with them."""
    found = split(study.data, study.out / "data", study.sizes)
    for name, counts in found.items():
        log(f"{name}: {', '.join(f'{kind} {count}' for kind, count in counts.items())}")
    others = [study.at("data", "verdict.jsonl"), *study.sets("fit").values(), *study.sets("search").values()]
    study.command("check", study.at("data", "pool.jsonl"), *others, "--show", "0")


def score_stage(study: Study) -> None:
    """Every indicator; the reward model is made first."""
    scores = study.out / "scores.parquet"
    if scores.exists() and set(INDICATORS.split(",")) <= set(ScoreTable.read(scores).indicators):
        return
    if not (study.out / "reward").exists():
        log("a reward model is trained on pairs of rows outside the pool")
        train(study.out / "data" / "pairs.jsonl", local_folder("smollm2") or Path("smollm2"), study.out / "reward")
    study.command(
        "score", study.at("data", "pool.jsonl"), *MODEL, "--embedding-model", "minilm",
        "--reward-model", study.at("reward"), "--targets", study.at("data", "targets.jsonl"),
        "--indicators", INDICATORS, "--out", study.at("scores.parquet"),
    )  # fmt: skip


def rate_stage(study: Study) -> None:
    """Random rows at each rate; `rate.json` has the mean loss over the search sets."""
    if (study.out / "rate.json").exists():
        return
    natural = {name: 1.0 / len(POOL) for name in POOL}
    fixed = _fit_arguments(study, "search") | {
        "data.scores": study.at("scores.parquet"), "data.subset_size": study.sizes.rows, "data.subset_tilt": 0.0,
        "data.subset_mixture": natural, "mining.ledger": study.at("rates"), "mining.refit": False,
    }  # fmt: skip
    sweep = {
        "program": "im-lightning",
        "command": ["${env}", "${program}", "fit", "--config", str(RECIPE.resolve()), "${args}"],
        "method": "grid",
        "metric": {"name": "im/eval_loss/dolly", "goal": "minimize"},
        "parameters": {
            **{name: {"value": value} for name, value in fixed.items()},
            "config": {
                "values": [
                    f"{{model: {{learning_rate: {rate}}}, data: {{subset_seed: {seed}}}}}"
                    for rate in study.sizes.rates
                    for seed in range(study.sizes.rate_runs)
                ]
            },
        },
    }
    if not (study.out / "rate_sweep.yaml").exists():
        write_text(study.out / "rate_sweep.yaml", json.dumps(sweep, indent=1))
    made = {(float(r.regime["learning_rate"]), r.subset["seed"]) for r in RunLedger(study.out / "rates").records()}
    _sweep_the_rest(study, "rate_sweep.yaml", lambda o: (o["model"]["learning_rate"], o["data"]["subset_seed"]), made)
    found: dict[float, list[float]] = {}
    for record in RunLedger(study.out / "rates").records():
        loss = float(np.mean([record.loss(kind) for kind in KINDS]))
        found.setdefault(float(record.regime["learning_rate"]), []).append(loss)
    means = {rate: float(np.mean(values)) for rate, values in sorted(found.items())}
    best = min(means, key=means.__getitem__)
    log("; ".join(f"learning rate {rate:g}: mean search loss {mean:.4f}" for rate, mean in means.items()))
    write_text(study.out / "rate.json", json.dumps({"rate": best, "losses": {f"{k:g}": v for k, v in means.items()}}))


def runs_stage(study: Study) -> None:
    """The designed runs, evaluated on the five fit sets."""
    _design(study, "sweep.yaml", "runs", "--runs", str(study.sizes.runs), "--repeats", str(study.sizes.repeats))
    made = {(r.subset["seed"], r.seeds["training"]) for r in RunLedger(study.out / "runs").records()}
    early = ("--eval-at", str(EARLY))
    _sweep_the_rest(study, "sweep.yaml", lambda o: (o["data"]["subset_seed"], o["seed_everything"]), made, *early)


def _sweep_the_rest(
    study: Study, name: str, run_of: Callable[[dict[str, Any]], Hashable], made: Set[Hashable], *more: str
) -> None:
    """Sweeps a file; where it has not been begun here, without the runs that were restored.

    Args:
        study: Where it is.
        name: The sweep's file.
        run_of: A trial's arguments → what tells it from the others.
        made: The same of the runs that are there.
        more: Of the command.

    Raises:
        InstructMiningError: a run that was restored is not one of the file's: it is of another design.
    """
    if not (study.out / "sweeps" / Path(name).stem).exists():
        sweep = yaml.safe_load((study.out / name).read_text(encoding="utf-8"))
        values = sweep["parameters"]["config"]["values"]
        wanted = [run_of(yaml.safe_load(value)) for value in values]
        if strange := sorted(made - set(wanted), key=str):
            cause = f"{len(strange)} of the runs that are kept are none of its {len(values)}, the first is {strange[0]}"
            remedy = "score and design as they were, or take these runs out of what is kept"
            raise InstructMiningError(message(study.at(name), cause, remedy))
        left = [value for value, one in zip(values, wanted, strict=True) if one not in made]
        log(f"{name}: {len(left)} of {len(values)} runs are to be made")
        if not left:
            return
        if len(left) < len(values):
            sweep["parameters"]["config"]["values"] = left
            write_text(study.out / name, yaml.safe_dump(sweep, sort_keys=False))
    study.command("sweep", study.at(name), "--jobs", str(study.jobs), *more)


def _design(study: Study, file: str, ledger: str, *more: str) -> None:
    """Writes the sweep file of runs that go into a ledger, unless it is there."""
    if (study.out / file).exists():
        return
    arguments = _fit_arguments(study, "fit") | {
        "model.learning_rate": _rate(study), "mining.ledger": study.at(ledger), "mining.refit": False,
    }  # fmt: skip
    del arguments["data.data"]
    study.command(
        "design", study.at("scores.parquet"), study.at("data", "pool.jsonl"), "--config", str(RECIPE.resolve()),
        *more, "--subset-size", str(study.sizes.rows), "--out", study.at(file),
        "--arguments=" + shlex.join(f"--{name}={_plain(value)}" for name, value in arguments.items()),
    )  # fmt: skip


def refit_stage(study: Study) -> None:
    """The rule and the mixture law, on the mean of the five kinds' losses; once, for what is compared hangs on them."""
    ledger = RunLedger(study.out / "runs")
    for record in ledger.records():
        if record.loggers:  # which are not kept: to a rule the runs that come back would be others
            ledger.add(replace(record, loggers={}), replace=True)
    rule, digest = study.out / "rule.json", RunLedger.digest(ledger.records("designed"))
    if rule.exists() and (study.out / "mix.json").exists() and LinearRule.load(rule).ledger_digest_ == digest:
        log("rule.json and mix.json are of these runs")
        return
    more = ("--target", TARGET, "--permutations", str(study.sizes.permutations), "--overwrite")
    study.command("refit", study.at("runs"), "--indicators", INDICATORS, "--out", study.at("rule.json"), *more)
    study.command(
        "mix", study.at("runs"), "--scores", study.at("scores.parquet"), "--budget", str(study.sizes.rows),
        "--evaluation", TARGET, "--rule", study.at("rule.json"), FORCE,
        "--out", study.at("mix.json"), "--overwrite",
    )  # fmt: skip


def merged_stage(study: Study) -> None:
    """Runs that are not trained: mixtures of the adapters of a few blocks, and trained twins of some."""
    sizes = study.sizes
    if sum(record.kind == MERGED for record in RunLedger(study.out / "merged").records()) >= sizes.mixtures:
        return
    counts = ("--runs", str(sizes.mixtures), "--blocks", str(sizes.blocks), "--twins", str(sizes.twins))
    _design(study, "merged.yaml", "merged", "--kind", MERGED, *counts)
    study.command("sweep", study.at("merged.yaml"), "--jobs", str(study.jobs))


def transfer_stage(study: Study) -> None:
    """Some of the subsets at another rank and rate: do they rank alike?"""
    rank, rate = OTHER
    _write_arguments(study)
    study.command(
        "transfer", study.at("runs"), "--model", "smollm2", "--runs", str(study.sizes.transfer),
        "--learning-rates", rate, f"--arguments=--model.lora_rank={rank}", "--scores", "scores.parquet",
        "--evaluation", TARGET, "--rule", study.at("rule.json"), "--out", study.at("transfer"),
    )  # fmt: skip


def _write_arguments(study: Study) -> None:
    """The arguments by which `transfer` repeats the designed runs: those that were restored came without, and a path in
    them would make other runs in another folder. Without the early evaluation, which nobody reads there."""
    ledger = RunLedger(study.out / "runs")
    for record in ledger.records("designed"):
        own = {f"data.subset_{name}": record.subset[name] for name in ("seed", "size", "tilt", "version")}
        fixed = _fit_arguments(study, "fit") | {"model.learning_rate": _rate(study), "mining.refit": False}
        value = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        for name, one in {**fixed, **own, "data.seed": record.seeds["data"]}.items():
            group, last = name.split(".")
            value.setdefault(group, {})[last] = one
        value["seed_everything"] = record.seeds["training"]
        text = yaml.safe_dump(value).replace(f"{study.out.resolve()}/", "")
        ledger.add_config(record.run_id, text)


def tables_stage(study: Study) -> None:
    """Fills the tables of docs/study.md from what is kept by now, draws its figures, and prints the tables."""
    keep(study.out, study.kept, study.sizes.mixtures)
    with TemporaryDirectory() as rules:
        text = markdown(study.kept, Path(rules))
        figures(study.kept, Path(rules))
    page = study.kept.with_name("study.md")
    before, after = around(page.read_text(encoding="utf-8")) if page.exists() else ("# Tables of the study\n\n", "")
    write_text(page, f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    print(text)


def around(page: str) -> tuple[str, str]:
    """What stands on a page before its tables, and after them."""
    before, _, rest = page.partition(BEGIN)
    return before, rest.partition(END)[2]


STAGES: dict[str, Callable[[Study], None]] = {
    "split": split_stage,
    "score": score_stage,
    "rate": rate_stage,
    "runs": runs_stage,
    "refit": refit_stage,
    "transfer": transfer_stage,
    "merged": merged_stage,
    "compare": compare_stage,
    "beside": beside_stage,
    "cheap": cheap_stage,
    "tables": tables_stage,
}


def _fit_arguments(study: Study, evaluated_on: str) -> dict[str, object]:
    """Arguments of every finetune: SmolLM2, one epoch, a set of each kind."""
    return {
        "data.data": study.at("data", "pool.jsonl"), "data.eval_data": study.sets(evaluated_on),
        "data.model": "smollm2", "data.max_length": 512, "data.batch_size": study.sizes.batch,
        "data.indicators": INDICATORS.split(","), "data.embedding_model": "minilm", "trainer.max_epochs": 1,
    }  # fmt: skip


def _rate(study: Study) -> float:
    file = study.out / "rate.json"
    if not file.exists():
        raise RequestError(message(str(file), "the learning rate has not been chosen", "run the stage rate first"))
    return float(json.loads(file.read_text(encoding="utf-8"))["rate"])


def _plain(value: object) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, dict | list) else str(value)

"""`im-lightning design`: writes a sweep file of designed runs, and says what a fit on them could tell."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from im_lightning._utils.answer import answer
from im_lightning._utils.command_line import recipe_remedy, words_of
from im_lightning._utils.files import write_text
from im_lightning._utils.numbers import time_text
from im_lightning._utils.outputs import Replacing, json_with, starting_with
from im_lightning._utils.progress import log
from im_lightning.commands import comma_list
from im_lightning.commands.runs import open_ledger
from im_lightning.errors import RequestError, message
from im_lightning.ledger.record import KINDS, MERGED
from im_lightning.sampling.designs.blocks import FORMAT, MergedSettings

if TYPE_CHECKING:
    from im_lightning.ledger.record import RunRecord
    from im_lightning.sampling.plan_runs import DesignPlan

SUMMARY = "write a sweep file of designed runs for a scored pool; say what they can tell, and cost"
EXAMPLE = "im-lightning design scores.parquet pool.jsonl --runs 60 --subset-size 1000 --out sweep.yaml"
POSITIONAL = ("scores", "data")
RECIPE = "recipes/02_designed_runs/designed_run.yaml"
_OF_A_FIT = {"data", "model", "mining", "trainer", "export", "seed_everything", "ckpt_path", "weights_only"}

_REPLACING, _MERGED = Replacing(), MergedSettings()


def run(
    scores: str,
    data: list[str],
    runs: int,
    subset_size: int,
    out: str,
    config: str = RECIPE,
    eval_data: str | None = None,
    repeats: int | None = None,
    candidates: int | None = None,
    first_seed: int = 0,
    subset_tilt: float | None = None,
    seconds_per_run: float | None = None,
    ledger: str | None = None,
    arguments: str | None = None,
    columns: str | None = None,
    kind: str = "trained",
    merged: MergedSettings = _MERGED,
    measure: bool = False,
    replacing: Replacing = _REPLACING,
) -> int:
    """Chooses the subsets of designed runs, for the most informative fit of a rule, and writes them as a sweep file.

    Nothing is trained. The file works with `im-lightning sweep` and, unchanged, with `wandb sweep`. Of several sources
    each is left out of some runs, as far as the runs allow; some runs repeat a subset with another training seed.

    Args:
        scores: Score table of the data, as `im-lightning score` wrote it.
        data: The scored files, folders or data sets, in the same order.
        runs: Finetune runs to make.
        subset_size: Rows of each run.
        out: Sweep file to write (.yaml).
        config: Recipe of one designed run; its epochs, format and evaluation data count here too.
        eval_data: Evaluation data, several separated by commas; their rows are never trained on. By default the
            recipe's.
        repeats: How many of the runs repeat a subset with another training seed; by default ten, or a quarter of the
            runs if that is less, as far as three subsets more than regressors are left; never under a tenth.
        candidates: Subsets to choose from; by default ten per run, at least 500.
        first_seed: The candidates are the subset seeds from this one on; another one gives another design.
        subset_tilt: How far a subset leans along a random indicator direction, in sd of the pool; by default the
            recipe's.
        seconds_per_run: What a run takes, for the cost estimate.
        ledger: Folder of earlier runs, whose speed the cost estimate takes: those on the base of the latest, where they
            are of several.
        arguments: Arguments of `im-lightning fit` that win over the recipe in every run, in one text, such as
            --arguments="--trainer.max_epochs=1"; they go into the sweep file and count here too.
        columns: Which column holds what, for data and evaluation data: prompt=question,response=answer; the same as
            --data.columns=… among the arguments.
        kind: trained (each run a finetune), or merged: blocks of rows are finetuned on once, and a run is a mixture of
            their adapters, which is evaluated only; the blocks go into a file beside the sweep file (docs/cost.md).
        merged: What merged runs are made of.
        measure: Measure this machine on some steps of a run, for the time and memory.
        replacing: What may be replaced.
    """
    from im_lightning.data.overlap.keys import USUAL, left_out
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.experiments.design_report import (
        MADE,
        design_heading,
        design_report,
        merged_heading,
        merged_lines,
        merged_values,
        run_values,
        steps_lines,
        sweep_text,
    )
    from im_lightning.sampling.designs.subsets import VERSION
    from im_lightning.sampling.plan_merged import plan_merged
    from im_lightning.sampling.plan_runs import plan_runs
    from im_lightning.training.run.encoded_pool import read_pool, reading_of, set_names
    from im_lightning.training.run.inputs import read_scores

    _check_kind(kind, merged)
    replacing.check(out, "sweep file", starting_with(MADE))
    words = words_of("--arguments", arguments) + ([] if columns is None else [f"--data.columns={columns}"])
    recipe = _overridden(_recipe(config), words)
    options = recipe.get("data") or {}
    reading = reading_of(options)
    pool = read_pool(data, reading, ScoreTable.read(scores).refusal)
    table = read_scores(scores, pool)
    _same_rows(scores, data, ScoreTable.read(scores), pool)
    named = comma_list(eval_data)
    sets = set_names(options.get("eval_data") if named is None else named)
    evaluated = [example for path in sets.values() for example in read_pool(path, reading).examples]
    shared = left_out(pool.examples, evaluated, options.get("exclude") or USUAL)
    tilt = float(options.get("subset_tilt", 1.0)) if subset_tilt is None else subset_tilt
    mixture = options.get("subset_mixture")
    common = (table, pool.sources, shared, runs, subset_size)
    fixed: dict[str, Any] = {
        "data.data": data[0] if len(data) == 1 else data,
        **({"data.sources": None} if options.get("sources") else {}),  # in place of which the data stand
        "data.scores": scores,
        **({} if named is None else {"data.eval_data": named[0] if len(named) == 1 else named}),
    }
    if kind == MERGED:
        unused = {"--repeats": repeats, "--seconds-per-run": seconds_per_run, "--ledger": ledger}
        _check_mergeable(recipe, {**unused, "--measure": measure or None})
        beside = str(Path(out).with_suffix(".blocks.json"))
        replacing.check(beside, "file of blocks", json_with(FORMAT))
        one = plan_merged(*common, merged, candidates, first_seed, tilt)
        lines = [merged_heading(one, len(pool)), *merged_lines(one, len(evaluated), recipe)]
        lines += steps_lines(recipe, subset_size) + _left_aside(table)
        answer(*design_report(one, lines, out))
        one.blocks.save(beside)
        fixed |= {"data.blocks": beside, "data.subset_tilt": 0.0, "data.subset_version": VERSION}
        values = merged_values(one.blocks, _training_seed(recipe))
    else:
        plan = plan_runs(
            *common,
            repeats=repeats,
            candidates=candidates,
            first_seed=first_seed,
            subset_tilt=tilt,
            subset_mixture=mixture,
        )
        fixed |= {"data.subset_size": subset_size, "data.subset_tilt": tilt, "data.subset_version": VERSION}
        lines = [design_heading(plan, subset_size, len(pool)), *_cost(plan, table, recipe, seconds_per_run, ledger)]
        lines += steps_lines(recipe, subset_size) + _left_aside(table)
        if measure:
            from im_lightning.experiments.fit_estimate import estimate_fit

            given = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in fixed.items()]
            lines += estimate_fit(["--config", config, *words, *given]).lines(runs)
        answer(*design_report(plan, lines, out))
        values = run_values(plan, _training_seed(recipe))
    mining = recipe.get("mining") or {}
    prefix, into = mining.get("log_prefix", "im"), str(mining.get("ledger") or "runs")
    metric = f"{prefix}/eval_loss/{next(iter(sets))}" if sets else None
    write_text(out, sweep_text(values, [config, *words], fixed, metric, lines, out, list(sets), into))
    log(f"wrote {out}")
    return 0


def _check_kind(kind: str, merged: MergedSettings) -> None:
    if kind not in KINDS:
        raise RequestError(message(f"--kind {kind}", "there is no such kind of run", f"use {' or '.join(KINDS)}"))
    if kind != MERGED and merged.given:
        cause = f"it says of what merged runs are made, and the runs are {kind}"
        raise RequestError(message(merged.given[0], cause, "pass --kind merged, or leave it out"))


def _check_mergeable(recipe: dict[str, Any], unused: dict[str, Any]) -> None:
    for flag, value in unused.items():
        if value is not None:
            raise RequestError(message(flag, "a design of merged runs has no use for it", "leave it out"))
    if (recipe.get("data") or {}).get("subset_mixture") is not None:
        cause = "the recipe has a subset_mixture, and blocks are drawn from all sources"
        raise RequestError(message("--kind merged", cause, 'pass --arguments="--data.subset_mixture=null"'))
    if (recipe.get("model") or {}).get("lora_rank") == 0:
        cause = "the recipe finetunes all weights (lora_rank: 0), and what is merged are adapters"
        raise RequestError(message("--kind merged", cause, 'pass --arguments="--model.lora_rank=16"'))


def _recipe(config: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        cause = f"the recipe of one run cannot be read ({getattr(error, 'strerror', None) or error})"
        remedy = recipe_remedy(config, "name a recipe of `im-lightning fit`")
        raise RequestError(message(f"--config {config}", cause, remedy)) from error
    except yaml.YAMLError as error:
        cause = f"it is not YAML ({' '.join(str(error).split())})"
        raise RequestError(message(f"--config {config}", cause, "mend it")) from error
    if not isinstance(value, dict) or not isinstance(value.get("data", {}), dict | None) or value.keys() - _OF_A_FIT:
        other = sorted(map(str, value.keys() - _OF_A_FIT)) if isinstance(value, dict) else []
        cause = "it does not hold the arguments of a fit" + (f", but {', '.join(other[:4])}" if other else "")
        raise RequestError(message(f"--config {config}", cause, "name a recipe of `im-lightning fit`"))
    return value


def _overridden(recipe: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """The recipe under arguments such as --trainer.max_epochs=1, which win over it."""
    import yaml

    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.startswith("--"):
            raise RequestError(message(f"--arguments {word}", "it is not --name=value", "write --trainer.max_epochs=1"))
        *groups, last = name[2:].split(".")
        place = recipe
        for group in groups:
            place[group] = place = dict(place.get(group) or {})
        place[last] = yaml.safe_load(text)
        with contextlib.suppress(ValueError, TypeError):  # to YAML 1e-3 is a text
            place[last] = float(place[last]) if isinstance(place[last], str) else place[last]
    return recipe


def _same_rows(scores: str, data: list[str], table: Any, pool: Any) -> None:
    """The table is of these data, row by row, as `select` wants it."""
    pairs = enumerate(zip(table.id, pool.ids, strict=False))
    differing = next((row for row, (left, right) in pairs if left != right), None)
    if differing is None and len(table) == len(pool):
        return
    where = (
        f"the table has {len(table):,} rows, the data {len(pool):,}"
        if differing is None
        else f"row {differing} differs"
    )
    remedy = (
        "pass the data that were scored, in the same order, or score them: im-lightning score DATA --out scores.parquet"
    )
    raise RequestError(message(f"{scores} and {', '.join(data)} do not belong together", where, remedy))


def _left_aside(table: Any) -> list[str]:
    """What was scored and is no regressor of the design."""
    from im_lightning.indicators.transforms import default_regressors

    names = [name for name in table.indicators if name not in default_regressors(table.indicators)]
    if not names:
        return []
    return [f"Scored, but not in the design: {', '.join(names)} (a refit takes them with --indicators)."]


def kept_tokens(prompts: Any, responses: Any, most: int) -> tuple[Any, Any]:
    """Tokens of prompts and responses (with their end) after cutting at `most`, as `encode_examples` cuts: the prompt
    down to a quarter, then the response.

    >>> [float(part) for part in kept_tokens(800, 599, 1000)]
    [400.0, 600.0]
    """
    import numpy as np

    answer = np.asarray(responses, dtype=np.float64) + 1
    prompt = np.minimum(prompts, np.maximum(most // 4, most - answer))
    return prompt, np.minimum(answer, most - prompt)


def _training_seed(recipe: dict[str, Any]) -> int:
    seed = recipe.get("seed_everything", 0)
    return 0 if isinstance(seed, bool) or not isinstance(seed, int) else seed


def _cost(
    plan: DesignPlan, table: Any, recipe: dict[str, Any], seconds_per_run: float | None, ledger: str | None
) -> list[str]:
    """What the runs cost: tokens, and seconds where a speed is known."""
    import numpy as np

    from im_lightning.experiments.run_length import epochs_text, run_length_of
    from im_lightning.models.cost import operations

    epochs = run_length_of(recipe, len(plan.runs[0].rows))[1]
    most = int((recipe.get("data") or {}).get("max_length") or 1024)
    out = []
    response = None
    times = f"in {epochs_text(epochs)} each."
    earlier, parameters, others = _of_latest_base(ledger)
    if "length_output" in table.indicators:
        rows = np.concatenate([d.rows for d in plan.runs])
        prompts = table.values.get("length_input")
        prompt, answer = kept_tokens(
            0.0 if prompts is None else prompts[rows], table.values["length_output"][rows], most
        )
        response = float(np.nansum(answer)) * epochs
        text = f"Cost: {response:,.0f} response tokens trained on"
        if prompts is not None:
            total_tokens = response + float(np.nansum(prompt)) * epochs
            text += f", {total_tokens:,.0f} with the prompts (without the template, cut at {most:,} tokens a row)"
            if parameters is not None:
                text += f", {operations(parameters, trained=total_tokens):.2e} FLOPs"
        out.append(f"{text}, {times}")
    else:
        count = sum(len(d.rows) for d in plan.runs) * epochs
        out.append(f"Cost: {count:,.0f} examples trained on, {times[:-1]}; score length_output for tokens.")
    total = None if seconds_per_run is None else seconds_per_run * len(plan.runs)
    basis = "as given"
    if total is None:
        total, basis = _seconds_of(earlier, response, len(plan.runs))
    if others:
        out.append(f"{others} of the runs in {ledger} are on another base than its latest, and do not count here.")
    if total is not None:
        out.append(
            f"Time: about {time_text(total)}, one run after the other ({total / len(plan.runs):.3g} s each, {basis})."
        )
    return out


def _of_latest_base(ledger: str | None) -> tuple[list[RunRecord], float | None, int]:
    """The runs on the base of the latest run that says which, its parameters (None where none says), and how many are
    on others."""
    records = [] if ledger is None else open_ledger(ledger).records()
    sizes = [r.compute.get("parameters") for r in records]
    latest = next((size for size in reversed(sizes) if size is not None), None)
    found = [r for r, size in zip(records, sizes, strict=True) if size in (None, latest)]
    return found, None if latest is None else float(latest), len(records) - len(found)


def _seconds_of(records: list[RunRecord], tokens: float | None, runs: int) -> tuple[float | None, str]:
    known = [r for r in records if r.seconds > 0 and r.tokens > 0]
    if not known:
        return None, ""
    if tokens is None:
        return runs * median(r.seconds for r in known), f"the median of {len(known)} runs"
    return tokens * median(r.seconds / r.tokens for r in known), f"by the speed of {len(known)} runs"

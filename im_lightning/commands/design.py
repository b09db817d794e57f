"""`im-lightning design`: writes a sweep file of designed runs, and says what a fit on them could tell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from im_lightning._utils.outputs import Replacing

if TYPE_CHECKING:
    from im_lightning.sampling.plan_runs import DesignPlan

SUMMARY = "write a sweep file of designed runs for a scored pool; say what they can tell, and cost"
EXAMPLE = "im-lightning design scores.parquet pool.jsonl --runs 60 --subset-size 1000 --out sweep.yaml"
POSITIONAL = ("scores", "data")
RECIPE = "recipes/02_designed_runs/designed_run.yaml"

_REPLACING = Replacing()


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
    replacing: Replacing = _REPLACING,
) -> int:
    """Chooses the subsets of designed runs, for the most informative fit of a rule, and writes them as a sweep file.

    Nothing is trained. The file works with `im-lightning sweep` and, unchanged, with `wandb sweep`. At least a quarter
    of the runs leave a source out, and a tenth repeat a subset with another training seed.

    Args:
        scores: Score table of the data, as `im-lightning score` wrote it.
        data: The scored files, folders or data sets, in the same order.
        runs: Finetune runs to make.
        subset_size: Rows of each run.
        out: Sweep file to write (.yaml).
        config: Recipe of one designed run; its epochs, format and evaluation data count here too.
        eval_data: Evaluation data, several separated by commas; their rows are never trained on. By default the
            recipe's.
        repeats: How many of the runs repeat a subset with another training seed; by default a tenth.
        candidates: Subsets to choose from; by default ten per run, at least 500.
        first_seed: The candidates are the subset seeds from this one on; another one gives another design.
        subset_tilt: How far a subset leans along a random indicator direction, in sd of the pool; by default the
            recipe's.
        seconds_per_run: What a run takes, for the cost estimate.
        ledger: Folder of earlier runs, whose speed the cost estimate takes.
        replacing: What may be replaced.
    """
    from im_lightning._utils.files import write_text
    from im_lightning._utils.outputs import starting_with
    from im_lightning._utils.progress import log
    from im_lightning.commands import comma_list
    from im_lightning.data.overlap.keys import USUAL, left_out
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.data.settings import Reading
    from im_lightning.experiments.design_report import MADE, design_heading, design_report, sweep_text
    from im_lightning.sampling.plan_runs import plan_runs
    from im_lightning.training.run.encoded_pool import read_pool, set_names
    from im_lightning.training.run.inputs import read_scores

    replacing.check(out, "sweep file", starting_with(MADE))
    recipe = _recipe(config)
    options = recipe.get("data") or {}
    reading = Reading(**{name: options[name] for name in Reading.__dataclass_fields__ if name in options})
    pool = read_pool(data, reading, ScoreTable.read(scores).refusal)
    table = read_scores(scores, pool)
    named = comma_list(eval_data)
    sets = set_names(options.get("eval_data") if named is None else named)
    evaluated = [example for path in sets.values() for example in read_pool(path, reading).examples]
    shared = left_out(pool.examples, evaluated, options.get("exclude") or USUAL)
    tilt = float(options.get("subset_tilt", 1.0)) if subset_tilt is None else subset_tilt
    mixture = options.get("subset_mixture")
    plan = plan_runs(
        table,
        pool.sources,
        shared,
        runs,
        subset_size,
        repeats=repeats,
        candidates=candidates,
        first_seed=first_seed,
        subset_tilt=tilt,
        subset_mixture=mixture,
    )
    fixed = {
        "data.data": data[0] if len(data) == 1 else data,
        "data.scores": scores,
        **({} if named is None else {"data.eval_data": named[0] if len(named) == 1 else named}),
        "data.subset_size": subset_size,
        "data.subset_tilt": tilt,
    }
    lines = [design_heading(plan, subset_size, len(pool)), *_cost(plan, table, recipe, seconds_per_run, ledger)]
    print(design_report(plan, lines))
    prefix = (recipe.get("mining") or {}).get("log_prefix", "im")
    metric = f"{prefix}/eval_loss/{next(iter(sets))}" if sets else None
    write_text(out, sweep_text(plan, config, fixed, metric, _training_seed(recipe), lines, out))
    log(f"wrote {out}")
    return 0


def _recipe(config: str) -> dict[str, Any]:
    import yaml

    from im_lightning.errors import RequestError, message

    try:
        value = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        cause = f"the recipe of one run cannot be read ({getattr(error, 'strerror', None) or error})"
        raise RequestError(message(f"--config {config}", cause, "name a recipe of `im-lightning fit`")) from error
    except yaml.YAMLError as error:
        cause = f"it is not YAML ({' '.join(str(error).split())})"
        raise RequestError(message(f"--config {config}", cause, "mend it")) from error
    if not isinstance(value, dict) or not isinstance(value.get("data", {}), dict | None):
        cause = "it does not hold the arguments of a fit"
        raise RequestError(message(f"--config {config}", cause, "name a recipe of `im-lightning fit`"))
    return value


def _training_seed(recipe: dict[str, Any]) -> int:
    seed = recipe.get("seed_everything", 0)
    return 0 if isinstance(seed, bool) or not isinstance(seed, int) else seed


def _cost(
    plan: DesignPlan, table: Any, recipe: dict[str, Any], seconds_per_run: float | None, ledger: str | None
) -> list[str]:
    """What the runs cost: tokens, and seconds where a speed is known."""
    import numpy as np

    epochs = (recipe.get("trainer") or {}).get("max_epochs") or 3
    out = []
    response = None
    if "length_output" in table.indicators:
        response = sum(float(np.nansum(table.values["length_output"][d.rows] + 1)) for d in plan.runs) * epochs
        text = f"Cost: {response:,.0f} response tokens trained on"
        if "length_input" in table.indicators:
            prompt = sum(float(np.nansum(table.values["length_input"][d.rows])) for d in plan.runs) * epochs
            text += f", {prompt + response:,.0f} with the prompts (without the template, before cutting)"
        out.append(f"{text}, in {epochs} epoch{'s' if epochs != 1 else ''} each.")
    else:
        rows = sum(len(d.rows) for d in plan.runs) * epochs
        out.append(f"Cost: {rows:,} examples trained on, {epochs} epochs included; score length_output for tokens.")
    total = None if seconds_per_run is None else seconds_per_run * len(plan.runs)
    basis = "as given"
    if total is None and ledger is not None:
        total, basis = _seconds_of(ledger, response, len(plan.runs))
    if total is not None:
        out.append(
            f"Time: about {_time(total)}, one run after the other ({total / len(plan.runs):.3g} s each, {basis})."
        )
    return out


def _seconds_of(ledger: str, tokens: float | None, runs: int) -> tuple[float | None, str]:
    from statistics import median

    from im_lightning.commands.runs import open_ledger

    known = [r for r in open_ledger(ledger).records() if r.seconds > 0 and r.tokens > 0]
    if not known:
        return None, ""
    if tokens is None:
        return runs * median(r.seconds for r in known), f"the median of {len(known)} runs"
    return tokens * median(r.seconds / r.tokens for r in known), f"by the speed of {len(known)} runs"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

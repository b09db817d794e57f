"""A design of finetune runs as text: the sweep file that makes them, and what a fit on them could tell."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import yaml

from im_lightning._utils.text_tables import Column, terminal_width, text_table, wrapped
from im_lightning.experiments.run_length import epochs_text, run_length_of
from im_lightning.rule.validation.diagnostics import COLLINEAR_CONDITION, COLLINEAR_VIF
from im_lightning.sampling.designs.blocks import Blocks
from im_lightning.sampling.plan_merged import MergedPlan
from im_lightning.sampling.plan_runs import DesignPlan

MADE = "# Designed runs, chosen by im-lightning design"
"""How a sweep file of ours begins."""


def design_heading(plan: DesignPlan, subset_size: int, rows: int) -> str:
    """One sentence: how many runs of what, out of how many `rows`."""
    count, first = plan.candidates
    return (
        f"{len(plan.runs)} designed runs of {subset_size:,} rows out of {_eligible(plan, rows)}: "
        f"{len(plan.subsets)} subsets chosen from {count:,} (seeds {first} to {first + count - 1}), "
        f"{len(plan.repeats)} of them repeated with another training seed, "
        f"{sum(d.design['dropped'] is not None for d in plan.subsets)} without one of the sources."
    )


def _eligible(plan: DesignPlan | MergedPlan, rows: int) -> str:
    kept_out = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in plan.ineligible.items() if n)
    return f"{plan.eligible:,} eligible of {rows:,}{f' (left out: {kept_out})' if kept_out else ''}"


def merged_heading(plan: MergedPlan, rows: int) -> str:
    """One sentence, as `design_heading`."""
    b = plan.blocks
    return (
        f"{len(b.mixtures)} merged runs, each a mixture of {len(b.rows)} blocks of {b.block_size:,} rows that are "
        f"finetuned on once, out of {_eligible(plan, rows)}; {b.twins} of them are trained, too, on {b.subset_size:,} "
        "rows in the shares of the mixture (twins)."
    )


def merged_lines(plan: MergedPlan, evaluated: int, recipe: dict[str, Any]) -> list[str]:
    """How far the blocks lie apart, and the cost in runs, by rows: forward 1, backward 2 (`evaluated` rows a run)."""
    b = plan.blocks

    def cost(rows: int) -> float:
        return 3 * run_length_of(recipe, rows)[1] * rows + evaluated

    run, blocks, mixed = cost(b.subset_size), len(b.rows) * cost(b.block_size), len(b.mixtures) * evaluated
    spread = ", ".join(f"{label} {sd:.2f}" for label, sd in zip(plan.labels, plan.spread, strict=True))
    return [
        f"The blocks' means differ by, in sd of the pool: {spread}.",
        f"Cost, by rows (forward 1, backward 2; {evaluated:,} rows of evaluation): as much as "
        f"{(blocks + mixed) / run + b.twins:.1f} runs of {b.subset_size:,} rows: {len(b.rows)} blocks "
        f"{blocks / run:.1f}, {b.twins} twins {b.twins}, {len(b.mixtures)} evaluations {mixed / run:.1f}.",
        f"Merged runs share the noise of the finetunes of their {len(b.rows)} blocks: a refit counts them as so many.",
    ]


FEW_STEPS = 100
"""Below, subsets seldom differ by more than repeats: at 2e-4 three very different ones differed by sd 0.0016."""


def steps_lines(recipe: dict[str, Any], rows: int) -> list[str]:
    """How many optimiser steps a run of `rows` has by the recipe, and a warning where they are few."""
    rate = (recipe.get("model") or {}).get("learning_rate") or 2e-4
    steps, epochs = run_length_of(recipe, rows)
    text = f"Each run takes {steps:,} optimiser steps ({rows:,} rows, {epochs_text(epochs)}) at learning rate {rate:g}."
    if steps >= FEW_STEPS:
        return [text]
    return [
        text,
        f"FEW STEPS: below {FEW_STEPS} subsets may differ by no more than repeats of one. Take larger subsets, more "
        "epochs, smaller batches or a higher learning rate; after six runs im-lightning runs says how far they differ.",
    ]


def design_report(plan: DesignPlan | MergedPlan, lines: list[str], out: str) -> tuple[dict[str, Any], str]:
    """Heading, the table of regressors, what the numbers say, sources, cost: as numbers with the sentences, and as
    text."""
    width, q = terminal_width(), plan.quality
    columns = [
        Column("regressor", right=False),
        Column("pool sd", rank=3),
        Column("sd of run means", rank=2),
        Column("VIF"),
        Column("standard error"),
        Column("reach", rank=1),
    ]
    rows = [
        [label, f"{sd:.3g}", f"{spread:.3f}", _number(vif, ".2f"), _number(error, ".3g"), f"{reach:.2f}"]
        for label, sd, spread, vif, error, reach in zip(
            plan.labels, plan.pool_sd, q.spread, q.vif, q.errors, q.reach, strict=True
        )
    ]
    said = [
        "sd of run means and reach are in sd of the pool's examples; the standard error of a coefficient is for one "
        "pool sd, in units of the residual sd of log loss (divide by pool sd for the coefficient of a rule file)",
        f"condition number {_number(q.condition_number, '.1f')} of the standardised design; runs lie up to "
        f"{q.largest_distance:.2f} from their mean (Mahalanobis), so a rule may move a subset's mean as far as "
        f"{q.tilt:.2f}, which along each regressor is its reach",
    ]
    if math.isfinite(plan.gain):
        said.append(
            f"choosing the seeds tells as much as {plan.gain:.2f} times as many runs with seeds as they come would "
            "(D-efficiency)"
        )
    lost = [label for label, error in zip(plan.labels, q.errors, strict=True) if math.isinf(error)]
    if lost:
        said.append(
            f"NOT TOLD APART: {', '.join(lost)} do not vary in the pool, or are combinations of each other; leave "
            "some out of the fit (refit --indicators)"
        )
    high = [f"{n} ({v:.1f})" for n, v in zip(plan.labels, q.vif, strict=True) if COLLINEAR_VIF < v < math.inf]
    if high or COLLINEAR_CONDITION < q.condition_number < math.inf:
        said.append(
            f"COLLINEAR: {', '.join(high) or 'see the condition number'}: their single coefficients will be vague; "
            "a larger --subset-tilt, more runs, or fewer regressors (refit --indicators) help"
        )
    if len(plan.source_runs) > 1:
        each = ", ".join(f"{n} {out}/{half}" for n, (out, half) in plan.source_runs.items())
        said.append(f"subsets without each source / of which it is at least half: {each}")
        if plan.without_quota:
            named = ", ".join(plan.without_quota)
            said.append(
                f"too few of either for a test of the rule on a source it has not seen: {named}; make more runs"
            )
    body = [wrapped(lines[0], width), "", text_table(columns, rows, width), ""]
    numbers = {"vif": q.vif, "standard_error": q.errors, "spread": q.spread, "reach": q.reach, "pool_sd": plan.pool_sd}
    names = ("condition_number", "largest_distance", "tilt", "rank", "log_det")
    record = {
        "out": out,
        "runs": len(plan.blocks.mixtures if isinstance(plan, MergedPlan) else plan.runs),
        "eligible": plan.eligible,
        "ineligible": plan.ineligible,
        "regressors": {n: {k: v[j] for k, v in numbers.items()} for j, n in enumerate(plan.labels)},
        "quality": {name: getattr(q, name) for name in names} | {"gain": plan.gain},
        "not_told_apart": lost,
        "notes": [*lines, *said],
    }
    return record, "\n".join([*body, *(wrapped(line, width, bullet="- ") for line in [*said, *lines[1:]])])


def _number(value: float, form: str) -> str:
    return "∞" if math.isinf(value) else format(value, form)


def run_values(plan: DesignPlan, training_seed: int) -> list[str]:
    """What is a run's own, as `fit` reads it after the recipe. A run is a *pair* of seeds, which a grid over two
    parameters cannot say without crossing them; so both stand in one `config` parameter."""
    pairs = [(d.design["seed"], training_seed) for d in plan.subsets]
    pairs += [(d.design["seed"], training_seed + 1) for d in plan.repeats]
    # data.seed orders the rows; under full finetuning the training seed alone would decide nothing
    return [f"{{seed_everything: {t}, data: {{subset_seed: {subset}, seed: {t}}}}}" for subset, t in pairs]


def merged_values(blocks: Blocks, training_seed: int) -> list[str]:
    """Likewise for what is trained of merged runs: the blocks, then the twins."""
    purpose = {} if blocks.block_size == blocks.subset_size else {"purpose": "block"}
    runs = [({name: 1.0}, blocks.block_size, purpose) for name in blocks.rows]
    runs += [(mixture, blocks.subset_size, {}) for mixture in blocks.mixtures[: blocks.twins]]
    values = []
    for seed, (shares, size, more) in enumerate(runs):
        data = {"subset_mixture": shares, "subset_size": size, "subset_seed": seed, "seed": training_seed, **more}
        one = yaml.safe_dump({"seed_everything": training_seed, "data": data}, default_flow_style=True, width=1e9)
        values.append(one.strip())
    return values


def sweep_text(
    values: list[str],
    config: list[str],
    fixed: dict[str, Any],
    metric: str | None,
    lines: list[str],
    out: str,
    sets: list[str],
    ledger: str = "runs",
) -> str:
    """The sweep file of the runs of these `values`, of a recipe and the arguments that win over it; their `ledger` is
    named in the command that fits a rule on them."""
    head = {
        "name": Path(out).stem,
        "description": " ".join(lines),
        "program": "im-lightning",
        "command": ["${env}", "im-lightning", "fit", "--config", *config, "${args}"],
        "method": "grid",
        **({} if metric is None else {"metric": {"name": metric, "goal": "minimize"}}),
    }
    text = f"{MADE}. Make them, then fit a rule:\n#\n"
    text += f"#   im-lightning sweep {out}        (or: wandb sweep {out}, then wandb agent …)\n"
    which = f" --evaluation {sets[0]}" if len(sets) > 1 else ""
    folder, rule = (shlex.quote(str(path)) for path in (ledger, Path(ledger) / "rule.json"))
    text += f"#   im-lightning refit {folder} --out {rule}{which}\n\n"
    text += yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=110)
    text += "parameters:\n"
    for name, value in fixed.items():
        text += f"  {name}: {{value: {json.dumps(value, ensure_ascii=False)}}}\n"
    text += "  config:      # what is each run's own: its training seed and its rows\n    values:\n"
    return text + "".join(f'      - "{value}"\n' for value in values)

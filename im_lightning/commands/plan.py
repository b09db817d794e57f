"""`im-lightning plan`: whether scoring, runs and selection can pay for a pool, before they are made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from im_lightning.commands.runs import open_ledger
from im_lightning.errors import RequestError, message
from im_lightning.experiments.plan import PlanSettings

if TYPE_CHECKING:
    from im_lightning.ledger.record import RunRecord
    from im_lightning.models.cost import Cost

SUMMARY = "say whether scoring, runs and selection can pay for a pool, or whether to train on everything"
EXAMPLE = (
    "im-lightning plan --rows 50000 --model smollm2 --ledger runs/ --compare compare/compare.json --budget-hours 8"
)


def run(
    settings: PlanSettings,
    model: str | None = None,
    revision: str | None = None,
    ledger: str | None = None,
    compare: str | None = None,
    scores: str | None = None,
) -> int:
    """Weighs what evidence costs against what a finetune on all rows costs, in FLOPs and in time.

    Nothing is trained or scored. What a ledger, a comparison with --curve and a score table know is used; what none of
    them knows is named. The break-even is a pool size: below it, train on everything.

    Args:
        settings: What is asked.
        model: Base model, for its parameters; by default that of the ledger's runs.
        revision: Branch, tag or commit of a hub id.
        ledger: Folder of runs on that base: what one costs, and how fast the machine is.
        compare: The compare.json of `im-lightning compare --curve`: what chosen rows are worth.
        scores: Score table, for what scoring a row cost (its .cost.json).
    """
    from im_lightning._utils.answer import answer
    from im_lightning._utils.text_tables import terminal_width
    from im_lightning.experiments.plan import Plan, usual_tokens, workload, worth_of
    from im_lightning.experiments.ways import way_of
    from im_lightning.models.cost import base_parameters
    from im_lightning.report.inputs import read_comparison

    settings.check()
    missing: list[str] = []
    parameters = math.nan if model is None else base_parameters(model, revision)
    records = [] if ledger is None else _records(ledger, parameters, missing)
    comparison = None if compare is None else read_comparison(compare)
    worth, lacking = worth_of(comparison)
    work = workload(settings, records, parameters, None if scores is None else _scored(scores))
    if math.isnan(work.trained.flops):
        missing.append("the operations of a row (--model and --row-tokens, or a ledger of this version)")
    if math.isnan(work.trained.seconds):
        missing.append("how fast the machine is, so hours cannot be weighed (--ledger: one run of the base is enough)")
    elif math.isnan(work.run.seconds):
        missing.append("what a designed run took, which none of the ledger's says (--subset-size reckons it by rows)")
    elif settings.row_tokens is not None and math.isnan(usual_tokens(records)):
        missing.append("how long the ledger's rows are, so that --row-tokens does not change the time")
    if lacking:
        missing.append(lacking)
    curve = [] if comparison is None else (comparison.get("curve") or {}).get("points", [])
    spent = sum(r.purpose == "designed" for r in records)
    found = Plan(settings, work, worth, missing, curve, spent, way_of(records))
    answer(found.to_json(), found.text(terminal_width()))
    return 0


def _records(ledger: str, parameters: float, missing: list[str]) -> list[RunRecord]:
    """Runs of one base: those of `parameters`, or of the only one that there is."""
    records = open_ledger(ledger).records()
    bases = {size for r in records if (size := r.compute.get("parameters")) is not None}
    if math.isnan(parameters) and len(bases) > 1:
        cause = f"its runs are of {len(bases)} bases ({', '.join(f'{size:,.0f}' for size in sorted(bases))} parameters)"
        raise RequestError(message(f"--ledger {ledger}", cause, "say which with --model"))
    found = [r for r in records if math.isnan(parameters) or r.compute.get("parameters") in (None, parameters)]
    if len(found) < len(records):
        missing.append(
            f"what {len(records) - len(found)} runs of the ledger would take on this base: theirs is another"
        )
    return found


def _scored(scores: str) -> Cost:
    """What scoring a row cost."""
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.models.cost import read_cost

    cost = read_cost(scores)
    if cost is None:
        remedy = "leave it out: one forward pass over the pool is then counted"
        raise RequestError(message(f"--scores {scores}", "what its scoring cost was not noted beside it", remedy))
    return cost * (1 / max(1, len(ScoreTable.read(scores))))

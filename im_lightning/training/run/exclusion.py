"""What a run leaves out of its pool for the evaluation sets, whose rows are no targets, and why each row was drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from im_lightning.data.overlap.keys import EXACT, USUAL, Mask, check_exclusion
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.ledger.record import RunRecord
from im_lightning.sampling.rows import Choice
from im_lightning.sampling.selection.decisions import Decisions
from im_lightning.scoring.passes.targets import check_targets
from im_lightning.scoring.settings import Setup
from im_lightning.training.evaluation import EvalSet
from im_lightning.training.run import run_folder
from im_lightning.training.run.encoded_pool import Pool, set_names
from im_lightning.training.run.run_folder import RunInputs


def exclusion_of(inputs: Mapping[str, Any]) -> str:
    """What a run leaves out of the pool for its evaluation sets; inputs of earlier versions do not say."""
    return str(inputs.get("exclude", EXACT))


def settle_exclusion(asked: str | None, records: Sequence[RunRecord]) -> str:
    """What an experiment leaves out of its pool for the evaluation sets: what is asked for, else what its runs left
    out, else the usual. Runs of earlier versions, which do not say, left out rows of the same content alone."""
    if asked is not None:
        check_exclusion(asked)
        return asked
    before = [str(r.subset.get("exclude", EXACT)) for r in records if r.subset.get("size")]
    return before[-1] if before else USUAL


def check_target_rows(setup: Setup, options: Any, pool: Pool, eval_sets: Mapping[str, EvalSet]) -> None:
    """Refuses target rows that the pool or an evaluation set holds, too; as `check_targets`."""
    paths = set_names(options.eval_data)
    sets = {str(paths.get(name, name)): one.examples for name, one in eval_sets.items()}
    check_targets(setup, {str(options.data or "the pool"): pool.examples, **sets})


def check_scored_targets(table: ScoreTable | None, options: Any, eval_sets: Mapping[str, EvalSet]) -> None:
    """Refuses to evaluate on rows that were targets when the table was scored; of a table the ids alone are known.

    Raises:
        RequestError: names the set and what the targets were.
    """
    targets = {} if table is None else table.meta.get("targets") or {}
    known, paths = set(targets.get("ids", ())), set_names(options.eval_data)
    for name, one in eval_sets.items():
        if shared := [row for row, id in enumerate(one.ids) if id in known]:
            of = f"{options.scores or 'the pool'} was scored towards ({targets['data'] or 'target rows'})"
            cause = f"{len(shared):,} of its {len(one.ids):,} rows are among those that {of}, first row {shared[0]}"
            remedy = "evaluate on other rows, or score towards others (im-lightning score --targets)"
            raise RequestError(message(f"eval_data {paths.get(name, name)}", cause, remedy))


def keep_decisions(run: RunInputs, choice: Choice, left_out: Mapping[str, Mask], pool: Pool) -> None:
    """Writes why each row was drawn or not into the run's folder, for `im-lightning explain`; once per draw."""
    if run.table is None or run.scored is None:
        return
    path = run.folder / "decisions" / f"{run_folder.subset_path(run.folder, choice.draw_inputs).stem}.parquet"
    decided = Decisions(np.ones(len(run.table), dtype=np.bool_))
    for reason, mask in left_out.items():
        decided.without(~mask, reason.replace("_", " "))
    decided.without(run.weights.eligible, "the rule has no prediction of it")
    groups = pool.groups(choice)
    if not choice.replacement and choice.budget is not None:
        decided.first_draw(run.weights.weights, choice.budget, groups)
    if run.rows is not None:
        if groups is not None:
            answered = np.full(int(groups.max()) + 1, -1, dtype=np.int64)
            answered[groups[run.rows]] = run.rows
            decided.one_per_prompt(groups, answered)
        decided.take(run.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    decided.write(path, run.table, run.rule, drawn=run.rows is not None, phi=run.scored.phi)

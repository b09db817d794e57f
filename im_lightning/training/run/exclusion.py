"""What a run leaves out of its pool for the evaluation sets, and why each row of a weighted fit was drawn or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from im_lightning.data.overlap.keys import EXACT, USUAL, Mask, check_exclusion
from im_lightning.ledger.record import RunRecord
from im_lightning.sampling.rows import Choice
from im_lightning.sampling.selection.decisions import Decisions
from im_lightning.training.run import run_folder
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


def keep_decisions(
    run: RunInputs, choice: Choice, left_out: Mapping[str, Mask], groups: np.ndarray | None = None
) -> None:
    """Writes why each row was drawn or not into the run's folder, for `im-lightning explain`; once per draw. `groups`
    are the prompts, int64 [N], where one row of each is drawn at most."""
    if run.table is None or run.scored is None:
        return
    path = run.folder / "decisions" / f"{run_folder.subset_path(run.folder, choice.draw_inputs).stem}.parquet"
    decided = Decisions(np.ones(len(run.table), dtype=np.bool_))
    for reason, mask in left_out.items():
        decided.without(~mask, reason.replace("_", " "))
    decided.without(run.weights.eligible, "the rule has no prediction of it")
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

"""How many runs a fit needs, how many there are, and the command that makes the next one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import default_regressors
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.regime import Regime, describe, group_regimes


def runs_missing(
    records: Iterable[RunRecord],
    p: int | None = None,
    evaluation: str | None = None,
    regime: str | None = None,
) -> int:
    """How many more designed runs a fit needs: n ≥ p + 3, counted as `fit_rule` counts.

    Args:
        records: The ledger's runs, of any purpose and status.
        p: Number of regressors; by default that of the default regressors in the runs.
        evaluation: Evaluation set; needed only where the runs have several.
        regime: Id of a run: only runs of its regime count. By default the regime with most designed runs.

    Returns:
        0 where there are enough. Without any complete designed run and without `p`: the number for one regressor.

    Raises:
        RequestError: several evaluation sets and none named.
    """
    complete = [r for r in records if r.status == "complete"]
    designed = [r for r in complete if r.purpose == "designed"]
    if not designed:
        return (p or 1) + 3
    evaluation = choose_evaluation(designed, evaluation)
    designed = [r for r in designed if has_loss(r, evaluation)]
    names = default_regressors(n for r in designed for n in r.phi_means)
    groups = group_regimes(designed, names, evaluation)
    run = None if regime is None else next((r for r in complete if r.run_id == regime), None)
    if run is not None:
        groups = [g for g in groups if g.takes(*describe(run, names, evaluation))]
    if not groups:
        return (p or max(1, len(names))) + 3
    p = p or max(1, len(groups[0].transforms))
    n = len(groups[0].records)
    if n < p + 3:
        n += len(weighted_of(complete, groups[:1], names, evaluation))
    return max(0, p + 3 - n)


def choose_evaluation(records: Sequence[RunRecord], evaluation: str | None) -> str:
    """The evaluation set to fit: the named one, or the only one.

    Raises:
        RequestError: none has the named one, or there are several and none is named.
    """
    counts = Counter(name for r in records for name in r.evaluation)
    listed = ", ".join(f"{name} ({n} runs)" for name, n in counts.items()) or "none"
    if evaluation is not None:
        if evaluation not in counts:
            cause = f"no complete designed run was evaluated on it; the evaluation sets are {listed}"
            raise RequestError(message(f"evaluation set {evaluation!r}", cause, "name one of these with --evaluation"))
        return evaluation
    if len(counts) != 1:
        cause = f"a rule predicts one evaluation loss, and the runs have {len(counts)} sets: {listed}"
        raise RequestError(message("refit", cause, "name one with --evaluation"))
    return next(iter(counts))


def count_runs(records: Sequence[RunRecord]) -> str:
    """`12 designed, 3 weighted, 1 incomplete designed`; `none` for none."""
    counts = Counter(r.purpose if r.status == "complete" else f"{r.status} {r.purpose}" for r in records)
    return ", ".join(f"{n} {name}" for name, n in counts.items()) or "none"


def fit_command(records: Sequence[RunRecord]) -> str:
    """The command that makes the next designed run: the runs' subset size and the first unused subset seed."""
    designed = [r for r in records if r.purpose == "designed"]
    sizes = {r.subset.get("size") for r in designed if r.subset.get("size")}
    size = sizes.pop() if len(sizes) == 1 else "N"
    seed = next_seed(designed)
    return f"im-lightning fit … --data.subset_size={size} --data.subset_seed={'K' if seed is None else seed}"


def more_runs(records: Sequence[RunRecord], missing: int) -> str:
    """What to do about missing runs, with the command: `make 4 more designed runs: ... (seeds 24 to 27)`."""
    seed = next_seed([r for r in records if r.purpose == "designed"])
    seeds = f" (subset seeds {seed} to {seed + missing - 1})" if missing > 1 and seed is not None else ""
    what = "another designed run" if missing == 1 else f"{missing} more designed runs"
    return f"make {what}: `{fit_command(records)}`{seeds}"


def next_seed(designed: Sequence[RunRecord]) -> int | None:
    seeds = [s for r in designed if isinstance(s := r.subset.get("seed"), int)]
    if designed and not seeds:
        return None
    return max(seeds, default=-1) + 1


def has_loss(record: RunRecord, evaluation: str) -> bool:
    """Whether the run has a finite positive loss on the evaluation set; a diverged one has not."""
    loss = record.loss(evaluation)
    return math.isfinite(loss) and loss > 0


def weighted_of(
    complete: Iterable[RunRecord], regimes: Sequence[Regime], names: Sequence[str], evaluation: str
) -> list[RunRecord]:
    """The weighted runs that belong to one of these regimes."""
    found = [r for r in complete if r.purpose == "weighted" and has_loss(r, evaluation)]
    groups = group_regimes(found, names, evaluation)
    return [r for g in groups if any(k.takes(g.description, g.transforms) for k in regimes) for r in g.records]

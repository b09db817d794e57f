"""A run's pool scored up front, by all ranks together; target rows, which are neither in the pool nor evaluated on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from im_lightning._utils.force import Force
from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.indicators.base import get_indicators, with_parts
from im_lightning.indicators.built_in import DESIGNED_INDICATORS, names_of
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.scoring.api import load_reference, score
from im_lightning.scoring.columns import DistinctPool
from im_lightning.scoring.passes.base import Pass
from im_lightning.scoring.passes.targets import UNNAMED, check_targets
from im_lightning.scoring.plan import ScoringPlan
from im_lightning.scoring.settings import Setup
from im_lightning.training.distributed.ranks import Ranks, share
from im_lightning.training.evaluation import EvalSet
from im_lightning.training.run.encoded_pool import Pool, set_names


def designed_indicators(reward_model: str | None, unieval_model: str | None) -> tuple[str, ...]:
    """Those, and the paper's others whose model is named."""
    return (
        *DESIGNED_INDICATORS,
        *(names_of("reward_model") if reward_model is not None else ()),
        *(names_of("unieval_model") if unieval_model is not None else ()),
    )


@dataclass(frozen=True)
class Scorer:
    """What a pool is scored for, and how."""

    indicators: tuple[str, ...]
    setup: Setup

    def __call__(self, examples: Sequence[Example]) -> ScoreTable:
        """Scores what the store lacks; does no model work where it lacks nothing."""
        return score(examples, self.indicators, self.setup)

    def measured(self, examples: Sequence[Example]) -> Scorer:
        """Knowing of the whole pool whether answers hold calls or reasoning and, where embeddings are wanted, whether a
        text is too long for their model: what a rank makes of its share is stored under the pool's identity."""
        setup = self.setup
        if any(one.messages[-1].fields for one in examples):
            setup = replace(setup, structured=True)
        wanted = [part for one in get_indicators(self.indicators) for part in with_parts(one)]
        if not any("embedding" in part.needs for part in wanted):
            return Scorer(self.indicators, setup)
        reference = load_reference(setup.models.knn_reference, setup.reading)
        pools = [None if rows is None else DistinctPool(rows) for rows in (examples, reference)]
        return Scorer(self.indicators, setup.measured(*pools))

    def preview(self, rule: LinearRule) -> ScoreTable:
        """The coming table without rows, its keys worked out without a model. Where it is not known yet whether the
        pool has texts too long for the embedding model, it is taken to be as the rule's was."""
        setup = self.setup
        if setup.long_rows is None:
            embeddings = ((rule.identities.get(name) or {}).get("embedding") or {} for name in self.indicators)
            setup = replace(setup, long_rows=sum("long texts" in one for one in embeddings))
        reference = load_reference(setup.models.knn_reference, setup.reading)
        return ScoringPlan([], get_indicators(self.indicators), setup, reference).preview()

    def passes(self, examples: Sequence[Example]) -> list[Pass]:
        """The work on the models that the store lacks: values and vectors of single examples, nothing of the pool, a
        reference or the targets, which is left to the rank that puts the table together."""
        plan = ScoringPlan(examples, get_indicators(self.indicators), self.setup)
        return [each for each in plan.passes if each.pool is plan.pool]


def score_own_share(scorer: Scorer, pool: Pool, ranks: Ranks) -> None:
    """Scores this rank's share of the pool into the store: the work on models, which is nearly all of it.

    The share is a pure function of the pool, so that ranks need not talk: rows sorted by the length of their text,
    dealt in turn.
    """
    scorer = scorer.measured(pool.examples)
    costs = [sum(len(turn.content) for turn in example.messages) for example in pool.examples]
    rows = share(costs, ranks.rank, ranks.world)
    for each in scorer.passes([pool.examples[row] for row in rows]) if rows else []:
        each.run()


def score_together(scorer: Scorer, pool: Pool, ranks: Ranks | None) -> ScoreTable | None:
    """All ranks score their shares, if there are several; rank 0 puts the table together, with what depends on the
    whole pool.

    Returns:
        The table on rank 0, None on the others.
    """
    if ranks is not None:
        score_own_share(scorer, pool, ranks)
        if ranks.rank:
            ranks.finish()
            return None
        ranks.wait_for_all()
    table = scorer(pool.examples)
    table.note_refused(pool.rejected)
    return table


def check_coming(rule: LinearRule | None, scorer: Scorer, force: Force) -> None:
    """Refuses a rule for what the pool is going to be scored by, before it is; `rule.check` says the rest afterwards.

    Raises:
        RequestError: as `LinearRule.check`.
    """
    if rule is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rule.check(scorer.preview(rule), force)


def check_target_rows(setup: Setup, options: Any, pool: Pool, eval_sets: Mapping[str, EvalSet]) -> None:
    """Refuses target rows that the pool or an evaluation set holds, too; as `check_targets`."""
    paths = set_names(options.eval_data)
    sets = {str(paths.get(name, name)): one.examples for name, one in eval_sets.items()}
    data = options.data or UNNAMED
    check_targets(setup, {data if isinstance(data, str) else " ".join(data): pool.examples, **sets})


def check_scored_targets(table: ScoreTable, options: Any, eval_sets: Mapping[str, EvalSet]) -> None:
    """Refuses to evaluate on rows that were targets when the table was scored; of a table the ids alone are known.

    Raises:
        RequestError: names the set and what the targets were.
    """
    targets = table.meta["targets"]
    known, paths = set(targets.get("ids", ())), set_names(options.eval_data)
    for name, one in eval_sets.items():
        if shared := [row for row, id in enumerate(one.ids) if id in known]:
            of = f"{options.scores or 'the pool'} was scored towards ({targets['data'] or 'target rows'})"
            cause = f"{len(shared):,} of its {len(one.ids):,} rows are among those that {of}, first row {shared[0]}"
            remedy = "evaluate on other rows, or score towards others (im-lightning score --targets)"
            raise RequestError(message(f"eval_data {paths.get(name, name)}", cause, remedy))

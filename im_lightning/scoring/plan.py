"""From examples and indicators to a table: what the store lacks is computed, one pass per model, and joined to rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.indicators.base import EMPTY_RESPONSE, Indicator, Reference, Scores, with_parts
from im_lightning.scoring.columns import DistinctPool, VectorWork, Work, combined_numerics, finite
from im_lightning.scoring.passes.base import EmbeddingPass, Pass, TextPass, TokenPass
from im_lightning.scoring.passes.language_model import LanguageModelPass
from im_lightning.scoring.passes.reward_and_unieval import ScorerPass, scorer_passes
from im_lightning.scoring.passes.targets import GradientPass, TunedPass
from im_lightning.scoring.report import Coverage
from im_lightning.scoring.settings import Setup
from im_lightning.scoring.store import Store, check_writable

LONG = "longer than the embedding model takes, embedded in parts"
_MEASURED_FROM_SECONDS = 5.0  # measuring the matmul rate takes half a second


class ScoringPlan:
    """What has to be done for a pool: the stored indicators, the passes they need, the pool-dependent ones after.

    Reads the store and computes nothing; loads no model.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        indicators: Sequence[Indicator],
        setup: Setup,
        reference: Sequence[Example] | None = None,
    ) -> None:
        self.indicators = list(indicators)  # those asked for, in order
        self.pool = DistinctPool(examples)
        if self.pool.structured and not setup.structured:
            setup = replace(setup, structured=True)
        self._parts = {each.name: with_parts(each) for one in indicators for each in with_parts(one)}
        self.wanted = wanted = {name: parts[-1] for name, parts in self._parts.items()}
        setup.require_models(wanted.values())
        dependent = any(_beside_the_pool(i) for i in wanted.values())
        self.reference = reference_pool(reference) if dependent and reference is not None else None
        self.searched = len(self.pool if self.reference is None else self.reference)  # among which neighbours are found
        self.setup = setup = setup.measured(self.pool, self.reference) if dependent else setup
        self.pool_key = {"pool": self.pool.digest()} if dependent and self.reference is None else {}
        stored = [i for i in wanted.values() if not i.derived_from]  # those that others are derived from included
        exact = setup.numerics.precision == "fp32"  # asked for: then values in bf16 are no answer
        self.works = {i.name: Work(self.pool, i, self._store(i, exact)) for i in stored}
        self.vectors: VectorWork | None = None
        self.reference_vectors: VectorWork | None = None
        self.gradients: VectorWork | None = None
        self.target_gradients: VectorWork | None = None
        lacking = [work.indicator for work in self.works.values() if work.missing.any()]
        if any(_beside_the_pool(indicator) for indicator in lacking):
            store = Store(setup.root, "embedding", *setup.of_vectors("embeddings"), exact)
            self.vectors = VectorWork(self.pool, store)
            if self.reference is not None:
                self.reference_vectors = VectorWork(self.reference, store)
        if any("gradient" in indicator.needs for indicator in lacking) and setup.targets is not None:
            store = Store(setup.root, "gradient", *setup.of_vectors("gradients"), exact)
            self.gradients = VectorWork(self.pool, store, "gradients")
            self.target_gradients = VectorWork(setup.targets, store, "gradients")
        self.passes = [p for p in self._passes() if len(p.rows())]

    def check(self) -> None:
        """Before any work: whether the models, by their settings, and packages are those that all of it takes.

        Raises:
            RequestError: they are not.
        """
        for each in self.passes:
            if isinstance(each, ScorerPass):
                each.check()
        for work in self.works.values():
            if _beside_the_pool(work.indicator) and work.missing.any():
                work.indicator.check_pool(self.searched, str(self.setup.torch_device))

    def key(self, indicator: Indicator) -> dict[str, Any]:
        """The table's key of an indicator: identity, numerics, and the pool's digest where it depends on the pool."""
        key: dict[str, Any] = {"identity": self._identity(indicator)}
        work = self.works.get(indicator.name)
        key["numerics"] = work.numerics() if work is not None else self._numerics_of_parts(indicator)
        return {**key, **self.pool_key} if any(map(_beside_the_pool, self._parts[indicator.name])) else key

    def _numerics_of_parts(self, indicator: Indicator) -> dict[str, Any]:
        """How the values were computed that a derived indicator is calculated from."""
        own = [self.works[one.name].numerics() for one in self._parts[indicator.name] if one.name in self.works]
        kinds = [kind for one in own for kind in one.get("several", [one])]
        kinds = [kind for kind in kinds if "precision" in kind] or kinds
        return combined_numerics([(kind, 1) for place, kind in enumerate(kinds) if kind not in kinds[:place]], None)

    @property
    def meta(self) -> dict[str, Any]:
        """What the table keeps: the ids of the target rows, so that no evaluation set shares any later."""
        used = any({"tuned", "gradient"} & set(one.needs) for one in self.wanted.values())
        if not used or (targets := self.setup.targets) is None:
            return {}
        return {"targets": {"data": self.setup.models.targets, "ids": targets.ids.to_pylist()}}

    def preview(self) -> ScoreTable:
        """The coming table without rows: its columns and keys, as far as they are known before the work."""
        empty = {indicator.name: np.empty(0) for indicator in self.indicators}
        keys = {
            one.name: {"identity": self._identity(one), "numerics": self.setup.numerics_of(one)}
            for one in self.indicators
        }
        return ScoreTable(np.empty(0, dtype=np.int64), [], [], empty, keys=keys)

    def _identity(self, indicator: Indicator) -> dict[str, Any]:
        identity = self.setup.identity_of(indicator)
        if self.reference is not None and any(map(_beside_the_pool, self._parts[indicator.name])):
            identity["reference"] = self.reference.digest()
        return identity

    def _store(self, indicator: Indicator, exact: bool) -> Store:
        identity = self._identity(indicator)
        key = {**identity, **self.pool_key} if _beside_the_pool(indicator) else identity
        numerics = self.setup.numerics_of(indicator)
        if indicator.pool_dependent:
            numerics = {**numerics, **indicator.pool_numerics(self.searched, str(self.setup.torch_device))}
        return Store(self.setup.root, indicator.name, key, numerics, exact)

    def _passes(self) -> list[Pass]:
        each = [work for work in self.works.values() if not work.indicator.pool_dependent]
        text = [w for w in each if set(w.indicator.needs) <= {"text"}]
        model = [w for w in each if {"conditional", "unconditional"} & set(w.indicator.needs)]
        scored = [w for w in each if {"reward", "unieval"} & set(w.indicator.needs)]
        tuned = [w for w in each if "tuned" in w.indicator.needs]
        tokens = [w for w in each if w not in text and w not in model and w not in scored and w not in tuned]
        pooled = self.vectors if self.setup.models.embedding_model is None else None
        passes: list[Pass] = [TextPass(self.pool, text, None, self.setup)]
        if any(w.missing.any() for w in model) or (pooled is not None and pooled.missing.any()):
            passes.append(LanguageModelPass(self.pool, [*tokens, *model], pooled, self.setup))
        else:
            passes.append(TokenPass(self.pool, tokens, None, self.setup))
        if self.vectors is not None and self.setup.models.embedding_model is not None:
            passes.append(EmbeddingPass(self.pool, [], self.vectors, self.setup))
        if self.reference is not None and self.reference_vectors is not None:
            label = "embeddings of the reference"
            passes.append(vectors_pass(self.reference, self.reference_vectors, self.setup, label))
        if tuned:
            passes.append(TunedPass(self.pool, tuned, None, self.setup))
        for pool, vectors in ((self.setup.targets, self.target_gradients), (self.pool, self.gradients)):
            if pool is not None and vectors is not None:
                passes.append(GradientPass(pool, [], vectors, self.setup))
                passes[-1].label += " of the targets" if pool is not self.pool else ""
        if scored:
            passes += scorer_passes(self.pool, scored, self.setup)
        return passes


def execute(plan: ScoringPlan, run: Callable[[Pass], None] = Pass.run) -> tuple[ScoreTable, Coverage]:
    """Runs the passes of a plan, each by `run`, and joins everything to the rows of the pool.

    Raises:
        RequestError: a model cannot be used; InstructMiningError: the cache cannot be written.
    """
    plan.check()
    if plan.passes or any(w.missing.any() for w in plan.works.values()):
        check_writable(plan.setup.root)
    coverage = Coverage(plan.pool)
    for each in plan.passes:
        vectors = plan.reference_vectors
        if vectors is not None and each.vectors is vectors and _made_meanwhile(plan, vectors, each):
            continue
        run(each)
        flops = each.operations(each.tokens)
        coverage.add_step(each.label, each.seconds, each.tokens, _share_of_limit(each), flops)
    _pool_dependent(plan, coverage)
    columns = {name: work.scores() for name, work in plan.works.items()}
    for indicator in plan.wanted.values():
        if indicator.derived_from:
            columns[indicator.name] = finite(indicator.name, indicator.derive(columns))
    for indicator in plan.indicators:
        coverage.add_column(indicator.name, columns[indicator.name], plan.works.get(indicator.name))
        if "embedding" in indicator.needs and plan.setup.long_own:
            coverage.columns[-1].notes[LONG] = plan.setup.long_own
    return _table(plan, columns), coverage


def _made_meanwhile(plan: ScoringPlan, vectors: VectorWork, each: Pass) -> bool:
    """Whether the pass over the pool has made all that this one over the reference lacks: they may share rows."""
    if plan.vectors is None or not plan.vectors.computed:
        return False
    if pc.any(pc.is_in(vectors.pool.ids, value_set=plan.pool.ids)).as_py():
        vectors.look_again()
    return not len(each.rows())


def _share_of_limit(each: Pass) -> float | None:
    """Useful operations per second beside the machine's matmul rate; None where it is not worth measuring."""
    seconds = each.seconds - each.loading
    if not each.flops or seconds < _MEASURED_FROM_SECONDS:
        return None
    from im_lightning.models.device import matmul_rate

    return each.flops / seconds / matmul_rate(each.number_format.dtype, each.setup.torch_device, each.width)


def _pool_dependent(plan: ScoringPlan, coverage: Coverage) -> None:
    """All pool-dependent indicators of a class together, over the distinct examples and how often each occurs."""
    groups: dict[type[Indicator], list[Work]] = {}
    for work in plan.works.values():
        if work.indicator.pool_dependent and work.missing.any():
            groups.setdefault(type(work.indicator), []).append(work)
    pool, device = plan.pool, str(plan.setup.torch_device)
    for kind, works in groups.items():
        start = time.monotonic()
        group = [work.indicator for work in works]
        fixed, vectors, beside = plan.reference, plan.vectors, plan.reference_vectors
        if not _beside_the_pool(group[0]):
            fixed, vectors, beside = plan.setup.targets, plan.gradients, plan.target_gradients
        if vectors is None:
            continue
        searched = len(pool if fixed is None else fixed)
        whole = not any(v is not None and v.incomplete for v in (vectors, beside))
        width = max(1, *(v.vectors.shape[1] for v in (vectors, beside) if v is not None))
        reference = _reference(pool, fixed, beside, width)
        found = kind.compute_pool(group, vectors.of_width(width), device, pool.counts(), reference)
        coverage.add_step(", ".join(w.name for w in works), time.monotonic() - start)
        for work, scores in zip(works, found, strict=True):
            numerics = kind.pool_numerics(searched, device)
            work.store.numerics = {**vectors.numerics(), **numerics}  # its digits are those of the vectors
            at = np.flatnonzero(work.missing)
            reasons = [scores.reasons[i] for i in at]
            if plan.setup.models.embed == "response":
                empty = [not pool.examples[i].response.strip() for i in at]
                reasons = [EMPTY_RESPONSE if e and r else r for e, r in zip(empty, reasons, strict=True)]
            work.put(at, Scores(scores.values[at], reasons))
            if whole:  # else the lack of memory here would be stored as a fact about this pool, in all of its rows
                work.flush()


def reference_pool(examples: Sequence[Example]) -> DistinctPool:
    """The fixed examples that pool-dependent indicators compare with; a RequestError where there are none."""
    if not examples:
        raise RequestError(message("the reference of knn", "it has no rows", "name data with rows in --knn-reference"))
    return DistinctPool(examples)


def vectors_pass(pool: DistinctPool, vectors: VectorWork, setup: Setup, label: str) -> Pass:
    """Vectors of examples alone; once they are stored, no later scoring makes them again."""
    kind: type[Pass] = LanguageModelPass if setup.models.embedding_model is None else EmbeddingPass
    made = kind(pool, [], vectors, setup)
    made.label = label
    return made


def _reference(
    pool: DistinctPool, fixed: DistinctPool | None, vectors: VectorWork | None, width: int
) -> Reference | None:
    if fixed is None or vectors is None:
        return None
    own = pc.fill_null(pc.index_in(pool.ids, value_set=fixed.ids), -1)
    return Reference(vectors.of_width(width), fixed.counts(), own.to_numpy().astype(np.int64))


def _beside_the_pool(indicator: Indicator) -> bool:
    """Whether an indicator compares an example with the others of the pool, or those of a reference in its place."""
    return indicator.pool_dependent and "gradient" not in indicator.needs


def _table(plan: ScoringPlan, columns: dict[str, Scores]) -> ScoreTable:
    codes, rows = plan.pool.codes, plan.pool.rows
    values: dict[str, np.ndarray] = {}
    reasons: dict[str, list[str | None]] = {}
    for indicator in plan.indicators:
        scores = columns[indicator.name]
        values[indicator.name] = scores.values[codes]
        if np.isnan(scores.values).any():
            reasons[indicator.name] = [scores.reasons[code] for code in codes]
    return ScoreTable(
        np.arange(len(rows)),
        [example.id for example in rows],
        [example.source for example in rows],
        values,
        reasons,
        {indicator.name: plan.key(indicator) for indicator in plan.indicators},
        plan.meta,
    )

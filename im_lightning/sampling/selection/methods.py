"""The methods of choosing rows: for each a row of the registry and a function that fills the basket with its rows.

`select_subset`, `im-lightning select` and `im-lightning compare` read what they must know of a method from its row, so
that a new method is a function under `@selection_method(…)`, here or in a file of a user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import source_codes
from im_lightning.sampling.draws.systematic import Floats, Rows, checked_weights, group_sums, systematic_sample
from im_lightning.sampling.selection.decisions import Basket, Decisions, unit_vectors
from im_lightning.sampling.selection.targeted import Targets
from im_lightning.sampling.weights.quality_weights import RowWeights


@dataclass
class Candidates:
    """What a method chooses from, and the basket it fills."""

    table: ScoreTable  # scores of the pool, N rows
    # bool [N], rows that may be chosen: eligible, with a prediction where there is a rule, and with what the method
    # needs
    usable: NDArray[np.bool_]
    basket: Basket  # where the rows go
    predicted: Floats | None  # float64 [N], predicted log loss; None without a rule
    column: Floats | None  # float64 [N], the score that the method ranks by; None where it has none
    weigh: Callable[[int, NDArray[np.bool_]], RowWeights]  # `quality_weights` for so many rows of those left (bool [N])
    rng: np.random.Generator  # decides draws, and which of equal rows come first
    order: Rows | None = None  # the usable rows, best first, where a ranking by columns orders them
    targets: Targets | None = None  # examples of what is wanted, where there are some
    decided: Decisions | None = None  # where a draw by weight notes its probabilities

    def shuffled(self) -> Rows:
        """The usable rows in random order."""
        rows = np.flatnonzero(self.usable)
        self.rng.shuffle(rows)
        return rows

    def fill_by(self, key: Floats | None, descending: bool = False) -> dict[str, Any]:
        """Takes the rows with the least key first (or the greatest); equal rows in random order."""
        if key is None:
            raise RuntimeError("the method's row in the registry does not ask for what it ranks by")
        rows = self.shuffled()  # then a stable sort, else equal rows would come in the order of the file
        self.basket.fill(rows[np.argsort((-key if descending else key)[rows], kind="stable")])
        return {}


Take = Callable[[Candidates], dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A row of the registry."""

    name: str  # as `method=` and `--method` take it, and the arm of a comparison
    title: str  # in tables and sentences
    take: Take  # fills the basket and returns its report: that of the weights and its own, else {}
    column: str | None = None  # the score it ranks by
    # which values of that score can be chosen; by default finite ones
    may: Callable[[Floats], NDArray[np.bool_]] = np.isfinite
    needs_rule: bool = False  # whether it cannot do without a rule
    weighted: bool = False  # whether it draws by `quality_weights` (uniform ones without a rule)
    embeddings: bool = False  # whether it needs a vector per row
    sources: bool = False  # whether it is for pools of several sources
    by_source: bool = False  # whether it weighs by the fit of source shares that stands in the rule, not by the rule
    by_tokens: bool = False  # whether it takes a budget of tokens alone
    # where it stands among the arms that a comparison has by default; None for one to be asked for by name
    place: int | None = 100
    mixture: bool = False  # whether it draws by a mixture of sources, which must be given
    targets: bool = False  # whether it chooses for targets, which must be given

    @property
    def ruled(self) -> bool:
        """Whether a rule decides its rows, where there is one."""
        return self.needs_rule or self.weighted

    @property
    def scored(self) -> bool:
        """Whether it costs a scoring of the pool; lengths cost next to nothing."""
        return (self.needs_rule and not self.by_source) or self.embeddings or self.column not in (None, TOKENS)


TOKENS = "length_output"
"""The column whose sum a budget of tokens is about."""

METHODS: dict[str, Method] = {}
"""Name → row of the registry."""


def selection_method(name: str, title: str, **row: Any) -> Callable[[Take], Take]:
    """Registers the function below as a method; further arguments as `Method`.

    Raises:
        RequestError: there is a method of this name.
    """

    def register(take: Take) -> Take:
        if name in METHODS:
            raise RequestError(message(f"method {name!r}", "it is registered already", "give it another name"))
        METHODS[name] = Method(name, title, take, **row)
        return take

    return register


def method_of(name: str) -> Method:
    """The row of a method.

    Raises:
        RequestError: there is none.
    """
    if name not in METHODS:
        raise RequestError(message(f"method {name!r}", "it is not known", f"use one of {', '.join(METHODS)}"))
    return METHODS[name]


@selection_method("weighted", "rule's weights", needs_rule=True, weighted=True, place=30)
def _weighted(c: Candidates) -> dict[str, Any]:
    """Rows by weight. A draw that falls short of its tokens, or loses near-duplicates, goes on with the other rows;
    one that brought less than half of what was needed with twice as many, so that it ends soon."""
    basket, left, report, more = c.basket, c.usable.copy(), dict[str, Any](), 1
    while not basket.full and left.any():
        wanted, available = basket.wanted(left), int(left.sum())
        if wanted >= available:
            if basket.taken:  # all that is left is needed
                basket.fill(c.rng.permutation(np.flatnonzero(left)))
                break
            cause = f"drawing all {available} rows without replacement takes each once, whatever its weight"
            what = f"budget={wanted}" if basket.target is None else f"budget_tokens={basket.target}"
            raise RequestError(message(what, cause, "lower the budget, or train on the whole pool as it is"))
        wanted, before = min(more * wanted, basket.most(left)), len(basket.taken)
        result = c.weigh(wanted, left)
        while (fewer := more * basket.wanted(left, result.weights)) < 0.9 * wanted:
            wanted, result = fewer, c.weigh(fewer, left)  # a draw of more rows would level the weights
        needed = wanted / more
        if more > 1:  # then it may be more than have a weight
            wanted = min(wanted, int(np.count_nonzero(group_sums(result.weights, basket.prompts))))
        if c.decided is not None:
            c.decided.first_draw(result.weights, wanted, basket.prompts)
        drawn = systematic_sample(checked_weights(result.weights), wanted, c.rng, groups=basket.prompts)
        basket.fill(drawn)
        basket.close(left, drawn)
        if len(basket.taken) - before < needed / 2:
            more *= 2
        report = report or result.report
    return report


selection_method(
    "by-source", "by source alone", needs_rule=True, weighted=True, sources=True, by_source=True, place=35
)(_weighted)


def _lowest(c: Candidates) -> dict[str, Any]:
    """Rows with the least of what the method ranks by: its column, else the predicted loss."""
    return c.fill_by(c.predicted if c.column is None else c.column)


def _highest(c: Candidates) -> dict[str, Any]:
    """Rows with the greatest."""
    return c.fill_by(c.predicted if c.column is None else c.column, descending=True)


selection_method("top", "rule's top rows", needs_rule=True, place=40)(_lowest)
selection_method("worst", "rule's worst rows", needs_rule=True, place=90)(_highest)


@selection_method("random", "random", place=10)
def _random(c: Candidates) -> dict[str, Any]:
    c.basket.fill(c.shuffled())
    return {}


@selection_method("random-balanced", "random, balanced by source", sources=True, place=20)
def _balanced(c: Candidates) -> dict[str, Any]:
    """One row of each source in turn; a source without more rows is left out of the turns."""
    rows = c.shuffled()
    names, code = source_codes([c.table.source[at] for at in rows.tolist()])
    by_source = np.argsort(code, kind="stable")
    first = np.searchsorted(code[by_source], np.arange(len(names)))
    turn = np.empty(len(rows), dtype=np.int64)
    turn[by_source] = np.arange(len(rows)) - first[code[by_source]]
    c.basket.fill(rows[np.lexsort((c.rng.permutation(len(names))[code], turn))])
    return {}


def _by(c: Candidates) -> dict[str, Any]:
    """The order of a `Ranking`."""
    if c.order is None:
        raise RuntimeError("there is no order")
    c.basket.fill(c.order)
    return {}


BY = Method("by", "by columns", _by, place=None)
"""Of rows ranked by columns; no method by name, since it says nothing without them."""


selection_method("random-tokens", "random, matched on tokens", by_tokens=True, place=None)(_random)
selection_method("longest", "longest", column=TOKENS, place=60)(_highest)
selection_method("reward", "highest reward", column="reward", place=75)(_highest)
selection_method("lowest-ppl", "lowest perplexity", column="ppl", place=70)(_lowest)
selection_method("ifd", "highest IFD below 1", column="ifd", may=lambda ifd: ifd < 1, place=80)(_highest)


@selection_method("diverse", "diverse, by weights", weighted=True, embeddings=True, place=50)
def _diverse(c: Candidates) -> dict[str, Any]:
    """Rows that cover the others. Where near-duplicates use up the candidates, the rest of the pool gives new ones."""
    from im_lightning.sampling.selection import diverse

    basket = c.basket
    if basket.vectors is None:
        raise RuntimeError("facility location needs vectors")
    left, report, more = c.usable.copy(), dict[str, Any](), 1
    while not basket.full and left.any():
        wanted, before = min(more * basket.wanted(left), int(left.sum())), len(basket.taken)
        result = c.weigh(wanted, left)
        rows, worth = diverse.draw_candidates(checked_weights(result.weights), wanted, c.rng)
        neighbours = diverse.neighbours_for(len(rows), wanted)
        graph = diverse.similarity_graph(unit_vectors(basket.vectors, rows), neighbours)
        covering = diverse.facility_location(graph, worth, lambda: basket.full, partial(_offer, basket, rows))
        basket.close(left, rows)
        if len(basket.taken) - before < wanted / more / 2:  # as in `_weighted`
            more *= 2
        report = report or {**result.report, "diverse": diverse.describe(len(rows), graph, covering)}
    return report


@selection_method("targeted", "nearest to the targets", embeddings=True, targets=True, place=55)
def _targeted(c: Candidates) -> dict[str, Any]:
    """The nearest row of each target in turn."""
    from im_lightning.sampling.selection import targeted

    basket, targets = c.basket, c.targets
    if targets is None:
        raise RuntimeError("there are no targets")
    found = targeted.round_robin(basket.unit, targets.vectors, c.usable, basket.offer, lambda: basket.full, c.rng)
    basket.target_of = {row: int(targets.rows[at]) for row, at in found.items()}
    return {"targeted": targeted.describe(targets, basket.unit, found)}


def _offer(basket: Basket, rows: Rows, candidate: int) -> bool:
    return basket.offer(int(rows[candidate]))


for _name, _title, _ruled, _place in (
    ("mix", "mixture of sources", False, 32),
    ("mix+rule", "mixture, rule's weights", True, 34),
):
    selection_method(_name, _title, needs_rule=_ruled, weighted=True, sources=True, mixture=True, place=_place)(
        _weighted
    )

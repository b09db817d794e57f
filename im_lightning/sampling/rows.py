"""Which rows a run trains on: eligibility, weights, the fixed subset. Pure functions of regressors and options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from im_lightning._utils.rng import SUBSET_DRAW, generator
from im_lightning.data.overlap.keys import EXACT, PROMPT, REASONS, USUAL, Mask, check_exclusion
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import Transform, source_codes
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.linear_rule import Regressors
from im_lightning.sampling.designs.blocks import Blocks, read_blocks
from im_lightning.sampling.designs.subsets import DEFAULT_TILT, designed_subset
from im_lightning.sampling.draws.systematic import checked_weights, systematic_sample
from im_lightning.sampling.weights.mixture import check_mixture, mixed, read_mixture, read_repeat
from im_lightning.sampling.weights.quality_weights import RowWeights, Weighting, of_draw, weights_of

MIX = "mix"


@dataclass(frozen=True)
class Choice:
    """The options that decide which rows a run trains on; the data module's arguments of the same names.

    With `subset_size` the run is a designed one, whatever else a recipe says: see `settled`.
    """

    rule: str | None = None
    budget: int | None = None
    weighting: Weighting = field(default_factory=Weighting)
    resample_each_epoch: bool = False
    replacement: bool = False
    subset_size: int | None = None
    subset_seed: int | None = None
    subset_mixture: dict[str, float] | None = None
    subset_tilt: float = DEFAULT_TILT
    subset_version: int = 1
    seed: int = 0
    exclude: str | None = None
    mixture: str | None = None
    blocks: str | None = None
    one_per_prompt: bool = False

    def __post_init__(self) -> None:
        if self.exclude is not None:
            check_exclusion(self.exclude)
        if (self.weighting.weighting == MIX) != (self.mixture is not None) and not self.designed:
            cause = "weighting mix and the mixture of sources belong together, and only one is given"
            raise RequestError(
                message("mixture", cause, "pass weighting=mix with mixture= (im-lightning mix makes one)")
            )
        if not self.designed and (self.subset_seed is not None or self.subset_mixture is not None or self.blocks):
            raise RequestError(message("subset_seed", "there is no subset_size to draw", "pass subset_size= as well"))
        for name in ("budget", "subset_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(message(name, f"it is {value}", "give at least one row, or leave it out"))
        if self.weighting.weighting == "top" and self.replacement and not self.designed:
            cause = "it takes the best rows once each, and a draw with replacement takes rows again"
            raise RequestError(message("weighting top", cause, "leave out replacement, or name another weighting"))
        if self.one_per_prompt and self.replacement:
            cause = "a draw with replacement may take a prompt several times"
            raise RequestError(message("one_per_prompt", cause, "leave out replacement, or one_per_prompt"))

    def settled(self) -> Choice:
        """The options that count: under a designed run rule, budget and ways of drawing are left aside."""
        if not self.designed:
            return self
        drawn = replace(self, rule=None, budget=None, resample_each_epoch=False, replacement=False)
        return replace(drawn, one_per_prompt=False)

    @property
    def designed(self) -> bool:
        """Whether the rows are a designed subset, made for a fit of a rule."""
        return self.subset_size is not None

    @cached_property
    def read_blocks(self) -> Blocks | None:
        """The blocks that a designed subset is drawn from in place of the sources, as their file had them at first."""
        return None if self.blocks is None else read_blocks(self.blocks)

    @property
    def uniform(self) -> bool:
        """Whether all eligible rows weigh the same."""
        how = self.weighting.weighting
        return how == "uniform" or (self.rule is None and how != MIX)

    @property
    def weighting_inputs(self) -> dict[str, Any]:
        """What the weights of the pool depend on; a designed subset has none."""
        if self.designed:
            return {"method": "designed"}
        if self.uniform:
            return {"method": "uniform"}
        mixture = {} if self.mixture is None else {"mixture": read_mixture(self.mixture)}
        again = {"replacement": True} if self.replacement else {}  # then no row is held to one draw by its weight
        return {**asdict(self.weighting), "budget": self.budget, **mixture, **again}

    @property
    def draw_inputs(self) -> dict[str, Any]:
        """What the rows depend on besides the weights."""
        if self.designed:
            seed = self.seed if self.subset_seed is None else self.subset_seed
            about = {"size": self.subset_size, "subset_seed": seed, "mixture": self.subset_mixture}
            version = {} if self.subset_version == 1 else {"version": self.subset_version}
            blocks = {} if self.read_blocks is None else {"blocks": self.read_blocks.digest}
            return {"kind": "designed", **about, "tilt": self.subset_tilt, **version, **blocks}
        kind = "all" if self.budget is None else "each epoch" if self.every_epoch else "fixed"
        repeat: dict[str, Any] = {} if self.repeat is None else {"repeat": self.repeat}
        repeat |= {"one_per_prompt": True} if self.one_per_prompt else {}
        return {"kind": kind, "rows": self.budget, "seed": self.seed, "replacement": self.replacement, **repeat}

    @property
    def repeat(self) -> float | None:
        """How often a row may come in an epoch that is drawn with replacement; None for no limit."""
        drawn = self.replacement and self.mixture is not None and not self.designed
        return read_repeat(str(self.mixture)) if drawn else None

    @property
    def every_epoch(self) -> bool:
        return self.resample_each_epoch or self.replacement


def exclusion_of(inputs: Mapping[str, Any]) -> str:
    """What a run leaves out of the pool for its evaluation sets; inputs of earlier versions do not say."""
    return str(inputs.get("exclude", EXACT))


def settle_exclusion(asked: str | None, records: Sequence[RunRecord]) -> str:
    """What an experiment leaves out of its pool for the evaluation sets: what is asked for, else what its runs left
    out, else the usual. Runs of earlier versions, which do not say, left out rows of the same content alone."""
    if asked is not None:
        check_exclusion(asked)
        return asked
    before = [exclusion_of(r.subset) for r in records if r.subset.get("size")]
    return before[-1] if before else USUAL


def weigh(
    choice: Choice,
    rows: int,
    left_out: Mapping[str, Mask],
    scored: Regressors | None,
    sources: Sequence[str] = (),
) -> RowWeights:
    """Eligibility and weights of a pool of so many rows.

    Rows left out for what they share with evaluation sets (`data.overlap.keys.left_out`: reason → bool [N]) are
    ineligible, and so are rows without a prediction (given a rule, also under uniform weights) or without regressors
    (for a designed subset). All are counted in the report. `scored` are the regressors of the pool under the rule,
    None where nothing was scored; `sources` are the names of the rows' sources, for a mixture of them.

    Raises:
        RequestError: no eligible row; a weighted draw without replacement of the whole pool, which has no effect.
    """
    excluded = {"in_evaluation": 0, **{reason: int(mask.sum()) for reason, mask in left_out.items() if mask.any()}}
    shared = sum(excluded.values())
    allowed = ~np.any([np.zeros(rows, dtype=bool), *left_out.values()], axis=0)
    needed = scored is not None and (choice.designed or scored.rule is not None)
    known = scored.known if scored is not None and needed else np.ones(rows, dtype=bool)
    excluded["no_prediction"] = int((allowed & ~known).sum())
    eligible = allowed & known
    drawable = int(eligible.sum())
    if not drawable:
        cause = f"none of its {rows} rows is eligible ({shared} are in an evaluation set, "
        cause += f"{excluded['no_prediction']} lack an indicator)"
        remedy = "add data, or score what is missing"
        if excluded.get(REASONS[PROMPT]):
            cause += f"; of {excluded[REASONS[PROMPT]]} the prompt is"
            remedy += ", or pass exclude=normalised if many rows have the same prompt by nature"
        raise RequestError(message("the pool", cause, remedy))
    _refuse_without_effect(choice, drawable)
    if choice.mixture is not None and not choice.designed:
        return _mixed(choice, allowed, excluded, scored, sources)
    if choice.designed or choice.uniform or scored is None:
        method = "designed" if choice.designed else "uniform"
        report: dict[str, Any] = {"method": method, "rows": rows, "eligible": drawable, "ineligible": excluded}
        return RowWeights(eligible / drawable, eligible, report)
    budget = None if choice.replacement else choice.budget
    made = weights_of(scored.phi, scored.rule, choice.weighting, budget, allowed)
    return replace(made, report={**made.report, "ineligible": excluded})


def _mixed(
    choice: Choice, allowed: Mask, excluded: dict[str, int], scored: Regressors | None, sources: Sequence[str]
) -> RowWeights:
    """By the mixture, and within each source by the rule, where there is one."""
    mixture, rule = read_mixture(str(choice.mixture)), None if scored is None else scored.rule
    check_mixture(mixture, sources)
    phi = np.empty((len(allowed), 0)) if scored is None or rule is None else scored.phi
    how = replace(choice.weighting, weighting="uniform" if rule is None else "auto")
    budget = None if choice.replacement else choice.budget
    made = mixed(weights_of(phi, rule, how, budget, allowed), sources, mixture)
    made = made if rule is None else of_draw(made, phi, rule, budget)
    return replace(made, report={**made.report, "method": MIX, "ineligible": excluded})


def _refuse_without_effect(choice: Choice, rows: int) -> None:
    if choice.designed or choice.replacement:
        return
    if choice.budget is not None and choice.budget > rows:
        cause = f"the pool has only {rows} eligible rows, and none is drawn twice"
        remedy = f"pass budget={rows} or less, or replacement=True"
        raise RequestError(message(f"budget={choice.budget}", cause, remedy))
    if choice.uniform or choice.one_per_prompt or (choice.budget is not None and choice.budget < rows):
        return
    what = "no budget" if choice.budget is None else f"budget={choice.budget}"
    cause = f"all {rows} eligible rows would be drawn once each, so the weights would have no effect"
    remedy = f"pass budget= (rows per epoch, fewer than {rows}), or replacement=True"
    raise RequestError(message(f"weighting {choice.weighting.weighting} with {what}", cause, remedy))


def draw_subset(
    choice: Choice,
    weights: RowWeights,
    scored: Regressors | None,
    sources: Sequence[str],
    pool_digest: str = "",
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """The fixed subset of a run: rows int64 [n], in the order drawn, and how they came about (JSON-like).

    None where every epoch resamples or all rows are used. A designed subset is tilted along the φ of `scored`; where
    there are blocks (of the pool of this digest), they stand in the place of the sources. Of `groups` (int64 [N], with
    one_per_prompt the prompts) one row each is drawn at most.

    Raises:
        RequestError: a designed subset of a pool that was not scored, or one larger than the pool.
    """
    how = choice.draw_inputs
    if how["kind"] == "designed":
        if scored is None:
            remedy = "pass indicators= or scores="
            raise RequestError(message("subset_size", "a designed subset is tilted along indicators", remedy))
        size, seed = int(choice.subset_size or 0), int(how["subset_seed"])
        mixture, tilt, eligible, more = choice.subset_mixture, choice.subset_tilt, weights.eligible, {}
        if choice.read_blocks is not None:
            sources = choice.read_blocks.names_of(pool_digest, len(sources))
            eligible, more = eligible & (np.asarray(sources) != ""), {"blocks": how["blocks"]}
        drawn = designed_subset(scored.phi, sources, size, seed, mixture, tilt, eligible, choice.subset_version)
        return np.asarray(drawn.rows, dtype=np.int64), {**drawn.design, **more, "indicators": scored.names}
    if how["kind"] == "fixed":
        rng = generator(choice.seed, purpose=SUBSET_DRAW)
        rows = systematic_sample(checked_weights(weights.weights), int(choice.budget or 0), rng, groups=groups)
        return rows, {"kind": "fixed", "seed": choice.seed}
    return None


def source_shares(sources: Sequence[str], exposures: np.ndarray) -> dict[str, float]:
    """Share of each source among what was trained on; exposures [N]."""
    total = float(exposures.sum())
    shares: dict[str, float] = {}
    for row in np.flatnonzero(exposures).tolist():
        shares[sources[row]] = shares.get(sources[row], 0.0) + float(exposures[row])
    return {name: value / total for name, value in sorted(shares.items())} if total else {}


def source_phi_means(
    table: ScoreTable, transforms: Mapping[str, Transform], exposures: np.ndarray
) -> dict[str, dict[str, float]]:
    """source → indicator → the part of `mean_phi` that its rows make up; NaN where no seen row has a value."""
    seen = np.flatnonzero(exposures)
    names, code = source_codes([table.source[at] for at in seen.tolist()])
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for indicator, transform in transforms.items():
        phi = transform.apply(table.values[indicator][seen])
        weight = np.where(np.isnan(phi), 0.0, exposures[seen])
        total = float(weight.sum())
        sums = np.bincount(code, np.nan_to_num(phi) * weight, minlength=len(names))
        for part, value in zip(found.values(), sums.tolist(), strict=True):
            part[indicator] = value / total if total > 0 else math.nan
    return found

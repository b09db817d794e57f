"""Paired comparison of arms: intervals over seeds, paired differences from a reference, Holm's correction.

A seed's arms share the candidate rows, the training seed and the numbers of tokens and steps; other seeds have other
candidate rows. An arm's own loss has a 95 % t interval over seeds, the evaluation set held fixed. Differences have a
two-way interval where the losses of single examples are known, else a paired t interval over seeds.

Every arm is trained with S seeds and evaluated on the same E examples. Both are samples: other seeds would draw other
candidate rows and train otherwise, other examples would be answered otherwise. Resampling seeds and examples
independently of one another (the pigeonhole bootstrap: A. Owen, Annals of Applied Statistics 1, 2007) carries both into
one standard error, errs on the side of too large a one, and needs no model of how the two interact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from im_lightning._utils.numbers import half_width, holm, p_text
from im_lightning.errors import RequestError, message

DRAWS = 4000
CONFIDENCE = 0.95
LEVEL = 0.05  # below which a corrected p is a verdict
_BLOCK = 1 << 22  # numbers alive at once


@dataclass(frozen=True)
class TwoWay:
    """A difference in nats per token and its two-way uncertainty.

    Args:
        difference: Mean over seeds of (summed nats of all examples / their tokens).
        se: Standard error over seeds and examples; NaN with one seed.
        df: Degrees of freedom of that standard error, from S − 1 (all of it from the seeds) to E − 1 (none of it).
        half_width: Of the 95 % interval, by the t distribution.
        p: Two-sided, of the same t; an interval excludes zero exactly where p is below 0.05.
    """

    difference: float
    se: float
    df: float
    half_width: float
    p: float


def two_way_bootstrap(sums: ArrayLike, tokens: ArrayLike, draws: int = DRAWS, seed: int = 0) -> TwoWay:
    """Mean difference between two arms and its two-way bootstrap standard error.

    Each draw takes S − 1 of the S seeds (so that the seeds' part of the variance is not too small: Rao and Wu, Journal
    of the American Statistical Association 83, 1988) and E of the E examples, both with replacement, and divides summed
    nats by the tokens of the examples drawn. Five seeds know little of their own spread, which a percentile of the
    bootstrap would hide: the quantile is that of t, with the degrees of freedom of the two parts of the variance after
    Satterthwaite (S − 1 for what the seeds' means show, E − 1 for the rest).

    Args:
        sums: float64 [S, E], summed nats of the arm minus those of the other, per seed and example.
        tokens: int [E], supervised tokens of the examples.
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        RequestError: the shapes do not fit, or there is no token.
    """
    d, c = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if d.ndim != 2 or c.shape != d.shape[1:] or not c.sum():
        cause = f"differences of shape {d.shape} with {c.shape[0] if c.ndim else 0} token counts"
        raise RequestError(message("two-way bootstrap", cause, "give [seeds, examples] and one count per example"))
    count, examples = d.shape
    difference = float(d.sum() / (count * c.sum()))
    if count < 2:
        return TwoWay(difference, math.nan, math.nan, math.nan, math.nan)
    variance = float(resampled_losses([d], c, draws, seed).var(ddof=1))
    of_seeds = float((d.sum(axis=1) / c.sum()).var(ddof=1)) / count
    return two_way(difference, variance, of_seeds, count, examples)


def resampled_losses(
    sums: Sequence[NDArray[np.float64]], tokens: NDArray[np.float64], draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Mean losses of A arms in draws of seeds and examples that the arms share, float64 [draws, A].

    Args:
        sums: Of each arm float64 [S, E], S at least 2.
        tokens: float64 [E].
        draws: How many.
        seed: Of the draws.
    """
    count, examples = sums[0].shape
    rng, means = np.random.default_rng(seed), list[NDArray[np.float64]]()
    block = max(1, _BLOCK // examples)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        seeds = rng.multinomial(count - 1, np.full(count, 1.0 / count), size) / (count - 1)
        drawn = rng.multinomial(examples, np.full(examples, 1.0 / examples), size)
        nats = [np.einsum("be,be->b", seeds @ arm, drawn) for arm in sums]
        means.append(np.stack(nats, axis=1) / (drawn @ tokens)[:, None])
    return np.concatenate(means)


def two_way(difference: float, variance: float, of_seeds: float, seeds: int, examples: int) -> TwoWay:
    """The t interval of a difference whose bootstrap variance is `variance`, `of_seeds` of it from the seeds' means."""
    from scipy import stats

    if variance == 0.0:  # arms that are the same rows
        return TwoWay(difference, 0.0, seeds - 1.0, 0.0, 1.0 if difference == 0.0 else 0.0)
    of_seeds = min(of_seeds, variance)
    rest = (variance - of_seeds) ** 2 / max(1, examples - 1)
    df = variance**2 / (of_seeds**2 / (seeds - 1) + rest)
    se = math.sqrt(variance)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, df) * se)
    return TwoWay(difference, se, df, half, float(2.0 * stats.t.sf(abs(difference) / se, df)))


def with_rule(found: TwoWay, sd: float, df: float) -> TwoWay:
    """The difference with a part of its uncertainty that all seeds share, of `sd` (nats per token) known to `df`
    degrees of freedom: how far another rule of the same kind would have moved it. It is not divided by the seeds."""
    from scipy import stats

    se = math.hypot(found.se, sd)
    if not sd or not math.isfinite(se):
        return found
    own = found.se**4 / found.df if found.se else 0.0
    total = se**4 / (own + sd**4 / df)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, total) * se)
    return TwoWay(found.difference, se, total, half, float(2.0 * stats.t.sf(abs(found.difference) / se, total)))


REFERENCE = "random"
"""The arm that the others are compared with."""
BASE = "base"
"""The arm of the base model: one evaluation, no training, the same for all seeds."""
RULED = "weighted"
"""The arm by whose difference, and whose worth, a rule is judged: rows drawn by its weights."""

SHOWN = ("better", "worse")
"""The verdicts that say something; the other is "no difference shown"."""


@dataclass(frozen=True)
class Verdict:
    """What may be said of an arm: that it is better or worse than the reference, or that no difference is shown.

    Args:
        arm: Its name.
        title: What it is called.
        verdict: "better", "worse" or "no difference shown".
        difference, half_width: Its loss minus the reference's, in nats per token, and half of its 95 % interval.
        p_holm: Corrected over the tested arms.
    """

    arm: str
    title: str
    verdict: str
    difference: float
    half_width: float
    p_holm: float

    @property
    def shown(self) -> bool:
        return self.verdict in SHOWN

    @property
    def numbers(self) -> str:
        """`+0.012 ± 0.004 nats per token, Holm p 0.002`."""
        return f"{self.difference:+.3f} {half_width(self.half_width)} nats per token, Holm p {p_text(self.p_holm)}"

    def sentence(self, reference: str = REFERENCE) -> str:
        """`Rule's top rows: worse than random (+0.012 ± 0.004 nats per token, Holm p 0.002).`"""
        return f"{self.title[:1].upper()}{self.title[1:]}: {self.verdict} than {reference} ({self.numbers})."

    def against(self, other: str) -> str:
        """What it says of a single comparison with another arm, tested for itself."""
        subject = f"{self.title[:1].upper()}{self.title[1:]}"
        numbers = self.numbers.replace("Holm p", "p")
        if not self.shown:
            return f"{subject} show no difference from {other} ({numbers}): no indicator is shown to help."
        return f"{subject} are {self.verdict} than {other} ({numbers})."


ONE_SEED = "One seed has no interval, so nothing can be said of any difference: run more (--seeds 5)."


def verdict_sentences(
    verdicts: Sequence[Verdict], seeds: int, reference: str = REFERENCE
) -> list[tuple[str, Verdict | None]]:
    """What a comparison says in words, and of which arm; an arm is better or worse only where it is shown to be."""
    if seeds < 2:
        return [(ONE_SEED, None)]
    out: list[tuple[str, Verdict | None]] = [(one.sentence(reference), one) for one in verdicts if one.shown]
    rest = "; ".join(one.title for one in verdicts if not one.shown)
    if rest:
        out.append((f"No difference from {reference} is shown for: {rest}.", None))
    return out


@dataclass(frozen=True)
class ArmResult:
    """One arm of a comparison; losses in nats per token, half-widths of 95 % intervals.

    Args:
        arm: Its name.
        losses: [seeds].
        mean, half_width: Of the losses, over seeds; the half-width is NaN with one seed.
        difference, difference_half_width: Mean paired difference from the reference; NaN for the reference itself.
        p: Two-sided, of the difference; NaN where the arm is not tested.
        p_holm: Corrected over the tested arms.
        verdict: "better", "worse", "no difference shown", or "" where the arm is not tested.
    """

    arm: str
    losses: tuple[float, ...]
    mean: float
    half_width: float
    difference: float = math.nan
    difference_half_width: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    verdict: str = ""

    def titled(self, title: str) -> Verdict:
        """The verdict on a tested arm that is called so."""
        return Verdict(self.arm, title, self.verdict, self.difference, self.difference_half_width, self.p_holm)

    def to_json(self) -> dict[str, Any]:
        """JSON-like; NaN as None."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {n: None if isinstance(v, float) and math.isnan(v) else v for n, v in plain.items()}


@dataclass(frozen=True)
class ExampleSums:
    """Evaluation losses of single examples.

    Args:
        sums: arm → float64 [S, E], summed nats per seed and example.
        tokens: int64 [E], supervised tokens of the examples.
    """

    sums: Mapping[str, NDArray[np.float64]]
    tokens: NDArray[np.int64]

    def by_instruction(self, prompts: Sequence[str]) -> ExampleSums:
        """With the reference outputs of one instruction together: they are no independent examples.

        Args:
            prompts: Instruction of each example, [E].
        """
        _, group = np.unique(list(prompts), return_inverse=True)
        if group.max() + 1 == len(group):
            return self
        sums = {arm: np.array([np.bincount(group, row) for row in rows], float) for arm, rows in self.sums.items()}
        return ExampleSums(sums, np.bincount(group, self.tokens).astype(np.int64))


def t_interval(values: ArrayLike) -> tuple[float, float]:
    """Mean and half-width of the t interval of independent values; the half-width of one value is NaN."""
    from scipy import stats

    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float(x.mean()), math.nan
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(half)


def t_test(differences: ArrayLike) -> float:
    """Two-sided p that the mean of independent differences is zero; NaN for fewer than two.

    Differences without any spread give 1 if they are all zero (arms that are the same rows), else 0.
    """
    from scipy import stats

    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        return math.nan
    sd = d.std(ddof=1)
    if sd == 0.0:
        return 1.0 if d.mean() == 0.0 else 0.0
    return float(2.0 * stats.t.sf(abs(d.mean()) / (sd / math.sqrt(len(d))), len(d) - 1))


def compare(
    losses: Mapping[str, Sequence[float]],
    reference: str = REFERENCE,
    untested: Sequence[str] = (),
    examples: ExampleSums | None = None,
    spread: Mapping[str, float] | None = None,
    spread_df: float = math.inf,
) -> list[ArmResult]:
    """Compares every arm with the reference, paired by seed, and by evaluation example where these are known.

    Args:
        losses: arm → evaluation losses in nats per token, one per seed, the seeds in the same order in every arm.
        reference: The arm to compare with.
        untested: Arms whose difference is shown but not tested; they do not count in the correction.
        examples: Losses of single examples of every arm; differences then have two-way intervals.
        spread: arm → sd of log loss over rules from other ledgers, with `spread_df` degrees of freedom (`with_rule`).

    Returns:
        The arms in the order given.

    Raises:
        RequestError: no such reference, or arms with different numbers of seeds.
    """
    if reference not in losses:
        raise RequestError(message("compare", f"there is no arm {reference!r}", f"name one of {', '.join(losses)}"))
    lengths = {arm: len(values) for arm, values in losses.items()}
    if len(set(lengths.values())) != 1 or not lengths[reference]:
        shown = ", ".join(f"{arm} {n}" for arm, n in lengths.items())
        raise RequestError(
            message("compare", f"the arms have different seeds ({shown})", "run every arm with every seed")
        )
    differences = {}
    for arm in losses:
        if arm != reference:
            alone = _difference(losses, arm, reference, examples)
            sd = (spread or {}).get(arm, 0.0) * float(np.mean(losses[arm]))
            found = with_rule(alone, sd, spread_df)
            differences[arm] = found.difference, found.half_width, found.p
    tested = [arm for arm in differences if arm not in untested]
    corrected = dict(zip(tested, holm([differences[arm][2] for arm in tested]).tolist(), strict=True))
    results = []
    for arm, values in losses.items():
        mean, half = t_interval(values)
        if arm == reference:
            results.append(ArmResult(arm, tuple(map(float, values)), mean, half))
            continue
        difference, difference_half, p = differences[arm]
        verdict = _verdict(difference, corrected[arm]) if arm in corrected else ""
        results.append(
            ArmResult(
                arm,
                tuple(map(float, values)),
                mean,
                half,
                difference=difference,
                difference_half_width=difference_half,
                p=p if arm in corrected else math.nan,
                p_holm=corrected.get(arm, math.nan),
                verdict=verdict,
            )
        )
    return results


def _difference(
    losses: Mapping[str, Sequence[float]], arm: str, reference: str, examples: ExampleSums | None
) -> TwoWay:
    if examples is not None:
        return two_way_bootstrap(examples.sums[arm] - examples.sums[reference], examples.tokens)
    paired = np.asarray(losses[arm], dtype=np.float64) - np.asarray(losses[reference], dtype=np.float64)
    mean, half = t_interval(paired)
    se = float(paired.std(ddof=1) / math.sqrt(len(paired))) if len(paired) > 1 else math.nan
    return TwoWay(mean, se, len(paired) - 1.0, half, t_test(paired))


def _verdict(difference: float, p: float) -> str:
    """By the corrected p; that is never below the p itself, so the 95 % interval of a shown difference excludes 0."""
    if not p < LEVEL:
        return "no difference shown"
    return "better" if difference < 0 else "worse"

"""The arithmetic of pairwise verdicts: win rate, agreement, position bias, length; intervals over instructions.

A pair of answers is asked in both orders, so a preference for a place cancels in its score. Pairs of one instruction
are no independent ones: an interval is over the means of instructions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from im_lightning._utils.optional import install_command

CONFIDENCE = 0.95  # of every interval
ONE = "one instruction"
"""Why there is no interval: it is over instructions."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one instruction, judged in both orders.

    Args:
        prompt: The instruction; its pairs stay together in intervals.
        first: Score of answer A where it was shown first: 1 better, 0.5 tie, 0 worse; NaN where there is no verdict.
        second: The same where it was shown second.
        words: Of A and of B.
    """

    prompt: str
    first: float
    second: float
    words: tuple[int, int]

    @property
    def score(self) -> float:
        """Mean over both orders; NaN where one has no verdict."""
        return (self.first + self.second) / 2


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval over instructions; NaN, with the reason, where there is none.

    >>> Share(0.425, 0.34, 0.51).text, Share(1.0, reason=ONE).text
    ('0.425 [0.340, 0.510]', '1.000 (no interval: one instruction)')
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    reason: str = ""

    @property
    def text(self) -> str:
        if math.isnan(self.value):
            return f"not known ({self.reason})"
        if math.isnan(self.low):
            return f"{self.value:.3f} (no interval: {self.reason})"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def off(self) -> bool:
        """Whether the interval leaves one half out."""
        return not (math.isnan(self.low) or self.low <= 0.5 <= self.high)


def share(values: ArrayLike, prompts: Sequence[str]) -> Share:
    """Mean of instruction means, with Wilson's interval at the variance that these show and t's quantile.

    With scores of 0 and 1 it is Wilson's interval of a proportion; ties, several pairs per instruction and their
    likeness enter through the variance. Without any, as many independent instructions are taken as there are.

    Args:
        values: Numbers from 0 to 1, [N]; NaN are left out.
        prompts: Instruction of each, [N].

    >>> share([1, 0, 1, 1], ["a", "b", "c", "c"]).value
    0.6666666666666666
    """
    from scipy import stats

    means = _instruction_means(values, prompts)
    count = len(means)
    if count < 2:
        return Share(float(means[0]) if count else math.nan, reason=ONE if count else "no verdict")
    p, variance = float(means.mean()), float(means.var(ddof=1)) / count
    q = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    n = p * (1 - p) / variance if variance > 0 and 0 < p < 1 else float(count)
    centre, half = (p + q * q / (2 * n)) / (1 + q * q / n), math.sqrt(p * (1 - p) / n + q * q / (4 * n * n))
    half *= q / (1 + q * q / n)
    return Share(p, max(0.0, centre - half), min(1.0, centre + half))


def _instruction_means(values: ArrayLike, prompts: Sequence[str]) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(numbers))
    if not len(known):
        return np.zeros(0)
    _, group = np.unique([prompts[at] for at in known.tolist()], return_inverse=True)
    return np.bincount(group, numbers[known]) / np.bincount(group)


def length_controlled(pairs: Sequence[Pair]) -> Share:
    """Win rate of A where both answers were equally long (Dubois et al., Length-Controlled AlpacaEval, 2024).

    The scores' log odds are fitted by a constant and tanh of the difference of lengths in its sd; the constant's share
    is the win rate at no difference. Its error is robust, with instructions as clusters.
    """
    from scipy import stats

    known = [pair for pair in pairs if not math.isnan(pair.score)]
    scores = np.array([pair.score for pair in known])
    delta = np.array([pair.words[0] - pair.words[1] for pair in known], dtype=np.float64)
    count = len({pair.prompt for pair in known})
    if count < 10:
        return Share(math.nan, reason=f"{ONE if count == 1 else f'{count} instructions'}, 10 are the least")
    sd = float(np.sqrt(np.mean(delta**2)))
    if sd == 0 or len(set(scores.tolist())) == 1:
        return share(scores, [pair.prompt for pair in known])
    if _follows(scores, delta):
        return Share(math.nan, reason="the verdicts follow the length alone")
    try:
        import statsmodels.api as sm
    except ImportError:
        return Share(math.nan, reason=f"it needs statsmodels ({install_command('api')})")

    _, groups = np.unique([pair.prompt for pair in known], return_inverse=True)
    design = np.column_stack([np.ones(len(known)), np.tanh(delta / sd)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shares as outcomes are meant; what does not converge is named below
        try:
            fit = sm.GLM(scores, design, family=sm.families.Binomial()).fit(
                cov_type="cluster", cov_kwds={"groups": groups}
            )
        except (np.linalg.LinAlgError, ValueError) as error:
            return Share(math.nan, reason=f"the fit failed ({error})")
    theta, se = float(fit.params[0]), float(fit.bse[0])
    if not fit.converged or not math.isfinite(se) or abs(fit.params).max() > 20:
        return Share(math.nan, reason="the fit does not converge")
    q = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 2))
    low, value, high = (1 / (1 + math.exp(-x)) for x in (theta - q * se, theta, theta + q * se))
    return Share(value, low, high)


def _follows(scores: NDArray[np.float64], delta: NDArray[np.float64]) -> bool:
    """Whether a bound on the difference of lengths parts all wins from all losses: no finite fit does better."""
    order = np.argsort(delta, kind="stable")
    ways = (scores[order], scores[order[::-1]])
    return set(scores.tolist()) == {0.0, 1.0} and any(bool((np.diff(s) >= 0).all()) for s in ways)


@dataclass(frozen=True)
class WinRate:
    """What a judge says of A against B, all shares over instructions.

    Args:
        pairs, instructions: How many have a verdict in both orders.
        missing: Pairs without.
        rate: Win rate of A, a tie counting half.
        better, tie, worse: Shares of pairs whose score is above, at and below one half.
        controlled: Win rate at equal length.
        agreement: Share of pairs with one verdict in both orders.
        first: Share of verdicts for the answer shown first, a tie counting half; 0.5 is no preference.
        longer: Win rate of the longer answer, where they differ.
        words: Mean words of A's and of B's answers.
    """

    pairs: int
    instructions: int
    missing: int
    rate: Share
    better: Share
    tie: Share
    worse: Share
    controlled: Share
    agreement: Share
    first: Share
    longer: Share
    words: tuple[float, float]

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> WinRate:
        known = [pair for pair in pairs if not math.isnan(pair.score)]
        prompts = [pair.prompt for pair in known]
        scores = np.array([pair.score for pair in known])
        first = [(pair.first + 1 - pair.second) / 2 for pair in known]
        delta = np.array([pair.words[0] - pair.words[1] for pair in known])
        longer = np.where(delta > 0, scores, np.where(delta < 0, 1 - scores, np.nan))
        words = [float(np.mean([pair.words[k] for pair in known])) if known else math.nan for k in (0, 1)]
        return cls(
            pairs=len(known),
            instructions=len(set(prompts)),
            missing=len(pairs) - len(known),
            rate=share(scores, prompts),
            better=share(scores > 0.5, prompts),
            tie=share(scores == 0.5, prompts),
            worse=share(scores < 0.5, prompts),
            controlled=length_controlled(pairs),
            agreement=share([pair.first == pair.second for pair in known], prompts),
            first=share(first, prompts),
            longer=share(longer, prompts),
            words=(words[0], words[1]),
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-like."""
        return asdict(self)

    def sentences(self, a: str, b: str) -> list[str]:
        """What may be said, in words."""
        if not self.pairs:
            return ["No pair has a verdict in both orders: nothing can be said."]
        verdict = f"{a} is {'better' if self.rate.value > 0.5 else 'worse'} than {b}"
        out = [
            f"{verdict if self.rate.off() else f'No difference between {a} and {b} is shown'}: win rate "
            f"{self.rate.text}, over {self.instructions:,} instruction{'s' * (self.instructions != 1)}.",
            f"{a} is better in {self.better.value:.1%} of cases, a tie in {self.tie.value:.1%}, worse in "
            f"{self.worse.value:.1%}.",
            f"The answers have {self.words[0]:,.0f} and {self.words[1]:,.0f} words; win rate at equal length "
            f"{self.controlled.text}.",
        ]
        return [*out, *self.biases()]

    def biases(self) -> list[str]:
        """What the verdicts owe to the place and to the length of an answer."""
        out = [f"Both orders agree in {self.agreement.value:.1%} of pairs."] if self.pairs else []
        if self.first.value in (0.0, 1.0) and self.first.off():
            place = "first" if self.first.value else "second"
            out.append(f"THE JUDGE ALWAYS PREFERS THE ANSWER SHOWN {place.upper()}: its verdicts say nothing.")
        elif self.first.off():
            place = "first" if self.first.value > 0.5 else "second"
            out.append(
                f"The judge prefers the answer shown {place} ({self.first.text} for the first, 0.5 is no preference); "
                "asking in both orders cancels that, at the price of more ties."
            )
        if self.longer.value in (0.0, 1.0) and self.longer.off():
            which = "longer" if self.longer.value else "shorter"
            out.append(
                f"THE JUDGE ALWAYS PREFERS THE {which.upper()} ANSWER: its verdicts cannot be told from a preference "
                "for length."
            )
        elif self.longer.off():
            which = "longer" if self.longer.value > 0.5 else "shorter"
            out.append(
                f"The {which} answer tends to win ({self.longer.text} for the longer): see the rate at equal length."
            )
        if self.missing:
            what = ("1 pair has", "is") if self.missing == 1 else (f"{self.missing:,} pairs have", "are")
            out.append(f"{what[0]} no verdict in both orders, and {what[1]} left out.")
        return out


def with_loss(rates: Mapping[str, float], losses: Mapping[str, float]) -> str:
    """How the win rates correlate with the losses over the arms, in a sentence; "" for fewer than four with both."""
    from scipy import stats

    arms = [arm for arm, rate in rates.items() if math.isfinite(rate) and math.isfinite(losses[arm])]
    if len(arms) < 4:
        return ""
    for what, values in (("win rates", rates), ("losses", losses)):
        if len({values[arm] for arm in arms}) == 1:
            return f"Win rate and loss over {len(arms)} arms: all {what} are equal, so there is nothing to correlate."
    rho = float(stats.spearmanr([losses[arm] for arm in arms], [rates[arm] for arm in arms])[0])
    said = "arms of lower loss are preferred" if rho < 0 else "arms of lower loss are not preferred"
    return f"Win rate and loss over {len(arms)} arms: Spearman {rho:.2f} ({said})."

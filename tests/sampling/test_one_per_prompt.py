"""If these failed, several answers to one prompt would be drawn together, or rows with other chances than are stated.

What is stated: of weights w a draw of n rows holds row i with probability min(1, c·W)·w_i / W, W the sum of the weights
of its prompt's rows and c such that these sum to n; methods that take rows in an order take the first of each prompt.
"""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from im_lightning import QualityWeightedSampler, ResumableDataLoader, ScoreTable, load_examples, prompt_groups
from im_lightning._utils.rng import generator
from im_lightning.errors import RequestError
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.draws.systematic import checked_weights, inclusion_probabilities, systematic_sample
from im_lightning.sampling.selection.methods import METHODS
from im_lightning.sampling.selection.ranking import Ranking
from im_lightning.sampling.selection.select import choose_rows, select_subset
from im_lightning.sampling.selection.targeted import Targets
from im_lightning.sampling.weights.quality_weights import Weighting, weights_of

N = 60
GROUPS = np.r_[np.zeros(10), [1, 1, 2, 2, 2], np.arange(3, N - 12)].astype(np.int64)  # one prompt has ten answers
RNG = np.random.default_rng(0)
WEIGHTS = checked_weights(np.r_[RNG.uniform(0.5, 2.0, N - 3), 0.0, 9.0, 0.0])
SOURCES = [f"s{k % 3}" for k in range(N)]
VALUES = {
    "length_output": RNG.integers(1, 30, N) * 1.0, "ppl": RNG.uniform(1, 9, N), "reward": RNG.normal(size=N),
    "ifd": RNG.uniform(0.2, 0.9, N),
}  # fmt: skip
TABLE = ScoreTable(np.arange(N), [f"{k:032x}" for k in range(N)], SOURCES, VALUES)
RULE = LinearRule("test", 0.0, np.array([-1.0]), ["reward"], {"reward": Transform("identity")})
VECTORS = RNG.standard_normal((N, 8)).astype(np.float32)
TARGETS = Targets(VECTORS[:3] + 0.1, np.zeros(N, dtype=bool), np.arange(3), "three")
GIVEN: dict[str, Any] = {
    "prompts": GROUPS, "embeddings": VECTORS, "targets": TARGETS, "weighting": "softmax",
    "mixture": dict.fromkeys(set(SOURCES), 1 / 3),
}  # fmt: skip


def water_level(weights: np.ndarray, n: int) -> np.ndarray:
    """min(1, c·w) by bisection on log c: shares no code with the package."""
    low, high = -300.0, 300.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, np.exp(middle) * weights).sum() < n else (low, middle)
    return np.minimum(1, np.exp(low) * weights)


def stated(weights: np.ndarray, n: int) -> np.ndarray:
    total = np.array([weights[g == GROUPS].sum() for g in range(GROUPS.max() + 1)])
    of_group = water_level(total, n)
    return np.array([of_group[g] * w / total[g] if w else 0.0 for g, w in zip(GROUPS, weights, strict=True)])


def once_per_prompt(rows: np.ndarray) -> bool:
    return max(Counter(GROUPS[rows].tolist()).values()) == 1


# the draw


@pytest.mark.parametrize("n", [1, 5, 20, 40])
def test_a_draw_holds_each_row_as_often_as_stated(n: int) -> None:
    chances = inclusion_probabilities(WEIGHTS, n, GROUPS)
    np.testing.assert_allclose(chances, stated(WEIGHTS, n), atol=1e-12)
    assert chances.sum() == pytest.approx(n)
    draws, hits = 4000, np.zeros(N)
    for epoch in range(draws):
        rows = systematic_sample(WEIGHTS, n, generator(5, epoch), groups=GROUPS)
        assert len(rows) == n and once_per_prompt(rows)
        hits[rows] += 1
    sd = np.sqrt(draws * chances * (1 - chances))
    assert np.all(np.abs(hits - draws * chances) <= 4.5 * sd + 1e-9)


def test_rows_of_prompts_that_are_not_certain_are_as_likely_as_without_the_option() -> None:
    """So a mean over the draw stays what the weights say it is."""
    free = inclusion_probabilities(WEIGHTS, 4)
    assert free.max() < 1 and free[:10].sum() < 1
    np.testing.assert_allclose(inclusion_probabilities(WEIGHTS, 4, GROUPS), free, rtol=1e-12)


def test_prompts_that_differ_change_no_probability() -> None:
    alone = np.arange(N)
    for n in (3, 30):
        np.testing.assert_allclose(inclusion_probabilities(WEIGHTS, n, alone), inclusion_probabilities(WEIGHTS, n))


def test_more_rows_than_prompts_are_refused() -> None:
    with pytest.raises(RequestError) as error:
        systematic_sample(WEIGHTS, 47, generator(0), groups=GROUPS)
    assert "of 46 groups (prompts), and each gives one row" in str(error.value)
    assert "draw at most 46 rows, or leave out one_per_prompt (groups=)" in str(error.value)
    assert once_per_prompt(systematic_sample(WEIGHTS, 46, generator(0), groups=GROUPS))


# the sampler


def test_ranks_share_one_draw_of_one_row_per_prompt() -> None:
    labels = [f"prompt {g}" for g in GROUPS]
    parts = [QualityWeightedSampler(WEIGHTS, 40, num_replicas=4, rank=r, seed=3, groups=labels) for r in range(4)]
    seen = set()
    for epoch in range(20):
        for part in parts:
            part.set_epoch(epoch)
        rows = np.array([row for part in parts for row in part])
        assert len(rows) == 40 and once_per_prompt(rows)
        seen |= set(rows[rows < 10].tolist())
    assert len(seen) > 5, "another answer in another epoch"


def test_a_resumed_draw_goes_on_and_other_prompts_are_refused() -> None:
    def loader(groups: np.ndarray | None = GROUPS) -> ResumableDataLoader:
        sampler = QualityWeightedSampler(WEIGHTS, 40, seed=3, groups=groups)
        return ResumableDataLoader(list(range(N)), batch_size=4, sampler=sampler)

    whole = [batch.tolist() for batch in loader()]
    begun = loader()
    iterator = iter(begun)
    head = [next(iterator).tolist() for _ in range(3)]
    again = loader()
    again.load_state_dict(begun.state_dict())
    assert head + [batch.tolist() for batch in again] == whole
    for other in (None, np.roll(GROUPS, 1)):
        with pytest.raises(RequestError, match="the checkpoint has weights"):
            loader(other).load_state_dict(begun.state_dict())


def test_what_a_sampler_cannot_keep_is_refused() -> None:
    with pytest.raises(RequestError, match=r"a draw with replacement may repeat rows.*leave out one of them"):
        QualityWeightedSampler(WEIGHTS, 5, replacement=True, groups=GROUPS)
    with pytest.raises(RequestError, match="groups: there are 3 for 60 rows"):
        QualityWeightedSampler(WEIGHTS, 5, groups=[1, 2, 3])
    with pytest.raises(RequestError, match="of 46 groups"):
        QualityWeightedSampler(WEIGHTS, 47, groups=GROUPS)


# selection


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].by_source])
def test_no_method_takes_two_answers_to_one_prompt(method: str) -> None:
    for seed in range(5):
        by_rows = {} if METHODS[method].by_tokens else {"budget": 30}
        for budget in (by_rows, {"budget": None, "budget_tokens": 300}):
            if not budget:
                continue
            rows = select_subset(TABLE, RULE, method=method, seed=seed, **budget, **GIVEN)
            assert once_per_prompt(rows) and len(rows) >= 10
            if budget.get("budget_tokens"):
                assert VALUES["length_output"][rows].sum() == pytest.approx(300, abs=3)


def test_in_an_order_the_first_of_each_prompt_is_taken() -> None:
    order = np.argsort(-VALUES["reward"])
    first: dict[int, int] = {}
    for row in order.tolist():
        first.setdefault(int(GROUPS[row]), row)
    for budget in (7, 48):
        assert select_subset(TABLE, None, budget, "reward", prompts=GROUPS).tolist() == list(first.values())[:budget]
    by = select_subset(TABLE, None, None, ranking=Ranking("reward", keep=0.5), prompts=GROUPS).tolist()
    assert by == [row for row in first.values() if row in order[: N // 2]]


def test_the_decisions_say_whose_prompt_was_taken_and_what_a_draw_promised() -> None:
    chosen = choose_rows(TABLE, RULE, 20, "weighted", prompts=GROUPS)
    d = chosen.decisions
    assert chosen.report["one_per_prompt"] == {"prompts": 48, "rows": N} and chosen.eligible == N
    assert d.probability.sum() == pytest.approx(20) and once_per_prompt(chosen.rows)
    same = [row for row in range(N) if d.reason[row] == "a row of the same prompt was taken"]
    assert same == [row for row in range(N) if not d.taken[row] and GROUPS[row] in GROUPS[chosen.rows]] and same
    assert all(d.taken[d.duplicate_of[row]] and GROUPS[d.duplicate_of[row]] == GROUPS[row] for row in same)
    draws, hits = 2000, np.zeros(N)
    for seed in range(draws):
        hits[choose_rows(TABLE, RULE, 20, "weighted", seed, prompts=GROUPS).rows] += 1
    sd = np.sqrt(draws * d.probability * (1 - d.probability))
    assert np.all(np.abs(hits - draws * d.probability) <= 4.5 * sd + 1e-9)


def test_the_mean_in_the_report_is_that_of_the_draw() -> None:
    """By rows, the prompt with ten answers counts ten times where it is drawn once."""
    chosen = choose_rows(TABLE, RULE, 20, "weighted", weighting=Weighting("softmax"), prompts=GROUPS)
    chance = stated(weights_of(RULE.phi(TABLE), RULE, Weighting("softmax"), 20).weights, 20)
    expected = chance @ VALUES["reward"] / chance.sum()
    assert chosen.report["expected_mean"] == pytest.approx({"reward": expected}, rel=1e-6)
    rows = choose_rows(TABLE, RULE, 20, "weighted", weighting=Weighting("softmax"))
    assert rows.report["expected_mean"]["reward"] != pytest.approx(expected, rel=1e-6)


def test_random_rows_are_met_in_random_order() -> None:
    """A prompt of more answers is met sooner: every order of the rows counts alike, and its first of each prompt."""
    table = TABLE.take(np.arange(6, 14))  # four answers, two, two
    prompts = GROUPS[6:14]
    exact: Counter[int] = Counter()
    orders = list(permutations(range(8), 8))
    for order in orders:
        first = dict.fromkeys(prompts[list(order)].tolist())
        exact.update(list(first)[:2])
    draws = 3000
    drawn = Counter(
        int(prompts[row]) for s in range(draws) for row in select_subset(table, None, 2, "random", s, prompts=prompts)
    )
    for prompt, count in exact.items():
        p = count / len(orders)
        assert abs(drawn[prompt] - draws * p) <= 4 * np.sqrt(draws * p * (1 - p)), prompt


def test_a_row_passed_over_for_its_prompt_counts_in_no_quota_and_as_no_near_duplicate() -> None:
    vectors = np.eye(N, dtype=np.float32)
    best = np.argsort(-VALUES["reward"])
    vectors[best[1]] = vectors[best[0]]
    prompts = np.arange(N)
    prompts[best[2]] = prompts[best[0]]
    ranking = Ranking("reward", quota="*=6")
    chosen = choose_rows(TABLE, None, 18, ranking=ranking, prompts=prompts, embeddings=vectors, max_similarity=0.9)
    d = chosen.decisions
    assert d.reason[best[1]] == "a row much like it was taken" and d.duplicate_of[best[1]] == best[0]
    assert d.reason[best[2]] == "a row of the same prompt was taken" and d.duplicate_of[best[2]] == best[0]
    assert Counter(SOURCES[row] for row in chosen.rows) == {"s0": 6, "s1": 6, "s2": 6}


def test_a_budget_above_the_number_of_prompts_is_refused() -> None:
    with pytest.raises(RequestError) as error:
        select_subset(TABLE, None, 49, "random", prompts=GROUPS)
    assert "48 of 60 rows can be chosen by random" in str(error.value) and "one per prompt" in str(error.value)
    with pytest.raises(RequestError, match=r"one per prompt\. Fix: lower the budget.*leave out --one-per-prompt"):
        select_subset(TABLE, None, None, "random", budget_tokens=int(VALUES["length_output"].sum()), prompts=GROUPS)
    assert len(select_subset(TABLE, RULE, 48, "weighted", prompts=GROUPS)) == 48


def test_prompts_are_compared_in_normal_form() -> None:
    prompts = ["Add 2 and 2.", "add 2 and 2", "Add 2 and 3.", "", "", "“Add” 2 and 2"]
    rows = [{"prompt": text, "response": str(k)} for k, text in enumerate(prompts)]
    assert prompt_groups(load_examples(rows)).tolist() == [0, 0, 1, 2, 3, 0]
    chats = [
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer},
                      {"role": "user", "content": "Go on"}, {"role": "assistant", "content": "Well"}]}
        for answer in ("Hi", "hi!", "Good day")
    ]  # fmt: skip
    assert prompt_groups(load_examples(chats)).tolist() == [0, 0, 1], "all that precedes the last answer"

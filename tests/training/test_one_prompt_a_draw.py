"""If these failed, a fit with one_per_prompt would train on several answers to a prompt in one epoch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fitting import World, trainer, write_rule, write_scores

from im_lightning.errors import RequestError
from im_lightning.sampling.draws.systematic import inclusion_probabilities
from im_lightning.training.datamodule import InstructMiningDataModule

PROMPTS = np.r_[np.zeros(10), np.arange(1, 31)].astype(int)  # the first ten rows answer one prompt


@pytest.fixture
def shared(world: World) -> World:
    """The small study, its first ten rows answers to one prompt, written in two ways."""
    rows = [json.loads(line) for line in Path(world.pool).read_text().splitlines()]
    for k in range(10):
        rows[k] |= {"instruction": "Say a word." if k % 2 else "say a word", "input": ""}
    pool = world.root / "shared.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = write_scores(world.root / "shared.parquet", str(pool))
    rule = write_rule(world.root / "shared.json", scores)
    return world._replace(pool=str(pool), scores=scores, rule=rule)


def ready(world: World, **options: Any) -> InstructMiningDataModule:
    data = world.data(one_per_prompt=True, **options)
    data.trainer = trainer(world.root)
    data.setup("fit")
    return data


def epochs(data: InstructMiningDataModule, count: int = 30) -> list[np.ndarray]:
    assert data.sampler is not None
    out = []
    for epoch in range(count):
        data.sampler.set_epoch(epoch)
        out.append(np.array(list(data.sampler)))
    return out


def test_the_pool_knows_its_prompts(shared: World) -> None:
    data = ready(shared)
    assert data.pool.prompts.tolist() == PROMPTS.tolist()


def test_without_a_budget_each_epoch_has_every_prompt_once(shared: World) -> None:
    data = ready(shared)
    drawn = epochs(data)
    assert all(sorted(PROMPTS[rows].tolist()) == list(range(31)) for rows in drawn)
    answers = Counter(int(rows[PROMPTS[rows] == 0][0]) for rows in drawn)
    assert len(answers) > 5, "another answer in another epoch"
    assert data.regime()["subset_size"] == 31


def test_a_budget_drawn_each_epoch_or_once_holds_no_prompt_twice(shared: World) -> None:
    anew = ready(shared, rule=shared.rule, budget=20, resample_each_epoch=True)
    for rows in epochs(anew):
        assert len(rows) == 20 and len(set(PROMPTS[rows])) == 20
    once = ready(shared, rule=shared.rule, budget=20)
    assert once.rows is not None and len(set(PROMPTS[once.rows])) == 20
    assert all(sorted(rows) == sorted(once.rows) for rows in epochs(once, 3))

    (file,) = (once.run_folder / "decisions").glob(f"*{_stem(once)}*")
    decisions = pq.read_table(file).to_pydict()
    expected = inclusion_probabilities(once.weights, 20, PROMPTS)
    np.testing.assert_allclose(decisions["probability"], expected, rtol=1e-12)
    ours = next((row for row in once.rows if PROMPTS[row] == 0), None)
    for row in range(10):
        passed = ours is not None and row != ours
        assert (decisions["reason"][row] == "a row of the same prompt was taken") == passed
        assert decisions["duplicate_of"][row] == (ours if passed else None)


@pytest.mark.parametrize("budget", [12, None])
def test_the_mean_in_the_record_is_that_of_the_draw(shared: World, budget: int | None) -> None:
    """Where ten rows answer one prompt they count for one at most; also in a folder that a draw of rows has frozen."""
    if budget is not None:
        rows = shared.data(rule=shared.rule, budget=budget)
        rows.trainer = trainer(shared.root)
        rows.setup("fit")
    data = ready(shared, rule=shared.rule, budget=budget)
    assert data.scored is not None and data.rule is not None
    chance = inclusion_probabilities(data.weights, budget or 31, PROMPTS)
    expected = chance @ data.scored.phi / chance.sum()
    assert list(data.report["expected_mean"].values()) == pytest.approx(expected.tolist(), rel=1e-9)
    assert data.report["predicted"]["expected"] == pytest.approx(float(data.rule.predict_mean(expected)[0]), rel=1e-9)
    if budget is not None:
        assert data.run_folder == rows.run_folder and rows.report["expected_mean"] != data.report["expected_mean"]


def _stem(data: InstructMiningDataModule) -> str:
    from im_lightning.training.run.run_folder import subset_path

    return subset_path(data.run_folder, data.choice.draw_inputs).stem


def test_a_checkpoint_goes_on_and_one_of_another_draw_is_refused(shared: World) -> None:
    options = {"rule": shared.rule, "budget": 20, "resample_each_epoch": True}
    data = ready(shared, **options)
    state = data.state_dict()
    assert state["draw"]["one_per_prompt"] is True
    again = ready(shared, **options)
    again.load_state_dict(state)
    assert list(again.sampler or ()) == list(data.sampler or ())
    plain = shared.data(**options)
    plain.trainer = trainer(shared.root)
    plain.setup("fit")
    assert "one_per_prompt" not in plain.state_dict()["draw"], "as earlier versions wrote it"
    with pytest.raises(RequestError, match="one_per_prompt: True → None"):
        plain.load_state_dict(state)


def test_what_cannot_be_kept_is_refused(shared: World) -> None:
    with pytest.raises(RequestError, match="one_per_prompt: a draw with replacement may take a prompt several times"):
        shared.data(one_per_prompt=True, replacement=True, budget=5)
    with pytest.raises(RequestError, match="are of 31 groups"):
        ready(shared, rule=shared.rule, budget=35)


def test_a_designed_subset_leaves_it_aside(shared: World) -> None:
    data = ready(shared, subset_size=30, subset_seed=1)
    assert not data.choice.one_per_prompt and data.rows is not None and len(data.rows) == 30

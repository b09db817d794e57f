"""If these failed, a fit would draw its sources in other shares than the mixture says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fitting import World

from im_lightning.errors import RequestError
from im_lightning.experiments.compare.equal_tokens import Arm, EqualTokensDataModule
from im_lightning.sampling.draws.systematic import inclusion_probabilities


@pytest.fixture
def mixture(world: World) -> str:
    path = Path(world.root) / "mix.json"
    path.write_text(json.dumps({"a": 0.75, "b": 0.25}))
    return str(path)


@pytest.mark.parametrize("ruled", [False, True])
def test_a_fit_draws_by_the_mixture(world: World, mixture: str, ruled: bool) -> None:
    """Within a source every row alike, or by the rule."""
    rule = {"rule": world.rule} if ruled else {"scores": None}
    data = world.data(weighting="mix", mixture=mixture, budget=16, resample_each_epoch=True, **rule)
    data.setup("fit")
    source = np.array(data.pool.sources)
    assert data.weights[source == "a"].sum() == pytest.approx(0.75) and data.report["method"] == "mix"
    assert (len(set(data.weights[source == "a"].round(12))) > 1) == ruled
    assert data.inputs["weighting"]["mixture"] == {"a": 0.75, "b": 0.25}
    if ruled:
        expected = inclusion_probabilities(data.weights, 16) @ data.scored.phi / 16
        assert list(data.report["expected_mean"].values()) == pytest.approx(expected.tolist(), rel=1e-9)
    counts: Counter[str] = Counter()
    for epoch in range(50):
        data.sampler.set_epoch(epoch)
        rows = list(data.sampler)
        assert len(set(rows)) == 16, "no row twice"
        counts.update(source[rows].tolist())
    assert counts["a"] / 800 == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("repeat", [2, 2.5])
def test_a_fit_repeats_no_row_more_often_than_the_mixture_allows(world: World, mixture: str, repeat: float) -> None:
    """A source that is asked for more rows than it has times the cap gives them all so often; others give the rest."""
    Path(mixture).write_text(json.dumps({"shares": {"a": 0.95, "b": 0.05}, "repeat": repeat}))
    data = world.data(weighting="mix", mixture=mixture, scores=None, replacement=True, budget=10)
    data.setup("fit")
    few = int((np.array(data.pool.sources) == "a").sum())
    budget = int(2 * repeat * few)
    data = world.data(weighting="mix", mixture=mixture, scores=None, replacement=True, budget=budget)
    data.setup("fit")
    source = np.array(data.pool.sources)
    for epoch in range(20):
        data.sampler.set_epoch(epoch)
        counts = np.bincount(list(data.sampler), minlength=len(source))
        assert counts.sum() == budget and counts.max() <= np.ceil(repeat)
        if repeat == 2:
            assert (counts[source == "a"] == 2).all()
    assert data.state_dict()["sampler"]["repeat"] == repeat and data.state_dict()["draw"]["repeat"] == repeat
    data = world.data(weighting="mix", mixture=mixture, scores=None, replacement=True, budget=len(source) * 3)
    with pytest.raises(RequestError, match=r"may come 2\.?5? times.*--repeat"):
        data.setup("fit")


def test_another_mixture_is_another_run(world: World, mixture: str) -> None:
    def folder() -> Path:
        data = world.data(weighting="mix", mixture=mixture, budget=16, scores=None)
        data.setup("fit")
        return data.run_folder

    first = folder()
    assert folder() == first
    Path(mixture).write_text(json.dumps({"a": 0.5, "b": 0.5}))
    assert folder() != first


def test_mixture_and_weighting_belong_together(world: World, mixture: str) -> None:
    for options in ({"weighting": "mix"}, {"mixture": mixture}):
        with pytest.raises(RequestError, match="belong together"):
            world.data(**options)
    Path(mixture).write_text(json.dumps({"a": 0.5, "news": 0.5}))
    data = world.data(weighting="mix", mixture=mixture, budget=16, scores=None)
    with pytest.raises(RequestError, match="the pool has no row of news"):
        data.setup("fit")


@pytest.mark.parametrize("method", ["mix", "mix+rule", "reward"])
def test_arms_of_a_comparison(world: World, method: str) -> None:
    arm = Arm(200, 4, method, mixture={"a": 1.0})
    given = {"eval_data": world.eval, "model": world.base, "scores": world.scores, "rule": world.rule}
    data = EqualTokensDataModule(arm, data=world.pool, **given)
    if method == "reward":
        with pytest.raises(RequestError, match="has no reward"):
            data.setup("fit")
        return
    data.setup("fit")
    assert data.rows is not None and {data.pool.sources[row] for row in data.rows} == {"a"}
    assert data.describe()["weights"]["mixture"] == {"a": 1.0}

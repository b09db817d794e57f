"""If these failed, a fit would draw its sources in other shares than the mixture says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fitting import World

from im_lightning._utils.hashing import digest_json
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


def relabelled(world: World) -> None:
    """Every row of the pool gets the other source; texts and ids stay."""
    rows = [json.loads(line) for line in Path(world.pool).read_text().splitlines()]
    swapped = [json.dumps({**row, "source": "ba"["ab".index(row["source"])]}) for row in rows]
    Path(world.pool).write_text("\n".join(swapped) + "\n")


def test_rows_of_another_source_are_weighed_anew(world: World, mixture: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Their ids are the same: the frozen weights were those of the sources before, and nobody heard of it."""
    options = {"weighting": "mix", "mixture": mixture, "budget": 16, "resample_each_epoch": True}

    def made(**more: Any) -> Any:
        data = world.data(**options, **more)
        data.setup("fit")
        return data

    first = made()
    state = first.state_dict()
    assert made().run_folder == first.run_folder
    relabelled(world)
    again = made()
    assert again.run_folder != first.run_folder and "other sources" in capfd.readouterr().err
    assert again.weights[np.array(again.pool.sources) == "a"].sum() == pytest.approx(0.75)
    assert again.table.source == again.pool.sources and made().run_folder == again.run_folder
    with pytest.raises(RequestError, match=r"resume: .*pool\.sources: .* → "):
        again.load_state_dict(state)
    with pytest.raises(RequestError, match=r"of another pool: pool\.sources.*leave run_dir out"):
        made(run_dir=str(first.run_folder), on_mismatch="warn")
    relabelled(world)
    back = made()
    assert back.run_folder == first.run_folder
    back.load_state_dict(state)


def test_folders_and_checkpoints_that_do_not_tell_the_sources_go_on(world: World, mixture: str) -> None:
    """As earlier versions froze them, under the name that they have now."""
    data = world.data(weighting="mix", mixture=mixture, budget=16, scores=None)
    data.setup("fit")
    state, note = data.state_dict(), data.run_folder / "inputs.json"
    told = json.loads(note.read_text())
    del told["inputs"]["pool"]["sources"], state["inputs"]["pool"]["sources"]
    assert data.run_folder.name == digest_json(told["inputs"])
    note.write_text(json.dumps(told))
    again = world.data(weighting="mix", mixture=mixture, budget=16, scores=None)
    again.setup("fit")
    again.load_state_dict(state)
    assert again.run_folder == data.run_folder and (again.weights == data.weights).all()


def test_a_rule_draws_on_where_only_the_names_of_sources_changed(world: World) -> None:
    """Its weights do not depend on them; the record's tables of sources have one set of names."""
    first = world.data(rule=world.rule, budget=12)
    first.setup("fit")
    state = first.state_dict()
    relabelled(world)
    again = world.data(rule=world.rule, budget=12)
    again.setup("fit")
    again.load_state_dict(state)
    assert again.run_folder == first.run_folder and again.table.source == again.pool.sources

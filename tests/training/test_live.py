"""`LiveStatistics` and its history: closed windows, resumes, two ranks and files, checked from the examples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import World
from loss_statistics import indicator_loss_statistics
from scipy import stats

from im_lightning.data.score_table import PREDICTED, ScoreTable
from im_lightning.errors import DataError, RequestError
from im_lightning.indicators.transforms import Transform
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.linear_rule import LinearRule, Regressors
from im_lightning.training.loss_statistics.live import MOST_POINTS, LiveStatistics, LossHistory
from im_lightning.training.loss_statistics.metric import IndicatorLossStatistics, deciles

EVERY, STEPS, BATCH = 3, 14, 4
EPOCH = 8  # steps; within an epoch no row is drawn twice
_DRAWS = [np.random.default_rng(epoch).permutation(40)[: EPOCH * BATCH] for epoch in range(2)]
ROWS = list(np.concatenate(_DRAWS).reshape(-1, BATCH)[:STEPS])
LOSSES = [5.0 - 0.2 * step + np.random.default_rng(100 + step).normal(size=BATCH) for step in range(STEPS)]


def live(world: World, rule: bool = True, every: int = EVERY) -> LiveStatistics:
    table = ScoreTable.read(world.scores)
    return LiveStatistics(40, table, Regressors.of(table, LinearRule.load(world.rule) if rule else None), every, 31.5)


def step(one: LiveStatistics, at: int, all_sum: Any = None, leader: bool = True, part: slice = slice(None)) -> Any:
    """One optimiser step as the callback makes it; what is logged before it."""
    if at and at % EPOCH == 0:
        one.standing(at, all_sum)  # the end of an epoch
    logged = one.close(at, all_sum, leader) if one.due(at) else None
    one.see(torch.tensor(LOSSES[at][part], dtype=torch.float32), torch.tensor(ROWS[at][part]))
    return logged


def run(one: LiveStatistics, first: int = 0, last: int = STEPS) -> list[dict[str, float]]:
    return [logged for at in range(first, last) if (logged := step(one, at))]


def check(one: LiveStatistics, world: World, values: dict[str, float], file: dict[str, Any]) -> None:
    """Every number again from the examples themselves."""
    rows, losses = np.concatenate(ROWS), np.concatenate([np.float32(x) for x in LOSSES]).astype(np.float64)
    window = np.repeat(np.arange(STEPS) // EVERY, BATCH)
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(rows, return_index=True)[1]] = True
    table, rule = ScoreTable.read(world.scores), LinearRule.load(world.rule)
    phi = rule.phi(table)[rows]
    for kind, mine in (("first", first), ("repeat", ~first)):
        expected = indicator_loss_statistics(phi[mine], losses[mine], window[mine])
        told = file if kind == "first" else file["repeat"]
        assert values[f"examples_{kind}"] == told["examples"] == mine.sum()
        assert values[f"r2_{kind}"] == pytest.approx(float(expected["r2"]))
        for j, name in enumerate(rule.feature_names_in_):
            assert values[f"pearson_{kind}/{name}"] == pytest.approx(float(expected["pearson"][j]))
            assert told["slope"][name] == pytest.approx(float(expected["slope"][j]))
        for scale, known in {PREDICTED: rule.predict(table), "ppl": table.values["ppl"]}.items():
            mean = stats.binned_statistic(deciles(known)[rows[mine]], losses[mine], bins=range(11)).statistic
            np.testing.assert_allclose(told["by_decile"][scale], mean)
    assert values["pool_seen"] == file["pool_seen"] == first.sum() / 40 and file["ess"] == 31.5
    place = deciles(rule.predict(table))[rows]
    points = {(when, d): loss for when, d, loss in file["deciles"]}
    for w in range(window.max() + 1):
        for d in range(10):
            mine = (window == w) & (place == d)
            when = min((w + 1) * EVERY, STEPS)
            assert ((when, d + 1) in points) == bool(mine.any())
            if mine.any():
                assert points[when, d + 1] == pytest.approx(losses[mine].mean())
    assert file["deciles_of"] == PREDICTED and set(file["other_deciles"]) == {"length_output", "ppl", "mtld"}


def test_every_number_follows_from_the_examples(world: World) -> None:
    one = live(world)
    logged = run(one)
    assert len(logged) == 4
    check(one, world, *one.standing(STEPS, None))
    rows, losses = np.concatenate(ROWS[3:6]), np.concatenate(LOSSES[3:6])
    place = deciles(LinearRule.load(world.rule).predict(ScoreTable.read(world.scores)))[rows]
    for d in range(10):
        name = f"decile_loss/{PREDICTED}/{d + 1}"
        assert (name in logged[1]) == (d in place)
        if d in place:
            assert logged[1][name] == pytest.approx(losses[place == d].mean(), rel=1e-5)


def test_without_a_rule_the_extreme_deciles_of_each_indicator_are_logged(world: World) -> None:
    one = live(world, rule=False)
    logged = run(one)[2]
    names = {name.split("/")[1] for name in logged if name.startswith("decile_loss/")}
    assert names <= {"length_output", "ppl", "mtld"} and names
    assert {name.split("/")[2] for name in logged if name.startswith("decile_loss/")} <= {"1", "10"}
    assert one.standing(STEPS, None)[1]["deciles_of"] == "length_output"


@pytest.mark.parametrize("stop", [1, 5, 6, 11])
def test_a_resume_changes_no_number(world: World, stop: int) -> None:
    """Also where it stops right at the end of a window, before that window was logged."""
    whole = live(world)
    logged = run(whole)
    before = live(world)
    first = run(before, last=stop)
    again = live(world)
    state = torch.load(_saved(world.root / "state.pt", before.state(None)), weights_only=True)
    again.adopt(state, stop, leader=True)
    rest = run(again, first=stop)
    assert len(first + rest) == len(logged)
    for got, expected in zip(first + rest, logged, strict=True):
        assert got == pytest.approx(expected)
    check(again, world, *again.standing(STEPS, None))


def test_another_window_after_a_resume_is_no_error(world: World) -> None:
    """log_every_n_steps is a setting of display: changing it must not make a run unresumable."""
    before = live(world)
    run(before, last=10)
    for every in (1, 2, 50):
        again = live(world, every=every)
        again.adopt(before.state(None), 10, leader=True)
        run(again, first=10)
        values, _ = again.standing(STEPS, None)
        assert values["examples_first"] + values["examples_repeat"] == STEPS * BATCH


def test_other_indicators_or_fewer_rows_after_a_resume_begin_anew(world: World, capfd: Any) -> None:
    """on_mismatch=warn promises to go on: sums of other indicators cannot be added to, and must not end the fit."""
    before = live(world)
    run(before, last=10)
    again = live(world, rule=False)
    again.adopt(before.state(None), 10, leader=True)
    run(again, first=10)
    values, _ = again.standing(STEPS, None)
    assert values["examples_first"] + values["examples_repeat"] == (STEPS - 10) * BATCH
    small = LiveStatistics(5, None, None, EVERY, 31.5)
    small.adopt(before.state(None), 10, leader=True)
    assert small.standing(10, None)[0]["pool_seen"] == 0
    err = capfd.readouterr().err
    assert "statistics are of other indicators" in err and "counts of rows are of a larger pool" in err


def _saved(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


def _rank(rank: int, world: World) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{world.root}/meet", rank=rank, world_size=2)

    def all_sum(tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.clone()
        dist.all_reduce(out)
        return out

    one, mine = live(world), slice(rank, None, 2)
    for at in range(8):
        step(one, at, all_sum, rank == 0, mine)
    state = one.state(all_sum)  # rank 0's copy is what a checkpoint holds
    shared = [state]
    dist.broadcast_object_list(shared, src=0)
    one = live(world)
    one.adopt(shared[0], 8, leader=rank == 0)
    for at in range(8, STEPS):
        step(one, at, all_sum, rank == 0, mine)
    torch.save(one.standing(STEPS, all_sum), world.root / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_a_resume_in_between_give_the_numbers_of_one(world: World) -> None:
    """Restored on every rank, sums would count twice; closed on one rank only, the other's would be lost."""
    import torch.multiprocessing as mp

    mp.start_processes(_rank, args=(world,), nprocs=2, start_method="fork")
    for rank in (0, 1):
        check(live(world), world, *torch.load(world.root / f"rank{rank}.pt", weights_only=True))


def test_a_step_reads_nothing_from_the_device(world: World) -> None:
    """A value read in every step would make the GPU wait for Python: meta tensors have none to be read."""
    one = live(world)
    for at in range(EVERY):
        assert not one.due(at)
        one.see(torch.zeros(BATCH, device="meta"), torch.zeros(BATCH, dtype=torch.int64, device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        one.flush()


def test_memory_does_not_grow_with_the_windows(world: World) -> None:
    one = live(world)
    sizes = []
    for at in range(0, 700 * EVERY, EVERY):
        if one.due(at):
            one.close(at, None, True)
        one.see(torch.tensor(LOSSES[at % STEPS]), torch.tensor(ROWS[at % STEPS]))
        if at in (300 * EVERY, 699 * EVERY):
            state = one.state(None)
            sizes.append(sum(t.numel() for t in state["statistics"].values() if isinstance(t, torch.Tensor)))
            assert len(state["history"]["steps"]) <= MOST_POINTS
    assert sizes[0] == sizes[1]


def test_merged_points_lose_no_example() -> None:
    history, rng = LossHistory(["a"]), np.random.default_rng(0)
    counts, sums = torch.zeros(1, 10, dtype=torch.float64), torch.zeros(1, 10, dtype=torch.float64)
    windows = 2 * MOST_POINTS + 77
    for step in range(1, windows + 1):
        counts, sums = counts + 2.0, sums + torch.tensor(rng.random((1, 10)))
        history.add(step, counts, sums)
    rows = [r for r in history.rows("a", windows, counts, sums) if r[1] == 4]
    assert rows[-1][0] == windows and [r[0] for r in rows] == sorted({r[0] for r in rows})
    widths = np.diff([0, *(r[0] for r in rows)])
    assert sum(2 * w * r[2] for w, r in zip(widths, rows, strict=True)) == pytest.approx(float(sums[0, 3]))
    assert len(rows) <= MOST_POINTS + 1


def test_a_window_is_logged_by_itself_however_many_there_are() -> None:
    """Where points are merged, what was logged was the mean of several windows; a resume changes nothing of it."""
    history, again = LossHistory(["a"]), LossHistory(["a"])
    counts, sums = torch.zeros(1, 10, dtype=torch.float64), torch.zeros(1, 10, dtype=torch.float64)
    for step in range(1, 2 * MOST_POINTS + 9):
        counts, sums = counts + 1.0, sums + float(step)
        assert history.add(step, counts, sums).tolist() == [[float(step)] * 10]
        if step == 2 * MOST_POINTS + 4:
            again.adopt(history.state())
            history = again


def test_a_closed_window_takes_no_more_examples() -> None:
    metric = IndicatorLossStatistics(["a"])
    metric.close(2)
    with pytest.raises(ValueError, match="window 1 is closed, the first open one is 2"):
        metric.update(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1).bool(), 1)


def test_statistics_in_a_ledger_are_no_runs(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    ledger = RunLedger(world.root / "runs")
    one = live(world)
    run(one)
    path = ledger.add_statistics("a-run", one.standing(STEPS, None)[1])
    assert ledger.records(status=None) == [] and not ledger.rejected and not capfd.readouterr().err
    read = ledger.statistics("a-run")
    assert read["run_id"] == "a-run" and read["indicators"] == ["length_output", "ppl", "mtld"]
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    with pytest.raises(RequestError, match=r"other\.statistics\.json: this run has no live statistics"):
        ledger.statistics("other")
    path.write_text(path.read_text()[:200])
    with pytest.raises(
        DataError, match=r"a-run\.statistics\.json: it does not hold a run's statistics: it is not whole"
    ):
        ledger.statistics("a-run")
    assert ledger.records(status=None) == []
    path.write_text("{}")
    with pytest.raises(DataError, match='"format" is not'):
        ledger.statistics("a-run")


def test_under_an_additive_rule_the_numbers_are_the_indicators(world: World) -> None:
    """Six regressors per indicator would be two hundred curves that nobody reads, each about a piece of a line."""
    table = ScoreTable.read(world.scores)
    names = [f"{indicator}[{k}]" for indicator in ("ppl", "mtld") for k in range(2)]
    base = {name: Transform("log" if "ppl" in name else "log1p", 0.0, 5.0) for name in names}
    hats = {name: replace(base[name], hat=(0.0, 1.0 + int(name[-2]), 5.0)) for name in names}
    rule = LinearRule("additive", 1.0, np.array([0.1, 0.2, -0.1, 0.3]), names, hats)
    one = LiveStatistics(40, table, Regressors.of(table, rule), EVERY, 31.5)
    run(one)
    values, file = one.standing(STEPS, None)
    assert file["indicators"] == ["ppl", "mtld"] and file["deciles_of"] == PREDICTED
    rows, losses = np.concatenate(ROWS), np.concatenate([np.float32(x) for x in LOSSES]).astype(np.float64)
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(rows, return_index=True)[1]] = True
    window = np.repeat(np.arange(STEPS) // EVERY, BATCH)
    phi = base["ppl[0]"].apply(table.values["ppl"])[rows]
    expected = indicator_loss_statistics(phi[first, None], losses[first], window[first])
    assert values["pearson_first/ppl"] == pytest.approx(float(expected["pearson"][0]))

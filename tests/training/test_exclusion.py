"""If these failed, a run would train on prompts that it is evaluated on, or a run begun would change its rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fitting import World, trainer

from im_lightning.cli import main
from im_lightning.errors import RequestError
from im_lightning.ledger.record import RunRecord
from im_lightning.sampling.rows import settle_exclusion
from im_lightning.training.datamodule import InstructMiningDataModule


@pytest.fixture
def leaked(world: World) -> str:
    """The evaluation set, with one row of the pool as it is, one in capitals, and one prompt with another answer."""
    pool = [json.loads(line) for line in Path(world.pool).read_text().splitlines()]
    capitals = {**pool[8], "output": pool[8]["output"].upper() + " ."}
    rows = [pool[3], capitals, {**pool[5], "output": "Something else."}]
    path = world.root / "leaked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + Path(world.eval).read_text())
    return str(path)


def ready(data: InstructMiningDataModule) -> InstructMiningDataModule:
    data.setup("fit")
    return data


@pytest.mark.parametrize(("exclude", "rows"), [(None, [3, 5, 8]), ("normalised", [3, 8]), ("exact", [3])])
def test_rows_like_evaluation_rows_are_left_out_and_counted(
    world: World, leaked: str, exclude: str | None, rows: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ready(world.data(rule=world.rule, budget=12, eval_data=leaked, exclude=exclude))
    assert [row for row in range(40) if not data.eligible[row]] == rows
    assert sum(data.report["ineligible"].values()) == len(rows)
    assert ("1 prompt in evaluation" in capsys.readouterr().err) == (exclude is None)
    assert data.describe()["design"]["exclude"] == (exclude or "prompt")


def test_an_unknown_exclusion_is_refused(world: World) -> None:
    with pytest.raises(RequestError, match="exclude: there is no 'some'"):
        world.data(exclude="some")


def test_a_pool_of_one_prompt_says_what_to_do(world: World) -> None:
    rows = [{"prompt": "Say a word.", "response": word} for word in ("red", "blue", "green")]
    for name, some in (("pool", rows[:2]), ("eval", rows[2:])):
        (world.root / f"one_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    pool, given = str(world.root / "one_pool.jsonl"), {"eval_data": str(world.root / "one_eval.jsonl")}
    with pytest.raises(RequestError, match=r"of 2 the prompt is.*exclude=normalised"):
        ready(InstructMiningDataModule(pool, model=world.base, **given))
    assert ready(InstructMiningDataModule(pool, model=world.base, exclude="normalised", **given)).eligible.all()


def test_a_run_begun_before_there_was_a_choice_keeps_its_rows(world: World, leaked: str, tmp_path: Path) -> None:
    """By its folder, by `run_dir` after a move, and by its checkpoint where the folder is lost."""

    def data(**options: Any) -> InstructMiningDataModule:
        made = world.data(rule=world.rule, budget=12, eval_data=leaked, **options)
        made.trainer = trainer(world.root)
        return ready(made)

    old = data(exclude="exact")  # what an earlier build did, and its inputs say nothing of it
    assert "exclude" not in old.inputs and old.eligible.sum() == 39
    state, folder = old.state_dict(), old.run_folder
    again = data()
    assert again.run_folder == folder and again.eligible.sum() == 39
    again.load_state_dict(state)
    shutil.copytree(folder, tmp_path / "moved")
    moved = data(run_dir=str(tmp_path / "moved"))
    assert moved.eligible.sum() == 39
    moved.load_state_dict(state)
    shutil.rmtree(folder)
    lost = data()
    assert lost.eligible.sum() == 37, "a new run"
    lost.load_state_dict(state)
    assert lost.eligible.sum() == 39 and lost.rows is not None and old.rows is not None
    assert lost.rows.tolist() == old.rows.tolist()
    with pytest.raises(RequestError, match="exclude"):
        data(exclude="prompt").load_state_dict(state)


def test_what_an_experiment_leaves_out() -> None:
    def run(**subset: Any) -> RunRecord:
        return RunRecord(run_id="r", status="complete", purpose="compare", created="", subset={"size": 9, **subset})

    assert settle_exclusion(None, []) == "prompt" and settle_exclusion(None, [run()]) == "exact"
    assert settle_exclusion(None, [run(exclude="normalised"), run(size=0)]) == "normalised"
    assert settle_exclusion("prompt", [run()]) == "prompt"
    with pytest.raises(RequestError, match="exclude: there is no 'some'"):
        settle_exclusion("some", [])


def test_a_weighted_fit_keeps_why_each_row_was_drawn(
    world: World, leaked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ready(world.data(rule=world.rule, budget=12, eval_data=leaked))
    (file,) = (data.run_folder / "decisions").glob("*.parquet")
    assert f"im-lightning explain ROW {data.run_folder}" in capsys.readouterr().err
    assert main(["explain", "3", str(data.run_folder)]) == 0 and "not taken: in evaluation" in capsys.readouterr().out
    decided = pq.read_table(file).to_pydict()
    assert data.rows is not None and np.flatnonzero(decided["taken"]).tolist() == sorted(data.rows.tolist())
    assert [decided["reason"][row] for row in (3, 8, 5)] == [
        "in evaluation", "in evaluation normalised", "prompt in evaluation"
    ]  # fmt: skip
    np.testing.assert_allclose(decided["probability"], 12 * data.weights, rtol=1e-9)
    again = world.data(rule=world.rule, budget=12, eval_data=leaked, resample_each_epoch=True)
    again.trainer = trainer(world.root / "other")
    (other,) = (ready(again).run_folder / "decisions").glob("*.parquet")
    assert set(pq.read_table(other).to_pydict()["taken"]) == {None}
    later = world.data(rule=world.rule, budget=12, eval_data=leaked, resample_each_epoch=True, seed=1)
    later.trainer = again.trainer
    assert ready(later).run_folder == again.run_folder and len(list(other.parent.glob("*.parquet"))) == 2
    uniform = ready(world.data(eval_data=leaked))
    assert not (uniform.run_folder / "decisions").exists()

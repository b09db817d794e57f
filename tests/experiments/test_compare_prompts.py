"""If these failed, answers to one prompt would stand in two folds, or what is aimed at would be what is reported."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flat_run import flat

from im_lightning import load_examples, prompt_groups
from im_lightning.commands import compare
from im_lightning.errors import RequestError
from im_lightning.experiments.compare import run as run_module
from im_lightning.experiments.compare.arms import usual_arms
from im_lightning.experiments.compare.equal_tokens import candidate_rows
from im_lightning.ledger.ledger import RunLedger

run = flat(compare.run)


def request(finished: Any, out: Path, **changes: Any) -> dict[str, Any]:
    folder = finished[0]
    return {
        "data": [str(folder / "pool.jsonl")], "eval_data": str(folder / "evaluation" / "report.jsonl"),
        "model": str(folder / "base"), "scores": str(folder / "scores.parquet"), "tokens": 200, "steps": 4, "seeds": 2,
        "device": "cpu", "learning_rate": 1e-3, "cache_dir": str(folder / "work" / "cache"), "out": str(out), **changes,
    }  # fmt: skip


def rows_of(out: Path) -> dict[str, list[list[int]]]:
    """Arm → rows of each seed's run."""
    found: dict[str, list[list[int]]] = {}
    for record in sorted(RunLedger(out / "ledger").records("compare"), key=lambda r: r.subset.get("seed") or 0):
        if record.subset.get("rows"):
            found.setdefault(record.subset["arm"], []).append(record.subset["rows"])
    return found


# folds


@pytest.mark.parametrize("seeds", [2, 5])
def test_rows_of_a_prompt_are_in_one_fold(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    prompts = np.r_[np.zeros(10), rng.integers(1, 150, 190)].astype(int)
    folds = [candidate_rows("folds", 200, k, seeds, 7, prompts) or [] for k in range(seeds)]
    assert sorted(row for fold in folds for row in fold) == list(range(200))
    where = Counter((int(prompts[row]), k) for k, fold in enumerate(folds) for row in fold)
    assert len({prompt for prompt, _ in where}) == len(where), "no prompt in two folds"
    assert all(abs(len(fold) - 200 / seeds) <= 10 for fold in folds) and all(fold == sorted(fold) for fold in folds)


def test_where_prompts_differ_the_folds_are_those_of_earlier_versions() -> None:
    for seeds in (3, 4):
        for k in range(seeds):
            assert candidate_rows("folds", 103, k, seeds, 5, np.arange(103)) == candidate_rows(
                "folds", 103, k, seeds, 5
            )


def test_a_prompt_that_most_rows_have_by_nature_is_split() -> None:
    """Else one fold would hold all that can be compared."""
    prompts = np.r_[np.zeros(60), np.arange(1, 41)].astype(int)
    folds = [candidate_rows("folds", 100, k, 4, 0, prompts) or [] for k in range(4)]
    assert [len(fold) for fold in folds] == [25] * 4 and sorted(row for fold in folds for row in fold) == list(
        range(100)
    )


# the comparison


def test_a_comparison_begun_with_other_folds_goes_on_with_them(finished, tmp_path: Path, monkeypatch) -> None:
    """An earlier version split answers to one prompt; its finetunes are not thrown away."""
    groups = prompt_groups(load_examples(str(finished[0] / "pool.jsonl")))
    shared = np.arange(len(groups)) // 2  # two answers to each prompt
    asked = request(finished, tmp_path / "old", arms="base,random", pool_draw="folds")
    plain = run_module.candidate_rows
    with monkeypatch.context() as earlier:
        earlier.setattr(run_module, "candidate_rows", lambda *given: plain(*given[:5]))
        assert run(**asked) == 0
    before = rows_of(tmp_path / "old")
    monkeypatch.setattr("im_lightning.training.run.encoded_pool.prompt_groups", lambda examples: shared)
    _forget_pools()
    assert run(**asked) == 0 and rows_of(tmp_path / "old") == before, "nothing was made anew"
    assert run(**{**asked, "out": str(tmp_path / "new")}) == 0
    new = rows_of(tmp_path / "new")["random"]
    assert new != before["random"] and not {shared[r] for r in new[0]} & {shared[r] for r in new[1]}
    _forget_pools()


def _forget_pools() -> None:
    """Of pools read before, the prompts are known."""
    from im_lightning.training.run import encoded_pool

    encoded_pool._read_pool.cache_clear()


def test_arms_aim_at_targets_and_take_a_prompt_once(finished, tmp_path: Path, monkeypatch, capsys) -> None:
    folder, out = finished[0], tmp_path / "out"
    pool = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    report = [json.loads(line) for line in (folder / "evaluation" / "report.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in (folder / "evaluation" / "fit.jsonl").read_text().splitlines()]
    wanted = [*other[:6], pool[11], report[0]]
    (tmp_path / "wanted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wanted))
    shared = np.arange(len(pool)) // 2
    monkeypatch.setattr("im_lightning.training.run.encoded_pool.prompt_groups", lambda examples: shared)
    _forget_pools()
    asked = request(finished, out, arms="random,targeted,full", target=str(tmp_path / "wanted.jsonl"), pool_draw="same")
    assert run(**asked, one_per_prompt=True) == 0
    told = capsys.readouterr()
    assert "1 more targets share one with the evaluation and are left out" in told.out
    rows = rows_of(out)
    assert set(rows) == {"random", "targeted", "full"} and "nearest to the targets" in told.out
    for arm in ("random", "targeted"):
        assert all(max(Counter(shared[one]).values()) == 1 for one in rows[arm])
    assert max(Counter(shared[rows["full"][0]]).values()) == 2, "full is the whole pool"
    same = {row for row, one in enumerate(pool) if one == pool[11]}
    assert not any(same & set(one) for arms in rows.values() for one in arms), "a target is in no arm"
    settings = json.loads((out / "compare.json").read_text())
    assert settings["settings"]["one_per_prompt"] is True and settings["settings"]["target"].endswith("wanted.jsonl")
    with pytest.raises(RequestError, match=r"it holds another result.*targets"):
        run(**request(finished, out, arms="random,targeted", pool_draw="same", one_per_prompt=True))
    _forget_pools()


def test_without_targets_the_arm_is_not_there(finished, tmp_path: Path) -> None:
    assert "targeted" in usual_arms()
    with pytest.raises(RequestError, match=r"targeted needs targets \(--target\)"):
        run(**request(finished, tmp_path / "out", arms="targeted"))

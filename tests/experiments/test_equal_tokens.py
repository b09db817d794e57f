"""Arms at equal supervised tokens and steps."""

from __future__ import annotations

import signal
from dataclasses import replace

import numpy as np
import pytest
from mini_demo import MINI, ols_rule

from im_lightning.errors import RequestError
from im_lightning.experiments.compare.equal_tokens import Arm, EqualTokensDataModule, split_in_order
from im_lightning.experiments.finetuning import finetune
from im_lightning.sampling.selection.decisions import take_tokens


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_taken_in_order_until_the_tokens_are_there(seed: int) -> None:
    """One long row at the end must not push an arm past the one per cent."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 60, 400)
    order = rng.permutation(400)
    target = int(rng.integers(1000, 4000))
    taken = take_tokens(order, tokens[order], target)
    assert taken is not None and abs(tokens[taken].sum() - target) <= 0.01 * target
    places = {row: place for place, row in enumerate(order.tolist())}
    at = [places[row] for row in taken.tolist()]
    assert at == sorted(at)  # in order,
    total = np.cumsum(tokens[order])
    sure = min(int((total <= target * 1.01).sum()), len(at))
    assert at[:sure] == list(range(sure))  # and none passed over before the end


def test_too_few_tokens_are_no_arm() -> None:
    assert take_tokens(np.arange(3), np.array([5, 5, 5]), 100) is None


def test_rows_are_split_in_order() -> None:
    parts = split_in_order(np.arange(11), 4)
    assert [row for part in parts for row in part] == list(range(11)) and [len(p) for p in parts] == [3, 3, 3, 2]
    with pytest.raises(RequestError, match=r"steps=4: the arm has 3 rows, and every step needs one"):
        split_in_order(np.arange(3), 4)


def arm(finished, **changes) -> EqualTokensDataModule:
    folder, _ = finished
    known = Arm.__dataclass_fields__
    taken = {"supervised_tokens": 300, "steps": 4, **{k: v for k, v in changes.items() if k in known}}
    options = {
        "data": str(folder / "parts" / "seed-0.jsonl"), "eval_data": str(folder / "evaluation" / "report.jsonl"),
        "model": str(folder / "base"), "scores": str(folder / "scores.parquet"), "rule": ols_rule(folder), "seed": 3,
        "force": True, "cache_dir": str(folder / "work" / "cache"),
        **{k: v for k, v in changes.items() if k not in known},
    }  # fmt: skip
    return EqualTokensDataModule(Arm(**taken), **options)


def ready(finished, tmp_path, monkeypatch, **changes) -> EqualTokensDataModule:
    monkeypatch.chdir(tmp_path)  # without a Trainer the frozen folder lies here
    module = arm(finished, **changes)
    module.setup("fit")
    return module


@pytest.mark.parametrize(
    "name", ["weighted", "top", "worst", "random", "random-balanced", "longest", "lowest-ppl", "diverse"]
)
def test_every_arm_has_its_rows(finished, tmp_path, monkeypatch, name: str) -> None:
    """Each arm is what its name says, whatever its tokens and steps have in common with the others'."""
    module = ready(finished, tmp_path, monkeypatch, method=name)
    assert 297 <= module.encoded.tokens(module.rows).sum() <= 303
    batches = list(module.train_dataloader())
    assert len(batches) == 4
    seen = np.concatenate([batch["row"].numpy() for batch in batches])
    np.testing.assert_array_equal(seen, module.rows)
    assert len(np.unique(seen)) == len(seen)
    assert sum(int(batch["target_mask"].sum()) for batch in batches) == module.design["supervised_tokens"]
    rest = np.setdiff1d(np.arange(len(module.pool)), module.rows)
    predicted = module.rule.predict(module.table)
    extreme = {
        "top": -predicted, "worst": predicted, "longest": module.table.values["length_output"],
        "lowest-ppl": -module.table.values["ppl"],
    }.get(name)  # fmt: skip
    if extreme is not None:
        assert extreme[module.rows].mean() > extreme[rest].mean()
        assert np.median(extreme[module.rows]) > np.quantile(extreme[rest], 0.5)
    again = ready(finished, tmp_path, monkeypatch, method=name)
    np.testing.assert_array_equal(again.rows, module.rows)


def test_a_given_order_is_followed(finished, tmp_path, monkeypatch) -> None:
    order = list(range(199, -1, -1))
    module = ready(finished, tmp_path, monkeypatch, method="given", order=order)
    assert set(order[: len(module.rows) - 2]) <= set(module.rows.tolist())


def test_refusals(finished, tmp_path, monkeypatch) -> None:
    """Each says what to change."""
    with pytest.raises(RequestError, match=r"there is no 'best'.*use one of weighted, by-source, top"):
        arm(finished, method="best")
    with pytest.raises(RequestError, match=r"arm 'top': it needs a rule.*pass rule="):
        arm(finished, method="top", rule=None)
    with pytest.raises(RequestError, match=r"does not apply to arm 'random'"):
        arm(finished, method="random", order=[1])
    with pytest.raises(RequestError, match=r"arm 'random': 200 candidate rows hold \d+ supervised tokens.*100000"):
        ready(finished, tmp_path, monkeypatch, method="random", supervised_tokens=100_000)


def test_ctrl_c_within_a_fit_reaches_the_user(finished, tmp_path, monkeypatch) -> None:
    """Lightning ends the process and makes it deaf to the next Ctrl-C; the demo must stop cleanly and resume."""
    module = arm(finished)
    before = signal.getsignal(signal.SIGINT)

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(EqualTokensDataModule, "train_dataloader", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(module, str(finished[0] / "base"), MINI.tuning, 0, tmp_path / "ledger", tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_full_arm_takes_all_rows_at_as_many_tokens_per_step(finished, tmp_path, monkeypatch) -> None:
    """Steps of more tokens would make the whole pool look worse, or better, for another reason than its rows."""
    module = ready(finished, tmp_path, monkeypatch, method="full")
    assert sorted(module.rows.tolist()) == list(range(200))
    tokens = module.design["supervised_tokens"]
    assert tokens > 900 and tokens / module.steps == pytest.approx(300 / 4, rel=0.1)
    assert len(module.batches) == module.steps


def test_arms_choose_among_the_candidates_only(finished, tmp_path, monkeypatch) -> None:
    """A seed's candidate rows are its draw of the pool: rows from elsewhere would tie the seeds together."""
    candidates = list(range(0, 200, 2))
    for name in ("top", "random", "full"):
        module = ready(finished, tmp_path, monkeypatch, method=name, candidates=candidates)
        assert set(module.rows.tolist()) <= set(candidates) and module.design["candidates"] == 100


def test_micro_batches_leave_the_number_of_steps(finished, tmp_path) -> None:
    """A model that fits only a part of a step must still make the same steps as every other arm."""
    settings = replace(MINI.tuning, accumulate=2)
    data = arm(finished, accumulate=2)
    record = finetune(data, str(finished[0] / "base"), settings, 0, tmp_path / "ledger", tmp_path)
    assert record.steps == 4 and len(data.batches) == 8
    whole = finetune(arm(finished), str(finished[0] / "base"), MINI.tuning, 0, tmp_path / "ledger", tmp_path)
    assert record.tokens == whole.tokens
    assert record.evaluation["report"]["loss"] == pytest.approx(whole.evaluation["report"]["loss"], rel=2e-3)

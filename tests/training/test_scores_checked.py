"""What was scored and what is trained: a rule that does not fit is refused before the work, the rest is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fitting import World, write_pool

from im_lightning import LinearRule, RequestError, ScoreTable, load_examples, score_examples
from im_lightning.data.settings import Encoding
from im_lightning.indicators.base import Indicator, register_indicator
from im_lightning.indicators.transforms import default_transforms
from im_lightning.models import checkpoint
from im_lightning.scoring import columns
from im_lightning.training.run.inputs import other_than_here

NAMES = ("length_output", "ppl")


def scored(world: World, path: str, **options: Any) -> ScoreTable:
    table = score_examples(load_examples(world.pool), NAMES, world.base, **options)
    table.write(path)
    return table


def rule_of(table: ScoreTable, path: str) -> str:
    transforms = default_transforms(table, NAMES)
    LinearRule(
        name="made", intercept_=1.0, coef_=np.array([-0.1, 0.2]), feature_names_in_=list(NAMES),
        transforms_=transforms, mean_=np.array([3.0, 5.0]), cov_=np.eye(2) / 9, radius_=2.0,
        identities={n: table.keys[n]["identity"] for n in NAMES}, n_runs_=20,
    ).save(path)  # fmt: skip
    return path


def test_a_rule_of_another_length_is_refused_before_a_model_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of scoring, and then: it does not fit."""
    rule = rule_of(scored(world, "scores.parquet", max_length=512), "rule.json")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(checkpoint, "load_causal_lm", never)
    monkeypatch.setattr(columns.Work, "put", never)
    with pytest.raises(RequestError, match=r"ppl was computed in another way than for the fit \(maximum length"):
        world.data(scores=None, rule=rule, budget=8).setup()


def test_a_rule_that_fits_is_used(world: World) -> None:
    rule = rule_of(scored(world, "scores.parquet"), "rule.json")
    data = world.data(scores=None, rule=rule, budget=8)
    data.setup()
    assert data.rows is not None and len(data.rows) == 8


def test_a_table_of_another_length_or_model_is_said(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny import make_tiny_llama

    scored(world, "scores.parquet", max_length=512)
    world.data(scores="scores.parquet", subset_size=8, subset_seed=0).setup()
    said = capsys.readouterr().err
    assert "scores.parquet was scored otherwise than is trained: ppl: maximum length (max_length): " in said
    assert "512 in the table, 1024 here" in said
    world.data(scores="scores.parquet", subset_size=8, subset_seed=0, max_length=512).setup()
    assert "scored otherwise" not in capsys.readouterr().err
    other = make_tiny_llama(tmp_path / "other", hidden=16, layers=1, seed=7)
    world.data(scores="scores.parquet", subset_size=8, subset_seed=0, max_length=512, model=other).setup()
    assert "is trained: ppl: model weights (model.weights): " in capsys.readouterr().err


@pytest.mark.usefixtures("forget_registrations")
def test_what_is_derived_of_a_reward_is_not_compared_with_the_base(world: World) -> None:
    """A fit on such a table ended in a traceback."""
    register_indicator("twice_reward")(type("Twice", (Indicator,), {"derived_from": ("reward",)}))
    reward = {"indicator": "reward", "version": 1, "reward_model": {"weights": "w", "tokenizer": "t"}}
    keys = {"twice_reward": {"identity": {"indicator": "twice_reward", "version": 1, "from": {"reward": reward}}}}
    table = ScoreTable([0], ["a"], [""], {"twice_reward": [1.0]}, keys=keys)
    assert other_than_here(table, Encoding(world.base)) == []


def test_rows_that_training_cuts_are_counted(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """length_output counts them uncut: a rule weighs tokens that the model never sees."""
    pool = write_pool(Path("long.jsonl"), n=12)
    examples = load_examples(pool)
    table = score_examples(examples, ["length_input", "length_output"], world.base, template="alpaca")
    table.write("long.parquet")
    capsys.readouterr()
    here, options = world._replace(pool=pool), {"scores": "long.parquet", "eval_data": None, "template": "alpaca"}
    uncut = here.data(**options, subset_size=12, subset_seed=0)
    uncut.setup()
    lengths = np.array([len(uncut.encoded.encoded[row].input_ids) for row in range(12)])
    limit = int(np.median(lengths))
    longer = int((lengths > limit).sum())
    assert 0 < longer < 12, "the case that is tested"
    here.data(**options, max_length=limit, subset_size=12, subset_seed=0).setup()
    said = capsys.readouterr().err
    assert said.count("cut in training") == 1
    assert f"{longer} of 12 rows are longer than max_length {limit} and cut in training; length_output counts" in said
    both = table.values["length_input"] + table.values["length_output"]
    limit = int(np.median(both))
    here.data(**options, max_length=limit, budget=4, resample_each_epoch=True).setup()
    assert f"{int((both > limit).sum())} of the pool's 12 rows, or more, are longer than max_length {limit}" in (
        capsys.readouterr().err
    )

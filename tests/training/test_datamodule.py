"""`InstructMiningDataModule`: which rows it draws, what it refuses, what it freezes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import World, trainer, write_pool, write_rule, write_scores

from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.tokenization import encode_examples
from im_lightning.errors import DataError, RequestError
from im_lightning.indicators.transforms import default_transforms, phi_matrix
from im_lightning.models.checkpoint import load_tokenizer
from im_lightning.rule import linear_rule as regressors
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.designs.subsets import designed_subset
from im_lightning.sampling.weights.quality_weights import RowWeights, quality_weights
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.run import scoring
from im_lightning.training.run.run_folder import RunInputs, freeze, thaw


def no_scoring(*_: Any, **__: Any) -> None:
    raise AssertionError("something was scored")


def epoch(data: InstructMiningDataModule, number: int) -> list[int]:
    data.sampler.set_epoch(number)
    return [row for batch in data.train_dataloader() for row in batch["row"].tolist()]


def ready(data: InstructMiningDataModule) -> InstructMiningDataModule:
    data.setup("fit")
    return data


def test_weights_are_those_of_the_rule_and_evaluation_rows_are_never_drawn(world: World) -> None:
    """Training on a row that is evaluated on would make every loss a lie."""
    rows = Path(world.pool).read_text().splitlines()
    leaked = world.root / "leaked.jsonl"
    leaked.write_text("\n".join([rows[3], rows[8], *Path(world.eval).read_text().splitlines()]) + "\n")
    data = ready(world.data(rule=world.rule, budget=12, eval_data=str(leaked)))
    eligible = np.ones(40, dtype=bool)
    eligible[[3, 8]] = False
    assert np.array_equal(data.eligible, eligible)
    table, rule = ScoreTable.read(world.scores), LinearRule.load(world.rule)
    expected = quality_weights(table, rule, budget=12, eligible=eligible)
    np.testing.assert_allclose(data.weights, expected.weights, rtol=1e-12)
    assert data.report["ineligible"] == {"in_evaluation": 2, "no_prediction": 0} and data.report["method"] == "tilt"
    assert not {3, 8} & {row for e in range(30) for row in epoch(ready(world.data(eval_data=str(leaked))), e)}


def test_rows_without_a_prediction_are_ineligible_and_counted(world: World) -> None:
    scores = write_scores(world.root / "holes.parquet", world.pool, missing=(0, 5))
    rule = write_rule(world.root / "r.json", scores)
    data = ready(world.data(scores=scores, rule=rule, budget=12))
    assert data.report["ineligible"] == {"in_evaluation": 0, "no_prediction": 2}
    assert not data.eligible[[0, 5]].any() and data.eligible.sum() == 38 and not data.weights[[0, 5]].any()
    uniform = ready(world.data(scores=scores, rule=rule, weighting="uniform"))
    assert uniform.eligible.sum() == 38, "every arm of a comparison draws from the same rows"


def test_a_fixed_subset_stays_and_is_permuted_each_epoch(world: World) -> None:
    data = ready(world.data(rule=world.rule, budget=12))
    first, second = epoch(data, 0), epoch(data, 1)
    assert len(set(first)) == 12 and sorted(first) == sorted(second) == sorted(data.rows) and first != second
    again = ready(world.data(rule=world.rule, budget=12))
    assert epoch(again, 0) == first
    other = ready(world.data(rule=world.rule, budget=12, seed=1))
    assert sorted(other.rows) != sorted(first)


def test_resample_each_epoch_draws_anew(world: World) -> None:
    data = ready(world.data(rule=world.rule, budget=12, resample_each_epoch=True))
    epochs = [epoch(data, e) for e in range(4)]
    assert data.rows is None and all(len(set(e)) == 12 for e in epochs) and sorted(epochs[0]) != sorted(epochs[1])


def test_only_what_is_drawn_is_encoded(world: World) -> None:
    """A budget of thousands from a pool of millions must not tokenise the millions first."""
    pool = write_pool(world.root / "new.jsonl", seed=77)  # that no other test has encoded in this process
    scores = write_scores(world.root / "new.parquet", pool)
    data = ready(world._replace(pool=pool).data(rule=world.rule, scores=scores, budget=12, resample_each_epoch=True))
    drawn = [row for batch in data.train_dataloader() for row in batch["row"].tolist()]
    assert len(drawn) == 12 and set(data.encoded.encoded) == set(drawn)


def test_phi_of_the_pool_is_made_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its quantiles take seconds on millions of rows; they were taken anew for every indicator."""
    calls: list[Any] = []
    real, phi = regressors.default_transforms, LinearRule.phi
    monkeypatch.setattr(regressors, "default_transforms", lambda *a: calls.append("quantiles") or real(*a))
    monkeypatch.setattr(LinearRule, "phi", lambda *a: calls.append("phi") or phi(*a))
    callback = InstructMiningCallback(ledger=str(world.root / "runs"))
    options = {"subset_size": 10, "subset_seed": 0}, {"rule": world.rule, "budget": 12}
    for at, choice in enumerate(options):
        trainer(world.root / str(at), callbacks=[callback]).fit(world.tuner(), datamodule=world.data(**choice))
    assert calls == ["quantiles", "phi", "quantiles"], "for weights, draw, live statistics and the record together"


def test_replacement_may_draw_a_row_twice(world: World) -> None:
    data = ready(world.data(rule=world.rule, replacement=True))
    assert any(len(set(epoch(data, e))) < 40 for e in range(3)) and len(epoch(data, 4)) == 40


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_draws_with_and_without_replacement_keep_weights_of_their_own(world: World, order: tuple[bool, bool]) -> None:
    """Without replacement no weight may exceed one draw; whichever run came first decided the weights of both."""
    made = {again: ready(world.data(rule=world.rule, budget=30, replacement=again)) for again in order}
    assert made[True].weights.max() * 30 > 1.001 and made[False].weights.max() * 30 <= 1 + 1e-9
    assert made[True].report["strength"] > made[False].report["strength"]


def test_without_rule_and_subset_all_rows_are_used(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    data = ready(world.data(scores=None))
    assert sorted(epoch(data, 0)) == list(range(40)) and data.table is None
    assert "all eligible rows weigh the same" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {},
            r"weighting auto with no budget: all 40 eligible.*no effect.*budget= .*fewer than 40.*replacement=True",
        ),
        ({"budget": 40}, r"weighting auto with budget=40: all 40 eligible rows.*no effect"),
        ({"budget": 41}, r"budget=41: the pool has only 40 eligible rows.*budget=40 or less, or replacement=True"),
        ({"budget": 12, "weighting": "best"}, r"weighting 'best'"),
        ({"budget": 12, "weighting": "top", "replacement": True}, r"weighting top: .*once each.*leave out replacement"),
    ],
)
def test_weights_without_effect_are_refused(world: World, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        ready(world.data(rule=world.rule, **options))


def test_designed_subset_depends_on_the_subset_seed_alone(world: World) -> None:
    """Repeats with another training seed must see the very same rows, or the noise ceiling means nothing."""
    data = ready(world.data(subset_size=15, subset_seed=4))
    table = ScoreTable.read(world.scores)
    names = ["length_output", "ppl", "mtld"]
    phi = phi_matrix(table, default_transforms(table, names))
    expected = designed_subset(phi, table.source, 15, 4)
    assert np.array_equal(data.rows, expected.rows) and data.purpose == "designed"
    assert data.design["seed"] == 4 and data.design["source_shares"] == expected.design["source_shares"]
    repeat = ready(world.data(subset_size=15, subset_seed=4, seed=1, rule=world.rule, budget=3))
    assert np.array_equal(repeat.rows, data.rows) and epoch(repeat, 0) != epoch(data, 0)
    assert repeat.rule is None, "a rule must not bend the runs that the next rule is fitted on"
    mixed = ready(world.data(subset_size=15, subset_seed=4, subset_mixture={"a": 1.0}, subset_tilt=0.0))
    assert {mixed.pool.sources[row] for row in mixed.rows} == {"a"}


def test_designed_rows_without_indicators_are_left_out(world: World) -> None:
    scores = write_scores(world.root / "holes.parquet", world.pool, missing=(0, 5))
    data = ready(world.data(scores=scores, subset_size=38, subset_seed=0))
    assert sorted(data.rows) == [r for r in range(40) if r not in (0, 5)]


def test_scores_from_a_file_load_no_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "score", no_scoring)
    ready(world.data(rule=world.rule, budget=12))


def test_scores_in_another_order_are_matched_by_id(world: World) -> None:
    table = ScoreTable.read(world.scores)
    shuffled = table.take(np.random.default_rng(0).permutation(40))
    shuffled.write(world.root / "shuffled.parquet")
    data = ready(world.data(scores=str(world.root / "shuffled.parquet"), rule=world.rule, budget=12))
    assert data.table.id == table.id
    np.testing.assert_array_equal(data.table.values["ppl"], table.values["ppl"])


def test_scores_of_another_pool_are_refused(world: World) -> None:
    ScoreTable.read(world.scores).take(np.arange(30)).write(world.root / "part.parquet")
    with pytest.raises(
        RequestError, match=r"part.parquet: it has no scores for 10 of the pool's 40 rows, first row 30"
    ):
        ready(world.data(scores=str(world.root / "part.parquet"), rule=world.rule, budget=12))


def test_a_rule_of_other_indicators_is_refused(world: World) -> None:
    table = ScoreTable.read(world.scores)
    table.keys["ppl"] = {"identity": {"indicator": "ppl", "version": 2}, "numerics": {}}
    table.write(world.root / "other.parquet")
    with pytest.raises(RequestError, match=r"rule .*: ppl was computed in another way"):
        ready(world.data(scores=str(world.root / "other.parquet"), rule=world.rule, budget=12))
    with pytest.warns(UserWarning, match="forced"):
        ready(world.data(scores=str(world.root / "other.parquet"), rule=world.rule, budget=12, force="other-base"))


def test_scored_up_front_then_frozen(world: World, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """A lost cache must not cost a resumed run its scores, nor change its weights."""
    first = ready(world.data(scores=None, subset_size=15, subset_seed=1))
    assert first.table.indicators == ["length_input", "length_output", "ppl", "mtld", "knn_6"]
    shutil.rmtree(own_cache)
    monkeypatch.setattr(scoring, "score", no_scoring)
    second = ready(world.data(scores=None, subset_size=15, subset_seed=1))
    assert second.run_folder == first.run_folder and np.array_equal(second.rows, first.rows)
    np.testing.assert_array_equal(second.table.values["ppl"], first.table.values["ppl"])
    assert ready(world.data(scores=None, subset_size=15, subset_seed=2)).run_folder == first.run_folder
    moved = world.root / "elsewhere"
    shutil.move(first.run_folder, moved)
    third = ready(world.data(scores=None, subset_size=15, subset_seed=1, run_dir=moved))
    assert np.array_equal(third.rows, first.rows)


def test_neighbours_are_looked_for_in_a_fixed_reference(world: World) -> None:
    """Otherwise knn of two pools is not comparable, and a rule fitted on one says nothing of the other."""
    from im_lightning.scoring.api import score_examples

    reference = write_pool(world.root / "reference.jsonl", 12, seed=9, tag="other ")
    options = {"scores": None, "indicators": ["knn_3"], "subset_size": 15, "subset_seed": 1}
    data = ready(world.data(**options, knn_reference=Path(reference)))
    expected = score_examples(data.examples, ["knn_3"], model=world.base, knn_reference=reference)
    np.testing.assert_array_equal(data.table.values["knn_3"], expected.values["knn_3"])
    assert data.table.keys["knn_3"]["identity"] == expected.keys["knn_3"]["identity"]
    plain = ready(world.data(**options))
    assert not np.array_equal(plain.table.values["knn_3"], data.table.values["knn_3"])
    assert plain.run_folder != data.run_folder and "knn_reference" not in plain.inputs["scoring"]
    write_pool(world.root / "reference.jsonl", 12, seed=10, tag="third ")
    assert ready(world.data(**options, knn_reference=reference)).run_folder != data.run_folder
    with pytest.raises(RequestError, match="there is no such file or folder"):
        ready(world.data(**options, knn_reference="nowhere.jsonl"))


def test_target_rows_are_part_of_the_run_and_of_no_evaluation_set(world: World, tmp_path: Path) -> None:
    """What is scored towards rows that are then evaluated on is judged by what it was chosen for."""
    from im_lightning.scoring.api import score_examples

    targets = write_pool(world.root / "targets.jsonl", 6, seed=9, tag="other ")
    names = ["gradient_similarity", "loss_drop"]
    options = {"scores": None, "indicators": names, "subset_size": 15, "subset_seed": 1}
    data = ready(world.data(**options, targets=Path(targets)))
    expected = score_examples(data.examples, names, model=world.base, targets=targets, device="cpu")
    for name in names:
        np.testing.assert_array_equal(data.table.values[name], expected.values[name])
    assert data.inputs["scoring"]["targets"] and np.isfinite(data.scored.phi).all()
    with pytest.raises(RequestError, match=r"--targets .*eval.*: it shares .* rows with .*eval"):
        ready(world.data(**options, targets=world.eval))
    named = {**options, "eval_data": world.eval, "model": world.base, "targets": targets}
    with pytest.raises(RequestError) as found:
        ready(InstructMiningDataModule([world.pool, targets], **named))
    assert f"im-lightning check {targets} {world.pool} {targets} lists those that are shared" in str(found.value)
    scores = tmp_path / "towards.parquet"
    expected.write(scores)
    assert ready(world.data(**{**options, "scores": str(scores)})).table.meta["targets"]["data"] == targets
    with pytest.raises(
        RequestError, match=r"eval_data .*targets.jsonl: 6 of its 6 rows are among those that .*towards"
    ):
        ready(world.data(**{**options, "scores": str(scores), "eval_data": targets}))


def test_ranks_leave_only_the_reference_to_the_rank_that_puts_the_table_together(world: World) -> None:
    """Else every rank would embed the reference, or one rank the whole pool."""
    from im_lightning.data.settings import Encoding
    from im_lightning.indicators.base import get_indicators
    from im_lightning.scoring.plan import ScoringPlan
    from im_lightning.scoring.settings import Numerics, ScorerModels, Setup

    reference = write_pool(world.root / "reference.jsonl", 12, seed=9, tag="other ")
    how = Encoding(world.base), ScorerModels(knn_reference=reference), Numerics(device="cpu")
    scorer = scoring.Scorer(("knn_3",), Setup(*how))
    examples = load_examples(world.pool)
    for share in (examples[::2], examples[1::2]):
        for each in scorer.passes(share):
            each.run()
    left = ScoringPlan(examples, get_indicators(["knn_3"]), Setup(*how), load_examples(reference)).passes
    assert [each.label for each in left] == ["embeddings of the reference"]


def test_the_folder_of_whoever_was_first_stays(world: World) -> None:
    """Two processes may freeze the same inputs; both then train on one and the same weights."""
    data = ready(world.data(rule=world.rule, budget=12))
    other = RowWeights(np.zeros(40), np.zeros(40, dtype=bool), {"method": "another"})
    assert not freeze(RunInputs(data.run_folder, data.inputs, None, None, other), data.pool.ids)
    np.testing.assert_array_equal(thaw(data.run_folder).weights.weights, data.weights)


def test_run_dir_of_other_inputs_is_refused(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    folder = ready(world.data(rule=world.rule, budget=12)).run_folder
    with pytest.raises(RequestError, match=r"not what they were: weighting.budget: 12 → 13.*on_mismatch=warn"):
        ready(world.data(rule=world.rule, budget=13, run_dir=folder))
    warned = ready(world.data(rule=world.rule, budget=13, run_dir=folder, on_mismatch="warn"))
    assert warned.report["budget"] == 12 and "going on" in capfd.readouterr().err
    write_rule(world.root / "rule.json", world.scores, coef=(1.0, 1.0, 1.0))
    kept = ready(world.data(rule=world.rule, budget=12, run_dir=folder))
    assert kept.rule.coef_.tolist() == [-0.1, 0.2, 0.0], "the run's rule is the frozen one"
    assert "goes on with its frozen rule" in capfd.readouterr().err


def test_run_dir_of_another_pool_is_refused_whatever_is_accepted(world: World) -> None:
    """Its scores and weights are joined to rows by their place: they would be those of other rows."""
    folder = ready(world.data(rule=world.rule, budget=12)).run_folder
    lines = Path(world.pool).read_text().splitlines()
    for other in (lines[::-1], [*lines, lines[0].replace("Describe", "Tell of")]):
        Path(world.pool).write_text("\n".join(other) + "\n")
        write_scores(Path(world.scores), world.pool)
        with pytest.raises(RequestError, match=r"of the rows of another pool: pool\.digest.*leave run_dir out"):
            ready(world.data(rule=world.rule, budget=12, run_dir=folder, on_mismatch="warn"))


def test_a_torn_frozen_file_is_named(world: World) -> None:
    folder = ready(world.data(rule=world.rule, budget=12)).run_folder
    weights = folder / "weights.parquet"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match=r"weights.parquet: it is torn or foreign.*delete the folder"):
        ready(world.data(rule=world.rule, budget=12))


def test_batches_hold_the_encoded_rows(world: World) -> None:
    data = ready(world.data(scores=None, batch_size=3, template="alpaca", max_length=64))
    batch = next(iter(data.train_dataloader()))
    tokenizer = load_tokenizer(world.base)
    expected = encode_examples(load_examples(world.pool), tokenizer, "alpaca", 64)
    assert batch["row"].dtype == torch.int64 and len(batch["row"]) == 3
    for i, row in enumerate(batch["row"].tolist()):
        length = len(expected[row].input_ids)
        assert batch["input_ids"][i, :length].tolist() == expected[row].input_ids.tolist()
        assert batch["target_mask"][i, :length].tolist() == expected[row].loss_mask.tolist()
        assert not batch["target_mask"][i, length:].any() and batch["attention_mask"][i].sum() == length


def test_a_token_without_an_embedding_is_refused_before_training(world: World) -> None:
    """Named as in scoring; torch would say 'index out of range in self' in the middle of an epoch."""
    tokenizer = load_tokenizer(world.base)
    tokenizer.add_tokens(["<scratch>"])
    base = shutil.copytree(world.base, world.root / "larger")
    tokenizer.save_pretrained(base)
    odd = world.root / "odd.jsonl"
    odd.write_text(Path(world.pool).read_text() + '{"instruction": "Think.", "output": "<scratch> 12"}\n')
    data = InstructMiningDataModule(str(odd), model=str(base), batch_size=41)
    with pytest.raises(
        RequestError, match=r"the model embeddings for [\d,]+: there is none for '<scratch>' in the example"
    ):
        next(iter(ready(data).train_dataloader()))


def test_setup_is_idempotent_and_every_loader_has_the_one_sampler(world: World) -> None:
    """Lightning may ask for the loader twice (estimated_stepping_batches); a second sampler would lose the position."""
    data = ready(world.data(rule=world.rule, budget=12))
    sampler = data.sampler
    data.setup("validate")
    assert data.train_dataloader().sampler is sampler and data.train_dataloader().sampler is sampler


def test_a_warm_store_draws_the_same_random_numbers_as_a_cold_one(world: World) -> None:
    """Otherwise the same seed would start another adapter, depending on what was scored before."""

    def after(**options: Any) -> tuple[float, float, float]:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        ready(world.data(scores=None, subset_size=5, subset_seed=0, **options))
        return torch.rand(1).item(), float(np.random.rand()), random.random()  # noqa: NPY002

    assert after() == after()


def test_hyperparameters_are_plain(world: World) -> None:
    """A Path in them would make the checkpoint unreadable under weights_only."""
    data = InstructMiningDataModule(
        [Path(world.pool)], eval_data={"held out": Path(world.eval)}, model=Path(world.base), scores=Path(world.scores)
    )
    assert json.loads(json.dumps(dict(data.hparams)))["eval_data"] == {"held out": world.eval}


def test_evaluation_sets_are_named(world: World) -> None:
    other = write_pool(world.root / "other.jsonl", n=3, seed=5, tag="o")
    assert list(ready(world.data(eval_data=[world.eval, other])).eval_sets) == ["eval", "other"]
    assert list(ready(world.data(eval_data={"a": world.eval})).eval_sets) == ["a"]
    (world.root / "b").mkdir()
    clash = write_pool(world.root / "b" / "eval.jsonl", n=3, seed=6, tag="c")
    with pytest.raises(RequestError, match=r"eval_data: .*both be called 'eval'"):
        world.data(eval_data=[world.eval, clash])


def test_bad_rows_are_refused_or_set_aside(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    bad = world.root / "bad.jsonl"
    bad.write_text(Path(world.pool).read_text() + '{"instruction": "no response"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:41"):
        data = InstructMiningDataModule(str(bad), model=world.base)
        data.setup()
    kept = ready(InstructMiningDataModule(str(bad), model=world.base, on_bad_row="quarantine"))
    assert len(kept.examples) == 40 and "1 bad row set aside" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"subset_seed": 3}, "subset_seed: there is no subset_size"),
        ({"budget": 0}, "budget: it is 0"),
        ({"subset_size": -1}, "subset_size: it is -1"),
        ({"on_mismatch": "ignore"}, "on_mismatch: there is no 'ignore'.*error, warn"),
        ({"purpose": "fun"}, "purpose: there is no 'fun'.*designed, weighted, search, compare"),
        ({"batch_size": 0}, "batch_size: it is 0.*give 1 or more"),
        ({"eval_batch_tokens": 0}, "eval_batch_tokens: it is 0"),
        ({"batch_tokens": 0}, "batch_tokens: it is 0"),
        ({"num_workers": -1}, "num_workers: it is -1.*give 0 or more"),
    ],
)
def test_wrong_arguments_are_refused_at_once(world: World, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        world.data(**options)


def test_the_model_must_be_named(world: World) -> None:
    with pytest.raises(RequestError, match="model: the base model, whose tokenizer encodes the data, is not named"):
        ready(world.data(model=None))


def test_a_changed_file_is_read_again(world: World) -> None:
    """The caches of one process must not outlive the files."""
    assert len(ready(world.data(scores=None)).examples) == 40
    write_pool(Path(world.pool), n=41)
    assert len(ready(world.data(scores=None)).examples) == 41


def test_a_pool_that_is_all_evaluation_is_refused(world: World) -> None:
    with pytest.raises(RequestError, match=r"the pool: none of its 40 rows is eligible \(40 are in an evaluation set"):
        ready(world.data(eval_data=world.pool))


def test_the_frozen_folder_does_not_hide_the_package(world: World) -> None:
    """A folder im_lightning/ beside a user's script would be imported in place of an editable installation."""
    folder = ready(world.data(rule=world.rule, budget=12)).run_folder
    assert folder.relative_to(".").parts[0] == "im-lightning" and not Path("im_lightning").exists()


@pytest.mark.filterwarnings("ignore:THE RULE")
def test_published_rule_with_models_of_ones_own(world: World, tmp_path: Path) -> None:
    """The way in for a user without runs: a published rule, and another reward model is another run."""
    from tiny_judges import make_deberta_reward, make_unieval

    unieval = make_unieval(tmp_path / "t5")
    options = {"rule": "instructmining-v3", "scores": None, "budget": 10, "unieval_model": unieval}
    runs = []
    for seed in range(2):
        reward = make_deberta_reward(tmp_path / f"reward{seed}", seed=seed)
        runs.append(ready(world.data(**options, reward_model=reward)))
    assert runs[0].table is not None and set(runs[0].table.indicators) == {
        "reward", "understandability", "naturalness", "coherence",
    }  # fmt: skip
    assert np.isfinite(runs[0].table.matrix(runs[0].table.indicators)).all()
    assert runs[0].run_folder != runs[1].run_folder
    named = [run.inputs["scoring"] for run in runs]
    assert (
        named[0]["reward_model"] != named[1]["reward_model"] and named[0]["unieval_model"] == named[1]["unieval_model"]
    )
    assert json.loads(json.dumps(dict(runs[0].hparams)))["unieval_model"] == unieval

    designed = ready(world.data(subset_size=8, scores=None, unieval_model=Path(unieval)))
    assert designed.table is not None and designed.table.indicators[-3:] == [
        "naturalness", "coherence", "understandability",
    ]  # fmt: skip


def test_an_indicator_whose_model_is_not_named_is_refused(world: World) -> None:
    with pytest.raises(RequestError, match=r"reward: a reward model is needed.*\(reward_model=\)"):
        ready(world.data(indicators=["reward"], scores=None, subset_size=8))


def test_columns_and_the_answer_reach_the_rows_of_pool_and_evaluation(world: World) -> None:
    """Named in Python, in a recipe or on a command line, they mean the same."""
    lines = [{"q": f"Question {k}?", "passage": f"Passage {k}.", "a": [f"answer {k}", "another"]} for k in range(12)]
    pool, evaluation = world.root / "named.jsonl", world.root / "named_eval.jsonl"
    for path, some in ((pool, lines[:9]), (evaluation, lines[9:])):
        path.write_text("".join(json.dumps(line) + "\n" for line in some))
    columns = {"prompt": "q", "context": "passage", "response": "a"}
    made = []
    for given in (columns, "prompt=q,context=passage,response=a"):
        data = InstructMiningDataModule(
            str(pool), eval_data=str(evaluation), model=world.base, columns=given, answer="first"
        )
        made.append(ready(data))
    assert made[0].examples == made[1].examples
    assert made[0].examples[3].prompt == "Question 3?\nPassage 3." and made[0].examples[3].response == "answer 3"
    assert len(made[0].eval_sets["named_eval"].ids) == 3
    with pytest.raises(DataError, match="--answer first takes the first"):
        ready(InstructMiningDataModule(str(pool), eval_data=str(evaluation), model=world.base, columns=columns))


def test_targets_and_a_reference_are_read_as_the_pool_is(world: World) -> None:
    """By the columns of the data: of two forms, one would have to be a file of its own."""
    named = {}
    for tag, count in (("pool", 20), ("eval", 3), ("targets", 4), ("near", 5)):
        lines = [{"q": f"What of {tag} {k}?", "a": f"{tag} {k} is so. " * (k + 1)} for k in range(count)]
        named[tag] = world.root / f"{tag}_named.jsonl"
        named[tag].write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = ready(
        InstructMiningDataModule(
            str(named["pool"]), eval_data=str(named["eval"]), model=world.base, subset_size=8,
            columns={"prompt": "q", "response": "a"}, indicators=["gradient_similarity", "knn_1"],
            targets=str(named["targets"]), knn_reference=str(named["near"]),
        )
    )  # fmt: skip
    assert np.isfinite(data.table.matrix(["gradient_similarity", "knn_1"])).all()
    assert len(data.table.meta["targets"]["ids"]) == 4

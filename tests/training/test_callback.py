"""`InstructMiningCallback`: the evaluation loss, the record, the statistics and the refit, checked from outside."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fitting import World, trainer, write_pool, write_rule, write_scores
from scipy import stats
from test_resume import Tape
from tiny import make_tiny_llama

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import InstructMiningError, RequestError
from im_lightning.indicators.transforms import default_transforms, phi_matrix
from im_lightning.ledger.ledger import RunLedger
from im_lightning.models.fingerprint import checkpoint_identity
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.training import evaluation as base_loss
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.module import InstructTuningModule
from im_lightning.training.run.encoded_pool import base_model_name


class Memory(pl.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))

    def values(self, name: str) -> list[float]:
        return [m[name] for _, m in self.lines if name in m]


def callback(world: World, **options: Any) -> InstructMiningCallback:
    return InstructMiningCallback(**{"ledger": str(world.root / "runs"), "log_every_n_steps": 3, **options})


def fit(world: World, *callbacks: Any, tuner: Any = None, data: Any = None, ckpt: Any = None, **options: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    fitting = trainer(world.root, **{"callbacks": list(callbacks), "max_epochs": 2, **options})
    tuner = tuner or world.tuner()
    fitting.fit(tuner, datamodule=data or world.data(rule=world.rule, budget=12), ckpt_path=ckpt)
    return tuner


def reference_loss(network: Any, batches: Any) -> tuple[list[float], list[int]]:
    """Per example summed NLL and tokens, from transformers' own logits, one example at a time."""
    sums, counts = [], []
    network.eval()
    for encoded in batches:
        ids = torch.tensor(encoded.input_ids, dtype=torch.int64)[None]
        logits = network(input_ids=ids).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        mask = torch.tensor(encoded.loss_mask[1:])
        sums.append(float(nll[mask].sum()))
        counts.append(int(mask.sum()))
    return sums, counts


def test_record_of_a_run(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Everything a later fit of a rule stands on: losses, means over what was really trained on, regime, tokens."""
    watch, tape = callback(world), Tape(world.root / "tape")
    data = world.data(rule=world.rule, budget=12)
    tuner = fit(world, watch, tape, data=data)
    (record,) = RunLedger(world.root / "runs").records()
    assert record.run_id == watch.run_id and record.status == "complete" and record.purpose == "weighted"

    encoded = data.eval_sets["eval"].encoded
    sums, counts = reference_loss(tuner.network, encoded)
    assert record.evaluation["eval"]["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert record.evaluation["eval"]["tokens"] == sum(counts) and record.evaluation["eval"]["examples"] == 7
    assert record.evaluation["eval"]["log_loss"] == pytest.approx(math.log(sum(sums) / sum(counts)), rel=1e-5)
    with tuner.network.disable_adapter():
        base, tokens = reference_loss(tuner.network, encoded)
    assert record.evaluation["eval"]["base_loss"] == pytest.approx(sum(base) / sum(tokens), rel=1e-5)
    kept = RunLedger(world.root / "runs").losses(record.run_id)["eval"]
    assert kept.ids == data.eval_sets["eval"].ids and kept.counts.tolist() == counts
    np.testing.assert_allclose(kept.sums, sums, rtol=1e-5)

    seen = Counter(row for line in tape.read()[0] for row in line[2:])
    weight = np.array([seen[row] for row in range(40)])
    table = ScoreTable.read(world.scores)
    for name in table.indicators:
        assert record.indicator_means[name] == pytest.approx(np.average(table.values[name], weights=weight))
    rule = LinearRule.load(world.rule)
    phi = phi_matrix(table, rule.transforms_)
    for j, name in enumerate(rule.feature_names_in_):
        assert record.phi_means[name] == pytest.approx(np.average(phi[:, j], weights=weight))
        assert record.transforms[name]["kind"] == rule.transforms_[name].kind
    assert record.keys == table.keys
    assert record.tokens == sum(int(data.encoded[r][1].loss_mask.sum()) * n for r, n in seen.items())
    assert record.steps == 6 and record.subset["size"] == 12 and record.subset["rows_seen"] == 12
    shares = {s: sum(n for r, n in seen.items() if table.source[r] == s) / 24 for s in "ab"}
    assert record.subset["source_shares"] == pytest.approx(shares)
    assert record.regime["method"] == "lora r=2 alpha=4 all-linear" and record.regime["epochs"] == 2
    assert record.regime["evaluation_sets"] == {"eval": data.eval_sets["eval"].digest}
    assert record.seeds == {"training": 1, "data": 0, "subset": None} and record.weights["method"] == "tilt"
    assert record.pool_digest == table.pool_digest
    assert f"{record.run_id}.json: evaluation loss eval" in capfd.readouterr().err


def test_statistics_are_those_of_the_losses_of_the_run(world: World) -> None:
    """What is shown while training must be computable from what was trained on."""
    rows: list[int] = []
    losses: list[float] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            rows.extend(outputs["row"].tolist())
            losses.extend(outputs["example_loss"].tolist())

    memory = Memory()
    data = world.data(rule=world.rule, budget=12)
    fit(world, callback(world, log_every_n_steps=100), Keep(), data=data, logger=memory)
    phi = data.rule.phi(data.table)
    first = slice(0, 12)
    expected = stats.linregress(phi[rows[first], 1], losses[first])
    assert memory.values("im/pearson_first/ppl")[-1] == pytest.approx(expected.rvalue, rel=1e-5)
    assert memory.values("im/slope_first/ppl")[-1] == pytest.approx(expected.slope, rel=1e-5)
    assert memory.values("im/examples_first") == [12.0] and memory.values("im/examples_repeat") == [12.0]
    assert memory.values("im/eval_loss/eval") and memory.values("im/base_loss/eval")
    assert memory.values("im/left_out") == [0.0]


def test_statistics_are_logged_at_the_end_of_each_window(world: World) -> None:
    memory = Memory()
    fit(world, callback(world, log_every_n_steps=2, log_prefix="mining"), logger=memory)
    steps = [step for step, metrics in memory.lines if "mining/left_out" in metrics]
    assert steps == [2, 4, 6] and not memory.values("im/left_out")


def test_two_ranks_give_the_numbers_of_one(world: World) -> None:
    """A padded sampler counts rows twice: 7 rows on 2 ranks gave 2.625 where 3.0 was right. Ranks see one optimiser
    step's rows together, so weights, losses, exposures and statistics must be those of one rank."""
    one, two = world.root / "one", world.root / "two"
    data = {"rule": world.rule, "budget": 12}
    a_log, b_log = (pl.loggers.CSVLogger(world.root, name) for name in ("a", "b"))
    fit(world, callback(world, ledger=str(one)), data=world.data(**data, batch_size=4), logger=a_log)
    ranks = {"strategy": "ddp_fork", "devices": 2}
    fit(world, callback(world, ledger=str(two)), data=world.data(**data, batch_size=2), logger=b_log, **ranks)
    (a,), (b,) = RunLedger(one).records(), RunLedger(two).records()
    first, second = (list(csv_rows(world.root / name / "version_0" / "metrics.csv"))[-1] for name in "ab")
    assert second == pytest.approx(first, rel=1e-4) and first["im/examples_repeat"] == 12.0
    assert b.evaluation["eval"]["examples"] == 7 and b.evaluation["eval"]["tokens"] == a.evaluation["eval"]["tokens"]
    assert b.evaluation["eval"]["loss"] == pytest.approx(a.evaluation["eval"]["loss"], rel=1e-5)
    assert b.evaluation["eval"]["base_loss"] == pytest.approx(a.evaluation["eval"]["base_loss"], rel=1e-6)
    np.testing.assert_allclose(
        RunLedger(two).losses(b.run_id)["eval"].sums, RunLedger(one).losses(a.run_id)["eval"].sums, rtol=1e-4
    )
    assert (b.tokens, b.steps, b.subset["exposures"]) == (a.tokens, a.steps, 24)
    assert b.phi_means == pytest.approx(a.phi_means) and b.regime == a.regime
    assert b.subset["digest"] == a.subset["digest"]


def test_one_evaluation_row_on_two_ranks(world: World) -> None:
    single = write_pool(world.root / "single.jsonl", n=1, seed=4, tag="s")
    for name, options in (("one", {}), ("two", {"strategy": "ddp_fork", "devices": 2})):
        fit(
            world,
            callback(world, ledger=str(world.root / name)),
            data=world.data(scores=None, eval_data=single),
            **options,
        )
    (a,), (b,) = RunLedger(world.root / "one").records(), RunLedger(world.root / "two").records()
    assert (
        b.evaluation["single"]["examples"] == 1 and b.evaluation["single"]["tokens"] == a.evaluation["single"]["tokens"]
    )


def test_a_resumed_run_overwrites_its_own_record(world: World) -> None:
    """Two records of one run, or exposures counted twice, would bend the next rule."""
    whole = callback(world, ledger=str(world.root / "whole"))
    memory = Memory()
    fit(world, whole, logger=memory)
    part, tape = callback(world), Tape(world.root / "tape", {"mid": (1, 0)})
    fit(world, part, tape)
    again, rest = callback(world), Memory()
    fit(world, again, ckpt=world.root / "tape" / "mid.ckpt", logger=rest)
    (record,) = RunLedger(world.root / "runs").records(status=None)
    (expected,) = RunLedger(world.root / "whole").records()
    assert record.run_id == part.run_id == again.run_id
    assert record.phi_means == expected.phi_means and record.tokens == expected.tokens
    assert record.evaluation["eval"] == pytest.approx(expected.evaluation["eval"])
    assert rest.lines[-1][1] == pytest.approx(memory.lines[-1][1], rel=1e-6)
    same_statistics(RunLedger(world.root / "whole"), expected.run_id, RunLedger(world.root / "runs"), record.run_id)


def test_what_was_measured_on_other_rows_is_not_taken_over(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """A resume on a changed evaluation set told its loss beside the base's on the old one, and counts by position of a
    pool in another order became those of other rows."""
    tape = Tape(world.root / "tape", {"mid": (1, 0)})
    fit(world, callback(world, eval_at=[2]), tape, data=world.data(subset_size=12, subset_seed=0))
    lines = Path(world.pool).read_text().splitlines()
    Path(world.pool).write_text("\n".join(reversed(lines)) + "\n")
    write_pool(Path(world.eval), n=9, seed=5, tag="other ")
    write_scores(Path(world.scores), world.pool)
    data = {"subset_size": 12, "subset_seed": 0, "on_mismatch": "warn"}
    again = callback(world)
    fit(world, again, data=world.data(**data), ckpt=world.root / "tape" / "mid.ckpt")
    assert "counted on them begins anew" in capfd.readouterr().err
    fresh = callback(world, ledger=str(world.root / "fresh"))
    fit(world, fresh, data=world.data(**data))
    assert again.record is not None and again.record.curve == {} and again.record.subset["exposures"] == 8
    kept = RunLedger(world.root / "runs").statistics(again.record.run_id)
    assert kept["examples"] + kept["repeat"]["examples"] == 8, "of the rows as they are now"
    assert again.base_losses == pytest.approx(fresh.base_losses, rel=1e-6)


def test_what_was_counted_under_another_rule_is_not_added_to(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Its φ and its deciles are other numbers; rows that were trained on stay such."""
    tape = Tape(world.root / "tape", {"mid": (1, 0)})
    fit(world, callback(world), tape)
    write_rule(Path(world.rule), world.scores, coef=(0.3, -0.2, 0.1))
    again = callback(world)
    data = world.data(rule=world.rule, budget=12, on_mismatch="warn")
    fit(world, again, data=data, ckpt=world.root / "tape" / "mid.ckpt")
    assert "another pool or rule" in capfd.readouterr().err and again.record is not None
    kept = RunLedger(world.root / "runs").statistics(again.record.run_id)
    assert kept["examples"] + kept["repeat"]["examples"] == 8 and again.record.subset["exposures"] == 24


def same_statistics(one: RunLedger, first: str, other: RunLedger, second: str) -> None:
    a, b = one.statistics(first), other.statistics(second)
    assert a["pool_seen"] == b["pool_seen"] == 12 / 40 and a["examples"] == b["examples"] == 12
    assert a["repeat"]["examples"] == b["repeat"]["examples"] == 12 and len(a["deciles"]) > 2
    assert a["ess"] == b["ess"] == pytest.approx(one.records(status=None)[0].weights["ess"])
    for name in ("pearson", "slope"):
        assert a[name] == pytest.approx(b[name], rel=1e-5)
    np.testing.assert_allclose(a["deciles"], b["deciles"], rtol=1e-5)


def test_two_ranks_resume_without_counting_twice(world: World) -> None:
    ranks = {"strategy": "ddp_fork", "devices": 2}
    whole, tape = callback(world, ledger=str(world.root / "whole")), Tape(world.root / "tape", {"mid": (1, 1)})
    data = {"rule": world.rule, "budget": 12, "batch_size": 2}
    fit(world, whole, tape, data=world.data(**data), logger=pl.loggers.CSVLogger(world.root, "a"), **ranks)
    ckpt = world.root / "tape" / "mid.ckpt"
    logger = pl.loggers.CSVLogger(world.root, "b")
    fit(world, callback(world), data=world.data(**data), ckpt=ckpt, logger=logger, **ranks)
    (expected,), (record,) = RunLedger(world.root / "whole").records(), RunLedger(world.root / "runs").records()
    assert record.phi_means == expected.phi_means and record.subset["exposures"] == 24
    last = [list(csv_rows(world.root / name / "version_0" / "metrics.csv"))[-1] for name in "ab"]
    assert {k: v for k, v in last[1].items() if k.startswith("im/")} == pytest.approx(
        {k: v for k, v in last[0].items() if k.startswith("im/")}, rel=1e-5
    )
    assert last[0]["im/examples_first"] == 12.0
    same_statistics(RunLedger(world.root / "whole"), expected.run_id, RunLedger(world.root / "runs"), record.run_id)


def csv_rows(path: Path) -> Any:
    import csv

    with path.open() as stream:
        for row in csv.DictReader(stream):
            yield {k: float(v) for k, v in row.items() if v not in ("", None)}


def test_the_base_is_measured_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 short runs must not evaluate the same base model 48 times."""
    fit(world, callback(world))
    monkeypatch.setattr(base_loss, "evaluate_with", lambda *_: pytest.fail("the base was measured again"))
    fit(world, callback(world))
    a, b = RunLedger(world.root / "runs").records()
    assert a.evaluation["eval"]["base_loss"] == b.evaluation["eval"]["base_loss"]
    fit(world, callback(world, evaluate_base=False), tuner=world.tuner(dtype="fp32"))
    assert "base_loss" not in RunLedger(world.root / "runs").records()[-1].evaluation["eval"]


def test_the_base_is_measured_anew_on_other_rows_in_the_same_folder(world: World) -> None:
    """The note in a folder named by run_dir told the base's loss on the rows that the folder is of."""
    asked = {"rule": world.rule, "budget": 12}
    data = world.data(**asked)
    fit(world, callback(world), data=data)
    write_pool(Path(world.eval), n=9, seed=5, tag="other ")
    there = world.data(**asked, run_dir=str(data.run_folder), on_mismatch="warn")
    again, fresh = callback(world), callback(world)
    fit(world, again, data=there)
    fit(world, fresh, data=world.data(**asked))
    assert again.record is not None and fresh.record is not None
    for record in (again.record, fresh.record):
        assert record.evaluation["eval"]["examples"] == 9
    measured = fresh.record.evaluation["eval"]["base_loss"]
    assert again.record.evaluation["eval"]["base_loss"] == pytest.approx(measured, rel=1e-6)


def test_trained_weights_are_not_taken_for_the_base(world: World) -> None:
    """Under full finetuning the base is gone after the first step: measured then, and kept, it was every run's base."""
    tuner = world.tuner(lora_rank=0, learning_rate=0.05)
    fit(world, callback(world, evaluate_base=False), tuner=tuner)
    again, fresh = callback(world), callback(world)
    fit(world, again, tuner=tuner)
    assert not again.base_losses
    fit(world, fresh, tuner=world.tuner(lora_rank=0))
    lora = callback(world)
    fit(world, lora)
    assert fresh.base_losses["eval"] == pytest.approx(lora.base_losses["eval"], rel=1e-5)


def test_the_record_names_the_base_that_was_trained(world: World) -> None:
    """By the base that the data module names, runs of two bases were of one regime, and a rule of one served the other
    without a word."""
    other = make_tiny_llama(world.root / "other", hidden=16, layers=2, seed=5)
    for tuner in (world.tuner(), InstructTuningModule(other, lora_rank=2)):
        fit(world, callback(world), tuner=tuner, data=world.data(subset_size=12, subset_seed=0))
    first, second = RunLedger(world.root / "runs").records()
    assert second.regime["base_model"] == base_model_name(checkpoint_identity(other)) != first.regime["base_model"]
    assert 0 < first.compute["parameters"] < second.compute["parameters"]
    rule = LinearRule.load(world.rule)
    rule.regime = {"base_model": first.regime["base_model"]}
    rule.save(world.rule)
    tuner = InstructTuningModule(other, lora_rank=2)
    with pytest.raises(RequestError, match=r"base model: .* in the rule's runs, .*other-base"):
        fit(world, callback(world), tuner=tuner)
    assert tuner.network is None, "not even the weights were loaded"
    forced = callback(world)
    with pytest.warns(UserWarning, match="base model"):
        fit(world, forced, tuner=tuner, data=world.data(rule=world.rule, budget=12, force="other-base"))
    assert forced.record is not None and forced.record.regime["base_model"] == second.regime["base_model"]
    assert forced.record.weights["forced"] == ["other-base"]


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"overfit_batches": 2}, {"barebones": True}])
def test_trial_runs_leave_no_record(world: World, options: dict[str, Any]) -> None:
    drop = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    pl.seed_everything(1, verbose=False)
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "default_root_dir": str(world.root),
        "callbacks": [callback(world)],
    }
    quiet = {} if "barebones" in options else dict.fromkeys(drop, False)
    pl.Trainer(**settings, **quiet, **options).fit(world.tuner(), datamodule=world.data(rule=world.rule, budget=12))
    assert not (world.root / "runs").exists()


def test_a_run_without_evaluation_is_incomplete(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    fit(world, callback(world), data=world.data(subset_size=12, eval_data=None))
    (record,) = RunLedger(world.root / "runs").records(status=None)
    assert record.status == "incomplete" and record.note == "no evaluation set"
    err = capfd.readouterr().err
    assert "no eval_data" in err and "no refit, the run" in err and "not measured (incomplete)" in err


def test_a_failed_run_says_so(world: World) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="the disk is full"):
        fit(world, callback(world), Fails())
    (record,) = RunLedger(world.root / "runs").records(status=None)
    assert record.status == "failed" and record.note == "ValueError: the disk is full"


class Own(pl.LightningModule):
    """A user's own module, as the contract asks."""

    def __init__(self, base: str, wrong: str = "") -> None:
        super().__init__()
        self.inner = InstructTuningModule(base, lora_rank=2)
        self.inner.configure_model()
        self.wrong = wrong

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        sums, counts = self.response_nll(batch)
        out = {"loss": sums.sum() / counts.sum(), "example_loss": (sums / counts).detach(), "row": batch["row"]}
        if self.wrong == "scalar":
            return out["loss"]
        if self.wrong == "shape":
            out["example_loss"] = out["example_loss"].mean()
        return {k: v for k, v in out.items() if k != self.wrong}

    def response_nll(self, batch: Any) -> Any:
        from im_lightning.models.likelihood import response_nll

        nll = response_nll(self.inner.network, batch)
        if self.wrong == "evaluation" and not self.training:
            return nll.sums.sum(), nll.counts.sum()
        return nll.sums, nll.counts

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_module_of_ones_own(world: World) -> None:
    fit(world, callback(world), tuner=Own(world.base))
    (record,) = RunLedger(world.root / "runs").records()
    assert record.regime["method"] == "Own" and record.evaluation["eval"]["base_loss"] > 0


def test_a_subclass_with_its_own_likelihood_is_measured_by_it(world: World) -> None:
    class Halved(InstructTuningModule):
        def response_nll(self, batch: Any) -> Any:
            sums, counts = super().response_nll(batch)
            return sums / 2, counts

    for kind in (InstructTuningModule, Halved):
        fit(world, callback(world), tuner=kind(world.base, lora_rank=2, dtype="fp32"))
    whole, half = (record.evaluation["eval"] for record in RunLedger(world.root / "runs").records())
    assert half["base_loss"] == pytest.approx(whole["base_loss"] / 2, rel=1e-5)
    assert "inner_loss" in whole and "inner_loss" not in half


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("row", r"Own: its training_step returned with loss, example_loss: row missing.*return \{"),
        ("example_loss", r"example_loss missing"),
        ("scalar", r"returned as a .*Tensor|returned with loss: example_loss and row missing"),
        ("shape", r"example_loss has shape \(\) and row \(4,\), not \[B\] both"),
        ("evaluation", r"Own: its response_nll did not return two tensors.*summed NLL in nats \[B\]"),
    ],
)
def test_a_module_that_breaks_the_contract_is_told(world: World, wrong: str, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        fit(world, callback(world, evaluate_base=False), tuner=Own(world.base, wrong))


def test_a_module_without_response_nll_is_told_before_training(world: World) -> None:
    class Without(Own):
        response_nll = None

    with pytest.raises(RequestError, match=r"Without has no response_nll.*or leave out eval_data"):
        fit(world, callback(world), tuner=Without(world.base))


def test_a_shortened_run_is_of_another_regime(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """A trial with a few batches must not enter the fit of the rule beside whole runs."""
    for limit in (1.0, 2):
        fit(world, callback(world), data=world.data(subset_size=12, subset_seed=0), limit_train_batches=limit)
    whole, short = RunLedger(world.root / "runs").records()
    assert "limit_train_batches" not in whole.regime and short.regime["limit_train_batches"] == 2
    first, second = (line for line in capfd.readouterr().err.splitlines() if "the next: " in line)
    assert "limit" not in first and "--trainer.limit_train_batches=2 " in second


def test_differences_from_the_rules_regime_are_said_once(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    rule = LinearRule.load(world.rule)
    rule.regime = {"subset_size": 300, "epochs": 7}
    rule.save(world.rule)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(world, callback(world), data=world.data(rule=world.rule, budget=12))
    said = "\n".join([*(str(w.message) for w in caught), capfd.readouterr().err])
    assert said.count("subset size: 300 in the rule's runs, 12 here") == 1
    assert said.count("epochs: 7 in the rule's runs, 2 here") == 1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"evaluation": "evel"}, RequestError, r"evaluation: there is no evaluation set 'evel'.*\(eval\)"),
        ({"ledger": "pool.jsonl/runs"}, InstructMiningError, r"pool\.jsonl/runs: no run can be kept in this ledger"),
    ],
)
def test_what_would_fail_after_the_training_is_said_before_it(
    world: World, options: dict[str, str], error: type[Exception], text: str
) -> None:
    tuner = world.tuner()
    with pytest.raises(error, match=text):
        fit(world, callback(world, **options), tuner=tuner)
    assert tuner.network is None, "not even the weights were loaded"


def test_another_datamodule_is_refused(world: World) -> None:
    class Other(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader([0])

    with pytest.raises(RequestError, match=r"InstructMiningCallback: the Trainer's datamodule is Other"):
        fit(world, callback(world), data=Other())


def test_log_every_n_steps_must_be_positive() -> None:
    with pytest.raises(RequestError, match="log_every_n_steps: it is 0"):
        InstructMiningCallback(log_every_n_steps=0)


@pytest.mark.parametrize("run_id", ["exp/1", "../x", "lr=2e-4", "my run", "rule", "a.statistics", "", "x" * 129])
def test_a_run_id_that_no_ledger_keeps_is_refused_at_once(run_id: str) -> None:
    """Refused by the ledger alone, it cost the record of a training that was done."""
    with pytest.raises(RequestError, match="run_id: no ledger can keep a run called"):
        InstructMiningCallback(run_id=run_id)


def designed(world: World, seed: int, subset_seed: int, **options: Any) -> None:
    pl.seed_everything(seed, verbose=False)
    data = world.data(subset_size=12, subset_seed=subset_seed)
    trainer(world.root, callbacks=[callback(world, **options)]).fit(world.tuner(), datamodule=data)


def test_enough_runs_refit_the_rule_and_too_few_say_how_many(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Three regressors need six runs; before that the person is told what is missing and how to make it."""
    for seed in range(6):
        designed(world, 0, seed)
        err = capfd.readouterr().err
        if seed < 5:
            assert not (world.root / "runs" / "rule.json").exists()
            missing = "one more designed run is" if seed == 4 else f"{5 - seed} more designed runs are"
            assert f"{missing} needed" in err
            assert f"--data.subset_size=12 --data.subset_seed={seed + 1}" in err
            assert "--model.lora_rank=2" in err and f"--mining.ledger={world.root / 'runs'}" in err
    assert "one more designed run is needed" not in err and "refitted on 6 runs" in err
    rule = LinearRule.load(world.root / "runs" / "rule.json")
    assert rule.n_runs_ == 6 and rule.feature_names_in_ == ["length_output", "ppl", "mtld"]
    assert RunLedger(world.root / "runs").records(status=None)[-1].purpose == "designed"


def test_the_next_command_asks_for_the_same_target(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Runs without the score that the rule is for are left out of its fit."""
    rows = [{"instruction": f"Say {k}.", "output": "yes"} for k in range(5)]
    Path(world.eval).write_text("".join(json.dumps(row) + "\n" for row in rows))
    designed(world, 0, 0, exact_match=True, evaluation="em:eval")
    (command,) = (line for line in capfd.readouterr().err.splitlines() if "the next: " in line)
    assert command.endswith("--mining.exact_match=true --mining.evaluation=em:eval")
    designed(world, 0, 1)
    (command,) = (line for line in capfd.readouterr().err.splitlines() if "the next: " in line)
    assert "mining.evaluation" not in command and "exact_match" not in command


def test_a_singular_design_fails_the_refit_and_not_the_training(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed in range(6):
        designed(world, seed, 0)  # six times the same subset
    assert "no refit" in capfd.readouterr().err
    assert len(RunLedger(world.root / "runs").records()) == 6
    assert not (world.root / "runs" / "rule.json").exists()


def test_search_and_compare_runs_do_not_refit(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    fit(world, callback(world), data=world.data(rule=world.rule, budget=12, purpose="compare"))
    assert RunLedger(world.root / "runs").records()[0].purpose == "compare"
    assert "refit" not in capfd.readouterr().err and not list((world.root / "runs").glob("rule*"))


def test_rows_with_missing_indicators_are_counted_not_averaged(world: World) -> None:
    """A NaN in one row must not make the mean of a run NaN."""
    scores = write_scores(world.root / "holes.parquet", world.pool, missing=(2, 7))
    fit(world, callback(world), data=world.data(scores=scores))
    (record,) = RunLedger(world.root / "runs").records()
    ppl = ScoreTable.read(scores).values["ppl"]
    assert record.indicator_means["ppl"] == pytest.approx(float(np.nanmean(ppl)))
    log_ppl = default_transforms(ScoreTable.read(scores), ["ppl"])["ppl"].apply(ppl)
    assert record.phi_means["ppl"] == pytest.approx(float(np.nanmean(log_ppl)))
    assert json.loads((world.root / "runs" / f"{record.run_id}.json").read_text())["weights"]["eligible"] == 40


def test_a_continuation_that_fails_leaves_the_complete_run(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """More epochs on a finished run, and Ctrl-C: what it had measured must not be lost to the attempt."""

    class Stops(pl.Callback):
        def on_train_batch_end(self, *given: Any) -> None:
            raise RuntimeError("the power is out")

    tape = Tape(world.root / "tape", {"end": (0, None)})
    fit(world, callback(world), tape, max_epochs=1)
    (before,) = RunLedger(world.root / "runs").records()
    with pytest.raises(RuntimeError, match="the power is out"):
        fit(world, callback(world), Stops(), ckpt=world.root / "tape" / "end.ckpt", max_epochs=2)
    (after,) = RunLedger(world.root / "runs").records(status=None)
    assert after.to_json() == before.to_json()
    assert "the ledger already has another complete run of this id" in capfd.readouterr().err

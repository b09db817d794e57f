"""Runs that share a base in one process give the records of runs alone: nothing of a run reaches the next one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import World, make_world

import im_lightning.training.module as tuning
import im_lightning.training.shared_base as sharing
from im_lightning._lightning import Callback, pl
from im_lightning._utils.files import write_json
from im_lightning.experiments.finetuning import TuningSettings, finetune
from im_lightning.experiments.sweep.trial import TrialRequest, TrialResult, run_trial
from im_lightning.ledger.ledger import RunLedger
from im_lightning.training import evaluation
from im_lightning.training.shared_base import shared_base

OWN = ("run_id", "created", "seconds")


@pytest.fixture
def world(small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    return make_world(small_base, tmp_path)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which bases have been loaded from their files."""
    found: list[str] = []
    real = sharing.load_causal_lm

    def counted(model: Any, *rest: Any, **more: Any) -> Any:
        found.append(str(model))
        return real(model, *rest, **more)

    for place in (sharing, tuning):
        monkeypatch.setattr(place, "load_causal_lm", counted)
    return found


def facts(ledger: str | Path) -> list[dict[str, Any]]:
    """Everything of the runs but when they were made, bit by bit."""
    runs = RunLedger(ledger)
    return [
        {**{k: v for k, v in asdict(r).items() if k not in OWN}, "losses": losses_of(runs, r.run_id)}
        for r in runs.records()
    ]


def losses_of(runs: RunLedger, run_id: str) -> Any:
    return {name: (list(one.ids), list(one.sums), list(one.counts)) for name, one in runs.losses(run_id).items()}


def request(world: World, place: str, number: int, *more: str) -> TrialRequest:
    """A trial on twelve rows, whose ledger and frozen folder are in `place`."""
    words = [
        f"--data.data={world.pool}", f"--data.eval_data={world.eval}", f"--data.model={world.base}",
        f"--data.scores={world.scores}", "--data.subset_size=12", f"--data.subset_seed={number}", "--data.batch_size=4",
        f"--mining.ledger={place}/runs", "--trainer.max_epochs=2", f"--trainer.default_root_dir={place}",
        "--trainer.enable_checkpointing=false", "--trainer.logger=false", "--trainer.accelerator=cpu",
        f"--seed_everything={number}", "--model.learning_rate=0.02", "--model.token_budget=40",
    ]  # fmt: skip
    return TrialRequest(number, [*words, *more], f"20260101-00000{number}-aaaaaaaa", f"{place}/trials/{number}")


KINDS = (
    ("--model.lora_rank=2", "--model.lora_dropout=0.3"),
    ("--model.lora_rank=0",),
    ("--model.lora_rank=4", "--model.dtype=bf16"),
    ("--model.lora_rank=2", "--model.gradient_checkpointing=true"),
    ("--model.lora_rank=3",),
)


def run_all(world: World, place: str) -> None:
    for number, kind in enumerate(KINDS):
        result = run_trial(request(world, place, number, *kind))
        assert isinstance(result, TrialResult) and result.status == "done", result


@pytest.mark.slow
def test_trials_that_share_a_base_equal_trials_in_processes_of_their_own(world: World, tmp_path: Path) -> None:
    with shared_base():
        run_all(world, "together")
    for number, kind in enumerate(KINDS):
        asked, answer = tmp_path / f"{number}.json", tmp_path / f"{number}.out"
        write_json(asked, asdict(request(world, "alone", number, *kind)))
        command = [sys.executable, "-m", "im_lightning.experiments.sweep.trial", str(asked), str(answer)]
        subprocess.run(command, check=True, cwd=tmp_path)
    assert facts("together/runs") == facts("alone/runs")


def test_trials_of_every_kind_follow_each_other(world: World) -> None:
    """Dropout, all weights, bf16, recomputed activations, another rank: each as if it were the first."""
    with shared_base():
        run_all(world, "together")
    run_all(world, "apart")
    found = facts("together/runs")
    assert found == facts("apart/runs")
    assert len({one["evaluation"]["eval"]["loss"] for one in found}) == len(KINDS)


class Leaves(Callback):
    """Ends a fit by leaving something on the network or in the process."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        getattr(self, self.what)(pl_module.network, pl_module.network.get_base_model())

    def generators(self, network: Any, base: Any) -> None:
        pl.seed_everything(77)

    def hooks(self, network: Any, base: Any) -> None:
        base.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 3)
        base.model.embed_tokens.weight.requires_grad_().register_hook(lambda gradient: gradient * 3)

    def another_forward(self, network: Any, base: Any) -> None:
        base.model.norm.forward = lambda states: states * 3

    def requires_grad(self, network: Any, base: Any) -> None:
        network.requires_grad_(True)

    def gradients(self, network: Any, base: Any) -> None:
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)

    def mode(self, network: Any, base: Any) -> None:
        network.eval()
        base.model.layers[0].mlp.train()

    def settings(self, network: Any, base: Any) -> None:
        base.config.attention_dropout = base.model.layers[0].self_attn.attention_dropout = 0.5
        base.generation_config.temperature = 3.0

    def dtype(self, network: Any, base: Any) -> None:
        network.to(torch.bfloat16)

    def another_adapter(self, network: Any, base: Any) -> None:
        from peft import LoraConfig

        network.add_adapter("other", LoraConfig(r=3, target_modules=["up_proj"], init_lora_weights=False))
        network.set_adapter("other")

    def disabled_adapter(self, network: Any, base: Any) -> None:
        network.base_model.disable_adapter_layers()

    def another_layer(self, network: Any, base: Any) -> None:
        base.model.layers = base.model.layers[:1]

    def merged_adapter(self, network: Any, base: Any) -> None:
        network.merge_adapter()

    def frozen_weights(self, network: Any, base: Any) -> None:
        base.model.norm.weight.data[3] += 1


UNDONE = [
    "generators", "hooks", "another_forward", "requires_grad", "gradients", "mode", "settings", "dtype",
    "another_adapter", "disabled_adapter", "another_layer",
]  # fmt: skip
TUNING = TuningSettings(lora_rank=2, learning_rate=0.02, batch_size=4, device="cpu")


def tune(world: World, place: str, seed: int, callbacks: list[Any]) -> None:
    data = world.data(subset_size=12, subset_seed=seed, seed=seed)
    finetune(data, world.base, TUNING, seed, f"{place}/runs", place, callbacks)


@pytest.fixture
def alone(world: World) -> list[dict[str, Any]]:
    """The run of seed 2, by itself."""
    tune(world, "alone", 2, [])
    return facts("alone/runs")


@pytest.mark.parametrize(
    ("what", "loaded"), [*((what, 1) for what in UNDONE), ("merged_adapter", 2), ("frozen_weights", 2)]
)
def test_what_a_run_leaves_does_not_reach_the_next(
    what: str, loaded: int, world: World, alone: list[dict[str, Any]], loads: list[str]
) -> None:
    """A base whose frozen weights were changed is loaded anew."""
    with shared_base():
        tune(world, "first", 1, [Leaves(what)])
        tune(world, "next", 2, [])
    assert facts("next/runs") == alone
    assert len(loads) == loaded


def test_the_base_is_evaluated_once_whatever_the_runs_weigh(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    real = evaluation.evaluate_with

    def counted(trainer: Any, module: Any, sets: Any) -> Any:
        measured.append("base" if trainer.global_step == 0 else "run")
        return real(trainer, module, sets)

    monkeypatch.setattr(evaluation, "evaluate_with", counted)
    with shared_base():
        for strength in (0.2, 0.5, 0.9):  # frozen in three folders
            data = world.data(rule=world.rule, budget=12, weighting="tilt", strength=strength, force=True)
            finetune(data, world.base, TUNING, 1, "runs", "work")
    assert measured == ["base"]
    (base,) = {record.evaluation["eval"]["base_loss"] for record in RunLedger("runs").records()}
    assert np.isfinite(base)


def test_outside_nothing_is_kept(world: World, loads: list[str]) -> None:
    for seed in (1, 2):
        tune(world, "runs", seed, [])
    assert len(loads) == 2
    assert sharing.shared is None

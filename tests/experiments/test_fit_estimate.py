"""What `fit --dry-run`, `sweep --dry-run` and `design --measure` say: right amounts of work, and nothing written."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fitting import World, make_world

from im_lightning.cli import main
from im_lightning.data.settings import Encoding, Reading
from im_lightning.experiments.fit_estimate import FitEstimate, Speed, estimate_fit, measure_speed
from im_lightning.experiments.sweep.file import read_sweep
from im_lightning.experiments.sweep.run import trials_left
from im_lightning.training.evaluation import EvalSet
from im_lightning.training.run.encoded_pool import Collate, coding_of, encoded_pool, read_pool


@pytest.fixture
def world(small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    return make_world(small_base, tmp_path)


def words(world: World) -> list[str]:
    return [
        f"--data.data={world.pool}", f"--data.eval_data={world.eval}", f"--data.model={world.base}",
        f"--data.scores={world.scores}", "--data.subset_size=12", "--trainer.max_epochs=2", "--trainer.accelerator=cpu",
        "--trainer.logger=false", "--trainer.enable_checkpointing=false",
    ]  # fmt: skip


def lengths(world: World, path: str) -> list[int]:
    coding = coding_of(Encoding(world.base))
    rows = encoded_pool(read_pool(path, Reading()), coding)
    return [len(one.input_ids) for _, one in rows.__getitems__(range(len(rows)))]


def test_the_amounts_are_those_of_the_fit(world: World) -> None:
    found = estimate_fit(words(world))
    assert (found.rows, found.epochs, found.base, found.unscored) == (12, 2, True, False)
    assert found.row_tokens == pytest.approx(np.mean(lengths(world, world.pool)))
    assert (found.eval_rows, found.eval_tokens) == (7, sum(lengths(world, world.eval)))
    assert found.speed.memory > 1e7
    without = estimate_fit([w for w in words(world) if "scores" not in w] + ["--mining.evaluate_base=false"])
    assert without.unscored and not without.base
    short = estimate_fit([*words(world), "--mining.stop_at=0.5", "--mining.eval_at=1"])  # 4 steps, of 8 rows
    assert (short.share, short.evaluations) == (0.5, 2)
    ended = estimate_fit([*words(world), "--trainer.max_steps=3", "--mining.stop_at=0.67"])
    assert (ended.epochs, ended.share) == (1.5, pytest.approx(2 / 3)), "it ends by its steps, not by its epochs"


def test_seconds_are_tokens_times_the_speed() -> None:
    """By hand: 10 rows of 5 tokens, twice, and 40 evaluation tokens; the base is evaluated once, whatever the runs."""
    one = FitEstimate(10, 5.0, 2, 4, 40.0, True, False, Speed(train=0.1, read=0.05, start=3.0))
    assert one.seconds() == pytest.approx(3 + 10 + 2 + 2)
    early = replace(one, share=0.5, evaluations=3)
    assert early.seconds() == pytest.approx(3 + 5 + 3 * 2 + 2)
    assert one.seconds(5) == pytest.approx(5 * (3 + 10 + 2) + 2)
    two = replace(one, devices=2)
    assert two.seconds() == pytest.approx(3 + 5 + 1 + 1), "rows and evaluation sets are divided among the devices"
    assert "at 10 tokens/s on each of 2 devices; evaluation" in two.lines()[0] and "devices" not in one.lines()[0]


def test_the_rates_are_seconds_per_token_on_the_clock(world: World) -> None:
    """A clock that ticks once when it is asked: loading takes one tick; then one step, and one batch, are more than
    the seconds that are to be timed."""
    coding = coding_of(Encoding(world.base))
    collate = Collate(coding.tokenizer)
    encoded = encoded_pool(read_pool(world.pool, Reading()), coding)
    evaluated = EvalSet("eval", encoded_pool(read_pool(world.eval, Reading()), coding), collate, 100)
    ticks = itertools.count(0, 10)
    cpu = torch.device("cpu")
    tuner = world.tuner()
    before = torch.get_rng_state()
    speed = measure_speed(tuner, encoded, [evaluated], collate, cpu, lambda: float(next(ticks)))
    assert torch.equal(torch.get_rng_state(), before)
    trained, read = (round(20 / rate) for rate in (speed.train, speed.read))
    assert speed.start == 10
    assert 8 * min(lengths(world, world.pool)) < trained < 8 * max(lengths(world, world.pool))
    assert read == sum(lengths(world, world.eval))
    assert all(not p.any() for name, p in tuner.named_parameters() if "lora_B" in name)  # the rate is 0


def sweep_file(world: World) -> str:
    command = ["${env}", "im-lightning", "fit", *words(world), "${args}"]
    parameters = {"data.subset_seed": {"values": [3, 4, 5, 6]}}
    file = {"program": "im-lightning", "command": command, "method": "grid", "parameters": parameters}
    Path("sweep.yaml").write_text(yaml.safe_dump(file))
    return "sweep.yaml"


def test_dry_runs_print_and_write_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    file = sweep_file(world)
    files = lambda: sorted(path for path in Path().rglob("*") if path.parts[0] != "cache")  # noqa: E731
    before = files()
    assert main(["fit", "--dry-run", "--export=finished", *words(world)]) == 0
    said = capsys.readouterr().out
    assert "a run: 12 rows of" in said and "evaluation of 7 rows" in said and "in all: about" in said
    assert main(["sweep", file, "--dry-run"]) == 0
    assert "4 runs, one after the other: about" in capsys.readouterr().out
    assert files() == before


def test_trials_of_other_lengths_are_not_estimated_silently(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 12 and of 24 rows all counted as 12: a study of sizes took many times as long as was printed."""
    command = ["im-lightning", "fit", *words(world), "${args}"]
    parameters = {"data.subset_size": {"values": [12, 24]}, "data.subset_seed": {"values": [3, 4]}}
    file = {"command": command, "method": "grid", "parameters": parameters}
    Path("sizes.yaml").write_text(yaml.safe_dump(file))
    assert main(["sweep", "sizes.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 runs, one after the other: about" in said
    assert said.endswith("\neach is reckoned as the next one, and they differ in data.subset_size\n")


def test_a_sweep_that_was_begun_counts_the_trials_that_are_left(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(world)
    assert main(["sweep", file, "--count", "1"]) == 0
    left, arguments = trials_left(read_sweep(file), "sweeps/sweep")
    assert left == 3 and "--data.subset_seed=4" in arguments
    assert main(["sweep", file]) == 0
    capsys.readouterr()
    assert main(["sweep", file, "--dry-run"]) == 0
    assert capsys.readouterr().out == "no trial is left\n"


def test_design_tells_what_its_runs_take(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    recipe: dict[str, Any] = {
        "data": {"model": world.base, "eval_data": world.eval},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    asked = ["design", world.scores, world.pool, "--runs", "8", "--subset-size", "12", "--config", "recipe.yaml"]
    assert main([*asked, "--out", "designed.yaml", "--measure"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a run: 12 rows of" in said and "8 runs, one after the other: about" in said
    assert "8 runs, one after the other" in Path("designed.yaml").read_text()

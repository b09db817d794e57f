"""If these failed, finetunes would be paid for that are not the ones `im-lightning design` promised."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fitting import write_pool, write_scores

from im_lightning.cli import main
from im_lightning.data.score_table import ScoreTable
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.linear_rule import Regressors

RECIPE = """
seed_everything: 5
data: {data: pool.jsonl, eval_data: eval.jsonl, model: model, subset_size: 10, batch_size: 8, template: alpaca}
model: {lora_rank: 2}
mining: {ledger: runs, refit: false}
trainer: {max_epochs: 2, logger: false, enable_checkpointing: false, enable_progress_bar: false}
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scored pool of two sources; two rows lack a value, and one is in the evaluation set too."""
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path / "pool.jsonl", n=160)
    write_pool(tmp_path / "eval.jsonl", n=5, seed=9, tag="e")
    shared = (tmp_path / "pool.jsonl").read_text().splitlines()[11]
    with (tmp_path / "eval.jsonl").open("a") as stream:
        stream.write(shared + "\n")
    write_scores(tmp_path / "scores.parquet", "pool.jsonl", missing=(3, 8))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def design(*options: str) -> int:
    fixed = ["--config", "recipe.yaml", "--out", "sweep.yaml", "--subset-size", "24", "--candidates", "120"]
    return main(["design", "scores.parquet", "pool.jsonl", *fixed, *options])


def agent_arguments(value: dict[str, Any], number: int) -> list[str]:
    """The words that wandb's own agent starts a grid's run with."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    def chosen(parameter: dict[str, Any]) -> Any:
        return parameter["values"][number] if "values" in parameter else parameter["value"]

    args = {name: {"value": chosen(parameter)} for name, parameter in value["parameters"].items()}
    flags = create_sweep_command_args({"args": args})["args"]
    words = [w for word in value["command"] for w in (flags if word == "${args}" else [word])]
    assert words[:3] == ["${env}", "im-lightning", "fit"]
    return words[2:]


def pairs(value: dict[str, Any]) -> list[tuple[int, int]]:
    runs = [yaml.safe_load(text) for text in value["parameters"]["config"]["values"]]
    assert all(run["data"]["seed"] == run["seed_everything"] for run in runs), "a repeat has another order of rows too"
    return [(run["data"]["subset_seed"], run["seed_everything"]) for run in runs]


def test_a_run_of_the_sweep_file_trains_on_the_planned_subset(study: Path, capfd: Any) -> None:
    """The whole way: design, wandb's words, fit, ledger; the run's means are the planned ones."""
    from tiny import make_tiny_llama

    from im_lightning.data.overlap.keys import left_out
    from im_lightning.data.settings import Reading
    from im_lightning.experiments.sweep.file import read_sweep
    from im_lightning.indicators.transforms import default_regressors, default_transforms, phi_matrix
    from im_lightning.sampling.plan_runs import plan_runs
    from im_lightning.training.datamodule import InstructMiningDataModule
    from im_lightning.training.run.encoded_pool import read_pool

    make_tiny_llama(study / "model", hidden=16, layers=1)
    assert design("--runs", "12", "--repeats", "2") == 0
    value = yaml.safe_load(Path("sweep.yaml").read_text())
    pool, evaluation = read_pool("pool.jsonl", Reading()), read_pool("eval.jsonl", Reading())
    table = ScoreTable.read("scores.parquet")
    plan = plan_runs(table, pool.sources, left_out(pool.examples, evaluation.examples), 12, 24, 2, 120)
    assert value["parameters"]["data.subset_version"] == {"value": 2} == {"value": plan.runs[0].design["version"]}
    assert pairs(value) == [(d.design["seed"], 5 + (k >= 10)) for k, d in enumerate(plan.runs)]
    for planned in plan.subsets[:3]:
        data = InstructMiningDataModule(
            "pool.jsonl", "eval.jsonl", "model", scores="scores.parquet", subset_size=24,
            subset_seed=planned.design["seed"], subset_version=2, template="alpaca",
        )  # fmt: skip
        data.setup()
        assert data.rows is not None and data.rows.tolist() == planned.rows.tolist()
        assert not {3, 8, 11} & set(planned.rows.tolist())
    own = read_sweep("sweep.yaml")
    last = {p.name: (p.grid or [None])[-1] for p in own.parameters}
    assert own.trials == 12 and ["fit", *own.arguments(last)] == agent_arguments(value, 11), "im-lightning sweep"
    assert main(agent_arguments(value, 11)) == 0, capfd.readouterr().err
    (record,) = RunLedger("runs").records()
    assert (record.purpose, record.seeds["training"], record.seeds["subset"]) == ("designed", 6, pairs(value)[11][0])
    assert record.evaluation.keys() == {"eval"} and value["metric"]["name"] == "im/eval_loss/eval"
    planned = plan.runs[11]
    transforms = default_transforms(table, default_regressors(table.indicators))
    phi = phi_matrix(table, transforms)
    means = phi[planned.rows].mean(axis=0)
    np.testing.assert_allclose([record.phi_means[n] for n in transforms], means, rtol=1e-9)
    known = np.delete(phi, [3, 8, 11], axis=0)
    np.testing.assert_allclose(planned.design["mean_shift"], (means - known.mean(0)) / known.std(0), rtol=1e-9)


def test_ten_of_the_runs_repeat_a_subset_and_every_source_can_be_held_out(study: Path, capsys: Any) -> None:
    from im_lightning.data.loading import load_examples
    from im_lightning.sampling.designs.subsets import designed_subset

    assert design("--runs", "41", "--first-seed", "1000") == 0
    value = yaml.safe_load(Path("sweep.yaml").read_text())
    chosen = pairs(value)
    by_subset = Counter(subset for subset, _ in chosen)
    assert len(chosen) == 41 == len(set(chosen)) and len(by_subset) == 31
    assert {training for _, training in chosen} == {5, 6} and min(by_subset) >= 1000
    table, sources = ScoreTable.read("scores.parquet"), [e.source for e in load_examples("pool.jsonl")]
    phi = Regressors.of(table, None).phi
    drawn = [designed_subset(phi, sources, 24, seed, version=2).design["source_shares"] for seed in by_subset]
    for source in set(sources):  # three regressors, so six runs to train on
        shares = np.array([one[source] for one in drawn])
        assert (shares == 0).sum() >= 6 and (shares >= 0.5).sum() >= 5
    capsys.readouterr()
    assert design("--runs", "9") == 0
    assert "too few of either for a test of the rule on a source it has not seen: a, b; make more runs" in " ".join(
        capsys.readouterr().out.split()
    )


def test_what_it_prints_is_known_before_any_training(study: Path, capsys: Any, monkeypatch: Any) -> None:
    from im_lightning.data.loading import load_examples
    from im_lightning.sampling.designs.subsets import designed_subset

    monkeypatch.setenv("COLUMNS", "100")
    assert design("--runs", "20", "--seconds-per-run", "90") == 0
    out, err = capsys.readouterr()
    text = " ".join(out.split())
    assert "20 designed runs of 24 rows out of 157 eligible of 160 (left out: 1 in evaluation, 2 no prediction)" in text
    for word in ("log(ppl)", "log1p(length_output)", "VIF", "standard error", "condition number", "Mahalanobis"):
        assert word in text
    gain = re.search(r"tells as much as (\d+\.\d+) times as many runs", text)
    assert gain is not None and float(gain[1]) > 1.1
    assert "Time: about 30 min, one run after the other (90 s each, as given)." in text
    table = ScoreTable.read("scores.parquet")
    value = yaml.safe_load(Path("sweep.yaml").read_text())
    sources, eligible = [e.source for e in load_examples("pool.jsonl")], np.arange(160) != 11
    phi = Regressors.of(table, None).phi
    rows = [designed_subset(phi, sources, 24, s, eligible=eligible, version=2).rows for s, _ in pairs(value)]
    tokens = 2 * sum(float((table.values["length_output"][r] + 1).sum()) for r in rows)
    assert f"Cost: {tokens:,.0f} response tokens trained on, in 2 epochs each." in text
    assert text.split("Cost:")[1].split(".")[0] in " ".join(value["description"].split())
    assert max(map(len, out.splitlines())) <= 100 and "wrote sweep.yaml" in err
    assert not Path("runs").exists() and not Path("im-lightning").exists()


def test_time_is_estimated_by_the_speed_of_earlier_runs(study: Path, capsys: Any) -> None:
    from simulated_ledger import simulate

    for record in simulate(5):
        record.tokens, record.seconds, record.compute = 1000, 20.0, {"parameters": 5e6}
        RunLedger("earlier").add(record)
    assert design("--runs", "20", "--ledger", "earlier") == 0
    text = " ".join(capsys.readouterr().out.split())
    tokens = float(re.search(r"Cost: ([\d,]+) response", text)[1].replace(",", ""))  # type: ignore[index]
    assert f"({tokens * 0.02 / 20:.3g} s each, by the speed of 5 runs)" in text
    table = ScoreTable.read("scores.parquet")
    table.with_values("length_input", np.arange(160) % 7 + 3.0).write("scores.parquet")
    assert design("--runs", "20", "--ledger", "earlier", "--overwrite") == 0
    text = " ".join(capsys.readouterr().out.split())
    whole = float(re.search(r"trained on, ([\d,]+) with the prompts", text)[1].replace(",", ""))  # type: ignore[index]
    assert f"tokens a row), {6 * 5e6 * whole:.2e} FLOPs, in 2 epochs each" in text
    for record in simulate(9, first=50):  # on a base ten times as slow, which is not the latest
        record.tokens, record.seconds, record.compute = 1000, 200.0, {"parameters": 5e7}
        record.created = "2025-12-31T00:00:00+00:00"
        RunLedger("earlier").add(record)
    assert design("--runs", "20", "--ledger", "earlier", "--overwrite") == 0
    both = " ".join(capsys.readouterr().out.split())
    assert f"{6 * 5e6 * whole:.2e} FLOPs" in both and "by the speed of 5 runs" in both
    assert "9 of the runs in earlier are on another base than its latest, and do not count here." in both
    assert "another base" not in text


def test_collinear_indicators_are_named_before_they_cost_anything(study: Path, capsys: Any) -> None:
    table = ScoreTable.read("scores.parquet")
    rng = np.random.default_rng(77)
    values = dict(table.values)
    values["reward"] = np.log(values["ppl"]) + 0.01 * rng.standard_normal(160)
    values["coherence"] = np.full(160, 0.5)
    ScoreTable(table.row, table.id, table.source, values, table.reasons).write("scores.parquet")
    assert design("--runs", "20") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "NOT TOLD APART: coherence do not vary in the pool" in text
        and "COLLINEAR: reward (" in text
        and "log(ppl) (" in text
    )
    assert re.search(r"tells as much as \d", text), "the others are still designed for"
    values["naturalness"] = np.log(values["ppl"])
    ScoreTable(table.row, table.id, table.source, values, table.reasons).write("scores.parquet")
    assert design("--runs", "20") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "NOT TOLD APART: log(ppl), naturalness, coherence" in text and "tells as much as" not in text
    assert "condition number ∞" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--runs", "6"], "5 different subsets are too few for 3 regressors"),
        (["--runs", "20", "--repeats", "10"], "10 of 20 runs would repeat a subset"),
        (["--runs", "20", "--candidates", "12"], "draw more candidates, or ask for fewer runs"),
        (["--runs", "20", "--candidates", "0"], "there is nothing to choose from"),
        (["--runs", "20", "--repeats", "-1"], "-1 of 20 runs would repeat a subset"),
        (["--runs", "20", "--first-seed", "-1"], "is not an integer from 0"),
        (["--runs", "20", "--subset-tilt", "-1"], "it is not a number from 0 on"),
        (["--runs", "20", "--ledger", "absent"], "there is no such ledger"),
        (["--runs", "20", "--config", "absent.yaml"], "the recipe of one run cannot be read"),
        (["--runs", "20", "--config", "eval.jsonl"], "is not YAML"),
        (["--runs", "20", "--config", "list.yaml"], "does not hold the arguments of a fit"),
        (["--runs", "20", "--subset-size", "158"], "157 of 160 rows can be drawn"),
        (["--runs", "20", "--eval-data", "other.jsonl"], "other.jsonl"),
        (["--runs", "20", "--arguments=--model.x='"], "it cannot be parted into words: no closing quotation"),
    ],
)
def test_what_cannot_be_designed_is_refused(study: Path, capsys: Any, options: list[str], said: str) -> None:
    Path("list.yaml").write_text("[1, 2]")
    assert design(*options) == 2
    assert said in capsys.readouterr().err
    assert not Path("sweep.yaml").exists()


def test_scores_of_another_pool_are_refused(study: Path, capsys: Any) -> None:
    row = {"instruction": "Something new.", "output": "yes"}
    with Path("pool.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    assert design("--runs", "20") == 2
    assert "it has no scores for 1 of the pool's 161 rows" in capsys.readouterr().err


def test_the_cost_is_that_of_what_is_trained(study: Path, small_base: str, capsys: Any) -> None:
    """It was 1.9 times too high: rows are cut at max_length, and epochs said on the command line win over the recipe.
    Against the very encoding of the rows."""
    from transformers import AutoTokenizer

    from im_lightning import encode_examples, load_examples
    from im_lightning.commands.design import kept_tokens

    tokenizer = AutoTokenizer.from_pretrained(small_base)
    main(
        [
            "score",
            "pool.jsonl",
            "--model",
            small_base,
            "--indicators",
            "length_input,length_output,mtld",
            "--out",
            "t.parquet",
        ]
    )
    table, examples = ScoreTable.read("t.parquet"), load_examples("pool.jsonl")
    for most in (16, 32, 1024):
        encoded = encode_examples(examples, tokenizer, "alpaca", most)
        trained = np.array([int(one.response_mask.sum()) for one in encoded])
        head = np.array([len(one.input_ids) for one in encode_examples(examples, tokenizer, "alpaca")])
        head = head - table.values["length_output"] - 1  # prompts as the template writes them
        assert np.abs(kept_tokens(head, table.values["length_output"], most)[1] - trained).max() <= 1
    capsys.readouterr()
    words = ["--runs", "20", "--arguments=--trainer.max_epochs=1 --data.max_length=16"]
    fixed = ["--config", "recipe.yaml", "--out", "sweep.yaml", "--subset-size", "24", "--candidates", "120"]
    assert main(["design", "t.parquet", "pool.jsonl", *fixed, *words]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "cut at 16 tokens a row), in 1 epoch each." in text
    tokens = float(re.search(r"Cost: ([\d,]+) response", text)[1].replace(",", ""))  # type: ignore[index]
    assert tokens <= 20 * 24 * 12 < 20 * 24 * float(np.mean(table.values["length_output"] + 1))
    command = yaml.safe_load(Path("sweep.yaml").read_text())["command"]
    assert command[-3:] == ["--trainer.max_epochs=1", "--data.max_length=16", "${args}"]
    assert main(["design", "t.parquet", "pool.jsonl", *fixed, "--runs", "20", "--arguments=max_epochs"]) == 2
    assert "--arguments max_epochs: it is not --name=value. Fix: " in capsys.readouterr().err


def test_few_steps_are_said_before_they_are_paid_for(study: Path, capsys: Any) -> None:
    """24 rows in batches of 8, 2 epochs: 6 steps, in which no subset can differ from another."""
    assert design("--runs", "20") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Each run takes 6 optimiser steps (24 rows, 2 epochs) at learning rate 0.0002." in text
    assert "FEW STEPS: below 100 subsets may differ by no more than repeats" in text
    assert design("--runs", "20", "--arguments=--trainer.max_epochs=40 --model.learning_rate=1e-3") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Each run takes 120 optimiser steps (24 rows, 40 epochs) at learning rate 0.001." in text
    assert "FEW STEPS" not in text


def test_a_run_ends_as_lightning_ends_it(study: Path, capsys: Any) -> None:
    """By its steps where they come first; -1 is no number of epochs, and no number of devices."""
    assert design("--runs", "20", "--arguments=--trainer.max_epochs=-1 --trainer.max_steps=150") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Each run takes 150 optimiser steps (24 rows, 50 epochs)" in text and "FEW STEPS" not in text
    assert "Cost: -" not in text and "in 50 epochs each" in text
    assert design("--runs", "20", "--arguments=--trainer.max_steps=4") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Each run takes 4 optimiser steps (24 rows, 1.33 epochs)" in text and "in 1.33 epochs each" in text
    for devices, steps in ((-1, 6), ("0,1", 4), (2, 4)):
        assert design("--runs", "20", f"--arguments=--trainer.devices={devices}") == 0
        assert f"Each run takes {steps} optimiser steps" in " ".join(capsys.readouterr().out.split())
    Path("sweep.yaml").unlink()
    assert design("--runs", "20", "--arguments=--trainer.max_epochs=-1") == 2
    assert "the run: neither max_epochs nor max_steps ends it" in capsys.readouterr().err
    assert not Path("sweep.yaml").exists()


def test_rows_of_another_pool_are_refused_and_scores_that_are_left_aside_named(study: Path, capsys: Any) -> None:
    table = ScoreTable.read("scores.parquet")
    values = {**table.values, "helpfulness": np.arange(160.0)}
    ScoreTable(table.row, table.id, table.source, values, table.reasons).write("scores.parquet")
    assert design("--runs", "20") == 0
    assert "Scored, but not in the design: helpfulness (a refit takes them" in " ".join(capsys.readouterr().out.split())

    lines = Path("pool.jsonl").read_text().splitlines(keepends=True)
    Path("pool.jsonl").write_text("".join([*lines[1:], lines[0]]))
    assert design("--runs", "20") == 2
    assert "scores.parquet and pool.jsonl do not belong together: row 0 differs. Fix: " in capsys.readouterr().err
    Path("pool.jsonl").write_text("".join(lines[:-2]))
    assert design("--runs", "20") == 2
    assert "the table has 160 rows, the data 158. Fix: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["design", "select"])
def test_swapped_arguments_are_recognised(command: str, study: Path, capsys: Any) -> None:
    options = {"design": ["--runs=9", "--subset-size=9", "--config=recipe.yaml"], "select": ["--budget=3"]}[command]
    assert main([command, "pool.jsonl", "scores.parquet", *options, "--out", "new.jsonl"]) == 1
    said = capsys.readouterr().err
    assert "pool.jsonl: is no score table: it seems to be rows of data; score tables and data stand in another" in said


def test_a_score_table_in_place_of_a_rule_is_recognised(study: Path, capsys: Any) -> None:
    given = ["select", "scores.parquet", "pool.jsonl", "--rule", "scores.parquet", "--budget=3", "--out", "new.jsonl"]
    assert main(given) == 1
    assert "it is not whole JSON: it seems to be Parquet, such as a score table" in capsys.readouterr().err


def test_the_refit_command_of_two_evaluation_sets_names_one(study: Path) -> None:
    write_pool(study / "other.jsonl", n=5, seed=3, tag="o")
    assert design("--runs", "20", "--eval-data", "eval.jsonl,other.jsonl") == 0
    assert "#   im-lightning refit runs --out runs/rule.json --evaluation eval\n" in Path("sweep.yaml").read_text()


def test_the_refit_command_is_of_the_ledger_that_the_runs_go_into(study: Path) -> None:
    assert design("--runs", "20", "--arguments=--mining.ledger=mine") == 0
    assert "#   im-lightning refit mine --out mine/rule.json\n" in Path("sweep.yaml").read_text()


def test_a_recipe_may_name_its_columns_by_a_mapping(study: Path) -> None:
    """As YAML does and the data module takes; it ended in a traceback."""
    columns = "columns: {instruction: instruction, response: output, source: source}, "
    Path("recipe.yaml").write_text(RECIPE.replace("eval_data:", f"{columns}eval_data:"))
    assert design("--runs", "12", "--repeats", "2") == 0


def test_a_recipe_with_sources_gives_runs_that_begin(study: Path) -> None:
    """The data stand in place of the sources: a pool that is named twice is refused, run by run."""
    from im_lightning.experiments.sweep.file import read_sweep

    Path("recipe.yaml").write_text(RECIPE.replace("data: pool.jsonl, ", "sources: {alpaca@pool.jsonl: 160}, "))
    assert design("--runs", "12", "--repeats", "2") == 0
    value = yaml.safe_load(Path("sweep.yaml").read_text())
    assert value["parameters"]["data.sources"] == {"value": None}
    own = read_sweep("sweep.yaml")
    words = own.arguments({p.name: (p.grid or [None])[-1] for p in own.parameters})
    assert "--data.sources=null" in words and "--data.data=pool.jsonl" in words
    assert "--data.sources=None" in agent_arguments(value, 0), "as wandb writes it, which a fit under it reads as null"


def test_columns_of_other_names_go_into_every_run(study: Path, capsys: Any) -> None:
    """Two spellings for one thing were needed: --columns for every other command, --arguments here."""
    for name in ("pool", "eval"):
        lines = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        rows = [{"q": r["instruction"], "a": r["output"], "source": r.get("source", "a")} for r in lines]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "prompt=q,response=a"
    score = ["score", "pool.jsonl", "--indicators", "mtld", "--out", "scores.parquet"]
    assert main([*score, "--columns", columns, "--overwrite"]) == 0
    assert design("--runs", "12", "--repeats", "2") == 1
    assert "--columns" in capsys.readouterr().err
    assert design("--runs", "12", "--repeats", "2", "--columns", columns) == 0
    assert yaml.safe_load(Path("sweep.yaml").read_text())["command"][-2:] == [f"--data.columns={columns}", "${args}"]

"""docs/indicators.md as it stands: a reader who copies it gets what it promises."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from im_lightning import cli
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.indicators import base, plugins
from im_lightning.indicators.base import get_indicator, get_indicators
from im_lightning.indicators.built_in import BUILT_IN
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.published import load_rule

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "indicators.md").read_text(encoding="utf-8")
MODEL = "meta-llama/Llama-3.2-1B"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line]


def test_the_table_has_every_indicator_and_what_it_needs() -> None:
    """Who plans a scoring reads off which models to have, and which extra to install."""
    lines = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line] for line in lines]
    needs: dict[str, set[str]] = {}
    for name in (name for cell, *_ in rows for name in re.findall("`([^`]+)`", cell)):
        asked = " ".join(row[2] for row in rows if f"`{name}`" in row[0])
        needs[name.replace("<i>", "6")] = {word[2:].replace("-", "_") for word in re.findall("`(--[^`]+)`", asked)}
    told = {row.name: row for row in BUILT_IN.values() if row.meaning}
    assert set(needs) == set(told)
    for name, info in told.items():
        assert info.model is None or info.model in needs[name], name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {word for row in rows for word in re.findall("`([a-z-]+)`", row[3])}
    assert {"ann", "embeddings", "local-models"} <= named and named - {"minilm"} <= set(extras)
    left = {name for name, info in told.items() if not info.default}
    assert left == {"ppl_tuned"} and "but for `ppl_tuned`" in PAGE


INDICATOR, SCORING, JOINING = blocks("python")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with a pool, an evaluation set, the recipes, my_indicators.py and judged.jsonl of the page."""
    draw = random.Random(0)
    for name, n in (("pool.jsonl", 60), ("eval.jsonl", 6)):
        rows = [
            {"instruction": f"Say {i} {name}.", "output": " ".join(draw.choices(["red!", "blue", "atom"], k=1 + i % 9))}
            for i in range(n)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_indicators.py").write_text(INDICATOR)
    (tmp_path / "judged.jsonl").write_text(blocks("json")[0])
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    known = set(base._registered)
    yield tmp_path
    for name in set(base._registered) - known - set(base.BUILT_IN):
        del base._registered[name]
    plugins._loaded.clear()


def run(command: list[str], model: str) -> None:
    small = [word.replace(MODEL, model).replace("subset_size=1000", "subset_size=24") for word in command]
    if command[0] == "fit":
        small += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    assert cli.main(small) == 0, command


def test_ones_own_indicator_scores_and_is_recorded(desk: Path, tiny_llama: str) -> None:
    score, fit = commands()[:2]
    run(score, tiny_llama)
    table = ScoreTable.read("scores.parquet")
    assert table.indicators == ["mtld", "exclamation_share"]
    responses = [json.loads(line)["output"] for line in Path("pool.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(table.values["exclamation_share"], [r.count("!") / len(r) for r in responses])
    run(fit, tiny_llama)
    (record,) = RunLedger("runs").records()
    assert "exclamation_share" in record.indicator_means


def test_scores_of_another_tool_become_regressors(desk: Path, tiny_llama: str) -> None:
    """From the file to the record that a refit reads, with what it is."""
    score, fit = commands()[2:4]
    rows = [{"row": i, "helpfulness": i / 10, "why": "text"} for i in range(2, 60)]
    with Path("judged.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    run(score, tiny_llama)
    table = ScoreTable.read("scores.parquet")
    assert table.values["helpfulness"][:3].tolist()[::2] == [3.5, 0.2] and np.isnan(table.values["helpfulness"][1])
    assert table.reasons["helpfulness"][1] == "no value in judged.jsonl"
    run(fit, tiny_llama)
    for seed in range(1, 6):
        run([*fit, f"--data.subset_seed={seed}"], tiny_llama)
    assert cli.main(["refit", "runs", "--indicators", "helpfulness", "--out", "rule.json"]) == 0
    rule = load_rule("rule.json")
    assert rule.feature_names_in_ == ["helpfulness"]
    identity = rule.identities["helpfulness"]
    assert identity["external"] == {"column": "helpfulness", "scorer": "my-judge-v1"}


def test_rows_are_scored_towards_targets(desk: Path, tiny_llama: str) -> None:
    """And the columns are regressors of runs like any other."""
    rows = [{"instruction": f"Name number {i}.", "output": f"red! {i} atom"} for i in range(5)]
    Path("targets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(commands()[4], tiny_llama)
    table = ScoreTable.read("scores.parquet")
    assert table.indicators == ["loss_drop", "gradient_similarity"]
    assert (np.abs(table.values["gradient_similarity"]) <= 1).all() and (table.values["loss_drop"] < 1).all()
    run([*commands()[3], "--data.subset_seed=3"], tiny_llama)
    (record,) = RunLedger("runs").records()
    assert {"loss_drop", "gradient_similarity"} <= set(record.indicator_means)


def test_the_python_of_the_page(desk: Path) -> None:
    exec(compile(INDICATOR, "docs/indicators.md", "exec"), {"__name__": "my_indicators"})
    exec(compile(SCORING, "docs/indicators.md", "exec"), {})
    exec(compile(JOINING, "docs/indicators.md", "exec"), {})
    table = ScoreTable.read("scores.parquet")
    assert table.keys["helpfulness"]["identity"]["external"] == {"column": "helpfulness", "scorer": "my-judge-v1"}


def test_a_wrong_external_file_is_found_before_the_work(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not after hours of scoring."""
    common = ["score", "pool.jsonl", "--out", "x.parquet", "--indicators", "mtld"]
    Path("wrong.jsonl").write_text('{"id": "mine", "helpfulness": 1}\n')
    assert cli.main([*common, "--external", "wrong.jsonl"]) == 1
    Path("clash.jsonl").write_text('{"row": 0, "mtld": 1, "good": 2}\n')
    assert cli.main([*common, "--external", "clash.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "none of its 1 ids" in error and "a column 'mtld' already" in error and not Path("x.parquet").exists()
    assert cli.main([*common, "--external", "clash.jsonl", "--external-columns", "good"]) == 0
    assert ScoreTable.read("x.parquet").indicators == ["mtld", "good"]


def test_a_rule_on_another_tools_scores_is_applied_to_the_same_scorer_only(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from im_lightning.indicators.transforms import Transform
    from im_lightning.rule.linear_rule import LinearRule

    Path("judged.jsonl").write_text("".join(f'{{"row": {i}, "helpfulness": {i}}}\n' for i in range(59)))
    identity = {"indicator": "helpfulness", "version": 1, "external": {"column": "helpfulness", "scorer": "judge-v1"}}
    rule = LinearRule("r", 1.0, np.array([-0.5]), ["helpfulness"], {"helpfulness": Transform("identity")})
    rule.identities = {"helpfulness": identity}
    rule.save("rule.json")
    score = ["score", "pool.jsonl", "--external", "judged.jsonl", "--rule", "rule.json", "--out", "x.parquet"]
    assert cli.main([*score, "--external-scorer", "judge-v1"]) == 0
    table = ScoreTable.read("x.parquet")
    np.testing.assert_allclose(table.predicted_log_loss[:59], 1.0 - 0.5 * np.arange(59))
    assert table.reasons["predicted_log_loss"][59] == "helpfulness: not in judged.jsonl"
    assert cli.main([*score, "--external-scorer", "judge-v2"]) == 2
    assert "helpfulness was computed in another way than for the fit" in capsys.readouterr().err


def test_a_file_is_imported_once_and_named_indicators_are_not_doubled(desk: Path) -> None:
    found = get_indicators(["my_indicators.py:exclamation_share", "exclamation_share", f"{desk}/my_indicators.py:mtld"])
    assert [one.name for one in found] == ["exclamation_share", "mtld"]


def test_an_indicator_from_a_file_travels_to_processes_without_the_file(desk: Path) -> None:
    """Workers of a cluster get the class itself: the file is on the machine that asked."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    indicator = get_indicator("my_indicators.py:exclamation_share")
    Path("carried").write_bytes(cloudpickle.dumps(indicator))
    Path("my_indicators.py").unlink()
    code = (
        "import pickle; from im_lightning.data.example import Example, Message\n"
        "one = pickle.load(open('carried', 'rb'))\n"
        "print(one.name, one.score(Example((Message('user', '?'), Message('assistant', 'hi!!')))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["exclamation_share", "0.5"], done.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere.py:x", "indicators nowhere.py: there is no such file.*my_indicators.py:questions"),
        ("no_such_module:x", "indicators no_such_module: there is no module no_such_module"),
        ("my_indicators.py:other", "indicator 'other': there is none of that name; there are .*exclamation_share"),
        ("helpfulness", "your own is FILE.py:NAME; for those of another tool name a score table that has them"),
        ("broken.py:x", r"indicators broken.py: it cannot be imported \(ZeroDivisionError: division by zero, line 2\)"),
        ("lacks.py:x", "there is no module numpyy .which it imports"),
        ("taken.py:ppl", "the name belongs to an indicator of im_lightning"),
    ],
)
def test_files_that_cannot_be_used_say_why(desk: Path, name: str, text: str) -> None:
    Path("broken.py").write_text("x = 1\n1 / 0\n")
    Path("lacks.py").write_text("import numpyy\n")
    Path("taken.py").write_text(INDICATOR.replace("exclamation_share", "ppl"))
    with pytest.raises(RequestError, match=text):
        get_indicator(name)

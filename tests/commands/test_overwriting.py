"""What a command may replace: its own file of the same kind. Anything else at --out stays, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fitting import write_pool, write_rule, write_scores
from simulated_ledger import simulate

from im_lightning.cli import main
from im_lightning.errors import RequestError
from im_lightning.experiments.finetuning import check_out
from im_lightning.ledger.ledger import RunLedger
from im_lightning.report.page import write_report

OLD = Path(__file__).parents[1] / "old_files" / "desk"
RECIPE = "data: {data: pool.jsonl, eval_data: eval.jsonl, model: model, subset_size: 10}\n"
COMMANDS = {
    "score": "pool.jsonl --indicators mtld --out o.parquet",
    "select": "scores.parquet pool.jsonl --method random --budget 5 --out o.jsonl",
    "refit": "runs --permutations 0 --bootstrap 0 --out o.json",
    "report": "--rule rule.json --scores scores.parquet --out o.html",
    "design": "scores.parquet pool.jsonl --config recipe.yaml --runs 8 --subset-size 10 --candidates 40 --out o.yaml",
}
KINDS = {
    "score": "score table",
    "select": "subset",
    "refit": "rule",
    "report": "report",
    "design": "sweep file",
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool, its scores, a rule, a recipe and a ledger, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path / "pool.jsonl", n=60)
    write_pool(tmp_path / "eval.jsonl", n=5, seed=9, tag="e")
    write_rule(tmp_path / "rule.json", write_scores(tmp_path / "scores.parquet", "pool.jsonl"))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for record in simulate(12, repeats=2):
        RunLedger("runs").add(record)
    return tmp_path


def run(command: str, out: str | None = None, *more: str) -> int:
    words = COMMANDS[command].split()
    return main([command, *words[:-1], out or words[-1], *more])


def output(command: str) -> Path:
    return Path(COMMANDS[command].split()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def users_file(path: Path) -> None:
    """A file such as a user may have under this name, readable in its format."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": ["mine"]}), path)
    else:
        texts = {".html": "<html><p>mine, not made by a tool</p></html>", ".yaml": "mine: true\n"}
        path.write_text(texts.get(path.suffix, '{"format": "mine", "rules": []}\n'))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_users_file_stays_unless_overwriting_is_asked_for(command: str, desk: Path, capsys) -> None:
    """A wrong --out must not cost hours of work."""
    out = output(command)
    users_file(out)
    before = contents(desk)
    assert run(command) == 2
    said = capsys.readouterr().err
    assert f"--out {out}: this file exists, and is no {KINDS[command]} as im-lightning wrote it. Fix: " in said
    assert "pass --overwrite to replace it" in said and contents(desk) == before
    assert run(command, None, "--overwrite") == 0
    assert out.read_bytes() != before[str(out)]
    assert run(command) == 0, "its own output of before is replaced without a word"


@pytest.mark.parametrize("command", COMMANDS)
def test_our_files_of_another_kind_stay_too(command: str, desk: Path, capsys) -> None:
    """`refit --out runs/<run>.json` made a run's record a rule: the run, and the rule fitted on it, were gone."""
    others = {"score": "runs/run-000.losses.parquet", "refit": "runs/run-000.json", "select": "pool.jsonl"}
    if command == "score":
        RunLedger("runs").add_losses("run-000", "held-out", ["a"], [1.0], [2])
    out = others.get(command)
    if out is None:
        out = f"other{output(command).suffix}"
        shutil.copy("runs/run-000.json", out)
    before = contents(desk)
    assert run(command, out) == 2 and f"--out {out}: " in capsys.readouterr().err
    assert contents(desk) == before


@pytest.mark.parametrize(
    ("command", "old"), [("score", "scores.parquet"), ("refit", "rules/ols.json"), ("design", "sweep.yaml")]
)
def test_files_of_earlier_versions_are_replaced(command: str, old: str, desk: Path) -> None:
    shutil.copy(OLD / old, output(command))
    assert run(command) == 0


def test_an_empty_file_is_nothing_to_lose_and_a_folder_is_no_file(desk: Path, capsys) -> None:
    Path("o.json").touch()
    assert run("refit") == 0
    assert run("refit", "runs") == 2
    assert "--out runs: it is a folder. Fix: name a file in it" in capsys.readouterr().err


def test_a_subset_that_was_changed_by_hand_is_the_users(desk: Path, capsys) -> None:
    assert run("select") == run("select") == 0
    rows = Path("o.jsonl").read_text()
    Path("o.jsonl").write_text(rows.replace("Describe", "Explain"))
    assert run("select") == 2 and "--out o.jsonl: this file exists" in capsys.readouterr().err
    Path("o.jsonl").write_text(rows)
    manifest = json.loads(Path("o.jsonl.manifest.json").read_text())
    del manifest["file"]  # as earlier versions wrote it
    Path("o.jsonl.manifest.json").write_text(json.dumps(manifest))
    assert run("select") == 0


@pytest.mark.parametrize(
    ("command", "beside"),
    [
        ("score", "o.parquet.cost.json"),
        ("score", "o.parquet.rejected.jsonl"),
        ("select", "o.jsonl.manifest.json"),
        ("select", "o.jsonl.rejected.jsonl"),
    ],
)
def test_files_beside_the_output_are_guarded_too(command: str, beside: str, desk: Path, capsys) -> None:
    with Path("pool.jsonl").open("a") as stream:
        stream.write('{"instruction": "no response"}\n')
    quarantine = "--on-bad-row=quarantine"
    Path(beside).write_text('{"mine": 1, "seconds": 12}\n')
    before = contents(desk)
    assert run(command, None, quarantine) == 2
    assert f"--out {beside}: this file exists" in capsys.readouterr().err and contents(desk) == before
    Path(beside).unlink()
    assert run(command, None, quarantine) == run(command, None, quarantine) == 0


def test_a_report_leaves_the_users_pictures(desk: Path, capsys) -> None:
    """The folder of figures was emptied of every picture before new ones were written."""
    assert run("report") == 0
    figure = sorted(Path("o_figures").glob("*.png"))[0]
    shutil.copy(figure, "o_figures/gone.png")  # ours, of a section that is no more
    Path("o_figures/holiday.png").write_bytes(b"\x89PNG mine")
    assert run("report") == 0
    assert Path("o_figures/holiday.png").read_bytes() == b"\x89PNG mine" and not Path("o_figures/gone.png").exists()
    Path("p_figures").mkdir()
    Path(f"p_figures/{figure.name}").write_bytes(b"\x89PNG mine")
    assert run("report", "p.html") == 2
    assert f"--out p_figures/{figure.name}: this file exists" in capsys.readouterr().err
    assert Path(f"p_figures/{figure.name}").read_bytes() == b"\x89PNG mine" and not Path("p.html").exists()
    Path("p.html").touch()  # an empty page says nothing of the pictures beside it
    assert run("report", "p.html") == 2
    assert Path(f"p_figures/{figure.name}").read_bytes() == b"\x89PNG mine"
    page = Path("o.html").read_text()
    Path("o.html").write_text("".join(line for line in page.splitlines(True) if "generator" not in line))
    assert run("report") == 0, "as earlier versions wrote it"
    write_report(Path("o.html"), rule="rule.json")  # Python says itself what it writes


def result(folder: Path, **inputs: object) -> Callable[[bool], None]:
    return lambda overwrite: check_out(folder / "compare.json", ("arms", "rendered"), inputs, overwrite)


def test_another_comparison_into_the_same_folder_is_refused_by_what_decides_it(tmp_path: Path) -> None:
    """Else a comparison's numbers are gone, its ledger full of runs that nothing refers to."""
    check = result(tmp_path, tokens=100, tuning={"learning_rate": 1e-3}, scores="a" * 32)
    check(False)
    value = {"format": "im_lightning.compare", "arms": [], "rendered": "a table"}
    value |= {"inputs": {"tokens": 100, "tuning": {"learning_rate": 1e-3}, "scores": "a" * 32}}
    (tmp_path / "compare.json").write_text(json.dumps(value))
    (tmp_path / "compare.txt").write_text("a table\n")
    check(False)
    other = result(tmp_path, tokens=200, tuning={"learning_rate": 1e-3}, scores=np.str_("b" * 32))
    with pytest.raises(RequestError, match=r"it holds another result \(tokens: 100 there, 200 asked for; scores: aaaa"):
        other(False)
    other(True)
    (tmp_path / "compare.txt").write_text("my notes\n")
    with pytest.raises(RequestError, match=r"compare\.txt: this file exists.*--overwrite"):
        check(False)
    (tmp_path / "compare.txt").unlink()
    (tmp_path / "compare.json").write_text('{"mine": 1}')
    with pytest.raises(RequestError, match=r"compare\.json: this file exists.*result of im-lightning compare"):
        check(False)


@pytest.mark.parametrize("kind", ["compare", "search"])
def test_results_of_earlier_versions_are_replaced(kind: str, tmp_path: Path) -> None:
    shutil.copytree(OLD / kind, tmp_path / "out")
    keys = {"compare": ("arms", "reference", "rendered"), "search": ("chosen", "trials", "rendered")}[kind]
    check_out(tmp_path / "out" / f"{kind}.json", keys, {"tokens": 1}, overwrite=False)


def test_a_sweep_keeps_out_of_a_folder_with_another_sweep_json(desk: Path, capsys) -> None:
    shutil.copy(OLD / "sweep.yaml", "sweep.yaml")
    Path("mine").mkdir()
    Path("mine/sweep.json").write_text("[1]")
    before = contents(desk)
    assert main(["sweep", "sweep.yaml", "--out", "mine"]) == 1
    said = capsys.readouterr().err
    assert "mine/sweep.json: it cannot be read" in said and "Fix: pass another --out." in said
    assert {k: v for k, v in contents(desk).items() if not k.endswith(".lock")} == before


@pytest.mark.parametrize("kind", ["compare", "search", "judge"])
def test_a_result_is_gone_on_with_only_where_it_is_ours_and_not_to_be_replaced(kind: str, tmp_path: Path) -> None:
    """An empty file is nothing to lose; of one that is replaced nothing is taken over."""
    file, keys = tmp_path / f"{kind}.json", ("inputs", "rendered")
    assert check_out(file, keys, {"tokens": 1}, overwrite=False) == {}
    file.touch()
    assert check_out(file, keys, {"tokens": 1}, overwrite=False) == {}
    value = {"format": f"im_lightning.{kind}", "inputs": {"tokens": 1}, "settings": {"pool_draw": "bootstrap"}}
    file.write_text(json.dumps(value))
    assert check_out(file, keys, {"tokens": 1}, overwrite=False) == value
    for text in (json.dumps(value), "{}", "[", ""):
        file.write_text(text)
        assert check_out(file, keys, {"tokens": 1}, overwrite=True) == {}


def test_an_empty_judgement_is_nothing_to_lose(tmp_path: Path) -> None:
    for name, response in (("a", "Bala."), ("r", "Bala")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "Name a lake.", "response": response}) + "\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "judge.json").touch()
    words = [str(tmp_path / "a.jsonl"), "--references", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["judge", *words]) == 0
    assert json.loads((tmp_path / "out" / "judge.json").read_text())["format"] == "im_lightning.judge"

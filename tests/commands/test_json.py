"""With --json every command's standard output is one JSON document, whatever it does and however it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_inputs
import yaml
from api_server import KEY, serving
from fitting import make_world, write_pool, write_scores
from mini_demo import MINI
from test_mixture import runs as mixed_runs
from tiny import make_tiny_llama

from im_lightning import cli
from im_lightning.data.score_table import ScoreTable
from im_lightning.experiments.demo import settings as demo_settings
from im_lightning.ledger.ledger import RunLedger

FIT = (
    "--data.data=small/pool.jsonl --data.eval_data=small/eval.jsonl --data.model=BASE "
    "--data.scores=small/scores.parquet --data.subset_size=12 --data.batch_size=4 --model.lora_rank=2 "
    "--trainer.max_epochs=1 --trainer.accelerator=cpu --trainer.devices=1 --trainer.logger=false "
    "--trainer.enable_checkpointing=false"
)
RULED = "large.jsonl --scores large.parquet --rule small/rule.json --model BASE --force other-base"
ASKED = "--base-url URL --api-model m --max-requests 99"
COMMANDS = {
    "runs ledger": "runs",
    "refit ledger --out new.json --method ols --permutations 20 --bootstrap 20": "rules",
    "mix mixed --scores mixed.parquet --method ols --budget 50": "shares",
    "plan --rows 5000 --model BASE --row-tokens 60 --compare compare.json": "verdict",
    "check pool.jsonl pool.jsonl": "overlaps",
    "select scores.parquet pool.jsonl --rule rule.json --budget 20 --force --out other.jsonl": "subset",
    "explain 3 subset.jsonl": "why",
    "report --ledger ledger --out page.html": "page",
    "clean": "files",
    "completion bash": "script",
    "recipe": "recipes",
    "recipe designed_run": "yaml",
    "recipe --out written": "files",
    "score small/pool.jsonl --model BASE --indicators length_output,mtld --out scored.parquet": "missing",
    "score small/pool.jsonl --model BASE --indicators ppl --out scored.parquet --dry-run": "passes",
    "design small/scores.parquet small/pool.jsonl --runs 12 --subset-size 12 --candidates 60 --config recipe.yaml "
    "--out design.yaml": "regressors",
    f"fit {FIT} --mining.ledger=runs": "metrics",
    f"fit {FIT} --dry-run": "seconds",
    "sweep sweep.yaml": "trials",
    "sweep sweep.yaml --dry-run": "trials_left",
    "generate small/eval.jsonl --model BASE --max-new-tokens 2 --out answers.jsonl": "answers",
    "judge small/eval.jsonl --references small/eval.jsonl --out judged": "references",
    f"make-eval small/eval.jsonl {ASKED} --out asked.jsonl --dry-run": "requests",
    f"make-eval small/eval.jsonl {ASKED} --out asked.jsonl": "outputs",
    f"score-llm small/eval.jsonl {ASKED} --out graded.parquet": "missing",
    "run large.jsonl --eval-data report.jsonl --model BASE --device cpu --dry-run": "seconds",
    f"compare {RULED} --eval-data small/eval.jsonl --arms random,weighted --tokens 900 --steps 2 --seeds 2 --out "
    "compared --device cpu": "arms",
    f"search {RULED} --eval-data small/eval.jsonl --report-data report.jsonl --low 4 --high 12 --budget-trials 2 "
    "--grid 2 --seeds 1 --epochs 1 --out searched --device cpu": "chosen",
    "transfer swept --model OTHER --runs 4 --out transferred": "agreement",
    "demo --fast --out demo": "arms",
}
"""Command line → a key of its document."""
LONG = ("demo", "search", "compare", "transfer")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, small_base: str) -> Iterator[Path]:
    """A ledger with rule, scores and pool, a subset chosen; and a small pool that models can be trained on."""
    root = tmp_path_factory.mktemp("json")
    _, table = report_inputs.make_folder(root)
    (root / "small").mkdir()
    make_world(small_base, root / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(demo_settings, "FAST", MINI)
        words = "select scores.parquet pool.jsonl --rule rule.json --budget 50 --force --out subset.jsonl"
        assert cli.main(words.split()) == 0
        write_pool(root / "large.jsonl", n=240)
        write_scores(root / "large.parquet", "large.jsonl")
        write_pool(root / "report.jsonl", n=40, seed=8, tag="r")
        records = mixed_runs()
        for record in records:
            RunLedger("mixed").add(record)
        sources = [sorted(records[0].subset["source_shares"])[k % 4] for k in range(len(table))]
        ScoreTable(table.row, table.id, sources, {}).write("mixed.parquet")
        make_tiny_llama(root / "other", hidden=16, layers=1, seed=3)
        fit = f"{FIT} --mining.ledger=swept".replace("BASE", small_base)
        command = ["im-lightning", "fit", *fit.split(), "${args}"]
        sweep = {"method": "grid", "command": command, "parameters": {"data.subset_seed": {"values": [0, 1, 2, 3]}}}
        Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
        data = "{data: small/pool.jsonl, eval_data: small/eval.jsonl, batch_size: 8}"
        Path("recipe.yaml").write_text(f"data: {data}\ntrainer: {{max_epochs: 1}}\n")
        yield root


def document(text: str) -> dict[str, Any]:
    """The one document that a text is, by the letter of RFC 8259."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key stands twice"
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=once)


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where the endpoint is, if the command asks one."""
    if "URL" not in request.getfixturevalue("line"):
        yield ""
        return
    with serving(tmp_path / "served.jsonl", lambda text, time: "[[7]]") as server:
        yield server.url


LINES = [pytest.param(line, marks=[pytest.mark.slow] * line.startswith(LONG)) for line in COMMANDS]


@pytest.mark.parametrize("line", LINES)
def test_standard_output_is_one_document(
    line: str, desk: Path, url: str, small_base: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A program that reads it needs no other way for the command that it has not met."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    if line.startswith("transfer"):
        assert cli.main(["sweep", "sweep.yaml"]) == 0
    words = [{"BASE": small_base, "URL": url, "OTHER": "other"}.get(word, word) for word in line.split()]
    capsys.readouterr()
    status = cli.main(["--json", *(word.replace("=BASE", f"={small_base}") for word in words)])
    shown = capsys.readouterr()
    assert status == (1 if line.startswith("check") else 0), shown.err
    found = document(shown.out)
    assert COMMANDS[line] in found and "error" not in found


def test_every_command_is_among_them() -> None:
    assert {line.split()[0] for line in COMMANDS} == set(cli.COMMANDS)


def test_the_numbers_are_those_of_the_records(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rounded number would be another one; what is missing is null, and says why."""
    assert cli.main(["runs", "ledger", "--json"]) == 0
    found = document(capsys.readouterr().out)
    records = RunLedger("ledger").records(status=None)
    assert [run["evaluation"] for run in found["runs"]] == [r.evaluation for r in records]
    assert cli.main(["plan", "--rows", "5000", "--json"]) == 0
    found = document(capsys.readouterr().out)
    assert found["ways"][0]["must_be_worth"] == {"value": None, "reason": "not known"}
    assert found["everything"] == {"flops": None, "seconds": None}
    assert any("how fast the machine is" in one for one in found["not_known"])


@pytest.mark.parametrize(
    ("line", "status", "cause"),
    [
        ("runs nowhere", 2, "there is no such ledger"),
        ("runs ledger --shade red", 2, "--shade: there is no such option"),
        ("explain 3 pool.jsonl", 1, "it does not hold decisions"),
        ("rnus ledger", 2, "there is no command 'rnus'"),
    ],
)
def test_an_error_is_a_document_too(line: str, status: int, cause: str, desk: Path, capsys: Any) -> None:
    """With the status that it has without --json, and its sentence where a person looks for it."""
    assert cli.main([*line.split(), "--json"]) == status
    shown = capsys.readouterr()
    found = document(shown.out)
    assert cause in found["error"] and found["status"] == status and found["error"] in shown.err


def test_an_answer_before_an_error_stays_in_the_document(desk: Path, capsys: Any, monkeypatch: Any) -> None:
    """What hours of trials gave is not lost because one of them failed at the end."""
    from im_lightning._utils.answer import answer
    from im_lightning.commands import runs
    from im_lightning.errors import DataError

    def run(ledger: str) -> int:
        answer({"value": math.nan, "other": 1.5}, "text")
        print("what a library prints")
        raise DataError("it broke")

    monkeypatch.setattr(runs, "run", run)
    assert cli.main(["runs", "ledger", "--json"]) == 1
    shown = capsys.readouterr()
    assert document(shown.out) == {"value": None, "other": 1.5, "error": "it broke", "status": 1}
    assert "what a library prints" in shown.err and "text" not in shown.out

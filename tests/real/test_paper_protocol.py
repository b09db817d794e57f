"""The recipe of the paper, small, from its sources to its verdict: SmolLM2 here, and behind a real server.

The server is transformers' own; it generates the references and judges, as an endpoint in the world would.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from im_lightning.cli import main
from im_lightning.data.loading import load_examples
from im_lightning.ledger.ledger import RunLedger
from tests.real.conftest import CITIES, GOODS, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1800)]
RECIPES = Path(__file__).parents[2] / "recipes"
SERVE = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


@pytest.fixture
def served(smollm2: str) -> Iterator[list[str]]:
    """Flags that name SmolLM2 behind `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", smollm2, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen([sys.executable, "-c", SERVE, *words], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        end = time.monotonic() + 300
        while time.monotonic() < end and process.poll() is None:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        speed = ["--timeout-seconds", "600", "--concurrency", "1", "--max-requests", "60"]
        yield ["--base-url", f"http://127.0.0.1:{port}/v1", "--api-model", smollm2, *speed]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def write_sources(folder: Path) -> None:
    """Thirty rows or more of each source, in the form in which it is published."""
    rows = rows_of(40, seed=3)
    alpaca = [{"instruction": row["instruction"], "input": "", "output": row["output"]} for row in rows]
    (folder / "alpaca_data.json").write_text(json.dumps(alpaca))
    messages: list[dict[str, Any]] = []
    for k, city in enumerate(sorted(CITIES) * 4):
        shared = {"message_tree_id": f"t{k}", "lang": "en", "deleted": False, "tree_state": "ready_for_export"}
        asked, told = (
            f"Tell me about {city}, please, in {k + 2} words.",
            f"{city} is the capital of {CITIES[city]}. " * 2,
        )
        root = {"message_id": f"q{k}", "parent_id": None, "text": asked, "role": "prompter", "rank": None}
        reply = {"message_id": f"a{k}", "parent_id": f"q{k}", "text": told, "role": "assistant", "rank": 0}
        messages += [{**shared, **root}, {**shared, **reply}]
    with gzip.open(folder / "2023-04-12_oasst_ready.messages.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(one) + "\n" for one in messages))
    with (folder / "stackexchange.jsonl").open("w") as stream:
        for k in range(36):
            text = f"<p>Use a loop:</p><pre><code>for i in range({k}):\n    print(i)\n</code></pre>"
            answers = [{"answer_id": k, "pm_score": 1 + k % 5, "selected": True, "text": text}]
            asked = f"<p>How do I print <em>{k}</em> numbers?</p>"
            stream.write(json.dumps({"qid": k, "question": asked, "answers": answers}) + "\n")
    with (folder / "wikihowAll.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["headline", "title", "text"])
        for k in range(36):
            goods = GOODS[k % len(GOODS)]
            writer.writerow(
                [f"Choose {goods}.", f"How to Buy {goods} {k}", f"Go to a shop. Ask for {k + 1} {goods}. Pay."]
            )


def test_from_the_sources_to_the_verdict(
    served: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none-needed")
    shutil.copytree(RECIPES, "recipes")
    write_sources(tmp_path)
    asked = [{"prompt": f"What is the capital of {country}?"} for country in ("France", "Italy", "Spain")]
    Path("instructions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))

    words = ["make-eval", "instructions.jsonl", "--outputs", "1", "--max-answer-tokens", "40"]
    assert main([*words, *served, "--out", "eval.jsonl"]) == 0
    references = load_examples("eval.jsonl")
    assert any("Paris" in one.response for one in references)

    fit = [
        "fit",
        "--config=recipes/07_paper_protocol/designed_v1.yaml",
        "--config=recipes/07_paper_protocol/small.yaml",
    ]
    for k in range(6):
        assert main([*fit, f"--data.subset_seed={k}", "--mining.refit=false"]) == 0
    runs = RunLedger("runs").records()
    assert len(runs) == 6 and {run.status for run in runs} == {"complete"}
    shares = {name for run in runs for name in run.subset["source_shares"]}
    assert shares == {"alpaca", "open-assistant", "stackexchange", "wikihow"}
    assert all(run.evaluation["eval"]["example_loss"] > 0 for run in runs)
    assert main(["refit", "runs", "--method", "ols", "--out", "runs/rule.json"]) == 0

    finetune = [*fit, "--data.subset_size=null", "--data.subset_seed=null", "--data.budget=12", "--mining.refit=false"]
    assert main([*finetune, "--data.rule=runs/rule.json", "--data.force=true", "--export=weighted"]) == 0
    assert main([*finetune, "--export=random"]) == 0
    for name in ("weighted", "random"):
        answer = ["generate", "eval.jsonl", "--model", "smollm2", "--adapter", name, "--max-new-tokens", "16"]
        assert main([*answer, "--out", f"{name}.jsonl"]) == 0
    capsys.readouterr()
    Path("prompt.txt").write_text("{request}\n(A) {first}\n(B) {second}\nWhich is better? Write [[A]], [[B]] or [[C]].")
    judge = [
        "judge",
        "weighted.jsonl",
        "--against",
        "random.jsonl",
        "--references",
        "eval.jsonl",
        "--prompt",
        "prompt.txt",
    ]
    assert main([*judge, *served, "--max-answer-tokens", "12", "--out", "judged"]) == 0
    said = capsys.readouterr().out
    assert "weighted against random, judged by" in said and "ROUGE-L with the references: weighted" in said
    found = json.loads(Path("judged/judge.json").read_text())
    assert found["win_rate"]["pairs"] + found["win_rate"]["missing"] == len(references)

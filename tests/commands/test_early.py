"""What an output may not be called is said before the data are read, a model is loaded or a request is paid for."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_server import KEY, serving

from im_lightning.cli import main

ROWS = "rows are written as JSON. Fix: end the name in .jsonl, .json, .jsonl.gz or .jsonl.zst"
TABLE = "a score table is a Parquet file. Fix: end its name in .parquet"
COLUMN = "a column of scores cannot have this name. Fix: rename the indicator"
PREDICTION = "a rule's prediction is called so. Fix: give another --name"
ASKED = "--base-url http://127.0.0.1:9/v1 --api-model m --max-requests 9"
REFUSED = {
    f"make-eval gone.jsonl {ASKED} --out eval.csv": f"eval.csv: {ROWS}",
    f"make-eval gone.jsonl {ASKED} --out eval.csv --dry-run": f"eval.csv: {ROWS}",
    f"score-llm gone.jsonl {ASKED} --out graded.csv": f"graded.csv: {TABLE}",
    f"score-llm gone.jsonl {ASKED} --out graded.parquet --name row": f"column 'row': {COLUMN}",
    f"score-llm gone.jsonl {ASKED} --out graded.parquet --name a_reason": f"column 'a_reason': {COLUMN}",
    f"score-llm gone.jsonl {ASKED} --out g.parquet --name predicted_log_loss": f"predicted_log_loss: {PREDICTION}",
    "generate gone.jsonl --model gone --out answers.txt": f"answers.txt: {ROWS}",
    "check gone.jsonl gone.jsonl --embedding-model gone --out found.txt": f"found.txt: {ROWS}",
    "select gone.parquet gone.jsonl --budget 3 --method random --out subset.csv": f"subset.csv: {ROWS}",
    "check gone.jsonl gone.jsonl --out found.parquet": f"found.parquet: {ROWS}",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_name_that_cannot_be_is_refused_before_the_data_are_read(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said at the end, it would be said after hours; and the corrected name has a journal of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main(words.split()) == 2
    assert REFUSED[words] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    ["make-eval pool.jsonl --out eval.csv", "score-llm pool.jsonl --out graded.csv"]
    + [f"score-llm pool.jsonl --out graded.parquet --name {name}" for name in ("row", "source", "x_reason")],
)
def test_nothing_is_asked_for_an_output_that_cannot_be_written(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    Path("pool.jsonl").write_text('{"prompt": "Name a lake.", "response": "Bala."}\n')
    with serving(tmp_path / "log", lambda text, time: "[[7]]") as server:
        asked = ["--base-url", server.url, "--api-model", "m", "--max-requests", "9"]
        assert main([*words.split(), *asked]) == 2
        assert not server.answered

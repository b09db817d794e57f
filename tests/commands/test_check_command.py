"""If these failed, a pool could hold the evaluation's rows, and `im-lightning check` would not say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pools import write_jsonl

from im_lightning.cli import main

EVALUATION = [
    {"prompt": "Name a color of the rainbow.", "response": "Red."},
    {"prompt": "What is the capital of France?", "response": "It is Paris."},
]
POOL = [
    {"prompt": "Add 2 and 2.", "response": "4"},
    {"prompt": "name a color of the rainbow", "response": "red"},
    {"prompt": "What is the capital of France?", "response": "Rome"},
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pool.jsonl", POOL)
    write_jsonl(tmp_path / "eval.jsonl", EVALUATION)
    return tmp_path


def test_overlaps_are_counted_shown_and_written(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "pool.jsonl", "eval.jsonl", "--out", "found.jsonl"]) == 1
    printed = capsys.readouterr().out
    assert "3 rows of pool.jsonl, against 2 of eval.jsonl" in printed
    lines = {line.split()[0]: line.split()[1:3] for line in printed.splitlines() if line[:1].isalpha() and "  " in line}
    assert lines["exact"] == ["0", "0"] and lines["normalised"] == ["1", "1"] and lines["prompt"] == ["1", "1"]
    assert "prompt: pool.jsonl:3 and eval.jsonl:2" in printed and "semantic" not in printed
    assert printed.endswith("2 of the pool's rows are in the evaluation set, by the strongest of these kinds.\n")
    found = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    told = [(one["kind"], one["row"], one["evaluation_row"]) for one in found]
    assert told == [("normalised", 1, 0), ("prompt", 2, 1)]
    assert main(["check", "pool.jsonl", "eval.jsonl", "--out", "found.jsonl"]) == 1, "its own file may be replaced"
    Path("found.jsonl").write_text('{"mine": 1}\n')
    assert main(["check", "pool.jsonl", "eval.jsonl", "--out", "found.jsonl"]) == 2
    assert Path("found.jsonl").read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize("name", ["found.json", "found.jsonl.gz", "found.json.zst"])
def test_its_own_file_is_known_in_every_form(files: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "pool.jsonl", "eval.jsonl", "--out", name]) == 1
    assert main(["check", "pool.jsonl", "eval.jsonl", "--out", name]) == 1
    write_jsonl(files / "pool.jsonl", POOL[:1])
    assert main(["check", "pool.jsonl", "eval.jsonl", "--out", name]) == 0, "a file of none is its own, too"
    assert main(["check", "pool.jsonl", "eval.jsonl", "--out", name]) == 0
    Path("found.json").write_text('[{"mine": 1}]')
    assert main(["check", "pool.jsonl", "eval.jsonl", "--out", "found.json"]) == 2
    assert "is no file of overlaps as im-lightning wrote it" in capsys.readouterr().err


def test_a_clean_pool_exits_with_0(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(files / "pool.jsonl", POOL[:1])
    assert main(["check", "pool.jsonl", "eval.jsonl", "--near", "0"]) == 0
    printed = capsys.readouterr().out
    assert "None of the pool's rows is in the evaluation set" in printed and "near" not in printed


def test_what_cannot_be_checked_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "empty.jsonl").write_text("")
    for words, cause in (
        (["pool.jsonl", "empty.jsonl"], "empty.jsonl: it holds no rows"),
        (["empty.jsonl", "eval.jsonl"], "empty.jsonl: it holds no rows"),
        (["pool.jsonl", "eval.jsonl", "--near", "2"], "near=2.0"),
        (["pool.jsonl", "gone.jsonl"], "there is no such file or folder"),
        (["pool.jsonl", "eval.jsonl", "--semantic", "0.8"], "--semantic 0.8: rows of the same meaning are found by an"),
    ):
        assert main(["check", *words]) in (1, 2)
        assert cause in capsys.readouterr().err

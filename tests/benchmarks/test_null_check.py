"""The null check counts what it should, goes on where it was, and runs the whole loop on permuted indicators."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mini_demo import MINI

from benchmarks import null_check
from im_lightning.errors import RequestError

SMALL = replace(MINI, null=True)


def test_a_seed_is_run_once_and_logged(tmp_path: Path, monkeypatch) -> None:
    """Twenty demos take a while: what is logged must not be run again, and nothing else be kept."""
    (line,) = null_check.check(tmp_path, [1000], SMALL)
    assert line["seed"] == 1000 and set(line["holm_p"]) == {
        "weighted",
        "top",
        "longest",
        "lowest-ppl",
        "reward",
        "worst",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"null_check.jsonl", "models"}
    monkeypatch.setattr(null_check, "Demo", None)
    assert null_check.check(tmp_path, [1000], SMALL) == [line]
    with pytest.raises(RequestError, match=r"made with other sizes.*another folder"):
        null_check.check(tmp_path, [1000], replace(SMALL, seeds=3))


def test_the_count_decides_the_status(tmp_path: Path, monkeypatch, capsys) -> None:
    """More than three of twenty is no accident, and a script that says so with status 0 says nothing."""
    lines = [{"seed": s, "shown": ["top"] if s < 1004 else []} for s in null_check.SEEDS]
    monkeypatch.setattr(null_check, "check", lambda out, seeds: lines[: len(seeds)])
    assert null_check.main(["--out", str(tmp_path)]) == 1
    assert "4 of 20 demos showed a difference: seed 1000 (top)" in capsys.readouterr().out
    assert null_check.main(["--out", str(tmp_path), "--count", "3"]) == 0
    assert null_check.NULL.null and len(null_check.SEEDS) == 20
    assert json.dumps(null_check.summary(lines[10:])) == '"0 of 10 demos showed a difference"'

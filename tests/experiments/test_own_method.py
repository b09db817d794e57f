"""A selection method of one's own is a row and a function in one file: select and compare take it by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from im_lightning.cli import main
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError
from im_lightning.experiments.compare.arms import usual_arms
from im_lightning.sampling.selection.methods import METHODS, Candidates, selection_method
from im_lightning.sampling.selection.select import select_subset


@pytest.fixture(autouse=True)
def shortest():
    """The method: all there is to adding one."""

    @selection_method("shortest", "shortest rows", column="length_output")
    def take(c: Candidates) -> dict[str, Any]:
        return c.fill_by(c.column)

    yield take
    METHODS.pop("shortest")


def test_it_is_taken_by_name(finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it had to be made known in a second place, a user's method would work in one command and not in the next."""
    folder = finished[0]
    scores, pool, out = folder / "scores.parquet", folder / "pool.jsonl", tmp_path / "subset.jsonl"
    table = ScoreTable.read(scores)
    lengths = table.values["length_output"]
    rows = select_subset(table, None, 20, "shortest")
    assert lengths[rows].tolist() == sorted(lengths.tolist())[:20]
    assert main(["select", str(scores), str(pool), "--method", "shortest", "--budget", "20", "--out", str(out)]) == 0
    assert "shortest" in capsys.readouterr().out and len(out.read_text().splitlines()) == 20

    asked = ["compare", str(pool), "--scores", str(scores), "--model", str(folder / "base"), "--device", "cpu"]
    asked += ["--eval-data", str(folder / "evaluation" / "report.jsonl"), "--tokens", "200", "--steps", "4"]
    asked += ["--seeds", "2", "--arms", "random,shortest", "--cache-dir", str(folder / "work" / "cache")]
    assert main([*asked, "--out", str(tmp_path / "compare")]) == 0
    text = capsys.readouterr().out
    arms = {arm["arm"]: arm for arm in json.loads((tmp_path / "compare" / "compare.json").read_text())["arms"]}
    assert arms["shortest"]["title"] == "shortest rows" and arms["shortest"]["tested"] and "shortest rows" in text
    assert arms["shortest"]["rows"] > arms["random"]["rows"] and abs(arms["shortest"]["tokens"] - 200) <= 2
    assert usual_arms()[-2:] == ("shortest", "full")


def test_what_its_row_asks_for_is_checked(finished) -> None:
    """The row alone decides what a method may be asked for."""
    lacking = ScoreTable([0], ["x"], ["a"], {"ppl": np.ones(1)})
    with pytest.raises(RequestError, match="length_output"):
        select_subset(lacking, None, 1, "shortest")
    with pytest.raises(RequestError, match="'shortest': it is registered already"):
        selection_method("shortest", "again")(lambda c: {})


def test_the_usual_arms_are_those_of_the_pages() -> None:
    METHODS.pop("shortest")
    assert usual_arms() == (
        "base", "random", "random-balanced", "weighted", "mix", "mix+rule", "by-source", "top", "diverse", "targeted",
        "longest", "lowest-ppl", "reward", "ifd", "worst", "full",
    )  # fmt: skip
    selection_method("shortest", "shortest rows")(lambda c: {})

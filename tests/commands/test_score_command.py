"""`im-lightning score`: what a person at a terminal gets, and is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from im_lightning.cli import main
from im_lightning.data.score_table import ScoreTable
from im_lightning.models.cost import base_parameters, read_cost

ROWS: list[dict[str, Any]] = [
    {"instruction": "Give three tips", "input": "", "output": "Eat, sleep and exercise. " * (i + 1), "source": f"s{i}"}
    for i in range(7)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {**ROWS[0], "output": ""}]))
    return path


def score(*arguments: object) -> int:
    return main(["score", *map(str, arguments)])


def test_writes_all_rows_in_input_order(data: Path, tmp_path: Path, tiny_llama: str, capsys: Any) -> None:
    out = tmp_path / "scores.parquet"
    assert score(data, "--model", tiny_llama, "--out", out) == 0
    shown = capsys.readouterr()
    assert shown.out == (
        f"wrote {out}: 8 rows, length_input, length_output, mtld, ppl, ppl_unconditional, ifd, knn_6; "
        "1 row without some value\n"
    )
    assert "ppl: 7 scored; 1 missing (empty response: 1)" in shown.err
    table = ScoreTable.read(out)
    assert table.row.tolist() == list(range(8)) and table.source == [*(f"s{i}" for i in range(7)), "s0"]
    assert (np.diff(table.values["length_output"][:7]) > 0).all()
    assert table.reasons["ppl"][7] == "empty response" and table.values["length_output"][7] == 0
    assert set(table.keys) == set(table.indicators)

    assert score(data, "--model", tiny_llama, "--out", out) == 0
    assert "no model was loaded" in capsys.readouterr().err


def test_chosen_indicators_without_any_model(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    assert score(data, data, "--indicators", "mtld,mtld_lexicalrichness", "--out", out) == 0
    table = ScoreTable.read(out)
    assert table.indicators == ["mtld", "mtld_lexicalrichness"] and len(table) == 16
    assert score(data, "--out", out) == 0
    assert ScoreTable.read(out).indicators == ["mtld"]


def test_bad_rows_stop_or_are_set_aside(data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "scores.parquet"
    with data.open("a") as stream:
        stream.write('{"instruction": "no response"}\n{torn\n')
    assert score(data, "--out", out) == 1
    assert "pool.jsonl:9" in capsys.readouterr().err and not out.exists()
    assert score(data, "--out", out, "--on-bad-row", "quarantine") == 0
    shown = capsys.readouterr()
    assert "8 rows" in shown.out and "2 rows rejected" in shown.out
    aside = [json.loads(line) for line in Path(f"{out}.rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in aside] == [9, 10] and all(row["cause"] for row in aside)
    data.write_text("\n".join(data.read_text().splitlines()[:8]) + "\n")
    assert score(data, "--out", out) == 0 and not Path(f"{out}.rejected.jsonl").exists(), "they were mended"
    Path(f"{out}.rejected.jsonl").write_text('{"mine": 1}\n')
    assert score(data, "--out", out) == 0 and Path(f"{out}.rejected.jsonl").read_text() == '{"mine": 1}\n'


def save_rule(path: Path, identities: dict[str, Any]) -> None:
    from im_lightning.indicators.transforms import Transform
    from im_lightning.rule.linear_rule import LinearRule

    names = ["length_output", "ppl"]
    transforms = {"length_output": Transform("log1p", 0.0, 10.0), "ppl": Transform("log", 0.0, 20.0)}
    LinearRule("mine", 0.5, np.array([-0.1, 0.2]), names, transforms, identities=identities).save(path)


def test_a_row_of_a_source_that_the_rule_does_not_know_says_so() -> None:
    """It has every indicator, and "no reason was recorded" stood in the table."""
    from im_lightning.commands.score import _predict
    from im_lightning.indicators.transforms import Transform, share_transforms
    from im_lightning.rule.linear_rule import LinearRule

    table = ScoreTable(range(3), ["a", "b", "c"], ["web", "new", "web"], {"ppl": np.array([2.0, 3.0, -1.0])})
    transforms = {"ppl": Transform("log", 0.0, 20.0), **share_transforms(["web"])}
    rule = LinearRule(
        "mine", 0.5, np.array([0.1, 0.2]), ["ppl", *share_transforms(["web"])], transforms, sources_=["web"]
    )
    found = _predict(table, rule)
    assert np.isnan(found.values["predicted_log_loss"]).tolist() == [False, True, True]
    reasons = found.reasons["predicted_log_loss"]
    assert reasons[1] == "no run of the rule had its source (new)" and "no finite regressor" in str(reasons[2])


def test_rule_decides_the_indicators_and_predicts(
    data: Path, tmp_path: Path, tiny_llama: str, capsys: Any, recwarn: pytest.WarningsRecorder
) -> None:
    out, rule = tmp_path / "scores.parquet", tmp_path / "rule.json"
    assert score(data, "--model", tiny_llama, "--indicators", "ppl,length_output", "--out", out) == 0
    keys = ScoreTable.read(out).keys
    save_rule(rule, {name: key["identity"] for name, key in keys.items()})
    assert score(data, "--model", tiny_llama, "--rule", rule, "--out", out) == 0
    table = ScoreTable.read(out)
    assert table.indicators == ["length_output", "ppl"]
    predicted = table.values["predicted_log_loss"]
    phi = np.log1p(table.values["length_output"]) * -0.1 + np.log(table.values["ppl"]) * 0.2
    np.testing.assert_allclose(predicted[:7], 0.5 + phi[:7])
    assert table.reasons["predicted_log_loss"][7] == "ppl: empty response"
    capsys.readouterr()

    # another truncation is another ppl: refused before any work, unless forced
    assert score(data, "--model", tiny_llama, "--rule", rule, "--max-length", 512, "--out", out) == 2
    said = capsys.readouterr().err
    assert "ppl was computed in another way" in said and "--force" in said and "coverage" not in said
    assert (
        score(data, "--model", tiny_llama, "--rule", rule, "--max-length", 512, "--out", out, "--force", "other-base")
        == 0
    )
    assert ScoreTable.read(out).meta["forced"] == ["other-base"]


def test_dry_run_estimates_and_writes_nothing(data: Path, tmp_path: Path, tiny_llama: str, capsys: Any) -> None:
    out, cache = tmp_path / "deep" / "scores.parquet", tmp_path / "cache"
    assert score(data, "--model", tiny_llama, "--out", out, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("8 rows\n") and "mtld: 8 rows to compute" in shown
    assert "tokens/s in" in shown and "MiB of memory" in shown
    tokens, flops = re.search(r"about ([\d,]+) tokens and (\S+) FLOPs", shown).groups()  # type: ignore[union-attr]
    wanted = 2 * base_parameters(tiny_llama) * float(tokens.replace(",", ""))
    assert float(flops) == pytest.approx(wanted, rel=0.05)
    assert not out.parent.exists() and not list(cache.rglob("*.parquet"))
    assert score(data, "--model", tiny_llama, "--out", out) == 0
    noted = read_cost(out)
    assert noted is not None and noted.flops == pytest.approx(wanted), "each row is read once"
    capsys.readouterr()
    assert score(data, "--model", tiny_llama, "--out", out, "--dry-run") == 0
    assert "ppl: in the store" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--out", "scores.csv"], 2, "--out scores.csv: a score table is a Parquet file"),
        (["--out", "{tmp}/folder.parquet"], 2, "is a folder"),
        (["--out", "{tmp}/pool.jsonl/scores.parquet"], 1, "cannot be written"),
        (["--out", "{tmp}/s.parquet", "--indicators", "pll"], 2, "ask for ppl"),
        (["--out", "{tmp}/s.parquet", "--indicators", "ppl"], 2, "name one with --model"),
        (["--out", "{tmp}/s.parquet", "--model", "/no/such"], 2, "/no/such: there is no such folder"),
        (["--out", "{tmp}/s.parquet", "--engine", "spark"], 2, "engine 'spark': is not known"),
        (["--out", "{tmp}/s.parquet", "--ray-workers", "2"], 2, "--ray-workers 2: the engine is local"),
        (["--out", "{tmp}/s.parquet", "--indicators", "reward"], 2, "name one with --reward-model (reward_model=)"),
        (["--out", "{tmp}/s.parquet", "--rule", "{tmp}/none.json"], 2, "none.json"),
    ],
)
def test_wrong_requests_fail_at_once_with_what_to_do(
    data: Path, tmp_path: Path, arguments: list[str], status: int, expected: str, capsys: Any
) -> None:
    (tmp_path / "folder.parquet").mkdir()
    assert score(data, *(a.format(tmp=tmp_path) for a in arguments)) == status
    said = capsys.readouterr()
    assert expected in said.err and "Fix" in said.err and said.out == ""


def test_a_neighbour_that_no_row_has_is_refused_before_the_work(
    data: Path, tmp_path: Path, tiny_llama: str, capsys: Any
) -> None:
    """A scoring of 400 rows for knn_1000 ran to its end, and every value was missing."""
    assert score(data, "--model", tiny_llama, "--indicators", "mtld,knn_1000", "--out", tmp_path / "s.parquet") == 2
    said = capsys.readouterr().err
    assert not list(tmp_path.rglob("part-*")), "nothing was scored"
    assert "--indicators knn_1000: there are " in said and "so no row would have a value. Fix: ask for knn_" in said
    three = [data, data, data, "--model", tiny_llama, "--out", tmp_path / "s.parquet"]
    assert score(*three, "--indicators", "knn_24") == 2 and "there are 23 other" in capsys.readouterr().err
    assert score(*three, "--indicators", "knn_9") == 0, "a copy is a neighbour, at distance 0"
    assert np.isfinite(ScoreTable.read(tmp_path / "s.parquet").values["knn_9"]).all()
    (tmp_path / "one.jsonl").write_text(json.dumps({"instruction": "Name a lake.", "output": "Como"}) + "\n")
    alone = [tmp_path / "one.jsonl", "--model", tiny_llama, "--out", tmp_path / "s.parquet"]
    assert score(*alone, "--indicators", "knn_1") == 2
    assert "there are 0 other examples, so no row would have a value. Fix: leave it out, or" in capsys.readouterr().err


def test_no_share_above_the_whole_is_printed(data: Path) -> None:
    """ "143 % of the measured matmul rate" says that the measurement was wrong, not that the scoring was fast."""
    from im_lightning import load_examples
    from im_lightning.scoring.columns import DistinctPool
    from im_lightning.scoring.report import Coverage

    coverage = Coverage(DistinctPool(load_examples(str(data))))
    coverage.add_step("a", 2.0, 100, 0.43)
    coverage.add_step("b", 2.0, 100, 1.43)
    text = "\n".join(coverage.lines())
    assert "43% of the measured matmul rate" in text and "143" not in text


def test_scores_by_row_are_refused_where_rows_are_set_aside(data: Path, tmp_path: Path, capsys: Any) -> None:
    """The bad second line would give every later row its neighbour's score."""
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], '{"title": "bad"}', *lines[1:]]) + "\n")
    (tmp_path / "j.jsonl").write_text("".join(json.dumps({"row": i, "grade": i}) + "\n" for i in range(len(lines) + 1)))
    out = tmp_path / "s.parquet"
    asked = [data, "--indicators", "mtld", "--external", tmp_path / "j.jsonl", "--out", out]
    assert score(*asked, "--on-bad-row", "quarantine") == 2
    said = capsys.readouterr().err
    assert "the rows of the data, 1 of which set aside: the later numbers" in said and "give each record the id" in said
    assert not out.exists() and not Path(f"{out}.rejected.jsonl").exists()
    data.write_text("\n".join(lines) + "\n")
    assert score(*asked, "--answer", "all") == 2 and "of which --answer all makes several" in capsys.readouterr().err
    assert score(*asked, "--on-bad-row", "quarantine") == 0
    assert ScoreTable.read(out).values["grade"].tolist() == list(range(len(lines)))


@pytest.mark.parametrize("flag", ["--external-columns", "--external-scorer"])
def test_what_is_about_a_file_that_is_not_named_is_refused(flag: str, data: Path, tmp_path: Path, capsys: Any) -> None:
    """It was ignored: a table without the scores that were meant looks like any other."""
    assert score(data, "--indicators", "mtld", "--out", tmp_path / "s.parquet", flag, "grade") == 2
    said = f"{flag} grade: it is about a file of scores, and none is named. Fix: name the file with --external"
    assert said in capsys.readouterr().err and not (tmp_path / "s.parquet").exists()

"""If these failed, `im-lightning select` would write other rows than the scores belong to, or not say what it chose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from im_lightning.cli import main
from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.published import load_rule
from im_lightning.sampling.selection.decisions import Decisions
from im_lightning.sampling.weights.quality_weights import quality_weights

N = 60


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A scored pool: pool.jsonl, scores.parquet, rule.json; the rule prefers rows of a high number."""
    rows = [{"instruction": f"Say {i}.", "output": f"{i} é", "extra": {"kept": i}} for i in range(N)]
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    score(path)
    LinearRule(
        "mine", 0.5, np.array([-0.01]), ["reward"], {"reward": Transform("identity", 0.0, 100.0)},
        mean_=np.array([29.5]), cov_=np.array([[25.0]]), radius_=2.0,
    ).save(tmp_path / "rule.json")  # fmt: skip
    return tmp_path


def score(path: Path) -> None:
    examples = load_examples(str(path))
    values = {"reward": np.arange(len(examples), dtype=float), "length_output": np.ones(len(examples))}
    table = ScoreTable(np.arange(len(examples)), [e.id for e in examples], [e.source for e in examples], values)
    table.write(path.parent / "scores.parquet")


def select(pool: Path, *options: str, data: str = "pool.jsonl") -> int:
    paths = [str(pool / "scores.parquet"), str(pool / data)]
    return main(["select", *paths, "--out", str(pool / "subset.jsonl"), *options])


def chosen(pool: Path) -> list[int]:
    lines = (pool / "subset.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["extra"]["kept"] for line in lines]


def test_rows_are_written_as_they_were_in_the_order_of_the_data(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert select(pool, "--rule", str(pool / "rule.json"), "--budget", "20") == 0
    rows = chosen(pool)
    assert len(set(rows)) == 20 and rows == sorted(rows) and np.mean(rows) > 32
    raw = (pool / "pool.jsonl").read_text(encoding="utf-8").splitlines()
    assert (pool / "subset.jsonl").read_text(encoding="utf-8").splitlines() == [raw[i] for i in rows]
    out = capsys.readouterr().out
    first, rest = out.split("\n", 1)
    assert "20 of 60 rows, weighted (tilt), rule mine, seed 0" in first
    assert " ".join(rest.split()).endswith("Only the second step is the rule's choice.")


def test_the_manifest_says_what_was_chosen_and_how(pool: Path) -> None:
    assert select(pool, "--rule", str(pool / "rule.json"), "--budget", "20", "--seed", "4") == 0
    manifest = json.loads((pool / "subset.jsonl.manifest.json").read_text())
    table = ScoreTable.read(pool / "scores.parquet")
    assert manifest["pool"] == {"digest": table.pool_digest, "rows": N, "eligible": N, "rejected": 0}
    assert (manifest["method"], manifest["seed"], manifest["budget"]) == ("weighted", 4, 20)
    assert manifest["rule"]["name"] == "mine" and len(manifest["rule"]["digest"]) == 32
    assert manifest["weights"]["method"] == "tilt" and manifest["subset"]["sources"] == {"pool": 20}
    first = (pool / "subset.jsonl").read_bytes()
    assert select(pool, "--rule", str(pool / "rule.json"), "--budget", "20", "--seed", "4") == 0
    assert (pool / "subset.jsonl").read_bytes() == first
    assert json.loads((pool / "subset.jsonl.manifest.json").read_text()) == manifest


@pytest.mark.parametrize(("method", "expected"), [("top", range(50, 60)), ("worst", range(10))])
def test_the_rules_top_and_worst_rows(pool: Path, method: str, expected: range) -> None:
    assert select(pool, "--rule", str(pool / "rule.json"), "--budget", "10", "--method", method) == 0
    assert chosen(pool) == list(expected)


@pytest.mark.parametrize("method", ["random", "longest"])
def test_baselines_need_no_rule(pool: Path, method: str) -> None:
    assert select(pool, "--budget", "10", "--method", method) == 0
    assert len(set(chosen(pool))) == 10
    assert json.loads((pool / "subset.jsonl.manifest.json").read_text())["rule"] is None


def test_data_that_were_not_scored_are_refused_by_their_first_row(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (pool / "pool.jsonl").read_text(encoding="utf-8").splitlines()
    lines[7] = lines[7].replace("Say 7.", "Say seven.")
    (pool / "other.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert select(pool, "--budget", "5", "--method", "random", data="other.jsonl") == 2
    error = capsys.readouterr().err
    assert "row 7 (" in error and "other.jsonl:8) has id" in error and "the table has" in error
    assert not (pool / "subset.jsonl").exists()


def test_more_or_fewer_rows_than_were_scored_are_refused(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (pool / "pool.jsonl").read_text(encoding="utf-8").splitlines()
    (pool / "short.jsonl").write_text("\n".join(lines[:50]), encoding="utf-8")
    assert select(pool, "--budget", "5", "--method", "random", data="short.jsonl") == 2
    assert "the table has 60 rows, the data 50" in capsys.readouterr().err
    (pool / "long.jsonl").write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    assert select(pool, "--budget", "5", "--method", "random", data="long.jsonl") == 2
    assert "row 60" in capsys.readouterr().err


def test_bad_rows_are_set_aside_as_when_scoring(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (pool / "pool.jsonl").read_text(encoding="utf-8").splitlines()
    (pool / "bad.jsonl").write_text("\n".join([lines[0], "[1]", *lines[1:]]), encoding="utf-8")
    options = ("--budget", "5", "--method", "random")
    assert select(pool, *options, data="bad.jsonl") == 1
    assert "bad.jsonl:2" in capsys.readouterr().err
    assert select(pool, *options, "--on-bad-row", "quarantine", data="bad.jsonl") == 0
    assert json.loads((pool / "subset.jsonl.rejected.jsonl").read_text())["line"] == 2
    assert json.loads((pool / "subset.jsonl.manifest.json").read_text())["pool"]["rejected"] == 1
    assert select(pool, *options) == 0 and not (pool / "subset.jsonl.rejected.jsonl").exists(), "they were mended"


def test_requests_that_cannot_be_met_end_with_status_two(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert select(pool, "--budget", "5") == 2
    assert "method weighted: it needs a rule" in capsys.readouterr().err
    assert select(pool, "--budget", "61", "--method", "random") == 2
    assert "budget=61: 60 of 60 rows" in capsys.readouterr().err
    assert select(pool, "--budget", "5", "--method", "random", "--out", str(pool / "pool.jsonl")) == 2
    assert "it is one of the inputs" in capsys.readouterr().err
    assert select(pool, "--budget", "5", "--rule", str(pool / "rule.json"), data="pool.jsonl") == 0


def test_a_budget_of_tokens_and_a_subset_to_match(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest's count is what a matched baseline is matched to."""
    table = ScoreTable.read(pool / "scores.parquet")
    table.with_values("length_output", np.arange(1.0, N + 1)).write(pool / "scores.parquet")
    assert select(pool, "--rule", str(pool / "rule.json"), "--budget", "10", "--method", "top") == 0
    first = json.loads((pool / "subset.jsonl.manifest.json").read_text())
    assert first["subset"]["tokens"] == sum(range(51, 61)) and first["subset"]["rows"] == 10
    assert set(first["versions"]) == {"python", "numpy"} and first["order"] == "as in the data"
    other = ("--method", "random-tokens", "--match", str(pool / "subset.jsonl"), "--out", str(pool / "matched.jsonl"))
    assert select(pool, *other) == 0
    matched = json.loads((pool / "matched.jsonl.manifest.json").read_text())
    assert matched["budget_tokens"] == 555 and abs(matched["subset"]["tokens"] - 555) <= 5
    assert matched["budget"] == matched["subset"]["rows"] > 10
    assert select(pool, "--budget-tokens", "300", "--method", "longest") == 0
    assert abs(json.loads((pool / "subset.jsonl.manifest.json").read_text())["subset"]["tokens"] - 300) <= 3

    capsys.readouterr()
    assert select(pool, "--method", "random", "--match", str(pool / "pool.jsonl")) == 2
    assert "pool.jsonl.manifest.json does not describe a subset" in capsys.readouterr().err
    assert select(pool, *other, "--budget", "3") == 2
    assert "leave out --budget and --budget-tokens" in capsys.readouterr().err
    table.with_values("length_output", np.full(N, np.nan)).write(pool / "scores.parquet")
    assert select(pool, "--method", "random", "--budget", "5") == 0
    assert select(pool, *other) == 2
    assert "has no count of tokens" in capsys.readouterr().err


def test_stability_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A choice that other runs would not have made must say so before anyone trains on it."""
    from simulated_ledger import simulate

    from im_lightning.ledger.ledger import RunLedger
    from im_lightning.rule.fit import fit_rule

    rows = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(N)]
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    examples, records = load_examples(str(path)), simulate(24, noise=0.02)
    rng = np.random.default_rng(0)
    values = {
        "ppl": np.exp(rng.normal(2, 0.5, N)),
        "length_output": np.exp(rng.normal(4, 0.5, N)),
        "knn_6": rng.normal(0.7, 0.2, N),
    }
    table = ScoreTable(
        np.arange(N), [e.id for e in examples], [e.source for e in examples], values, keys=records[0].keys
    )
    table.write(tmp_path / "scores.parquet")
    book = RunLedger(tmp_path / "runs")
    for record in records:
        book.add(record)
    fit_rule(records).save(tmp_path / "runs" / "rule.json")
    rule = ["--rule", str(tmp_path / "runs" / "rule.json"), "--budget", "12"]
    assert select(tmp_path, *rule, "--method", "top", "--stability", "12") == 0
    told = json.loads((tmp_path / "subset.jsonl.manifest.json").read_text())["stability"]
    assert told["replicates"] == 12 and 0 < told["jaccard"]["mean"] <= 1 and told["budget"] == 12
    out = capsys.readouterr().out
    assert "stability over 12 bootstrapped rules" in out and f"{told['jaccard']['mean']:.2f} (" in out
    assert select(tmp_path, *rule, "--stability", "12", "--ledger", str(tmp_path)) == 2
    assert "24 of the 24 runs behind it are not in the ledger" in capsys.readouterr().err
    assert select(tmp_path, *rule, "--ledger", str(tmp_path)) == 2
    assert "which --stability alone reads. Fix: add --stability 50, or leave it out" in capsys.readouterr().err
    assert select(tmp_path, "--budget", "12", "--method", "random", "--stability", "12") == 2
    assert "it is about the runs behind a rule" in capsys.readouterr().err
    assert select(tmp_path, *rule, "--method", "top", "--quota", "*=9", "--stability", "12") == 2
    assert "--stability: it is about a choice by the rule alone" in capsys.readouterr().err
    assert select(tmp_path, *rule, "--method", "longest", "--stability", "12") == 2
    assert "method longest: what it takes is not decided by a rule alone" in capsys.readouterr().err


def test_a_mixture_that_nothing_draws_by_is_refused(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was read by nobody, and need not even exist."""
    assert select(pool, "--budget", "12", "--method", "random", "--mixture", "mix.json") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--mixture mix.json: method random does not draw by it. Fix: pass --method mix, or mix+rule" in said


def explained(capsys: pytest.CaptureFixture[str], row: object, file: Path) -> str:
    capsys.readouterr()
    assert main(["explain", str(row), str(file)]) == 0
    return capsys.readouterr().out


def test_a_row_by_number_and_by_id(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert select(pool, "--rule", str(pool / "rule.json"), "--budget", "20") == 0
    table, rule = ScoreTable.read(pool / "scores.parquet"), load_rule(str(pool / "rule.json"))
    decided = pq.read_table(pool / "subset.jsonl.decisions.parquet").to_pydict()
    taken = chosen(pool)
    assert np.flatnonzero(decided["taken"]).tolist() == taken and decided["id"] == table.id
    weights = quality_weights(table, rule, budget=20).weights
    np.testing.assert_allclose(decided["probability"], 20 * weights, rtol=1e-9)
    reward = table.values["reward"]
    np.testing.assert_allclose(decided["contribution_reward"], -0.01 * (reward - reward.mean()), atol=1e-12)
    np.testing.assert_allclose(decided["predicted_log_loss"], rule.predict(table))
    out = " ".join(explained(capsys, taken[0], pool / "subset.jsonl").split())
    assert out.startswith(f"row {taken[0]} of the pool, counted from 0, source pool, id {table.id[taken[0]]}")
    assert "It was taken." in out and f"probability {decided['probability'][taken[0]]:.3g}" in out
    other = next(row for row in range(N) if row not in taken)
    out = " ".join(explained(capsys, table.id[other], pool / "subset.jsonl.decisions.parquet").split())
    assert (
        out.startswith(f"row {other} of the pool")
        and table.id[other] in out
        and "It was not taken: the draw did not" in out
    )
    assert f"{decided['contribution_reward'][other]:+.4f}" in out and "reward" in out


def test_a_number_counts_rows_of_the_pool_and_a_taken_row_is_found_in_the_subset(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else who counts lines of the subset reads of another row, and does not notice."""
    assert select(pool, "--rule", str(pool / "rule.json"), "--budget", "20") == 0
    lines = (pool / "subset.jsonl").read_text(encoding="utf-8").splitlines()
    for place, row in enumerate(chosen(pool), 1):
        out = " ".join(explained(capsys, row, pool / "subset.jsonl").split())
        assert f"row {row} of the pool, counted from 0" in out
        assert f"It is number {place} of the rows in subset.jsonl, counted from 1." in out
        assert json.loads(lines[place - 1])["extra"]["kept"] == row


def test_a_row_by_its_words(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a person has before them is the text; numbers are for programs."""
    assert select(pool, "--by", "reward", "--keep", "0.5") == 0
    subset = str(pool / "subset.jsonl")
    capsys.readouterr()
    assert main(["explain", subset, "--text", "say  41."]) == 0
    out = capsys.readouterr().out
    assert out == explained(capsys, 41, pool / "subset.jsonl") and out.startswith("row 41 of the pool")
    assert main(["explain", subset, "--text", "say 4"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "11 rows of the pool have this text; name one by its number:"
    assert shown[1:3] == ["row 4: Say 4.", "row 40: Say 40."] and shown[-1] == "and 1 more" and len(shown) == 12
    for words, cause in (
        ([subset, "--text", "sing"], "--text 'sing': no row of"),
        (["4", subset, "--text", "say 4"], "row, --text: one of them is needed and not both"),
        ([subset], "row, --text: one of them is needed and not both"),
        (
            [str(pool / "pool.jsonl"), "--text", "4"],
            "does not say which files the pool has (FileNotFoundError). Fix: name",
        ),
    ):
        assert main(["explain", *words]) == 2
        assert cause in capsys.readouterr().err
    (pool / "subset.jsonl.manifest.json").unlink()
    assert main(["explain", subset, "--text", "41.", "--data", str(pool / "pool.jsonl")]) == 0
    assert capsys.readouterr().out == out


def test_a_selection_by_a_column(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert select(pool, "--by", "reward", "--keep", "0.5") == 0
    assert chosen(pool) == list(range(N // 2, N)) and "30 of 60 rows, by" in capsys.readouterr().out
    manifest = json.loads((pool / "subset.jsonl.manifest.json").read_text())
    assert (manifest["method"], manifest["by"], manifest["keep"], manifest["quota"]) == ("by", "reward", 0.5, None)
    assert "It was not taken: others rank before it by reward." in explained(capsys, 3, pool / "subset.jsonl")
    assert select(pool, "--by", "reward:low", "--quota", "pool=4", "--group", "source") == 0
    assert chosen(pool) == [0, 1, 2, 3]
    assert "the quota of its source was full" in explained(capsys, 9, pool / "subset.jsonl")


def test_what_cannot_be_explained_is_named(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert select(pool, "--by", "reward", "--keep", "0.5") == 0
    file = str(pool / "subset.jsonl")
    for words, status, cause in (
        (["60", file], 2, "has no such row (its 60 rows end with row 59)"),
        (["first", file], 2, "it is neither the number of a row nor an id"),
        (["0" * 32, file], 2, "has no such row"),
        (["1", str(pool / "gone.parquet")], 2, "there is no such file"),
        (["1", str(pool / "scores.parquet")], 1, "it does not hold decisions (it has the columns row, id, source"),
        (["1", str(pool / "pool.jsonl")], 1, "it does not hold decisions"),
        (["1", str(pool)], 2, "there is no such file"),
    ):
        assert main(["explain", *words]) == status
        assert cause in capsys.readouterr().err


def test_decisions_of_something_else_are_not_replaced(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pool / "subset.jsonl.decisions.parquet"
    file.write_text("mine")
    assert select(pool, "--by", "reward", "--keep", "0.5") == 2
    assert file.read_text() == "mine" and "no decisions of a selection" in capsys.readouterr().err


def test_a_selection_that_was_interrupted_is_made_by_the_same_command(pool: Path, monkeypatch) -> None:
    """Without its manifest the subset passed for a file of the user's, and was not replaced."""
    asked = ["--rule", str(pool / "rule.json"), "--budget", "20"]
    assert select(pool, *asked, "--seed", "1") == 0

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for there in (True, False):  # an earlier subset, and none
        with monkeypatch.context() as patch:
            patch.setattr(Decisions, "write", stops)
            assert select(pool, *asked) == 130
        assert (pool / "subset.jsonl").exists() == there
        assert select(pool, *asked) == 0 and len(chosen(pool)) == 20
        for path in pool.glob("subset.jsonl*"):
            path.unlink()

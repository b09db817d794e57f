"""`im-lightning search` on the miniature playground: sets apart, real trials, replay after Ctrl-C, honest words."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flat_run import flat
from mini_demo import ols_rule

from im_lightning.cli import main
from im_lightning.commands import search
from im_lightning.errors import DataError, RequestError
from im_lightning.experiments.compare.statistics import ExampleSums, TwoWay
from im_lightning.experiments.demo.playground.pool import make_evaluation
from im_lightning.experiments.search import result as result_module
from im_lightning.experiments.search import run as search_module
from im_lightning.experiments.search.proposals import Point, Space, blendsearch, grid
from im_lightning.experiments.search.result import curve_words
from im_lightning.ledger.ledger import RunLedger

run = flat(search.run)


@pytest.fixture(scope="module")
def search_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third evaluation set, for searching."""
    from im_lightning.data.loading import write_rows

    path = tmp_path_factory.mktemp("search_set") / "search.jsonl"
    write_rows(path, make_evaluation("fit", 40, 77))
    return path


def request(finished: Any, search_set: Path, out: Path, **changes: Any) -> dict[str, Any]:
    folder = finished[0]
    return {
        "data": [str(folder / "pool.jsonl")], "eval_data": str(search_set),
        "report_data": str(folder / "evaluation" / "report.jsonl"), "model": str(folder / "base"),
        "rule": ols_rule(folder), "scores": str(folder / "scores.parquet"), "low": 12, "high": 60,
        "out": str(out), "budget_trials": 4, "grid": 3, "seeds": 2, "epochs": 1, "batch_size": 10,
        "learning_rate": 1e-3, "device": "cpu", "cache_dir": str(folder / "work" / "cache"), "force": True,
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def searched(finished: Any, search_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search; look, do not write."""
    out = tmp_path_factory.mktemp("search") / "out"
    assert run(**request(finished, search_set, out)) == 0
    return out


def test_the_search_leaves_its_parts(searched: Path) -> None:
    """Trials, the choice, the report by fresh seeds, the words and the plot are what a user came for."""
    value = json.loads((searched / "search.json").read_text())
    trials = value["trials"]
    assert len(trials) == 4 and len({t["size"] for t in trials}) == 4 and all(12 <= t["size"] <= 60 for t in trials)
    assert value["chosen"]["size"] == min(trials, key=lambda t: t["objective"])["size"]
    sizes = {row["size"] for row in value["report"]}
    assert {12, 27, 60} <= sizes and value["chosen"]["size"] in sizes
    assert all(len(row["report"]) == 2 for row in value["report"])
    text = " ".join((searched / "search.txt").read_text().split())
    assert "(chosen)" in text and "double descent" in text.lower() and "shares no row" in text
    assert (searched / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_trials_are_kept_out_of_refits_and_reported_by_other_seeds(searched: Path) -> None:
    """The seed that made a size look good must not be the one that reports it."""
    value = json.loads((searched / "search.json").read_text())
    records = {r.run_id: r for r in RunLedger(searched / "ledger").records()}
    assert {r.purpose for r in records.values()} == {"search"}
    reported = {i for row in value["report"] for i in row["run_ids"]}
    assert {records[i].seeds["training"] for i in reported} == {1, 2}
    assert {r.seeds["training"] for i, r in records.items() if i not in reported} == {0}
    assert all(set(r.evaluation) == {"search", "report"} for r in records.values())


def test_an_interrupted_search_goes_on_to_the_same_choice(
    finished, search_set: Path, searched: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Trials are hours: what is in the ledger is replayed, and the proposals after it are the same."""
    made: list[int] = []
    real = search_module.finetune

    def counting(data, *args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(data.choice.budget)
        return real(data, *args, **kwargs)

    monkeypatch.setattr(search_module, "finetune", counting)
    with pytest.raises(KeyboardInterrupt):
        run(**request(finished, search_set, tmp_path))
    assert len(RunLedger(tmp_path / "ledger").records("search")) == 2
    monkeypatch.setattr(search_module, "finetune", real)
    run(**request(finished, search_set, tmp_path))
    first, again = (json.loads((out / "search.json").read_text()) for out in (searched, tmp_path))
    assert again["trials"] == first["trials"] and again["chosen"] == first["chosen"]
    assert [row["report"] for row in again["report"]] == [row["report"] for row in first["report"]]
    assert "2 found in" in capsys.readouterr().err
    monkeypatch.setattr(search_module, "finetune", None)
    shutil.copytree(searched, tmp_path / "copy")
    run(**request(finished, search_set, tmp_path / "copy"))  # everything is there: nothing is trained


def test_a_picture_beside_an_empty_result_is_the_users(
    finished, search_set: Path, searched: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(searched, out)
    (out / "search.txt").unlink()
    (out / "search.json").write_text("")
    (out / "curve.png").write_bytes(b"\x89PNG mine")
    with pytest.raises(RequestError, match=r"curve\.png: this file exists, and is no plot of a search"):
        run(**request(finished, search_set, out))
    assert (out / "curve.png").read_bytes() == b"\x89PNG mine"
    (out / "curve.png").unlink()
    assert run(**request(finished, search_set, out)) == 0  # every run is in the ledger


def test_a_pool_that_was_scored_in_quarantine_can_be_searched(finished, search_set: Path, tmp_path: Path) -> None:
    """One bad row of fifty thousand, set aside when the pool was scored, must not end the loop here."""
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"instruction": "Say nothing."}\n' + (finished[0] / "pool.jsonl").read_text())
    asked = request(finished, search_set, tmp_path / "out", data=[str(pool)], method="grid", grid=2, seeds=1)
    with pytest.raises(DataError, match=r"pool\.jsonl:1: no response.*--on-bad-row quarantine"):
        run(**asked)
    assert run(**asked, on_bad_row="quarantine") == 0
    assert len(json.loads((tmp_path / "out" / "search.json").read_text())["report"]) == 2


def test_sets_that_share_rows_are_refused(finished, search_set: Path, tmp_path: Path) -> None:
    """A report on searched rows is the weakness of the paper's search."""
    mixed = tmp_path / "mixed.jsonl"
    report = (finished[0] / "evaluation" / "report.jsonl").read_text().splitlines(keepends=True)
    mixed.write_text("".join(report + search_set.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(RequestError, match=r"3 of its 35 rows are in the search set.*keep the two sets apart"):
        run(**request(finished, search_set, tmp_path, report_data=str(mixed)))
    again = [json.loads(line) for line in search_set.read_text().splitlines()[:3]]
    again = [{**row, "output": f"{row['output']} again"} for row in again]
    mixed.write_text("".join([*report, *(json.dumps(row) + "\n" for row in again)]))
    with pytest.raises(RequestError, match=r"3 of its 35 rows answer prompts of the search set.*keep the prompts"):
        run(**request(finished, search_set, tmp_path, report_data=str(mixed)))
    fit = str(finished[0] / "evaluation" / "fit.jsonl")
    with pytest.raises(RequestError, match=r"--report-data .*fitted on this very set.*--force"):
        run(**request(finished, search_set, tmp_path, report_data=fit))


def test_wrong_requests_are_named(finished, search_set: Path, tmp_path: Path) -> None:
    cases = [
        ({"method": "magic"}, r"--method: there is no 'magic'.*blendsearch, grid"),
        ({"objective": "hope"}, r"--objective: there is no 'hope'"),
        ({"low": 60, "high": 60}, r"60 to 60 rows is no range"),
        ({"high": 640}, r"--high 640: the pool has 640 rows to draw from.*at most 639"),
        ({"grid": 1}, r"--grid: it is 1"),
        ({"seeds": 0}, r"--seeds: it is 0"),
        ({"seed": -1}, r"--seed: it is -1"),
        ({"budget_trials": 0}, r"--budget-trials: it is 0"),
        ({"epochs": -1}, r"--epochs: it is -1\. Fix: give 1 or more"),
        ({"accumulate": 0}, r"--accumulate: it is 0"),
        ({"batch_size": 0}, r"--batch-size: it is 0"),
        ({"strength_range": "1,0.5"}, r"--strength-range: 1 to 0.5 is no range"),
        ({"strength_range": "much"}, r"--strength-range: 'much' is not two numbers"),
        ({"strength_range": "0.3,1", "weighting": "softmax"}, r"--strength-range: weighting softmax has no strength"),
        ({"temperature_range": "0.3,1"}, r"--temperature-range: weighting auto may have no temperature"),
        ({"method": "grid", "strength_range": "0.3,1"}, r"--strength-range: a grid is of sizes, drawn at strength 1"),
        ({"method": "grid", "temperature_range": "0.3,1"}, r"--temperature-range: a grid is of sizes"),
        ({"mixture": "mix.json"}, r"--mixture: a search draws by the rule's weights alone.*compare with the arm mix"),
    ]
    for changes, text in cases:
        with pytest.raises(RequestError, match=text):
            run(**request(finished, search_set, tmp_path, **changes))


def test_without_flaml_there_is_the_grid(finished, search_set: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The extra is optional: its absence must name the command that mends it, and the grid must work without it."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "flaml":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=r"No module named 'flaml'.*pip install 'im-lightning\[search\]'"):
        run(**request(finished, search_set, tmp_path / "a"))
    again = request(finished, search_set, tmp_path / "b", method="grid", grid=2, seeds=1, objective="predicted")
    run(**again)
    shown = capsys.readouterr()
    assert "predicted log loss" in shown.out and "cannot see a best one" in " ".join(shown.out.split())
    assert "One seed per size has no interval" in shown.out


def test_blendsearch_is_a_function_of_the_losses() -> None:
    """Replay after an interrupt rests on this; and it must find a plain minimum better than its first trial."""
    space = Space(64, 4096, strength=(0.2, 1.0))

    def loss(point: Point) -> float:
        return (np.log(point.size) - np.log(700)) ** 2 + (point.strength - 0.6) ** 2

    first = list(blendsearch(space, 14, 5, loss))
    assert first == list(blendsearch(space, 14, 5, loss))
    assert len({point for point, _ in first}) == 14 and first[0][0].size == 64
    assert all(64 <= p.size <= 4096 and 0.2 <= p.strength <= 1.0 for p, _ in first)
    assert min(value for _, value in first) < 0.5 * first[0][1]
    few = list(blendsearch(Space(3, 5), 50, 0, lambda point: float(point.size)))  # a range of three sizes is used up
    assert 2 <= len(few) <= 3


def test_the_grid_is_logarithmic() -> None:
    assert [p.size for p in grid(Space(256, 4096), 5)] == [256, 512, 1024, 2048, 4096]
    assert [p.size for p in grid(Space(2, 4), 9)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("means", "words"),
    [
        ([2.5, 2.7, 2.4], "Double descent is shown: the loss rises from 10 to 20 rows and falls again to 40."),
        ([2.7, 2.4, 2.6], "The loss falls from 10 to 20 rows and rises to 40"),
        ([2.7, 2.6, 2.4], "the loss falls with the number of rows; double descent is not shown."),
        ([2.5, 2.5, 2.5], "No difference between the sizes is shown; double descent is not shown."),
    ],
)
def test_the_curve_is_described_only_as_far_as_it_is_shown(means: list[float], words: str) -> None:
    """The paper reads double descent off single runs; noise has peaks too."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 30, 120)
    shared = rng.normal(0, 0.3, (4, 120))
    sums = {
        str(s): (m + shared + rng.normal(0, 0.05, (4, 120))) * tokens for s, m in zip((10, 20, 40), means, strict=True)
    }
    assert words in curve_words([10, 20, 40], ExampleSums(sums, tokens))
    one = ExampleSums({name: values[:1] for name, values in sums.items()}, tokens)
    assert "nothing is said" in curve_words([10, 20, 40], one)


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ({1: -0.1, 90: 0.1}, "The loss falls from 10 to 20 rows and rises from 40 to 80: more rows are not better"),
        (
            {1: 0.1, 90: -0.1},
            "Double descent is shown: the loss rises from 10 to 20 rows and falls again from 40 to 80.",
        ),
        ({9: 0.1, 100: -0.1}, "Some sizes have a lower loss than smaller ones, and some a higher one; double descent"),
    ],
)
def test_a_curve_that_falls_and_rises_elsewhere_is_not_called_falling(
    differences: dict[int, float], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falls and rises that share no size: the rise was left out, and more rows looked better throughout."""

    def shown(sums: Any, tokens: Any) -> TwoWay:
        found = differences.get(round(float(sums[0, 0])), 0.0)
        return TwoWay(found, 0.01, 1.0, 0.02, 0.001 if found else 1.0)

    monkeypatch.setattr(result_module, "two_way_bootstrap", shown)
    sums = {str(s): np.full((2, 1), float(v)) for s, v in zip((10, 20, 40, 80), (0, 1, 10, 100), strict=True)}
    assert words in curve_words([10, 20, 40, 80], ExampleSums(sums, np.ones(1, dtype=np.int64)))


def test_the_command_line_reads_it(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["search", "--help"])
    assert stopped.value.code == 0 and "--budget-trials" in capsys.readouterr().out

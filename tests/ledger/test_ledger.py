"""The ledger is what a rule is fitted on: a lost, torn or mistaken run would change it unseen."""

from __future__ import annotations

import json
import math
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from simulated_ledger import make_record, simulate

from im_lightning.errors import DataError, RequestError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord, new_run_id, now


def test_round_trip_keeps_everything(tmp_path):
    record = make_record(3, note="ünïcode", seeds={"training": 1}, seconds=1.5, weights={"ess": 12.5})
    ledger = RunLedger(tmp_path / "runs")
    path = ledger.add(record)
    assert path == tmp_path / "runs" / "run-003.json"
    assert ledger.records() == [record]


def test_missing_means_are_null_in_the_file_and_nan_in_memory(tmp_path):
    ledger = RunLedger(tmp_path)
    path = ledger.add(make_record(0, phi={"ppl": math.nan, "reward": np.float32(0.5)}))
    assert "NaN" not in path.read_text()
    means = ledger.records()[0].phi_means
    assert math.isnan(means["ppl"])
    assert means["reward"] == 0.5


def test_numpy_values_are_written_as_plain_json(tmp_path):
    ledger = RunLedger(tmp_path)
    record = make_record(0, tokens=np.int64(7), weights={"size": np.int32(3), "shares": np.ones(2)})
    ledger.add(record)
    got = ledger.records()[0]
    assert (got.tokens, got.weights["size"], got.weights["shares"]) == (7, 3, [1.0, 1.0])


def test_an_odd_value_does_not_lose_the_run(tmp_path):
    ledger = RunLedger(tmp_path)
    ledger.add(make_record(0, loggers={"csv": tmp_path, "dtype": np.dtype("float32")}, seconds=math.inf))
    got = ledger.records()[0]
    assert math.isnan(got.seconds)
    assert got.loggers == {"csv": str(tmp_path), "dtype": "float32"}


def test_reading_makes_no_folder_and_a_file_is_no_ledger(tmp_path):
    assert RunLedger(tmp_path / "absent").records() == []
    assert not (tmp_path / "absent").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"it is a file, and a ledger is a folder. Fix: name the ledger"):
        RunLedger(tmp_path / "file")


def test_order_is_by_time_across_offsets_then_id(tmp_path):
    ledger = RunLedger(tmp_path)
    times = {
        "d": "2026-01-01T12:00:00Z", "a": "2026-01-01T12:30:00+02:00", "c": "2026-01-01T12:00:00", "b": "2025-12-31",
    }  # fmt: skip
    for run_id, created in times.items():
        ledger.add(make_record(run_id=run_id, created=created))
    assert [r.run_id for r in ledger.records()] == ["b", "a", "c", "d"]


def test_filters(tmp_path):
    ledger = RunLedger(tmp_path)
    ledger.add(make_record(0))
    ledger.add(make_record(1, purpose="weighted"))
    ledger.add(make_record(2, purpose="search"))
    ledger.add(make_record(3, status="failed", evaluation={}))
    assert [r.run_id for r in ledger.records()] == ["run-000", "run-001", "run-002"]
    assert [r.run_id for r in ledger.records("designed", status=None)] == ["run-000", "run-003"]
    assert [r.run_id for r in ledger.records(("designed", "weighted"))] == ["run-000", "run-001"]


def test_a_complete_run_is_not_overwritten_by_another(tmp_path):
    """Two runs under one id would silently become one; a run that was cut short may be finished."""
    ledger = RunLedger(tmp_path)
    ledger.add(make_record(0, status="incomplete", evaluation={}))
    ledger.add(make_record(0))
    ledger.add(make_record(0))  # the same again: nothing is lost
    with pytest.raises(RequestError, match=r"run-000.json: the ledger already has another complete run of this id"):
        ledger.add(make_record(0, loss=9.0))
    ledger.add(make_record(0, loss=9.0), replace=True)
    assert ledger.records()[0].loss("held-out") == 9.0


def test_many_threads_lose_nothing_and_readers_see_whole_files(tmp_path):
    ledger = RunLedger(tmp_path)
    done = threading.Event()
    seen: list[str] = []

    def read() -> None:
        while not done.is_set():
            reader = RunLedger(tmp_path)
            reader.records(status=None)
            seen.extend(name for name, _ in reader.rejected)

    watcher = threading.Thread(target=read)
    watcher.start()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda k: [ledger.add(make_record(16 * k + i)) for i in range(8)], range(16)))
    done.set()
    watcher.join()
    assert seen == []
    assert len(ledger.records()) == 128
    assert not [f for f in tmp_path.iterdir() if f.suffix != ".json"]


def _write_some(path: str, worker: int) -> None:
    for i in range(8):
        record = make_record(i, run_id=f"w{worker}-{i}")
        ledger = RunLedger(path)
        ledger.add(record)
        ledger.add_losses(record.run_id, "e", [f"x{i}"], [float(worker)], [1])


def test_many_processes_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_some, args=(str(tmp_path), w)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    ledger = RunLedger(tmp_path)
    assert {r.run_id for r in ledger.records()} == {f"w{w}-{i}" for w in range(4) for i in range(8)}
    assert ledger.losses("w3-5")["e"].sums.tolist() == [3.0]


def test_torn_and_invalid_files_are_set_aside_and_named(tmp_path, capsys):
    ledger = RunLedger(tmp_path)
    whole = ledger.add(make_record(0)).read_text()
    (tmp_path / "torn.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "bytes.json").write_bytes(whole.encode().replace(b"designed", b"d\xff"))
    (tmp_path / "wrong.json").write_text(whole.replace('"purpose": "designed"', '"purpose": "guess"'))
    assert [r.run_id for r in ledger.records()] == ["run-000"]
    assert [name for name, _ in ledger.rejected] == ["bytes.json", "torn.json", "wrong.json"]
    said = capsys.readouterr().err
    assert "torn.json: it is not whole JSON" in said
    assert "set aside as torn.json.rejected" in said
    assert "wrong.json: the field purpose is 'guess'; it must be one of designed, weighted" in said
    assert (tmp_path / "torn.json.rejected").exists()
    assert not (tmp_path / "torn.json").exists()
    assert ledger.records() and ledger.rejected == []


def test_foreign_and_newer_files_are_named_and_left_where_they_are(tmp_path, capsys):
    """`im-lightning runs .` in a project folder must not rename package.json, nor an old version a newer one's runs."""
    ledger = RunLedger(tmp_path)
    value = make_record(1).to_json()
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "pool.json").write_text('{"instruction": "a", "output": "b"}\n' * 2)  # JSON Lines, as many name them
    (tmp_path / "runs.json").write_text(2 * (json.dumps(value) + "\n"))
    (tmp_path / "tsconfig.json").write_text('{"a": 1,  // why\n}')
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "run-001.json").write_text(json.dumps({**value, "schema_version": 2}))
    (tmp_path / "copy of run.json").write_text(json.dumps(value))
    ledger.add(make_record(0))
    for _ in range(2):
        assert [r.run_id for r in ledger.records()] == ["run-000"]
    assert sorted(name for name, _ in ledger.rejected) == [
        "copy of run.json", "empty.json", "latin.json", "list.json", "package.json", "pool.json", "run-001.json",
        "runs.json", "tsconfig.json",
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert said.count("package.json") == 1  # named once, not at every reading
    assert "package.json: it is not a run record" in said
    assert "its schema_version is 2, and this version of im-lightning reads 1" in said
    assert "it holds the run run-001, which belongs in run-001.json" in said
    assert not list(tmp_path.glob("*.rejected"))


def test_rules_beside_the_runs_are_no_runs(tmp_path, capsys):
    from im_lightning.rule.published import published_rule

    ledger = RunLedger(tmp_path)
    ledger.add(make_record(0))
    published_rule("instructmining-v1").save(tmp_path / "rule.json")
    published_rule("instructmining-v1").save(tmp_path / "another.json")
    assert len(ledger.records()) == 1
    assert ledger.rejected == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run_id": "a/b"}, "the field run_id is 'a/b'; it must be letters, digits"),
        ({"run_id": "rule"}, "the field run_id is 'rule'"),
        ({"status": "done"}, "the field status is 'done'; it must be one of complete, incomplete, failed"),
        ({"purpose": "x"}, "the field purpose is 'x'"),
        ({"created": "yesterday"}, "the field created is 'yesterday'; it must be an ISO 8601 time"),
        ({"tokens": -1}, "the field tokens is -1; it must be a count"),
        ({"tokens": "12"}, "the field tokens is '12'"),
        ({"evaluation": {}}, "the field evaluation is {}; it must be at least one set on a complete run"),
        ({"evaluation": {"e": {"loss": "low"}}}, "the field evaluation.e.loss is 'low'; it must be a number or null"),
        ({"phi_means": {"ppl": "x"}}, "the field phi_means.ppl is 'x'; it must be a number or null"),
        ({"weights": []}, "the field weights is []; it must be an object with string keys"),
        ({"keys": {"ppl": 3}}, "the field keys.ppl is 3; it must be an object"),
        ({"note": None}, "the field note is None; it must be a string"),
        ({"seconds": "1"}, "the field seconds is '1'; it must be a number or null"),
    ],
)
def test_a_wrong_field_is_named_before_anything_is_written(tmp_path, changes, says):
    ledger = RunLedger(tmp_path)
    with pytest.raises(DataError) as error:
        ledger.add(make_record(0, **changes))
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_field_is_named():
    value = make_record(0).to_json()
    del value["created"]
    with pytest.raises(DataError, match=r"x.json: the field created is missing"):
        RunRecord.from_json(value, "x.json")


def test_losses_per_example_by_set(tmp_path):
    ledger = RunLedger(tmp_path)
    ledger.add_losses("r", "a", ["x", "y", "x"], [1.0, 2.0, 3.0], [4, 5, 6])
    ledger.add_losses("r", "b", ["z"], [7.0], [8])
    ledger.add_losses("r", "a", ["x", "y"], [1.5, 2.5], [4, 5])  # measured again: replaces
    got = ledger.losses("r")
    assert set(got) == {"a", "b"}
    assert got["a"].ids == ["x", "y"]
    np.testing.assert_array_equal(got["a"].sums, [1.5, 2.5])
    assert got["b"].counts.dtype == np.int64
    assert ledger.records() == []


def test_losses_with_and_without_the_edges_of_answers_in_one_file(tmp_path):
    """A set whose module does not tell them apart, before or after one that does, keeps none, not zeros."""
    ledger = RunLedger(tmp_path)
    ledger.add_losses("r", "plain", ["x"], [1.0], [4])
    assert ledger.losses("r")["plain"].edge_sums is None
    ledger.add_losses("r", "edges", ["y", "z"], [2.0, 3.0], [5, 6], [0.5, 0.25], [2, 1])
    ledger.add_losses("r", "after", ["x"], [1.0], [4])
    got = ledger.losses("r")
    assert got["edges"].edge_sums.tolist() == [0.5, 0.25] and got["edges"].edge_counts.tolist() == [2, 1]
    assert got["edges"].edge_counts.dtype == np.int64
    assert got["plain"].edge_sums is None and got["after"].edge_counts is None


def test_losses_that_do_not_fit_are_refused(tmp_path):
    ledger = RunLedger(tmp_path)
    with pytest.raises(RequestError, match="losses of run r: 1 ids, 1 sums, 1 counts and 2 edge_sums"):
        ledger.add_losses("r", "a", ["x"], [1.0], [1], [1.0, 2.0])
    with pytest.raises(RequestError, match="losses of run r: 2 ids, 1 sums and 2 counts"):
        ledger.add_losses("r", "a", ["x", "y"], [1.0], [1, 2])
    with pytest.raises(RequestError, match="this run has no per-example losses"):
        ledger.losses("r")
    (tmp_path / "r.losses.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match="it is not a file of losses"):
        ledger.losses("r")


def test_digest_knows_the_runs_and_not_their_order():
    """A rule says which runs it was fitted on; a changed loss must change that."""
    records = simulate(5)
    assert RunLedger.digest(records) == RunLedger.digest(records[::-1])
    assert RunLedger.digest(records) != RunLedger.digest(records[:4])
    changed = [*records[:4], make_record(4, loss=1.0)]
    assert RunLedger.digest(records) != RunLedger.digest(changed)


def test_run_ids_are_valid_and_differ():
    ids = {new_run_id() for _ in range(50)}
    assert len(ids) == 50
    make_record(run_id=ids.pop(), created=now()).validate()

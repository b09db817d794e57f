"""`ScoreTable`: the file between `score` and everything after it; a lost reason or identity is a silent wrong rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from im_lightning._utils.hashing import digest_strings
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import DataError, InstructMiningError, RequestError

NAN = float("nan")


def table() -> ScoreTable:
    return ScoreTable(
        row=[0, 1, 2, 3],
        id=["a", "b", "a", "c"],
        source=["x", "y", "x", "é"],
        values={"ppl": np.array([1.5, NAN, 1 / 3, NAN]), "length_output": [3, 0, 5, 1]},
        reasons={"ppl": [None, "empty response", None, "empty response"]},
        keys={"ppl": {"identity": {"indicator": "ppl", "model": {"weights": "9f"}}, "numerics": {"precision": "fp32"}}},
        meta={"data": ["pool.jsonl"]},
    )


def same(a: ScoreTable, b: ScoreTable) -> bool:
    return (
        (a.row.tolist(), a.id, a.source, a.reasons, a.keys, a.meta)
        == (b.row.tolist(), b.id, b.source, b.reasons, b.keys, b.meta)
        and list(a.values) == list(b.values)
        and all(np.array_equal(a.values[n], b.values[n], equal_nan=True) for n in a.values)
    )


def test_round_trip_is_exact(tmp_path: Path):
    """Floats to the last bit, reasons, identities: what `fit` reads is what `score` computed."""
    full = table().with_values("predicted_log_loss", [0.1, NAN, 0.3, 0.4], [None, "no ppl", None, None])
    full.write(tmp_path / "scores.parquet")
    assert same(ScoreTable.read(tmp_path / "scores.parquet"), full)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["scores.parquet"]


def test_columns_of_the_file(tmp_path: Path):
    """Other tools read the Parquet file: the columns are those documented, reasons only where values are missing."""
    full = table().with_values("predicted_log_loss", [0.1, 0.2, 0.3, 0.4]).with_values("mtld", [1, 2, 3, 4])
    full.write(tmp_path / "scores.parquet")
    frame = pq.read_table(tmp_path / "scores.parquet")
    assert frame.column_names == [
        "row",
        "id",
        "source",
        "ppl",
        "length_output",
        "mtld",
        "predicted_log_loss",
        "ppl_reason",
    ]
    assert [str(t) for t in frame.schema.types] == ["int64", "string", "string", *["double"] * 4, "string"]
    assert frame["ppl_reason"].to_pylist() == [None, "empty response", None, "empty response"]


def test_predictions_are_no_indicator():
    """A refit on the rule's own predictions would look perfect."""
    full = table()
    assert full.predicted_log_loss is None
    full = full.with_values("predicted_log_loss", [1, 2, 3, 4])
    assert full.indicators == ["ppl", "length_output"] and full.predicted_log_loss.tolist() == [1, 2, 3, 4]
    assert [entry["indicator"] for entry in full.coverage()] == ["ppl", "length_output"]


def test_coverage_counts_reasons():
    """The person sees how many rows a rule cannot judge, and why."""
    assert table().coverage()[0] == {"indicator": "ppl", "rows": 4, "scored": 2, "missing": {"empty response": 2}}
    assert table().coverage()[1] == {"indicator": "length_output", "rows": 4, "scored": 4, "missing": {}}


def test_reasons_follow_the_values():
    """NaN never stands without a reason, a value never with one."""
    t = ScoreTable([0, 1], ["a", "b"], ["", ""], {"x": [NAN, 1]}, {"x": [None, "stale"]})
    assert t.reasons["x"] == ["no reason was recorded", None]


def test_take_and_with_values_leave_the_table_alone():
    """Subsets keep their pool's row numbers, in the order asked for."""
    full = table()
    part = full.take([3, 0, 0])
    assert part.row.tolist() == [3, 0, 0] and part.id == ["c", "a", "a"] and part.keys == full.keys
    assert part.reasons["ppl"] == ["empty response", None, None]
    assert full.take(np.array([True, False, False, True])).row.tolist() == [0, 3]
    assert len(full.take([])) == 0 and full.take([]).matrix(["ppl"]).shape == (0, 1)
    more = full.with_values("ppl", [1, 2, 3, 4], key={"identity": {"v": 2}, "numerics": {}})
    assert same(full, table()) and more.keys["ppl"]["identity"] == {"v": 2} and more.reasons["ppl"] == [None] * 4
    assert full.with_values("ppl", [1, 2, 3, 4]).keys == {}  # another column must not inherit the old identity


def test_pool_digest_is_that_of_the_ids_in_order():
    """Pool-dependent values are keyed by it."""
    assert table().pool_digest == digest_strings(["a", "b", "a", "c"]) != table().take([1, 0, 2, 3]).pool_digest


def test_matrix():
    """Columns in the order asked for; an absent one is named with the command that makes it."""
    assert np.array_equal(table().matrix(["length_output", "ppl"])[:, 0], [3, 0, 5, 1])
    assert table().matrix([]).shape == (4, 0)
    with pytest.raises(RequestError) as caught:
        table().matrix(["ppl", "mtld"])
    assert str(caught.value) == (
        "the score table: has no mtld (it has ppl, length_output). Fix: score the data for them: "
        "im-lightning score DATA --model MODEL --indicators ppl,mtld --out scores.parquet."
    )


def test_odd_sources_are_written(tmp_path: Path):
    """One row whose source is not valid Unicode must not lose a night's scores."""
    ScoreTable([0], ["a"], ["\ud800"], {}).write(tmp_path / "s.parquet")
    assert ScoreTable.read(tmp_path / "s.parquet").source == ["?"]


def test_wrong_columns():
    """Columns that do not line up would score one row with another's values."""
    with pytest.raises(RequestError, match=r"column 'ppl': it has 2 entries for 1 rows. Fix: give one entry per row"):
        ScoreTable([0], ["a"], [""], {"ppl": [1, 2]})
    with pytest.raises(RequestError, match=r"column 'id': it has 2 entries for 1 rows"):
        ScoreTable([0], ["a", "b"], [""], {})
    with pytest.raises(RequestError, match=r"column 'reasons of ppl': it has 1 entries for 2 rows"):
        ScoreTable([0, 1], ["a", "b"], ["", ""], {"ppl": [NAN, 1]}, {"ppl": ["x"]})
    for name in ("row", "ppl_reason", ""):
        with pytest.raises(RequestError, match=rf"column '{name}': a column of scores cannot have this name"):
            ScoreTable([0], ["a"], [""], {name: [1]})


def test_files_that_are_no_score_table(tmp_path: Path):
    """Missing, torn, foreign and future files are told apart, each with what to do."""
    path = tmp_path / "scores.parquet"
    with pytest.raises(RequestError, match=r"scores.parquet: there is no such score table. Fix: score the data"):
        ScoreTable.read(path)
    with pytest.raises(RequestError, match=r"scores.csv: a score table is a Parquet file. Fix: end its name"):
        table().write(tmp_path / "scores.csv")
    table().write(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"scores.parquet: is torn or not Parquet \(.*Fix: score the data again"):
        ScoreTable.read(path)
    foreign = [pa.table({"a": [1]}), pa.table({"row": [0], "id": ["a"], "source": ["x"], "ppl": [1.0]})]
    described = {b"im_lightning": json.dumps({"version": 1, "scores": ["ppl"], "keys": {}, "meta": {}}).encode()}
    foreign.append(foreign[0].replace_schema_metadata(described))
    foreign.append(foreign[1].replace_schema_metadata({b"im_lightning": b"not json"}))
    foreign.append(pa.table({**{n: foreign[1][n] for n in ("row", "id", "source")}, "ppl": ["x"]}, metadata=described))
    for other in foreign:
        pq.write_table(other, path)
        with pytest.raises(
            DataError, match=r"is Parquet but no score table of im_lightning. Fix: score the data again"
        ):
            ScoreTable.read(path)
    later = {b"im_lightning": json.dumps({"version": 2, "scores": [], "keys": {}, "meta": {}}).encode()}
    pq.write_table(foreign[1].replace_schema_metadata(later), path)
    with pytest.raises(DataError, match=r"was written by a later version \(2\)"):
        ScoreTable.read(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InstructMiningError, match=r"cannot be written"):
        table().write(tmp_path / "file" / "scores.parquet")

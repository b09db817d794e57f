"""If these failed, another tool's scores would land on the wrong rows, or vanish without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from im_lightning import join_external
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import DataError, RequestError

IDS = [f"{i:032x}" for i in (1, 2, 3, 1)]  # the last row is a duplicate of the first


def table() -> ScoreTable:
    return ScoreTable(np.arange(4), IDS, ["a"] * 4, {"ppl": np.arange(1.0, 5.0)})


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_by_id_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(
        tmp_path / "judge.jsonl",
        {"id": IDS[2], "helpful": 3, "comment": "good"}, {"id": "ff", "helpful": 9.5}, {"id": IDS[0], "helpful": 1.5},
    )  # fmt: skip
    joined = join_external(table(), file)
    np.testing.assert_array_equal(joined.values["helpful"], [1.5, np.nan, 3.0, 1.5])
    assert joined.reasons["helpful"] == [None, "not in judge.jsonl", None, None]
    identity = joined.keys["helpful"]["identity"]
    assert identity["external"]["column"] == "helpful" and len(identity["external"]["digest"]) == 32
    assert joined.indicators == ["ppl", "helpful"]
    said = capsys.readouterr().err
    assert (
        "helpful joined to 3 of 4 rows by id; 1 of its records are of no row; not numeric and left out: comment" in said
    )
    joined.write(tmp_path / "scores.parquet")  # and it is a column like any other
    again = ScoreTable.read(tmp_path / "scores.parquet")
    assert again.keys["helpful"]["identity"] == identity and again.reasons["helpful"][1] == "not in judge.jsonl"


def test_by_row_from_parquet_with_missing_values(tmp_path: Path) -> None:
    columns = {"row": [3, 0, 2], "a": [0.5, None, float("inf")], "b": [1, 2, 3], "t": ["x", "y", "z"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    joined = join_external(table(), tmp_path / "x.parquet")
    np.testing.assert_array_equal(joined.values["a"], [np.nan, np.nan, np.nan, 0.5])
    np.testing.assert_array_equal(joined.values["b"], [2, np.nan, 3, 1])
    assert joined.reasons["a"] == ["no value in x.parquet", "not in x.parquet", "not finite in x.parquet", None]
    only = join_external(table(), tmp_path / "x.parquet", columns=["b"])
    assert only.indicators == ["ppl", "b"]


def test_a_column_that_appears_late_keeps_its_rows(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"row": 0, "a": 1}, {"row": 1, "b": 2, "a": None}, {"row": 3, "a": 4})
    joined = join_external(table(), file)
    np.testing.assert_array_equal(joined.matrix(["a", "b"]), [[1, np.nan], [np.nan, 2], [np.nan, np.nan], [4, np.nan]])


def test_files_of_one_named_scorer_are_one_indicator(tmp_path: Path) -> None:
    """A rule fitted on one pool's scores must apply to another pool's by the same scorer, and to no other's."""
    one, two = (jsonl(tmp_path / f"{v}.jsonl", {"row": 0, "a": v}) for v in (1, 2))
    named = [join_external(table(), file, scorer="armorm-8b").keys["a"] for file in (one, two)]
    assert named[0] == named[1] and named[0]["identity"]["external"]["scorer"] == "armorm-8b"
    assert join_external(table(), one).keys["a"] != join_external(table(), two).keys["a"]


def test_the_same_example_twice_with_the_same_values_is_fine(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"id": IDS[0], "a": 1}, {"id": IDS[1], "a": 2}, {"id": IDS[0], "a": 1})
    np.testing.assert_array_equal(join_external(table(), file).values["a"], [1, 2, np.nan, 1])


@pytest.mark.parametrize(
    ("records", "text"),
    [
        (
            [{"id": IDS[0], "a": 1}, {"id": IDS[0], "a": 2}],
            rf"x.jsonl:2: id '{IDS[0]}' was there before, in line 1, with",
        ),
        ([{"id": IDS[0], "a": 1}, {"id": IDS[0]}], "was there before, in line 1, with other values"),
        ([{"row": 1, "a": 1}, {"row": 1, "a": 1}], r"x.jsonl:2: row 1 was there before, in line 1\..*one record per"),
        ([{"a": 1}], r"x.jsonl:1: it has neither id nor row.*an id \(the score table's\) or a row"),
        ([{"id": IDS[0], "a": 1}, {"row": 1, "a": 1}], "x.jsonl:2: it has no id"),
        ([{"id": 7, "a": 1}], "its id is 7, not a text"),
        ([{"row": 1.5, "a": 1}], "its row is 1.5, not a whole number"),
        ([{"row": True, "a": 1}], "its row is True"),
        ([{"row": -1, "a": 1}], "its row is -1"),
        ([[1, 2]], "x.jsonl:1: is a list and no record"),
        ([{"row": 0, "a": 1}, {"row": 1, "a": "high"}], r"column 'a' is to hold numbers, but .*x.jsonl:2 holds 'high'"),
        ([{"row": 0, "a": "0.5"}, {"row": 1, "a": 1}], r"column 'a' is to hold numbers, but .*x.jsonl:1 holds '0.5'"),
        ([{"row": 0, "a": [1.0, 2.0]}, {"row": 1, "a": 1}], r"x.jsonl:1 holds \[1.0, 2.0\]"),
        ([{"id": "mine-17", "a": 1}], "none of its 1 ids is one of the table's 4 rows.*column id"),
        ([{"row": 400, "a": 1}], "none of its 1 rows is one of the table's"),
        ([], "it holds no records"),
    ],
)
def test_hostile_files_are_refused_with_line_and_remedy(tmp_path: Path, records: list[Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        join_external(table(), jsonl(tmp_path / "x.jsonl", *records))


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_text('{"row": 0, "a": 1}\n{"row": 1, "a"')
    with pytest.raises(DataError, match=r"torn.jsonl:2: "):
        join_external(table(), tmp_path / "torn.jsonl")
    (tmp_path / "no.parquet").write_text("nothing")
    with pytest.raises(DataError, match="is not a readable Parquet file"):
        join_external(table(), tmp_path / "no.parquet")
    with pytest.raises(RequestError, match=r"none.jsonl: there is no such file.*\.parquet"):
        join_external(table(), tmp_path / "none.jsonl")
    (tmp_path / "x.csv").write_text("row,a\n0,1\n")
    with pytest.raises(RequestError, match="its kind cannot be told from its name"):
        join_external(table(), tmp_path / "x.csv")
    huge = tmp_path / "huge.jsonl"
    huge.write_text('{"row": 0, "a": ' + "9" * 400 + ', "b": 1}\n{"row": 1, "a": NaN}\n')
    assert join_external(table(), huge).reasons["a"][:2] == ["not finite in huge.jsonl", "no value in huge.jsonl"]


def test_columns_that_cannot_be_taken_are_named(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"row": 0, "ppl": 1, "my score": 2, "b": 3, "t": "x"})
    with pytest.raises(RequestError, match=r"column 'my score' cannot be an indicator's name.*--external-columns"):
        join_external(table(), file, columns=["my score"])
    with pytest.raises(RequestError, match=r"the score table has a column 'ppl' already.*rename it"):
        join_external(table(), file, columns=["ppl", "b"])
    with pytest.raises(RequestError, match=r"there is no c \(it has b\)"):
        join_external(table(), file, columns=["b", "c"])
    with pytest.raises(DataError, match="column 't' is to hold numbers"):
        join_external(table(), file, columns=["t"])
    with pytest.raises(RequestError, match="it has no column of numbers"):
        join_external(table(), jsonl(tmp_path / "y.jsonl", {"row": 0, "t": "x"}))


def test_the_index_of_a_data_frame_is_no_score(tmp_path: Path) -> None:
    """A frame that was filtered or sorted is written with its index: the places in the file were an indicator."""
    columns = {"row": [1, 2, 3], "grade": [2.0, 3.0, 4.0], "__index_level_0__": [1, 2, 3]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert join_external(table(), tmp_path / "x.parquet").indicators == ["ppl", "grade"]
    with pytest.raises(RequestError, match=r"there is no __index_level_0__ \(it has no column of numbers\)"):
        join_external(table(), tmp_path / "x.parquet", columns=["__index_level_0__"])

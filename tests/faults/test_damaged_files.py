"""Files that are torn, truncated, foreign or of another schema: named and set aside, or refused; never believed.

Every file of ours is damaged at many places. If these failed, a copied or half-written file would end in a traceback
that names nothing, or worse, in other numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from simulated_ledger import make_record

from im_lightning._utils.progress import Stages
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import DataError, InstructMiningError, RequestError
from im_lightning.experiments.answers.generation import _Kept
from im_lightning.experiments.sweep import merged, trial
from im_lightning.indicators.transforms import Transform
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.weights.quality_weights import RowWeights
from im_lightning.scoring.passes import targets
from im_lightning.scoring.store import Join, Store
from im_lightning.training.run import run_folder as frozen
from im_lightning.training.run.run_folder import RunInputs, freeze, keep_subset, read_subset, thaw

NUMERICS = {"precision": "fp32"}
IDS = [f"{i:032x}" for i in range(50)]
VALUES = np.random.default_rng(0).normal(size=50)
TRUNCATIONS, FLIPS = 25, 60


def damaged(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """The file truncated and with one bit flipped at many places, and other files under its name."""
    rng = random.Random(0)
    for at in [0, 1, len(whole) - 2, *(rng.randrange(len(whole) - 1) for _ in range(TRUNCATIONS - 3))]:
        yield f"truncated to {at}", whole[:at]
    for _ in range(FLIPS):
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        changed = bytearray(whole)
        changed[at] ^= 1 << bit
        yield f"bit {bit} of byte {at} flipped", bytes(changed)
    yield "zeros", bytes(len(whole))
    for text in ("", "[]", "null", "3", '"text"', "{}", '{"a": [1', "<html>", "[" * 100_000, "\ud800"):
        yield f"replaced by {text[:9]!r}", text.encode("utf-8", "surrogatepass")


def foreign_parquet(path: Path) -> Iterator[tuple[str, bytes]]:
    """Tables of other schemas under the file's name, with its own metadata, so that only the columns tell."""
    table = pq.read_table(path)
    other = {
        "strings": pa.array(["x"] * len(table)),
        "nulls": pa.nulls(len(table)),
        "lists": pa.array([[1]] * len(table)),
    }
    for name in table.column_names:
        yield f"without {name}", written(table.drop_columns([name]))
        for kind, column in other.items():
            at = table.column_names.index(name)
            if column.type == table.column(at).type:
                continue  # then only the content is another, which is no damage that a reader could see
            yield f"{name} holds {kind}", written(table.set_column(at, name, column))
    yield "no metadata", written(table.replace_schema_metadata(None))
    for text in ("", "[]", "3", '{"digest": 3}', "{", "\xff"):
        yield f"metadata {text!r}", written(table.replace_schema_metadata({b"im_lightning": text.encode("latin-1")}))
    yield "no rows", written(table.slice(0, 0))


def written(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_store_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part is used as it was written, or set aside and named; the other parts are used in any case."""
    store = Store(tmp_path, "ppl", {"indicator": "ppl"}, NUMERICS)
    store.append(IDS, VALUES, [None] * 50)
    (path,) = store.folder.glob("part-*")
    whole = path.read_bytes()
    store.append(["other"], np.array([7.0]), [None])
    asked = Join(pa.array([*IDS, "other"]))
    tried = 0
    for what, content in [*damaged(whole), *foreign_parquet(path)]:
        path.write_bytes(content)
        column = store.lookup(asked)
        assert column.present[50] and column.values[50] == 7.0, what
        known = column.present[:50]
        np.testing.assert_array_equal(column.values[:50][known], VALUES[known], err_msg=what)
        if path.exists():
            assert known.all() or what == "no rows", f"{what}: neither used nor set aside"
        else:
            assert not known.any() and f"set aside as {path.name}.rejected" in capsys.readouterr().err, what
            path.with_name(f"{path.name}.rejected").unlink()
        tried += 1
    assert tried > 100


def test_store_vectors(tmp_path: Path) -> None:
    store = Store(tmp_path, "embedding", {"e": 1}, NUMERICS)
    vectors = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    store.append_vectors(IDS, vectors)
    (path,) = store.folder.glob("part-*")
    whole = path.read_bytes()
    for what, content in [*damaged(whole), *foreign_parquet(path)]:
        path.write_bytes(content)
        found = store.lookup_vectors(Join(pa.array(IDS)))
        if found.present.any():
            np.testing.assert_array_equal(found.vectors[found.present], vectors[found.present], err_msg=what)
        assert path.exists() == found.present.all() or what == "no rows", what


def test_finetunes_on_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of rows that come later are made by the update that is kept: a bit of it that flipped changes them all."""
    pairs = {f"layer.{k}": (torch.randn(2, 5), torch.randn(7, 2)) for k in range(3)}
    path = tmp_path / "update.safetensors"
    path.write_bytes(whole := targets._to_bytes(pairs))
    assert targets._sound(path) == whole and targets._sound(tmp_path / "none") is None
    tried = 0
    for what, content in damaged(whole):
        path.write_bytes(content)
        found = targets._sound(path)
        if found is not None:
            read = targets._from_bytes(found, torch.device("cpu"))
            assert read.keys() == pairs.keys(), what
            assert all(torch.equal(a, b) for name in pairs for a, b in zip(read[name], pairs[name], strict=True)), what
        else:
            assert f"set aside as {path.name}.rejected" in capsys.readouterr().err and not path.exists(), what
        tried += found is None
    assert tried > 70


def test_ledger_records(tmp_path: Path) -> None:
    """A torn record is set aside; one that still reads as a record of this run is one: JSON has no checksum."""
    ledger = RunLedger(tmp_path)
    path = ledger.add(make_record(0))
    whole = path.read_bytes()
    ledger.add(make_record(1))
    set_aside = 0
    for what, content in damaged(whole):
        path.write_bytes(content)
        records = RunLedger(tmp_path).records(status=None)
        assert make_record(1) in records and len(records) <= 2, what
        aside = path.with_name(path.name + ".rejected")
        if what.startswith("truncated"):  # what does not begin as a record may be anybody's, and stays
            assert aside.exists() == (b"im_lightning.run" in content) and path.exists() != aside.exists(), what
        set_aside += aside.exists()
        aside.unlink(missing_ok=True)
    assert set_aside > 40


def test_records_of_trials(tmp_path: Path) -> None:
    """A sweep goes on after a torn record: the trial is made again, or named where it cannot be."""
    ledger = RunLedger(tmp_path)
    record = make_record(0)
    path = ledger.add(record)
    for what, content in damaged(path.read_bytes()):
        path.write_bytes(content)
        for read in (
            lambda: trial._record(ledger, record.run_id),
            lambda: merged._record(str(tmp_path), record.run_id),
        ):
            try:
                found = read()
            except InstructMiningError as error:
                assert record.run_id in str(error), what
            else:
                assert found is None or isinstance(found, RunRecord), what
    path.write_bytes(b"")
    assert trial._record(ledger, record.run_id) is None
    with pytest.raises(RequestError, match=r"the run of a trial cannot be read .*restore it"):
        merged._record(str(tmp_path), record.run_id)


def test_times_of_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage of hours must not end in a traceback since a note of seconds is torn."""
    stages = Stages(tmp_path / "timings.json")
    with stages("scoring", "all rows"):
        pass
    for what, content in damaged(stages.path.read_bytes()):
        stages.path.write_bytes(content)
        with stages("runs", "all runs"):
            pass
        assert stages.total()["runs"] >= 0, what
    assert "timings.json: it does not hold the times of earlier calls; they are counted anew" in capsys.readouterr().err


def test_answers_in_the_making(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl.partial.jsonl"
    for text in ("[1]", "3", "null", '{"mine": 1}', "\x00"):
        path.write_text(text)
        with pytest.raises(RequestError, match="it is no file of answers in the making"):
            _Kept(path, "inputs").read()
        assert path.read_text() == text


def test_ledger_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Torn losses are refused by name; and a run that is made again replaces them rather than failing at its end."""
    ledger = RunLedger(tmp_path)
    path = ledger.add_losses("r", "a", IDS, VALUES.tolist(), list(range(50)))
    whole = path.read_bytes()
    refused = 0
    for what, content in [*damaged(whole), *foreign_parquet(path)]:
        path.write_bytes(content)
        try:
            losses = ledger.losses("r")
        except DataError as error:
            assert str(path) in str(error) and "it is not a file of losses" in str(error), what
            refused += 1
        else:
            for one in losses.values():
                assert one.sums.dtype == np.float64 and one.counts.dtype == np.int64, what
                np.testing.assert_array_equal(one.sums, VALUES, err_msg=what)
    assert refused > 80
    path.write_bytes(whole[:-30])
    ledger.add_losses("r", "b", ["x"], [1.0], [2])
    assert set(ledger.losses("r")) == {"b"} and path.with_name(f"{path.name}.rejected").exists()
    assert f"set aside as {path.name}.rejected" in capsys.readouterr().err


def test_score_tables(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    table = ScoreTable(range(50), IDS, ["s"] * 50, {"ppl": VALUES}, keys={"ppl": {"identity": {"indicator": "ppl"}}})
    table.write(path)
    refused = 0
    for what, content in [*damaged(path.read_bytes()), *foreign_parquet(path)]:
        path.write_bytes(content)
        try:
            found = ScoreTable.read(path)
        except (DataError, RequestError) as error:
            assert str(path) in str(error), what
            refused += 1
        else:
            same = np.array_equal(found.values["ppl"], VALUES) and found.id == IDS
            unknown = what == "ppl holds nulls" and np.isnan(found.values["ppl"]).all() and all(found.reasons["ppl"])
            assert same or unknown or what == "no rows", what
    assert refused > 80


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A frozen folder with all of its files."""
    table = ScoreTable(range(50), IDS, ["s"] * 50, {"ppl": VALUES}, keys={"ppl": {"identity": {"indicator": "ppl"}}})
    rule = LinearRule(
        name="made", intercept_=1.0, coef_=np.array([0.5]), feature_names_in_=["ppl"],
        transforms_={"ppl": Transform("identity", -3.0, 3.0)}, mean_=np.array([0.0]), cov_=np.eye(1), radius_=2.0,
        identities={"ppl": {"indicator": "ppl"}}, n_runs_=9,
    )  # fmt: skip
    path = tmp_path / "frozen"
    eligible = np.ones(50, dtype=bool)
    weights = RowWeights(eligible / 50, eligible, {"method": "tilt"})
    assert freeze(RunInputs(path, {"pool": {"rows": 50}}, table, rule, weights), IDS)
    keep_subset(path, {"kind": "fixed"}, np.arange(9), {"seed": 1})
    return path


@pytest.mark.parametrize("name", ["inputs.json", "rule.json", "weights.parquet", "table.parquet"])
def test_frozen_folders(folder: Path, name: str) -> None:
    """A resumed run must not go on with weights that are not the run's."""
    path = folder / name
    whole = path.read_bytes()
    refused = 0
    for what, content in [*damaged(whole), *(foreign_parquet(path) if path.suffix == ".parquet" else ())]:
        path.write_bytes(content)
        frozen._thaw.cache_clear()
        try:
            found = thaw(folder)
        except InstructMiningError as error:
            assert str(folder) in str(error) and "Fix" in str(error), what
            refused += 1
        else:
            weights = found.weights
            assert weights.weights.dtype == np.float64 and weights.eligible.dtype == bool, what
            if name == "weights.parquet":
                np.testing.assert_array_equal(weights.weights, np.full(50, 1 / 50), err_msg=what)
    assert refused > 30


def test_subset_files(folder: Path) -> None:
    (path,) = (folder / "subsets").iterdir()
    refused = 0
    for what, content in damaged(path.read_bytes()):
        path.write_bytes(content)
        try:
            found = read_subset(folder, {"kind": "fixed"})
        except DataError as error:
            assert str(path) in str(error), what
            refused += 1
        else:
            assert found is not None and found[0].dtype == np.int64, what
    assert refused > 40


def test_rule_files(folder: Path) -> None:
    """A damaged rule is refused by name, or is still a rule with finite coefficients."""
    path = folder / "rule.json"
    refused = 0
    for what, content in damaged(path.read_bytes()):
        path.write_bytes(content)
        try:
            rule = LinearRule.load(path)
        except InstructMiningError as error:
            assert str(path) in str(error) and "Fix" in str(error), what
            refused += 1
        else:
            assert np.isfinite(rule.coef_).all() and rule.coef_.shape == (len(rule.feature_names_in_),), what
    assert refused > 40

"""The score store: what was computed is found again, and nothing else is believed."""

from __future__ import annotations

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pools import make_pool

from im_lightning.errors import InstructMiningError
from im_lightning.scoring.store import Join, Store, check_writable

FP32, BF16 = {"precision": "fp32"}, {"precision": "bf16"}


def store(root: Path, numerics: dict[str, str] = FP32, **key: object) -> Store:
    return Store(root, "ppl", {"indicator": "ppl", **key}, numerics)


def ids(*names: str) -> Join:
    return Join(pa.array(names, type=pa.string()))


def fill(target: Store, *names: str, start: float = 1.0) -> None:
    target.append(names, np.arange(len(names)) + start, [None] * len(names))


def test_values_reasons_and_notes_come_back_in_the_order_asked(tmp_path: Path) -> None:
    s = store(tmp_path)
    assert not s.lookup(ids("a")).present.any()
    s.append(["a", "b", "c"], np.array([1.5, np.nan, 3.5]), [None, "empty response", None], [None, None, "cut"])
    fill(s, "d", start=9.0)
    column = s.lookup(ids("d", "x", "b", "c", "d"))
    np.testing.assert_array_equal(column.present, [True, False, True, True, True])
    np.testing.assert_array_equal(column.values, [9.0, np.nan, np.nan, 3.5, 9.0])
    assert column.reasons == [None, None, "empty response", None, None]
    assert column.notes == [None, None, None, "cut", None]
    assert column.numerics == [(FP32, 4)]


def test_one_join_serves_stores_with_equal_and_with_other_contents(tmp_path: Path) -> None:
    """The join remembers its last answer: it must not give one store's positions to another."""
    first, second, third = store(tmp_path, m=1), store(tmp_path, m=2), store(tmp_path, m=3)
    fill(first, "a", "b", "c")
    fill(second, "a", "b", "c", start=11.0)
    fill(third, "c", "a", start=21.0)
    asked = ids("c", "b", "a")
    assert first.lookup(asked).values.tolist() == [3.0, 2.0, 1.0]
    assert second.lookup(asked).values.tolist() == [13.0, 12.0, 11.0]
    np.testing.assert_array_equal(third.lookup(asked).values, [21.0, np.nan, 22.0])
    assert first.lookup(asked).values.tolist() == [3.0, 2.0, 1.0]


def test_other_keys_are_other_folders_and_say_what_they_are(tmp_path: Path) -> None:
    """Scores of one model must never pass for another's."""
    fill(store(tmp_path, model="A"), "a")
    assert not store(tmp_path, model="B").lookup(ids("a")).present.any()
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "key.json").read_text()) == {"name": "ppl", "key": {"indicator": "ppl", "model": "A"}}


def test_same_numerics_win_over_others_which_still_count(tmp_path: Path) -> None:
    fill(store(tmp_path, BF16), "a", "b", start=100.0)
    fill(store(tmp_path, FP32), "b", start=1.0)
    column = store(tmp_path, FP32).lookup(ids("a", "b"))
    assert column.values.tolist() == [100.0, 1.0]
    assert {n["precision"]: c for n, c in column.numerics} == {"bf16": 1, "fp32": 1}


def test_unsound_parts_are_named_and_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A crash of the machine or a copied file costs the rows of that file, not the pool, and not the truth."""
    s = store(tmp_path)
    fill(s, "good")
    fill(s, "torn")
    torn = next(p for p in s.folder.glob("part-*") if pq.read_table(p).column("id").to_pylist() == ["torn"])
    torn.write_bytes(torn.read_bytes()[:-20])
    (s.folder / "part-empty.parquet").write_bytes(b"")
    other = store(tmp_path, model="other")
    fill(other, "foreign")
    foreign = next(other.folder.glob("part-*"))
    foreign.rename(s.folder / "part-foreign.parquet")
    pq.write_table(pa.table({"id": ["stranger"], "value": [1.0]}), s.folder / "part-stranger.parquet")
    wrong = pa.table({"id": ["x"], "value": ["text"], "reason": [""], "note": [""]})
    described = {b"im_lightning": json.dumps({"digest": s.digest, "numerics": FP32}).encode()}
    pq.write_table(wrong.replace_schema_metadata(described), s.folder / "part-wrong.parquet")

    column = s.lookup(ids("good", "torn", "foreign", "stranger", "x"))
    assert column.present.tolist() == [True, False, False, False, False]
    said = capsys.readouterr().err
    rejected = sorted(p.name for p in s.folder.glob("*.rejected"))
    assert len(rejected) == 5 and all(name.removesuffix(".rejected") in said for name in rejected)
    assert "it belongs to another key" in said and "its column value holds string" in said
    assert s.lookup(ids("good")).present.all() and capsys.readouterr().err == ""  # said once


def test_a_part_that_cannot_be_read_now_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file server's hiccup, or too many open files, must not throw away what is sound."""
    store = Store(tmp_path, "mtld", {"k": 1}, {})
    store.append(["a"], np.array([1.0]), [None])

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert not store.lookup(Join(pa.array(["a"]))).present.any()
    assert "cannot be read now (Input/output error)" in capsys.readouterr().err
    assert store.lookup(Join(pa.array(["a"]))).values.tolist() == [1.0]


def test_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """A value that is silently off by a power of two would be the worst kind of score."""
    s = store(tmp_path)
    s.append([f"{i:032x}" for i in range(2000)], np.random.default_rng(0).normal(size=2000), [None] * 2000)
    part = next(s.folder.glob("part-*"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)
    assert not s.lookup(ids(f"{5:032x}")).present.any()
    assert list(s.folder.glob("*.rejected"))


def test_many_writers_need_no_lock(tmp_path: Path) -> None:
    names = [f"{i:032x}" for i in range(400)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: fill(store(tmp_path), *names[10 * i : 10 * i + 20], start=10.0 * i), range(39)))
    column = store(tmp_path).lookup(ids(*names))
    assert column.present.all()
    assert column.values.tolist() == [float(i) for i in range(400)]
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".tmp", ".rejected")]


def test_unfinished_temporary_files_are_not_read(tmp_path: Path) -> None:
    s = store(tmp_path)
    fill(s, "a")
    (s.folder / ".part-x.parquet.abc.tmp").write_bytes(b"half")
    assert s.lookup(ids("a")).present.all() and not list(s.folder.glob("*.rejected"))


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path: Path) -> None:
    """A SIGKILL leaves a hidden temporary file; on a cluster where jobs are pre-empted they would fill the disk."""
    store = Store(tmp_path, "mtld", {"k": 1}, {})
    store.append(["a"], np.array([1.0]), [None])
    old, fresh = store.folder / ".part-1.parquet.x.tmp", store.folder / ".part-2.parquet.y.tmp"
    for path, age in ((old, 90_000), (fresh, 60)):
        path.write_bytes(b"half a part")
        os.utime(path, (time.time() - age, time.time() - age))
    Store(tmp_path, "mtld", {"k": 1}, {}).append(["b"], np.array([2.0]), [None])
    assert not old.exists() and fresh.exists(), "another writer may be at work on a fresh one"
    assert len(list(store.folder.glob("part-*.parquet"))) == 2


def test_vectors_round_trip_over_parts(tmp_path: Path) -> None:
    s = Store(tmp_path, "embedding", {"e": 1}, FP32)
    assert s.lookup_vectors(ids("a")).vectors.shape == (1, 0)
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    b[1] = np.nan
    s.append_vectors(["a", "b", "c"], a)
    s.append_vectors(["d", "e", "f"], b)
    known = s.lookup_vectors(ids("f", "x", "a", "e"))
    assert known.present.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(known.vectors, np.stack([b[2], np.full(5, np.nan), a[0], b[1]]).astype(np.float32))


def test_cache_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InstructMiningError, match=r"cannot be written.*choose a writable folder"):
        check_writable(tmp_path / "file" / "cache")


def test_the_digest_of_a_pool_is_that_of_its_sorted_ids() -> None:
    """Stored pool-dependent values are found by it: by another one, or by order, they would be lost."""
    from im_lightning._utils.hashing import digest_bytes
    from im_lightning.scoring.columns import DistinctPool

    rows = make_pool(40)
    rows = [*rows, *rows[:7]]
    expected = digest_bytes("\n".join(sorted(example.id for example in rows)).encode("ascii"))
    assert DistinctPool(rows).digest() == DistinctPool(rows[::-1]).digest() == expected
    assert DistinctPool(rows[:-1]).digest() != expected
    assert DistinctPool([]).digest() == digest_bytes(b"")


def test_vectors_on_disk_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are read one at a time into a file where a pool is large; nothing else may change."""
    from im_lightning._utils import files as _files

    store = Store(tmp_path, "embedding", {"k": 1}, {"n": 1})
    rng = np.random.default_rng(0)
    ids, vectors = [f"{i:032x}" for i in range(50)], rng.normal(size=(50, 8)).astype(np.float32)
    for start in range(0, 50, 20):
        store.append_vectors(ids[start : start + 20], vectors[start : start + 20])
    store.append_vectors(ids[:3], -vectors[:3])  # later parts do not win over earlier ones
    asked = Join(pa.array([*ids[::-3], "f" * 32]))
    in_memory = store.lookup_vectors(asked)
    monkeypatch.setattr(_files, "SCRATCH_BYTES", 0)
    on_disk = store.lookup_vectors(asked)
    assert isinstance(on_disk.vectors, np.memmap)
    np.testing.assert_array_equal(on_disk.vectors, in_memory.vectors)
    np.testing.assert_array_equal(in_memory.vectors[:-1], vectors[::-3])
    assert in_memory.present.tolist() == [True] * 17 + [False] == on_disk.present.tolist()
    assert in_memory.numerics == [({"n": 1}, 17)]

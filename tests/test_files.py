"""Atomic files: whoever reads sees the old content or the new, and a failed write leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from im_lightning._utils import files as _files
from im_lightning._utils.files import atomic_path, write_json
from im_lightning._utils.hashing import digest_json, digest_strings
from im_lightning.errors import InstructMiningError


def test_a_failed_write_keeps_the_old_file_and_no_debris(tmp_path: Path) -> None:
    target = tmp_path / "rule.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["rule.json"]


def test_folders_are_made(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", [])
    assert (tmp_path / "a" / "b.json").exists()


def test_an_unwritable_place_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InstructMiningError, match=r"file/x\.json: cannot be written: .*choose a writable folder"):
        write_json(tmp_path / "file" / "x.json", {})


def test_digests_depend_on_content_and_borders_only() -> None:
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    assert digest_strings(["ab", "c"]) != digest_strings(["a", "bc"])
    assert len(digest_json("\ud800")) == 32  # a lone surrogate is content like any other


def test_large_arrays_lie_in_a_file_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors of a million rows must not fill the memory, nor be left on the disk."""
    import numpy as np

    assert not isinstance(_files.scratch_array((3, 2), tmp_path), np.memmap)
    monkeypatch.setattr(_files, "SCRATCH_BYTES", 20)
    array = _files.scratch_array((3, 2), tmp_path / "cache")
    assert isinstance(array, np.memmap)
    array[:] = 7.0
    assert array.sum() == 42.0
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_room_for_a_large_array_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(_files, "SCRATCH_BYTES", 0)
    with pytest.raises(InstructMiningError, match=r"cannot be written: .*free some space"):
        _files.scratch_array((3, 2), tmp_path / "cache")

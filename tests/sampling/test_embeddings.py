"""If these failed, "diverse" would compare rows by vectors of other rows, of another model, or not say what lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from im_lightning.cli import main
from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import DataError, RequestError
from im_lightning.sampling.selection.embeddings import embedding_identity, read_vectors, stored_vectors
from im_lightning.scoring.api import score_examples

WORDS = ["red", "blue", "atom", "cell", "tree", "river", "stone"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """A pool with a duplicate, its score table, and the store."""
    folder = tmp_path_factory.mktemp("diverse")
    rng = np.random.default_rng(0)
    rows = [{"instruction": f"Say {i}.", "output": " ".join(rng.choice(WORDS, rng.integers(1, 9)))} for i in range(40)]
    rows.append(rows[3])
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(str(folder / "pool.jsonl"))
    table = score_examples(examples, ["length_output", "knn_2"], model=tiny_llama, cache_dir=str(folder / "store"))
    table.write(folder / "scores.parquet")
    return folder


def select(scored: Path, *options: str) -> int:
    paths = [str(scored / "scores.parquet"), str(scored / "pool.jsonl"), "--out", str(scored / "subset.jsonl")]
    return main(["select", *paths, "--method", "diverse", *options])


def test_the_stored_vectors_are_those_of_knn(scored: Path) -> None:
    """From the vectors the table's own knn_2 can be recalculated, row by row, duplicates too."""
    table = ScoreTable.read(scored / "scores.parquet")
    vectors = np.asarray(stored_vectors(table, scored / "store"), dtype=np.float64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    distance = np.sort(np.linalg.norm(vectors[:, None] - vectors[None], axis=2), axis=1)
    np.testing.assert_allclose(distance[:, 2], table.values["knn_2"], atol=1e-4)
    np.testing.assert_array_equal(vectors[3], vectors[40])


def test_the_command_finds_them_and_names_them_in_the_manifest(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert select(scored, "--budget", "8", "--cache-dir", str(scored / "store"), "--max-similarity", "0.9999") == 0
    manifest = json.loads((scored / "subset.jsonl.manifest.json").read_text())
    assert manifest["embeddings"]["kind"].startswith("mean of the base model") and manifest["max_similarity"] == 0.9999
    assert manifest["weights"]["diverse"]["candidates"] == 41 and 0 < manifest["weights"]["diverse"]["coverage"] <= 1
    assert "diverse (uniform), seed 0; covers" in capsys.readouterr().out
    rows = (scored / "subset.jsonl").read_text().splitlines()
    assert len(set(rows)) == 8

    vectors = np.asarray(stored_vectors(ScoreTable.read(scored / "scores.parquet"), scored / "store"))
    np.save(scored / "vectors.npy", vectors)
    assert (
        select(scored, "--budget", "8", "--embeddings", str(scored / "vectors.npy"), "--max-similarity", "0.9999") == 0
    )
    assert (scored / "subset.jsonl").read_text().splitlines() == rows
    assert json.loads((scored / "subset.jsonl.manifest.json").read_text())["embeddings"]["file"] == "vectors.npy"


def test_a_store_that_no_longer_has_them_is_named_with_the_remedy(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert select(scored, "--budget", "8", "--cache-dir", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"the score store {tmp_path} lacks the embeddings of 40 of 40 examples" in error
    assert "--cache-dir" in error and "--embeddings vectors.npy" in error


def test_vectors_of_two_models_are_not_mixed() -> None:
    def key(model: str) -> dict:  # type: ignore[type-arg]
        return {"identity": {"embedding": {"model": model}}, "numerics": {}}

    table = ScoreTable([0], ["x"], ["a"], {"knn_1": [1.0], "knn_2": [1.0]}, keys={"knn_1": key("a"), "knn_2": key("b")})
    with pytest.raises(RequestError, match="knn_1, knn_2 come from different embeddings"):
        embedding_identity(table)
    assert embedding_identity(table.with_values("knn_2", [1.0], key=key("a"))) == {"model": "a"}


def test_files_that_hold_no_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no such file"):
        read_vectors(tmp_path / "none.npy", 3)
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(DataError, match=r"text.npy: is not a .npy array.*numpy.save"):
        read_vectors(tmp_path / "text.npy", 3)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"is not a \.npy array"):
        read_vectors(tmp_path / "objects.npy", 1)
    np.save(tmp_path / "ints.npy", np.ones((3, 2), dtype=int))
    with pytest.raises(DataError, match=r"it holds \(3, 2\) int64.*shape \[3, d\]"):
        read_vectors(tmp_path / "ints.npy", 3)
    np.save(tmp_path / "short.npy", np.ones((2, 2), dtype=np.float32))
    with pytest.raises(DataError, match="one vector per row of the table"):
        read_vectors(tmp_path / "short.npy", 3)

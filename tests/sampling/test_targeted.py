"""If these failed, rows "like those wanted" would be like others, or give away what is evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pools import write_jsonl

from im_lightning import ScoreTable, load_examples, score_examples, select_subset, targets_of
from im_lightning._utils.rng import SUBSET_DRAW, generator
from im_lightning.cli import main
from im_lightning.errors import RequestError
from im_lightning.sampling.selection import targeted
from im_lightning.sampling.selection.ranking import Ranking
from im_lightning.sampling.selection.select import choose_rows
from im_lightning.sampling.selection.targeted import Targets

N, M = 400, 7
RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((N, 12)).astype(np.float32)  # of any length, as another tool may write them
WANTED = (VECTORS[:M] + 0.4 * RNG.standard_normal((M, 12))).astype(np.float32)
TABLE = ScoreTable(
    np.arange(N), [f"{k:032x}" for k in range(N)], [f"s{k % 3}" for k in range(N)],
    {"length_output": RNG.integers(1, 30, N) * 1.0, "reward": RNG.normal(size=N)},
)  # fmt: skip
WORDS = ["red", "blue", "atom", "cell", "tree", "river", "stone", "cloud", "seven"]


def targets(vectors: np.ndarray = WANTED, shared: tuple[int, ...] = ()) -> Targets:
    mask = np.isin(np.arange(N), shared)
    return Targets(vectors, mask, np.arange(len(vectors)), "some")


def round_robin(vectors: np.ndarray, wanted: np.ndarray, order: list[int], rows: int, usable: Any = None) -> list[int]:
    """The plain loop: the target whose turn it is takes the free row of the greatest cosine."""
    free = set(range(len(vectors))) if usable is None else set(np.flatnonzero(usable).tolist())
    taken: list[int] = []
    while len(taken) < rows and free:
        target = wanted[order[len(taken) % len(order)]].astype(np.float64)
        cosines = {}
        for row in free:
            vector = vectors[row].astype(np.float64)
            cosines[row] = float(target @ vector) / float(np.linalg.norm(target) * np.linalg.norm(vector))
        best = max(cosines, key=lambda row: cosines[row])
        taken.append(best)
        free.remove(best)
    return taken


def order_of(seed: int, count: int = M) -> list[int]:
    """Whose turn comes first is drawn."""
    return generator(seed, purpose=SUBSET_DRAW).permutation(count).tolist()


# which rows


@pytest.mark.parametrize("budget", [1, 5, 40, N])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_target_takes_its_nearest_row_in_turn(budget: int, seed: int) -> None:
    rows = select_subset(TABLE, None, budget, "targeted", seed, embeddings=VECTORS, targets=targets())
    assert rows.tolist() == round_robin(VECTORS, WANTED, order_of(seed), budget)


def test_a_pool_too_large_to_know_all_neighbours_at_once_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that are much alike use up the same neighbours; then more are looked for, among the rows left."""
    alike = np.repeat(WANTED[:1], M, axis=0) + 1e-3 * RNG.standard_normal((M, 12)).astype(np.float32)
    for wanted in (WANTED, alike):
        whole = select_subset(TABLE, None, 350, "targeted", embeddings=VECTORS, targets=targets(wanted))
        with monkeypatch.context() as small:
            small.setattr(targeted, "_KEPT", 1)
            small.setattr(targeted, "_SIMILARITIES", 3 * N)
            small.setattr(targeted, "_CHUNK", 50)
            parts = select_subset(TABLE, None, 350, "targeted", embeddings=VECTORS, targets=targets(wanted))
        assert parts.tolist() == whole.tolist() == round_robin(VECTORS, wanted, order_of(0), 350)


def test_a_row_that_may_not_be_taken_costs_its_target_no_turn() -> None:
    """Shares, quotas, near-duplicates, prompts and rows of the targets' own prompts hold as for any method."""
    chosen = choose_rows(
        TABLE, None, 60, "targeted", ranking=Ranking("reward", keep=0.5), embeddings=VECTORS,
        targets=targets(shared=tuple(range(M))),
    )  # fmt: skip
    ranked = np.argsort(-np.where(np.arange(N) >= M, TABLE.values["reward"], -np.inf))[: round(0.5 * (N - M))]
    usable = np.isin(np.arange(N), ranked)
    assert sorted(chosen.rows) == sorted(round_robin(VECTORS, WANTED, _turns(chosen), 60, usable))
    assert {chosen.decisions.reason[row] for row in range(M)} == {"a target has its prompt"}

    vectors = VECTORS.copy()
    vectors[N // 2 :] = vectors[: N // 2] * 2.0  # every row twice
    twice = select_subset(TABLE, None, 100, "targeted", embeddings=vectors, max_similarity=0.999, targets=targets())
    assert len({int(row) % (N // 2) for row in twice}) == 100
    once = select_subset(
        TABLE, None, 100, "targeted", embeddings=vectors, prompts=np.arange(N) % (N // 2), targets=targets()
    )
    assert len({int(row) % (N // 2) for row in once}) == 100
    assert {int(row) % (N // 2) for row in once} == set(round_robin(VECTORS[: N // 2], WANTED, order_of(0), 100))
    given: dict[str, Any] = {"embeddings": VECTORS, "targets": targets()}
    quota = select_subset(TABLE, None, 40, "targeted", ranking=Ranking(quota="s0=0"), **given)
    assert quota.tolist() == round_robin(VECTORS, WANTED, order_of(0), 40, np.arange(N) % 3 != 0)


def _turns(chosen: Any) -> list[int]:
    """The order of the targets, as the decisions tell it."""
    return [int(chosen.decisions.target[row]) for row in chosen.rows[:M]]


def test_the_report_and_the_decisions_say_for_whom() -> None:
    chosen = choose_rows(TABLE, None, 20, "targeted", embeddings=VECTORS, targets=targets(shared=(0, 1)))
    report, units = chosen.report["targeted"], VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    for place, row in enumerate(chosen.rows.tolist()):
        assert chosen.decisions.target[row] == _turns(chosen)[place % M]
    wanted = (WANTED / np.linalg.norm(WANTED, axis=1, keepdims=True))[chosen.decisions.target[chosen.rows]]
    assert report["mean_cosine"] == pytest.approx((wanted * units[chosen.rows]).sum(axis=1).mean(), abs=1e-6)
    assert (report["targets"], report["served"], report["rows_sharing_a_prompt"]) == (M, M, 2)
    few = choose_rows(TABLE, None, 3, "targeted", embeddings=VECTORS, targets=targets())
    assert few.report["targeted"]["served"] == 3 and (few.decisions.target >= 0).sum() == 3


def test_equal_rows_and_the_first_turn_are_drawn() -> None:
    same = np.ones((N, 4), dtype=np.float32)
    draws = {tuple(select_subset(TABLE, None, 3, "targeted", seed, embeddings=same, targets=targets(same[:2])).tolist())
             for seed in range(5)}  # fmt: skip
    assert len(draws) == 5
    given: dict[str, Any] = {"embeddings": VECTORS, "targets": targets()}
    assert len({int(select_subset(TABLE, None, 1, "targeted", seed, **given)[0]) for seed in range(9)}) > 2


def test_it_needs_targets() -> None:
    with pytest.raises(RequestError, match=r"method targeted: it needs targets\. Fix: pass --target FILE"):
        select_subset(TABLE, None, 3, "targeted", embeddings=VECTORS)


# the vectors of the targets


def rows_of(name: str, count: int, seed: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    return [
        {"instruction": f"{name} {k}: {' '.join(rng.choice(WORDS, 3))}.",
         "output": " ".join(rng.choice(WORDS, rng.integers(2, 9)))}
        for k in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, embedder: str) -> Path:
    """A pool scored by the base model's states and by an embedder, and what is wanted."""
    folder = tmp_path_factory.mktemp("targeted")
    pool, wanted = rows_of("Say", 40, 0), rows_of("Want", 5, 1)
    pool[7] = {"instruction": wanted[2]["instruction"].upper(), "output": "another answer"}
    wanted.append(pool[3])
    write_jsonl(folder / "pool.jsonl", pool)
    write_jsonl(folder / "wanted.jsonl", wanted)
    store = str(folder / "store")
    for name, models in (("base", {"model": tiny_llama}), ("embedder", {"embedding_model": embedder})):
        table = score_examples(load_examples(str(folder / "pool.jsonl")), ["knn_2"], cache_dir=store, **models)
        table.write(folder / f"{name}.parquet")
    return folder


def select(desk: Path, scores: str, *options: str) -> int:
    files = [str(desk / f"{scores}.parquet"), str(desk / "pool.jsonl"), "--out", str(desk / "subset.jsonl")]
    files += ["--target", str(desk / "wanted.jsonl"), "--method", "targeted", "--budget", "12"]
    return main(["select", *files, "--cache-dir", str(desk / "store"), *options])


@pytest.mark.parametrize("kind", ["base", "embedder"])
def test_the_command_compares_targets_and_pool_in_one_space(
    desk: Path, kind: str, tiny_llama: str, embedder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vectors of the targets are those that they would have as rows of the pool."""
    model = tiny_llama if kind == "base" else embedder
    assert select(desk, kind, "--target-model", model) == 0
    told = capsys.readouterr()
    assert "6 targets; 2 rows of the pool share a prompt with one" in told.err
    manifest = json.loads((desk / "subset.jsonl.manifest.json").read_text())
    assert manifest["targets"]["rows"] == 6 and manifest["weights"]["targeted"]["served"] == 6

    from im_lightning.sampling.selection.embeddings import stored_vectors

    both = load_examples(str(desk / "pool.jsonl")) + load_examples(str(desk / "wanted.jsonl"))
    given = {"model": model} if kind == "base" else {"embedding_model": model}
    joint = score_examples(both, ["knn_2"], cache_dir=str(tmp_path / "other"), **given)
    vectors = np.asarray(stored_vectors(joint, tmp_path / "other"))
    usable = ~np.isin(np.arange(40), [3, 7])
    wanted = round_robin(vectors[:40], vectors[40:], order_of(0, 6), 12, usable)
    lines = (desk / "pool.jsonl").read_text().splitlines()
    assert (desk / "subset.jsonl").read_text().splitlines() == [lines[row] for row in sorted(wanted)]

    assert main(["explain", str(wanted[0]), str(desk / "subset.jsonl")]) == 0
    assert f"It was taken, for target {order_of(0, 6)[0]}." in capsys.readouterr().out
    assert main(["explain", "7", str(desk / "subset.jsonl")]) == 0
    assert "It was not taken: a target has its prompt." in capsys.readouterr().out
    assert select(desk, kind) == 0, "they are in the store now, and no model is needed"


def test_the_model_is_asked_for_and_checked(
    desk: Path, small_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = write_jsonl(tmp_path / "new.jsonl", rows_of("New", 3, 5))
    for scores in ("base", "embedder"):
        assert select(desk, scores, "--target", new) == 2
        error = capsys.readouterr().err
        assert "lacks the embeddings of 3 of them, and their model is not named" in error and "--target-model" in error
    assert select(desk, "base", "--target", new, "--target-model", small_base) == 2
    error = capsys.readouterr().err
    assert "it does not make the vectors that the pool's knn_<i> was scored by (model weights" in error
    assert "im-lightning score TARGET --indicators knn_1" in error


def test_what_has_no_effect_or_no_common_space_is_refused(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert select(desk, "base", "--method", "random") == 2
    assert "method random does not look at it. Fix: pass --method targeted" in capsys.readouterr().err
    np.save(tmp_path / "v.npy", np.ones((40, 3), dtype=np.float32))
    assert select(desk, "base", "--embeddings", str(tmp_path / "v.npy")) == 2
    assert "its vectors would have to be of the same model" in capsys.readouterr().err


def test_targets_that_are_evaluated_are_left_out(desk: Path, tiny_llama: str) -> None:
    """A row that is chosen for likeness to a report row is chosen by the report."""
    table, pool = ScoreTable.read(desk / "base.parquet"), load_examples(str(desk / "pool.jsonl"))
    wanted = load_examples(str(desk / "wanted.jsonl"))
    seen = [{"prompt": wanted[0].prompt.lower() + " ", "response": "x"}, {"prompt": "Z", "response": "z"}]
    report = load_examples(seen)
    given: dict[str, Any] = {"model": tiny_llama, "cache_dir": str(desk / "store")}
    found = targets_of(wanted, table, pool, report, **given)
    assert found.rows.tolist() == [1, 2, 3, 4, 5] and found.in_evaluation == 1
    assert "1 more targets share one with the evaluation and are left out" in found.text()
    assert np.flatnonzero(found.shared).tolist() == [3, 7]
    with pytest.raises(RequestError, match=r"of its 1 rows 1 share a prompt with the evaluation, and 0 have no embed"):
        targets_of(wanted[:1], table, pool, report, **given)


def test_targets_without_a_vector_are_left_out(desk: Path, tiny_llama: str) -> None:
    """By their responses, an empty one is like nothing."""
    pool, store = load_examples(str(desk / "pool.jsonl")), str(desk / "store")
    table = score_examples(pool, ["knn_2"], model=tiny_llama, embed="response", cache_dir=store)
    wanted = load_examples([{"prompt": "A", "response": ""}, {"prompt": "B", "response": "red stone"}])
    found = targets_of(wanted, table, pool, model=tiny_llama, cache_dir=store)
    assert found.rows.tolist() == [1] and found.without_vector == 1 and not found.shared.any()
    assert "1 more targets have no embedding and are left out" in found.text()

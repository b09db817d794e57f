"""What a Ray worker computes and what is made of it here, without Ray: the values of the local engine, each once."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pools import alpaca, make_pool, same_table
from tiny_judges import make_chat_reward, make_unieval

from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding
from im_lightning.errors import InstructMiningError, RequestError
from im_lightning.indicators.base import Indicator, get_indicators
from im_lightning.scoring.passes import base as passes
from im_lightning.scoring.passes import language_model
from im_lightning.scoring.passes.base import Pass
from im_lightning.scoring.plan import ScoringPlan, execute
from im_lightning.scoring.ray_cluster import engine
from im_lightning.scoring.ray_cluster.engine import RayEngine, piece_of, take, tasks_of
from im_lightning.scoring.ray_cluster.worker import (
    Order,
    Outcome,
    Worker,
    carried,
    estimate,
    identities,
    shared,
    unpacked,
)
from im_lightning.scoring.settings import Engine, Numerics, ScorerModels, Setup

NAMES = ["length_input", "mtld", "ppl", "ifd", "knn_2"]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("judges")
    return {"reward_model": make_chat_reward(root / "r"), "unieval_model": make_unieval(root / "u")}


def order_of(each: Pass) -> Order:
    indicators, vectors = [work.indicator for work in each.works], each.vectors.name if each.vectors else ""
    return Order(type(each), indicators, vectors, each.setup, identities(indicators, vectors, each.setup), {})


def outcomes(each: Pass, shares: int = 1) -> Iterator[tuple[np.ndarray, Outcome]]:
    """Pieces dealt to two workers, pickled on the way as Ray would."""
    crew = [Worker(order_of(each)) for _ in range(2)]
    tasks = [(rows, (k, shares)) for rows in each.pieces(each.rows()) for k in range(shares if each.deals else 1)]
    sent = [pickle.dumps(carried(piece_of(each, number, *task))) for number, task in enumerate(tasks)]
    for number, piece in enumerate(sent):  # all were made before any is back
        [answer] = crew[number % 2](pickle.loads(piece))
        [outcome] = unpacked(pickle.loads(pickle.dumps(answer)))
        yield tasks[number][0], outcome


def run(each: Pass, shares: int = 1, repeat: bool = False) -> None:
    """As `RayEngine.run`, in this process; with `repeat` every outcome comes twice."""
    for rows, outcome in outcomes(each, shares):
        outcome.check()
        for _ in range(1 + repeat):
            take(each, rows, outcome)
    each.flush()


def scored(pool: list[Example], names: list[str], setup: Setup, run: Any = Pass.run) -> ScoreTable:
    return execute(ScoringPlan(pool, get_indicators(names), setup), run)[0]


def setup_of(cache: Path, **names: Any) -> Setup:
    encoding = Encoding(names.pop("model", None), max_length=512, cache_dir=str(cache))
    return Setup(encoding, ScorerModels(**names), Numerics(256, "fp32", "cpu"))


def stored(cache: Path) -> dict[str, list[str]]:
    """Ids by folder of the store, all parts together."""
    found: dict[str, list[str]] = {}
    for part in sorted(cache.rglob("part-*.parquet")):
        found.setdefault(part.parent.name, []).extend(pq.read_table(part, columns=["id"]).column("id").to_pylist())
    return found


def test_target_indicators_are_those_of_the_local_engine(tiny_llama: str, tmp_path: Path) -> None:
    """Gradients go to the store as vectors; the finetune is made once, and its update goes to every worker."""
    pool, targets = make_pool(20), [alpaca(f"Name colour {i}.", f"Colour {i} is red.") for i in range(4)]
    names = ["ppl_tuned", "loss_drop", "gradient_similarity"]
    setups = [replace(setup_of(tmp_path / name, model=tiny_llama), target_rows=targets) for name in ("a", "b")]
    made: list[str] = []

    def apart(each: Pass) -> None:
        if each.kept is not None:
            outcome = shared(order_of(each), piece_of(each, 0, each.rows()[:1]))
            outcome.check()
            each.shared, order = outcome.shared, replace(order_of(each), shared=outcome.shared)
            each.kept.unlink()  # what a worker elsewhere cannot see
            made.append(each.label)
            crew = [Worker(order) for _ in range(2)]
            for number, rows in enumerate(np.array_split(each.rows(), 2)):
                [answer] = crew[number](carried(piece_of(each, number, rows)))
                take(each, rows, unpacked(answer)[0])
            each.flush()
            assert not each.kept.exists()
        else:
            run(each, shares=2, repeat=True)

    same_table(scored(pool, names, setups[0]), scored(pool, names, setups[1], apart))
    assert made == ["ppl_tuned"]
    kept = stored(tmp_path / "b")
    gradients = next(ids for name, ids in kept.items() if name.startswith("gradient-"))
    assert sorted(gradients) == sorted(e.id for e in [*pool, *targets])


@pytest.mark.parametrize("shares", [1, 3])
def test_workers_give_the_values_of_the_local_engine(
    shares: int, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, whoever works on which piece or share of its batches, and each row is stored once."""
    monkeypatch.setattr(language_model, "FIRST_ROWS", 13)
    monkeypatch.setattr(language_model, "PART_ROWS", 17)
    monkeypatch.setattr(passes, "TEXT_PIECE", 10)
    pool = [*make_pool(40), alpaca("Say nothing.", ""), *make_pool(3)]
    here = scored(pool, NAMES, setup_of(tmp_path / "a", model=tiny_llama))
    there = scored(pool, NAMES, setup_of(tmp_path / "b", model=tiny_llama), lambda each: run(each, shares, repeat=True))
    same_table(here, there)
    ids = stored(tmp_path / "b")
    assert {name.rsplit("-", 1)[0] for name in ids} == {
        "embedding", "length_input", "mtld", "ppl", "ppl_unconditional", "knn_2",
    }  # fmt: skip
    for name, kept in ids.items():
        assert sorted(kept) == sorted({e.id for e in pool}), name


def test_tokens_judges_and_embeddings(
    embedder: str, tiny_llama: str, judges: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of pass works elsewhere."""
    monkeypatch.setattr(passes, "CHUNK", 7)
    monkeypatch.setattr("im_lightning.scoring.passes.reward_and_unieval.PART_ROWS", 9)
    pool = [*make_pool(20), alpaca("Say nothing.", "")]
    names = ["length_output", "knn_1", "reward", "naturalness", "coherence"]
    models = {"model": tiny_llama, "embedding_model": embedder, **judges}
    here = scored(pool, names, setup_of(tmp_path / "a", **models))
    there = scored(pool, names, setup_of(tmp_path / "b", **models), lambda each: run(each, 2))
    same_table(here, there)


def test_what_the_store_has_is_not_computed_again(tiny_llama: str, tmp_path: Path) -> None:
    """Resume is the store's: half from an earlier local scoring, the rest from workers, then nothing is left."""
    pool, setup = make_pool(20), setup_of(tmp_path, model=tiny_llama)
    scored(pool[:12], ["ppl"], setup)
    seen: list[int] = []

    def counting(each: Pass) -> None:
        for rows, outcome in outcomes(each):
            seen.append(len(rows))
            take(each, rows, outcome)
        each.flush()

    scored(pool, ["ppl"], setup, counting)
    assert seen == [8]
    assert not ScoringPlan(pool, get_indicators(["ppl"]), setup).passes


def test_rows_too_long_for_the_workers_memory_are_not_stored(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay without a value in this table, with the reason, and may be tried again on a bigger machine."""
    pool = [*make_pool(12), alpaca("Describe many things. " * 30, "exercise " * 60)]
    real = language_model.LanguageModelPass.forward

    def forward(self: Any, side: Any, at: np.ndarray) -> Any:
        if max(len(side.encoded[i].input_ids) for i in at) > 300:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(self, side, at)

    monkeypatch.setattr(language_model.LanguageModelPass, "forward", forward)
    table = scored(pool, ["ppl", "knn_1"], setup_of(tmp_path, model=tiny_llama), run)
    assert np.isnan(table.values["ppl"][12]) and np.isfinite(table.values["ppl"][:12]).all()
    assert table.reasons["ppl"][12] == "out of memory with this row alone"
    assert all(pool[12].id not in ids for name, ids in stored(tmp_path).items() if not name.startswith("knn"))


def test_a_worker_with_another_checkpoint_refuses(tiny_llama: str, tmp_path: Path) -> None:
    """A cluster whose machines hold different weights under one path would fill one column with two models' values."""
    plan = ScoringPlan(make_pool(4), get_indicators(["ppl"]), setup_of(tmp_path, model=tiny_llama))
    order = replace(order_of(plan.passes[0]), identities={"ppl": "0" * 32})
    outcome = Worker(order).compute(piece_of(plan.passes[0], 0, np.arange(4)))
    assert not outcome.values
    with pytest.raises(RequestError, match=r"worker \d+ on .*: ppl: the model or the im_lightning here is another"):
        outcome.check()
    with pytest.raises(RequestError, match="another than where the scoring was started"):
        estimate(order, piece_of(plan.passes[0], 0, np.arange(4))).check()


def test_a_model_that_is_not_there_is_named(tiny_llama: str, tmp_path: Path) -> None:
    plan = ScoringPlan(make_pool(4), get_indicators(["ppl"]), setup_of(tmp_path, model=tiny_llama))
    order = order_of(plan.passes[0])
    worker = Worker(replace(order, setup=replace(order.setup, encoding=Encoding("/no/such"))))
    with pytest.raises(RequestError, match=r"worker .*/no/such: there is no such folder"):
        worker.compute(piece_of(plan.passes[0], 0, np.arange(4))).check()


def test_work_on_texts_is_enough_for_all_workers(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece of the text pass is 16,384 rows: of so many one worker of sixty had work."""
    monkeypatch.setattr(engine, "CHUNK", 5)
    pool = make_pool(40)
    plan = ScoringPlan(pool, get_indicators(["mtld", "length_input"]), setup_of(tmp_path, model=tiny_llama))
    for each in plan.passes:
        tasks = tasks_of(each, each.rows(), 4)
        assert len(tasks) >= 8 and {share for _, share in tasks} == {(0, 1)}
        assert np.concatenate([rows for rows, _ in tasks]).tolist() == each.rows().tolist()
        assert [len(rows) for rows, _ in tasks_of(each, each.rows()[:7], 60)] == [5, 2], "no smaller ones"
    [model] = ScoringPlan(pool, get_indicators(["ppl"]), setup_of(tmp_path, model=tiny_llama)).passes
    assert [(len(rows), share) for rows, share in tasks_of(model, model.rows(), 1)] == [(40, (0, 2)), (40, (1, 2))]


def test_workers_are_told_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand elsewhere: a GGUF file was looked for on the hub, a template under `~` nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "small.gguf").touch()
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    setup = Setup(Encoding("small.gguf", template="~/own.jinja"), ScorerModels("org/embedder"))
    plan, ray = ScoringPlan(make_pool(2), get_indicators(["mtld"]), setup), RayEngine.__new__(RayEngine)
    ray.device = "cpu"
    told = ray.order(plan.passes[0]).setup
    assert told.encoding.model == str((tmp_path / "small.gguf").resolve())
    assert told.encoding.template == str((tmp_path / "own.jinja").resolve())
    assert told.models.embedding_model == "org/embedder"


class Faulty(Indicator):
    name = "faulty"

    def score(self, example: Example) -> float:
        raise ZeroDivisionError("a fault of the indicator")


def test_a_fault_of_an_indicator_comes_with_its_trace(tmp_path: Path) -> None:
    plan = ScoringPlan(make_pool(4), [Faulty()], setup_of(tmp_path))
    outcome = Worker(order_of(plan.passes[0])).compute(piece_of(plan.passes[0], 0, np.arange(4)))
    assert any("in score" in line for line in outcome.lines)
    with pytest.raises(InstructMiningError, match="scoring faulty: ZeroDivisionError: a fault of the indicator"):
        outcome.check()


def test_rows_that_kill_every_worker_are_given_up(tmp_path: Path) -> None:
    """Ray tries for ever; a piece that needs more memory than a worker has would never end."""
    plan = ScoringPlan(make_pool(4), get_indicators(["mtld"]), setup_of(tmp_path))
    worker = Worker(replace(order_of(plan.passes[0]), begin=lambda number: 4))
    with pytest.raises(InstructMiningError, match="3 workers died over the same 4 rows"):
        worker.compute(piece_of(plan.passes[0], 0, np.arange(4))).check()


def test_values_say_how_the_workers_computed_them(tmp_path: Path, tiny_llama: str) -> None:
    """A worker with another torch: its values are not passed off as computed with ours."""
    plan = ScoringPlan(make_pool(30), get_indicators(["ppl"]), setup_of(tmp_path, model=tiny_llama))
    [each] = plan.passes
    for half, version in ((np.arange(15), "1.0"), (np.arange(15, 30), "2.0")):
        outcome = Worker(order_of(each)).compute(piece_of(each, 0, half))
        outcome.numerics["ppl"]["torch"] = version
        take(each, half, outcome)
    each.flush()
    again = ScoringPlan(make_pool(30), get_indicators(["ppl"]), setup_of(tmp_path, model=tiny_llama))
    kinds = again.key(get_indicators(["ppl"])[0])["numerics"]["several"]
    assert sorted(kind["torch"] for kind in kinds) == ["1.0", "2.0"]
    now = plan.key(get_indicators(["ppl"])[0])["numerics"]["several"]
    assert sorted(kind["torch"] for kind in now) == ["1.0", "2.0"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"engine": "spark"}, "engine 'spark': is not known"),
        ({"ray_address": "host:1"}, "--ray-address host:1: the engine is local"),
        ({"ray_workers": 2}, "--ray-workers 2: the engine is local"),
        ({"engine": "ray", "ray_workers": 0}, "--ray-workers 0: is less than one worker"),
        ({"engine": "ray", "device": "cuda:1"}, "--device cuda:1: Ray's workers take whichever GPU"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        Setup(numerics=Numerics(device=arguments.pop("device", "auto")), engine=Engine(**arguments))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(RequestError, match=r"pip install 'im-lightning\[ray\]'"):
        Setup(engine=Engine("ray"))

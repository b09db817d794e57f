"""Two processes with one thread each, against one: the pool shared out as the ranks of a fit share it."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import timing
from benchmarks.checkpoints import MIDDLE, SMALL, make_checkpoint
from benchmarks.registry import Ratio, Setting, benchmark
from im_lightning._lightning import keep_environment
from im_lightning._utils.progress import log, silence
from im_lightning.data.example import Example
from im_lightning.errors import InstructMiningError, message

_BAR = 1.7
_ROWS, _QUICK_ROWS = 240, 150  # of which one process makes some 30 (3) seconds
_INDICATORS = ("length_output", "mtld", "ppl", "ppl_unconditional")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_WAIT_SECONDS = 600.0
_MOST_SECONDS = 300.0  # after so long no new round begins


@benchmark("processes")
def processes(setting: Setting) -> Iterator[Ratio]:
    if timing.counts_processor_time():
        log("processes: processor time says nothing of two processes side by side; left out")
        return
    size, rows = (SMALL, _QUICK_ROWS) if setting.quick else (MIDDLE, _ROWS)
    examples = setting.examples[:rows]
    model = make_checkpoint(setting.folder, size, setting.examples)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    shares: list[float] = []
    with _crew(2, model, examples) as crew:
        begun = time.perf_counter()
        for index in range(-1, max(1, setting.repeats)):  # the first round warms up
            if index > 0 and time.perf_counter() - begun > _MOST_SECONDS:
                break
            for world in (1, 2) if index % 2 == 0 else (2, 1):
                took, share = _score(crew[:world], setting.folder / f"round{index}-{world}")
                if index >= 0:
                    seconds[world].append(took)
                    shares.append(share)
    value = statistics.median(a / b for a, b in zip(seconds[1], seconds[2], strict=True))
    one, two = (rows / statistics.median(seconds[world]) for world in (1, 2))
    had = statistics.median(shares)
    yield Ratio(
        f"two scoring processes with one thread each against one ({size.name} parameters, {rows:,} rows)",
        value,
        _BAR,
        f"{two:,.0f} rows/s",
        f"{one:,.0f} rows/s by one",
        note=f"each process had {had:.0%} of a core while it worked"
        + ("" if had > 0.95 else ": the machine was busy, so this says little"),
        details={
            "seconds": {str(k): v for k, v in seconds.items()},
            "share_of_a_core": shares,
            "cores": os.cpu_count(),
        },
    )


def _score(crew: list[Connection], folder: Path) -> tuple[float, float]:
    """All of the crew score the pool together into an empty store; seconds, and their share of a core while at it."""
    start = time.perf_counter()
    for rank, each in enumerate(crew):
        each.send((str(folder), rank, len(crew)))
    answers = [_answer(each) for each in crew]
    return time.perf_counter() - start, statistics.mean(answers)


def _answer(connection: Connection) -> float:
    if not connection.poll(_WAIT_SECONDS):
        cause = f"a scoring process did not answer for {_WAIT_SECONDS:g} s"
        raise InstructMiningError(message("benchmark", cause, "run it on a machine that is less busy"))
    try:
        answer = connection.recv()
    except EOFError as error:
        cause = "a scoring process died"
        raise InstructMiningError(message("benchmark", cause, "look at its error above")) from error
    return float(answer)


@contextmanager
def _crew(count: int, model: str, examples: list[Example]) -> Iterator[list[Connection]]:
    """Processes that wait for work, with everything imported; one thread each."""
    context = multiprocessing.get_context("spawn")
    alone = {**dict.fromkeys(_THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}
    started, ends = [], []
    with keep_environment(*alone):
        os.environ.update(alone)
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, model, examples), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            ends.append(ours)
    try:
        yield ends
    finally:
        for end in ends:
            end.close()  # their sign to stop
        for process in started:
            process.join(10)
            process.kill()


def _work(connection: Connection, model: str, examples: list[Example]) -> None:
    """Scores its share whenever asked, and answers with its share of a core while it did."""
    import torch

    from im_lightning.data.settings import Encoding
    from im_lightning.scoring.settings import Numerics, Setup
    from im_lightning.training.distributed.ranks import Ranks
    from im_lightning.training.run.encoded_pool import Pool
    from im_lightning.training.run.scoring import Scorer, score_own_share

    torch.set_num_threads(1)
    pool = Pool(examples)
    while True:
        try:
            folder, rank, world = connection.recv()
        except EOFError:
            return
        encoding = Encoding(model, template="alpaca", cache_dir=f"{folder}/store")
        scorer = Scorer(_INDICATORS, Setup(encoding, numerics=Numerics(precision="fp32", device="cpu")))
        ranks = Ranks(Path(folder) / "meet", rank, world)
        with silence(), ranks.alive():
            start, busy = time.perf_counter(), time.process_time()
            if world > 1:  # the steps of `score_together`, with a look at the clocks after this one
                score_own_share(scorer, pool, ranks)
            else:
                scorer(pool.examples).write(f"{folder}/scores.parquet")
            share = (time.process_time() - busy) / (time.perf_counter() - start)
            ranks.finish()
            if world > 1 and rank == 0:
                ranks.wait_for_all()
                scorer(pool.examples).write(f"{folder}/scores.parquet")
        connection.send(share)

"""What finetunes will take on this machine, by some of their steps that are timed: seconds, memory; nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from im_lightning._lightning import isolate_rng
from im_lightning._utils.numbers import time_text
from im_lightning.experiments.run_length import epochs_text, run_length
from im_lightning.scoring.estimate import peak_memory
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.evaluation import EvalSet
from im_lightning.training.module import InstructTuningModule, training_precision
from im_lightning.training.run.encoded_pool import Collate, EncodedPool

TRAIN_SECONDS, READ_SECONDS = 5.0, 2.5
"""After which no further step, or batch, is timed; one is."""
_SAMPLE_ROWS = 1000  # whose tokens are counted
_STEP_ROWS = 8


@dataclass(frozen=True)
class Speed:
    """What a machine does.

    Args:
        train: Seconds per token trained on.
        read: Seconds per token of a forward pass.
        start: Seconds until a finetune begins.
        memory: Most bytes in use while this was measured; of the GPU where one is used.
    """

    train: float
    read: float
    start: float
    memory: int = 0


@dataclass(frozen=True)
class FitEstimate:
    """What a run takes.

    Args:
        rows, row_tokens: Rows of an epoch, and mean tokens of one, prompt and template included.
        epochs: Passes over them, the last one in part where `max_steps` ends it.
        eval_rows, eval_tokens: Of all evaluation sets.
        base: Whether the base is evaluated, too.
        unscored: Whether the pool has to be scored before.
        speed: Of this machine.
        share: Of the steps, that is trained before the run is stopped.
        evaluations: Of a run.
        devices: Among which rows and evaluation sets are divided; the speed is that of one.
    """

    rows: int
    row_tokens: float
    epochs: float
    eval_rows: int
    eval_tokens: float
    base: bool
    unscored: bool
    speed: Speed
    share: float = 1.0
    evaluations: int = 1
    devices: int = 1

    def seconds(self, runs: int = 1) -> float:
        """Of so many runs that share a base, one after the other: it is evaluated once."""
        trained = self.rows * self.row_tokens * self.epochs * self.share * self.speed.train / self.devices
        evaluation = self.eval_tokens * self.speed.read / self.devices
        return runs * (self.speed.start + trained + self.evaluations * evaluation) + (evaluation if self.base else 0.0)

    def to_json(self, runs: int = 1) -> dict[str, Any]:
        """JSON-like, with the seconds of so many runs."""
        return {**asdict(self), "runs": runs, "seconds": self.seconds(runs)}

    def lines(self, runs: int = 1) -> list[str]:
        """For a person."""
        s = self.speed
        trained = f"{self.rows:,} rows of {self.row_tokens:.0f} tokens, {epochs_text(self.epochs)}"
        each = f" on each of {self.devices} devices" if self.devices > 1 else ""
        first = (
            f"a run: {trained}, at {1 / s.train:,.0f} tokens/s{each}; evaluation of {self.eval_rows:,} rows "
            f"({self.eval_tokens:,.0f} tokens at {1 / s.read:,.0f} tokens/s{each})"
        )
        many = f"{runs:,} runs, one after the other" if runs > 1 else "in all"
        total = f"{many}: about {time_text(self.seconds(runs))}, measured on some steps; {s.memory / 2**20:,.0f} MiB"
        out = [first, f"{total} of memory at most in them"]
        if self.unscored:
            out.append("before: the pool is scored; im-lightning score DATA --dry-run says what that takes")
        return out


def measure_speed(
    module: InstructTuningModule,
    encoded: EncodedPool,
    sets: Sequence[EvalSet],
    collate: Collate,
    device: torch.device,
    clock: Callable[[], float] = time.monotonic,
) -> Speed:
    """Loads the module's base and times steps and evaluation batches on rows of every length; under 20 s on a machine
    that trains a row of 1,000 tokens in a second.

    Args:
        module: New; its weights are changed by nothing (the rate is 0), and it should not be fitted afterwards.
        encoded: The pool.
        sets: Evaluation sets; without one the forward pass is timed on the pool.
        collate: Makes batches.
        device: Where the fit will be.
        clock: Seconds: of the wall, or of the processor.
    """
    h: Any = module.hparams
    module.keep_precision(training_precision(h.dtype, h.model, h.revision, device))
    begun = clock()
    with isolate_rng():
        module.configure_model()
    module.to(device)
    start = clock() - begun
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def on_device(items: Sequence[Any]) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in collate(items).items()}

    def step(items: Sequence[Any]) -> None:
        module.training_step(on_device(items), 0)["loss"].backward()
        module._step_mean.reset()
        optimizer.step()
        optimizer.zero_grad()

    def read(items: Sequence[Any]) -> None:
        module.response_nll(on_device(items))

    rows = _sample(len(encoded))
    pool = encoded.__getitems__(rows.tolist())
    evaluated = [(row, one) for s in sets for row, one in enumerate(s.encoded)] or pool
    step([min(pool, key=lambda item: _length(item))])  # to warm up
    train = _rate(step, _spread(pool), TRAIN_SECONDS, device, clock)
    module.eval()
    return Speed(train, _rate(read, _spread(evaluated), READ_SECONDS, device, clock), start, peak_memory(device.type))


def estimate_fit(arguments: list[str], clock: Callable[[], float] = time.monotonic) -> FitEstimate:
    """What `im-lightning fit` with these arguments would take; nothing is scored, trained or written."""
    from im_lightning.training.cli import run_fit

    class Made(Exception):
        """Carries the parts of the fit out of it, before it begins."""

    begun = clock()

    def stop(cli: Any) -> None:
        raise Made(cli)

    try:
        run_fit(arguments, before=stop)
    except Made as made:
        (cli,) = made.args
    reading = clock() - begun
    trainer, data, module = cli.trainer, cli.datamodule, cli.model
    data._load()
    speed = measure_speed(
        module, data.encoded, list(data.eval_sets.values()), data.collate, trainer.strategy.root_device, clock
    )
    speed = Speed(speed.train, speed.read, speed.start + reading, speed.memory)
    choice = data.choice
    rows = choice.subset_size or choice.budget or len(data.pool)
    lengths = [_length(item) for item in data.encoded.__getitems__(_sample(len(data.pool)).tolist())]
    evaluated = [_length((row, one)) for s in data.eval_sets.values() for row, one in enumerate(s.encoded)]
    callback = next(one for one in trainer.callbacks if isinstance(one, InstructMiningCallback))
    devices = trainer.num_devices * trainer.num_nodes
    asked = {name: getattr(trainer, name) for name in ("max_epochs", "max_steps", "accumulate_grad_batches")}
    steps, epochs = run_length(rows, data.hparams["batch_size"] * devices, asked)
    share, evaluations = (1.0, 1) if callback.curve is None else callback.curve.cost(steps)
    scored = data.hparams["scores"] is not None or not (choice.designed or choice.rule or data.hparams["indicators"])
    return FitEstimate(
        rows=rows,
        row_tokens=float(np.mean(lengths)),
        epochs=epochs,
        eval_rows=len(evaluated),
        eval_tokens=float(sum(evaluated)),
        base=callback.evaluate_base,
        unscored=not scored,
        speed=speed,
        share=share,
        evaluations=evaluations,
        devices=devices,
    )


def _length(item: Any) -> int:
    return sum(len(one.input_ids) for one in (item[1], *item[1].earlier))


def _sample(rows: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(rows)[:_SAMPLE_ROWS]


def _spread(items: Sequence[Any]) -> Iterator[list[Any]]:
    """Batches without end, each of short, middling and long rows, as the whole is."""
    ordered = sorted(items, key=_length)
    count, offset = min(_STEP_ROWS, len(ordered)), 0.5
    while True:
        yield [ordered[int((k + offset) / count * len(ordered))] for k in range(count)]
        offset = (offset + 0.618) % 1.0


def _rate(
    work: Callable[[Sequence[Any]], None],
    batches: Iterator[list[Any]],
    seconds: float,
    device: torch.device,
    clock: Callable[[], float],
) -> float:
    """Seconds per token."""
    tokens, begun = 0, clock()
    for batch in batches:
        work(batch)
        tokens += sum(map(_length, batch))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if clock() - begun > seconds:
            break
    return (clock() - begun) / tokens

"""The evaluation loss: Σ response-token NLL / Σ tokens over a set, exact on any number of ranks.

Every rank runs the same number of batches (filler rows without target tokens make up for what is missing, so that
collectives inside the model would stay in step), the sums and counts of every example are gathered, and there is one
division, at the end. No example counts twice and none is padded in.

Measured besides: the base model, once per frozen folder, since every finetune is compared with it; and the best
checkpoint, recorded beside the final weights, which are what counts.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from im_lightning._lightning import Trainer
from im_lightning._utils.files import parse_json, write_json
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import Progress, log
from im_lightning.data.example import Example
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.models.batching import plan_batches
from im_lightning.models.likelihood import evaluating
from im_lightning.training import shared_base
from im_lightning.training.run.encoded_pool import Collate, EncodedPool

FILLER = -1
ResponseNLL = Callable[[dict[str, Tensor]], Sequence[Tensor] | Tensor]
"""A batch → summed nats and target tokens of each example, and after them perhaps both of its answers' edges."""


class EvalSet:
    """One evaluation set, encoded; its batches hold at most `batch_tokens`, padding included."""

    def __init__(self, name: str, encoded: EncodedPool, collate: Collate, batch_tokens: int) -> None:
        self.name, self.source, self._collate, self.batch_tokens = name, encoded, collate, batch_tokens
        encoded.need(range(len(encoded)))
        self.encoded = [encoded.encoded[row] for row in range(len(encoded))]

    @property
    def examples(self) -> list[Example]:
        return self.source.pool.examples

    @property
    def ids(self) -> list[str]:
        return self.source.pool.ids

    @property
    def digest(self) -> str:
        """Digest of the ids in order."""
        return self.source.pool.digest

    @property
    def instructions(self) -> np.ndarray:
        """int64 [n], which instruction each example is a reference output of."""
        return np.unique([example.prompt_id for example in self.examples], return_inverse=True)[1]

    @property
    def tokens(self) -> int:
        """Of all sequences, prompts included."""
        return int(self.source.lengths(np.arange(len(self))).sum())

    def __len__(self) -> int:
        return len(self.encoded)

    def batches(self, rank: int = 0, world: int = 1) -> list[dict[str, Tensor]]:
        """This rank's batches: as many on every rank; `row` is the position in the set, or `FILLER`."""
        lengths = self.source.lengths(np.arange(len(self)))
        dealt = np.argsort(-lengths, kind="stable")
        parts = [dealt[r::world] for r in range(world)]
        plans = [[rows[batch] for batch in plan_batches(lengths[rows], self.batch_tokens)] for rows in parts]
        most = max(len(plan) for plan in plans)
        made = [self._collate([(int(row), self.encoded[row]) for row in rows]) for rows in plans[rank]]
        return made + [self._filler() for _ in range(most - len(made))]

    def _filler(self) -> dict[str, Tensor]:
        shortest = int(np.argmin([len(e.input_ids) for e in self.encoded]))
        batch = self._collate([(FILLER, self.encoded[shortest])])
        return {**batch, "target_mask": torch.zeros_like(batch["target_mask"])}


@dataclass(frozen=True)
class EvalLosses:
    """Losses of one set.

    Args:
        sums: float64 [n], nats per example.
        counts: int64 [n], its supervised tokens.
        instructions: int64 [n], which instruction it is a reference output of; None where each has its own.
        edge_sums: float64 [n], nats of the first and last token of its answers alone; None where the module that was
            evaluated does not tell them apart.
        edge_counts: int64 [n], the number of these tokens.
    """

    sums: np.ndarray
    counts: np.ndarray
    instructions: np.ndarray | None = None
    edge_sums: np.ndarray | None = None
    edge_counts: np.ndarray | None = None

    @property
    def loss(self) -> float:
        """Nats per token over the whole set; NaN without a token."""
        tokens = int(self.counts.sum())
        return float(self.sums.sum() / tokens) if tokens else math.nan

    @property
    def inner_loss(self) -> float:
        """Nats per token without the first and last token of every answer; NaN where these are not known, or all."""
        if self.edge_sums is None or self.edge_counts is None:
            return math.nan
        return EvalLosses(self.sums - self.edge_sums, self.counts - self.edge_counts).loss

    @property
    def example_loss(self) -> float:
        """Nats per token with every instruction counting alike: the mean over instructions of the mean over their
        reference outputs of nats per token; NaN without a token."""
        known = self.counts > 0
        if not known.any():
            return math.nan
        groups = np.arange(len(self.counts)) if self.instructions is None else self.instructions
        _, groups = np.unique(groups[known], return_inverse=True)
        return float(np.mean(np.bincount(groups, self.sums[known] / self.counts[known]) / np.bincount(groups)))

    def summary(self) -> dict[str, Any]:
        """`{loss, tokens, examples, instructions, log_loss, example_loss, inner_loss}` as a RunRecord keeps it."""
        loss = self.loss
        groups = self.instructions
        return {
            "loss": loss,
            "tokens": int(self.counts.sum()),
            "examples": len(self.counts),
            "instructions": len(self.counts) if groups is None else len(set(groups.tolist())),
            "log_loss": math.log(loss) if loss > 0 else math.nan,
            "example_loss": self.example_loss,
            **({} if self.edge_sums is None else {"inner_loss": self.inner_loss}),
        }

    def columns(self) -> dict[str, Any]:
        """What the ledger keeps of each example (`RunLedger.add_losses`)."""
        kept = ("sums", "counts", "edge_sums", "edge_counts")
        return {name: value.tolist() for name in kept if (value := getattr(self, name)) is not None}


def evaluate(
    sets: Sequence[EvalSet],
    response_nll: ResponseNLL,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    all_sum: Callable[[Tensor], Tensor] | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, EvalLosses]:
    """Losses of every set, by name, under a model in evaluation mode; equal on all ranks.

    A collective where there are several ranks: the sets come in the same order on each, and `all_sum` is needed.
    `context` makes the precision context of each forward pass.
    """
    out = {}
    for one in sets:
        kinds = (torch.float32 if device.type == "mps" else torch.float64, torch.int64) * 2
        totals: list[Tensor] = []
        shown = Progress(f"evaluation on {one.name}", math.ceil(len(one) / world), "rows")
        for batch in one.batches(rank, world):
            batch = {name: value.to(device) for name, value in batch.items()}
            with torch.no_grad(), context():
                got = response_nll(batch)
            real = batch["row"] != FILLER
            rows = batch["row"][real]
            totals = totals or [torch.zeros(len(one), dtype=kind, device=device) for kind in kinds[: len(got)]]
            for total, part in zip(totals, got, strict=True):
                total[rows] = part.detach().to(device, total.dtype)[real]
            if rank == 0:
                shown.advance(len(rows))
        if all_sum is not None and world > 1:
            totals = [all_sum(total) for total in totals]
        sums, counts, *edges = (total.cpu().numpy() for total in totals)
        out[one.name] = EvalLosses(sums.astype(np.float64), counts, one.instructions, *edges)
    return out


def evaluate_with(trainer: Trainer, module: Any, sets: Mapping[str, EvalSet]) -> dict[str, EvalLosses]:
    """`evaluate` with a Trainer's ranks, device and precision; every rank calls it, its process group alive."""
    call = through_wrapper(trainer, module)

    def response_nll(batch: dict[str, Tensor]) -> Sequence[Tensor] | Tensor:
        got = call(batch)
        if isinstance(got, Tensor) and got.shape == (4, len(batch["row"])):
            return got
        rows = (len(batch["row"]),)
        if not isinstance(got, tuple) or len(got) != 2 or any(getattr(part, "shape", None) != rows for part in got):
            cause = "its response_nll did not return two tensors with one number per example of the batch"
            remedy = "return (summed NLL in nats [B], number of response tokens [B])"
            raise RequestError(message(type(module).__name__, cause, remedy))
        return got

    with evaluating(module):
        return evaluate(
            list(sets.values()),
            response_nll,
            trainer.strategy.root_device,
            trainer.global_rank,
            trainer.world_size,
            all_sum(trainer),
            trainer.precision_plugin.val_step_context,
        )


def through_wrapper(trainer: Trainer, module: Any) -> ResponseNLL:
    """The module's `evaluation_nll` or `response_nll`, called through the strategy's wrapper where there is one, as
    Lightning calls `validation_step`: under FSDP only the wrapper's forward gathers the weights."""
    strategy = trainer.strategy
    _, name = _likelihood_of(module)
    redirect = getattr(strategy, "_forward_redirection", None)
    if redirect is None or strategy.model is module or strategy.lightning_module is not module:
        return getattr(module, name)
    return lambda batch: redirect(strategy.model, module, name, batch)


def _likelihood_of(module: Any) -> tuple[type, str]:
    """The method that measures, and the class that has it: a subclass with a `response_nll` of its own is measured by
    that."""
    for kind in type(module).__mro__:
        for name in ("evaluation_nll", "response_nll"):
            if name in vars(kind):
                return kind, name
    return type(module), "response_nll"


def all_sum(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over the Trainer's ranks, on their device; None where there is one rank."""
    if trainer.world_size == 1:
        return None

    def reduce(tensor: Tensor) -> Tensor:
        return trainer.strategy.reduce(tensor.to(trainer.strategy.root_device, copy=True), reduce_op="sum")

    return reduce


def base_losses(trainer: Trainer, module: Any, datamodule: Any, fresh: bool) -> dict[str, float]:
    """Nats per token of the weights that the fit starts from, per evaluation set; every rank calls it.

    The module's `base_weights()`, where it has one, is a context with the base's weights, or None where training has
    changed them; without it, where nothing has been trained yet (`fresh`), the present weights are the base's. Empty
    where there is no evaluation set, or the base's weights are gone.
    """
    base = getattr(module, "base_weights", None)
    weights = base() if callable(base) else nullcontext() if fresh else None
    if not datamodule.eval_sets or weights is None:
        return {}
    path = _note(trainer, module, datamodule) if callable(base) else None
    known = _read(path, datamodule) if path is not None and trainer.is_global_zero else None
    known = trainer.strategy.broadcast(known)
    if known is not None:
        return known
    shared = None if path is None else shared_base.shared
    noted = {} if shared is None else shared.measured  # by runs whose rows or weights differ, in folders of their own
    of = "" if path is None else _measurement(path, module, datamodule)
    if of not in noted:
        with weights:
            losses = evaluate_with(trainer, module, datamodule.eval_sets)
        noted[of] = {name: one.loss for name, one in losses.items()}
    out = dict(noted[of])
    if path is not None and trainer.is_global_zero and all(math.isfinite(loss) for loss in out.values()):
        try:
            write_json(path, {"losses": out, "of": _of(datamodule)})
        except InstructMiningError as error:  # it only saves time
            log(str(error))
    return out


def _note(trainer: Trainer, module: Any, datamodule: Any) -> Path | None:
    """Where the losses of this base are kept; None where the module trains another model than the data module names."""
    options = module.hparams
    if options.get("model") != datamodule.hparams["model"] or options.get("revision") != datamodule.hparams["revision"]:
        return None
    kind, name = _likelihood_of(module)
    numerics = {
        "dtype": module.numerics()["precision"] if hasattr(module, "numerics") else options.get("dtype"),
        "precision": str(trainer.precision_plugin.precision),
        "device": trainer.strategy.root_device.type,
        "full": not options.get("lora_rank"),
        **({"quantization": options["quantization"]} if options.get("quantization") else {}),
        **({"likelihood": f"{kind.__module__}.{kind.__qualname__}"} if name == "response_nll" else {}),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return datamodule.run_folder / "base" / f"{digest_json(numerics)}.json"


def _measurement(path: Path, module: Any, datamodule: Any) -> str:
    """Digest of what a base's losses depend on; the name of their note is that of the numerics."""
    coding = datamodule.coding
    sets = {name: [one.digest, one.batch_tokens] for name, one in datamodule.eval_sets.items()}
    return digest_json([coding.model, coding.digest, sets, module.hparams.get("token_budget"), path.name])


def _of(datamodule: Any) -> str:
    """Digest of the base and of the evaluation rows; a folder named by run_dir may be of others (on_mismatch=warn)."""
    return digest_json([datamodule.inputs[name] for name in ("evaluation", "model", "template", "max_length")])


def _read(path: Path, datamodule: Any) -> dict[str, float] | None:
    """What a note holds; None where it is of another base or other rows. Those of earlier versions do not say."""
    of = _of(datamodule)
    try:
        noted = parse_json(path.read_text(encoding="utf-8"))
        losses = noted["losses"] if noted.get("of", of) == of else {}
        return {name: float(losses[name]) for name in sorted(datamodule.eval_sets)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not measured yet, or torn: measured again


def best_losses(trainer: Trainer, module: Any, datamodule: Any) -> dict[str, float]:
    """Nats per token of the best checkpoint's weights, per evaluation set; every rank calls it.

    The module has its present weights again afterwards. Empty where no checkpoint was kept by a monitored value, or
    where a rank cannot put its weights into the module as they are (sharded, or in a folder that it does not see).
    """
    checkpoint: Any = trainer.checkpoint_callback
    if not datamodule.eval_sets or getattr(checkpoint, "best_model_score", None) is None:
        return {}
    named = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    own = {name: value for kind in named for name, value in kind}  # a tied weight stands in checkpoints under each name
    state = _weights(Path(checkpoint.best_model_path))
    fits = bool(state) and all(name in own and own[name].shape == value.shape for name, value in state.items())
    reduce, votes = all_sum(trainer), torch.tensor(float(fits))
    if (votes if reduce is None else reduce(votes)).item() < trainer.world_size:
        if trainer.is_global_zero:
            cause = "not all ranks can put its weights into the module as they are"
            log(f"{checkpoint.best_model_path}: the best checkpoint's evaluation loss is not measured: {cause}")
        return {}
    with _holding(own, state):
        losses = evaluate_with(trainer, module, datamodule.eval_sets)
    return {name: one.loss for name, one in losses.items()}


def best_note(trainer: Trainer) -> str:
    """Which checkpoint is the best, for the record; "" where none was kept by a monitored value."""
    checkpoint: Any = trainer.checkpoint_callback
    score = getattr(checkpoint, "best_model_score", None)
    if score is None:
        return ""
    return f"best checkpoint by {checkpoint.monitor} ({float(score):.6g}): {checkpoint.best_model_path}"


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's state_dict; {} where there are none to be read here."""
    if not path.is_file():
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError):
        return {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@contextmanager
def _holding(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[None]:
    """The module's tensors hold other values inside, and their own, kept in the host's memory, again afterwards: a
    device that trains all weights has no room for a second copy."""
    before = {name: own[name].detach().to("cpu", copy=True) for name in state}
    try:
        _copy(own, state)
        yield
    finally:
        _copy(own, before)


def _copy(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)

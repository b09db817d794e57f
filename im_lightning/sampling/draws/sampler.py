"""`QualityWeightedSampler` and `ResumableDataLoader`: draws by weight, resumable at any row and world size.

It subclasses `DistributedSampler` because that is what Lightning, Fabric and Accelerate leave alone, but it needs no
process group: the draw is a pure function of (weights, seed, epoch), each rank makes it for itself and takes its part.
The loader tells the sampler which rows it has handed out, so that a fit resumes at the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from im_lightning._utils.hashing import digest_bytes
from im_lightning._utils.rng import checked_word, generator
from im_lightning.errors import DataError, RequestError, message
from im_lightning.sampling.draws.systematic import (
    Floats,
    Plan,
    Rows,
    checked_groups,
    checked_weights,
    expected_counts,
    multinomial_sample,
    plan_draw,
    repeated_sample,
    systematic_sample,
)

_STATE: dict[str, type] = dict.fromkeys(("seed", "epoch", "position", "num_samples"), int)
_STATE |= {"replacement": bool, **dict.fromkeys(("weights", "pending", "draws", "numpy"), str)}


class QualityWeightedSampler(DistributedSampler[int]):
    """Draws `num_samples` rows per epoch by weight; rank r yields every `num_replicas`-th of them, from the r-th on.

    Without replacement row i is drawn with probability exactly min(1, c·w_i) (`sampling.draws.systematic`); with it
    draws are independent. All ranks get equal counts: at most `num_replicas` - 1 rows at the end of a draw are left
    out. `draws_per_epoch` is the number asked for; `num_samples`, as in every DistributedSampler, is this rank's.

    The sampler knows what was drawn, not what was used: rows that workers have prefetched do not count. Whoever hands
    out the batches says so with `advance`; `ResumableDataLoader` does. Then `state_dict` holds (seed, epoch, position),
    position counted over all ranks, so the state of one rank is valid on every rank and for every number of ranks.

    Args:
        weights: One finite, non-negative number per row (sequence, array or tensor); they are copied. 0 is never drawn.
        num_samples: Rows drawn per epoch over all ranks.
        replacement: Whether a row may be drawn more than once in an epoch.
        num_replicas: Number of ranks.
        rank: This rank, from 0.
        seed: Together with the epoch it decides the draw; 0 ≤ seed < 2^64. Equal on all ranks.
        repeat: With replacement, how often a row may come at most in an epoch (`expected_counts`); None for no limit.
        groups: One label per row, such as its prompt: an epoch holds at most one row of each. Groups are drawn by the
            sums of their weights, W, and one row of each by its own: with probability min(1, c·W)·w_i / W.

    Raises:
        RequestError: a weight is negative, NaN or infinite; fewer rows (groups) with a positive weight than
            `num_samples` without replacement; groups with replacement; `rank` or `num_replicas` out of range; fewer
            rows than ranks.

    >>> sampler = QualityWeightedSampler([0.0, 1.0, 1.0, 2.0], num_samples=3)
    >>> sorted(sampler)
    [1, 2, 3]
    """

    def __init__(
        self,
        weights: Sequence[float] | NDArray[Any] | Any,
        num_samples: int,
        replacement: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        repeat: float | None = None,
        groups: Sequence[Any] | NDArray[Any] | None = None,
    ) -> None:
        if num_replicas < 1 or not 0 <= rank < num_replicas:
            cause = "ranks count from 0 to num_replicas - 1"
            remedy = "pass trainer.distributed_sampler_kwargs, or leave both out on one process"
            raise RequestError(message(f"rank={rank}, num_replicas={num_replicas}", cause, remedy))
        self._weights = checked_weights(weights)
        self.replacement = bool(replacement)
        self.repeat = None if repeat is None or not replacement else float(repeat)
        self._groups = None if groups is None else checked_groups(groups, len(self._weights))
        if self.replacement and groups is not None:
            cause = "a draw with replacement may repeat rows, so that one row per group cannot be kept"
            raise RequestError(message("replacement with groups", cause, "leave out one of them"))
        self._plan = self._planned(self._weights, num_samples)
        self.draws_per_epoch = int(num_samples)
        if num_samples < num_replicas:
            cause = f"{num_replicas} ranks would not get a row each"
            remedy = f"draw at least {num_replicas} rows or use fewer ranks"
            raise RequestError(message(f"num_samples={num_samples}", cause, remedy))
        rows, seed = cast(Any, range(num_samples)), checked_word("seed", seed)
        super().__init__(rows, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        self.dataset = cast(Any, range(len(self._weights)))
        self._digest = _digest_of(self._weights, self._groups)
        self._pending: tuple[Floats, Plan | None, str] | None = None
        self._start = 0  # where the next iteration begins; consumed by it
        self._position = 0  # rows handed out in this epoch, over all ranks
        self._order: tuple[int, int, Rows] | None = None  # (seed, epoch, drawn rows)

    @property
    def weights(self) -> Floats:
        """The weights in force, float64 [N], read-only."""
        return self._weights

    @property
    def position(self) -> int:
        """Rows handed out in this epoch, over all ranks."""
        return self._position

    def __len__(self) -> int:
        """Rows of a full epoch on this rank, also after a resume in its middle."""
        return self.num_samples

    def remaining(self) -> int:
        """Rows that the next iteration will yield on this rank."""
        return (self.draws_per_epoch - self._start) // self.num_replicas

    def draw(self) -> Rows:
        """The global draw of the current epoch, int64 [num_samples] in visiting order; equal on all ranks."""
        if self._order is None or self._order[:2] != (self.seed, self.epoch):
            self._order = None  # frees the last epoch's before making this one's
            rng = generator(self.seed, self.epoch)
            if self.repeat is not None:
                rows = repeated_sample(self._weights, self.draws_per_epoch, self.repeat, rng)
            elif self.replacement:
                rows = multinomial_sample(self._weights, self.draws_per_epoch, rng)
            else:
                rows = systematic_sample(self._weights, self.draws_per_epoch, rng, self._plan, self._groups)
            self._order = (self.seed, self.epoch, rows)
        return self._order[2]

    def __iter__(self) -> Iterator[int]:
        """Yields this rank's rows from the restored position, once; the next iteration starts at the beginning."""
        rows = self.draw()
        start, count, self._start = self._start, self.remaining(), 0
        self._position = start
        return _as_ints(rows[start : start + count * self.num_replicas][self.rank :: self.num_replicas])

    def advance(self, rows: int) -> None:
        """Counts `rows` rows of this rank (and as many of every other rank) as handed out."""
        self._position = min(self._position + rows * self.num_replicas, self.draws_per_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Moves to an epoch. Only if it is another one does the position return to 0 and a pending update of weights
        take effect: Lightning calls this again for the epoch that a checkpoint was restored into."""
        if checked_word("epoch", epoch) == self.epoch:
            return
        self.epoch = int(epoch)
        self._start = self._position = 0
        if self._pending is not None:
            self._weights, self._plan, self._digest = self._pending
            self._pending = self._order = None

    def update_weights(self, weights: Sequence[float] | NDArray[Any] | Any) -> None:
        """Replaces the weights from the next epoch on (the next `set_epoch` with another epoch); the current epoch
        goes on as drawn. Call it on every rank with the same weights.

        Raises:
            RequestError: another number of rows, or weights that the constructor would refuse.
        """
        new = checked_weights(weights)
        if len(new) != len(self._weights):
            cause = f"{len(new)} weights were given for {len(self._weights)} rows"
            raise RequestError(message("update_weights", cause, "pass one weight per row of the pool, in its order"))
        self._pending = (new, self._planned(new, self.draws_per_epoch), _digest_of(new, self._groups))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain ints and strings, valid on every rank and for any number of ranks."""
        return {
            "seed": int(self.seed),
            "epoch": int(self.epoch),
            "position": int(self._position),
            "num_samples": self.draws_per_epoch,
            "replacement": self.replacement,
            **({} if self.repeat is None else {"repeat": self.repeat}),
            "weights": self._digest,
            "pending": self._pending[2] if self._pending else "",
            "draws": _fingerprint(),
            "numpy": np.__version__,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken; seed and epoch come from it. Restoring twice does no harm.

        Raises:
            DataError: `state` is not one of this sampler's.
            RequestError: it was taken under other weights, another number of draws, or a numpy that draws otherwise.
        """
        wrong = [key for key, kind in _STATE.items() if not isinstance(state.get(key), kind)]
        if wrong or not 0 <= state["position"] <= state["num_samples"]:
            cause = f"{', '.join(wrong) or 'position'} is missing or of the wrong kind"
            remedy = "resume from a checkpoint that a QualityWeightedSampler wrote"
            raise DataError(message("sampler state", cause, remedy))
        for key, here, remedy in (
            ("num_samples", self.draws_per_epoch, "resume with the budget that the checkpoint was made with"),
            ("replacement", self.replacement, "resume with the same replacement="),
            ("repeat", self.repeat, "resume with the same mixture, or start a new fit"),
            ("weights", self._digest, "resume with the same pool, rule and weighting, or start a new fit"),
            ("draws", _fingerprint(), f"resume under numpy {state['numpy']} (here: {np.__version__})"),
        ):
            if state.get(key) != here:
                cause = f"the checkpoint has {key} {state.get(key)}, this sampler {here}"
                raise RequestError(message("resume", cause, remedy))
        if state["pending"] and (self._pending is None or self._pending[2] != state["pending"]):
            here = self._pending[2] if self._pending else "none"
            cause = f"the checkpoint holds weights {state['pending']} for the next epoch, this sampler {here}"
            remedy = "call update_weights with the same weights before load_state_dict"
            raise RequestError(message("resume", cause, remedy))
        self.seed = checked_word("seed", state["seed"])
        self.epoch = checked_word("epoch", state["epoch"])
        self._start = self._position = state["position"]

    def _planned(self, weights: Floats, num_samples: int) -> Plan | None:
        if not self.replacement:
            return plan_draw(weights, num_samples, self._groups)
        if self.repeat is not None:
            expected_counts(weights, num_samples, self.repeat)  # says what is wrong
        elif num_samples < 1 or not weights.any():
            multinomial_sample(weights, num_samples, generator(0))  # says what is wrong
        return None


class ResumableDataLoader(DataLoader[Any]):
    """A `DataLoader` over a `QualityWeightedSampler` whose position counts batches *yielded*, not prefetched.

    `__iter__` is a generator: nothing, no worker either, starts before the first batch is asked for, so a `set_epoch`
    in between is respected; and the position advances just before each batch is handed out, so a checkpoint written
    while a batch is trained on counts that batch. `state_dict` and `load_state_dict` are the sampler's: one sampler may
    serve several loaders, one after the other, and restoring through either does the same.

    With another sampler (Lightning's `overfit_batches` puts in a sequential one) it is an ordinary DataLoader: it keeps
    no position and its state is empty.

    Args: as for `torch.utils.data.DataLoader`, the `further` ones by name; batches come from `sampler` and `batch_size`
        only.

    Raises:
        RequestError: no sampler, a `batch_sampler`, or `in_order=False`, under which rows could not be counted.

    >>> sampler = QualityWeightedSampler([1.0] * 6, num_samples=6)
    >>> loader = ResumableDataLoader(range(6), batch_size=2, sampler=sampler)
    >>> _ = next(iter(loader))
    >>> loader.state_dict()["position"]
    2
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[int] | None = None,
        batch_sampler: None = None,
        **further: Any,
    ) -> None:
        if sampler is None or shuffle or batch_sampler is not None or not further.pop("in_order", True):
            cause = "its order must come from sampler= and batch_size= alone, or it could not be resumed"
            remedy = "pass sampler=QualityWeightedSampler(…); leave out shuffle, batch_sampler and in_order"
            raise RequestError(message("ResumableDataLoader", cause, remedy))
        super().__init__(dataset, batch_size, sampler=sampler, **further)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, QualityWeightedSampler):
            yield from super().__iter__()
            return
        left = sampler.remaining()  # before the workers start: they consume the restored position
        size = self.batch_size or 1
        for batch in super().__iter__():
            rows = min(size, left)
            left -= rows
            sampler.advance(rows)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state: rows handed out so far, over all ranks."""
        return self.sampler.state_dict() if isinstance(self.sampler, QualityWeightedSampler) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the sampler's state; the next iteration goes on from there.

        Raises:
            RequestError: the sampler keeps no position, yet the state holds one.
        """
        if isinstance(self.sampler, QualityWeightedSampler):
            self.sampler.load_state_dict(state)
        elif state:
            cause = f"the loader's sampler is a {type(self.sampler).__name__}, which keeps no position"
            raise RequestError(message("resume", cause, "pass sampler=QualityWeightedSampler(…)"))


def _as_ints(rows: Rows) -> Iterator[int]:
    for start in range(0, len(rows), 4096):  # a list of all of them would take 32 bytes more per row
        yield from rows[start : start + 4096].tolist()


def _digest_of(weights: Floats, groups: Rows | None) -> str:
    parts = [weights] if groups is None else [weights, groups.astype("<i8")]
    return digest_bytes(*(cast(bytes, part.data.cast("B")) for part in parts))  # hashed in place, without a copy


@lru_cache(maxsize=1)
def _fingerprint() -> str:
    """Digest of two small draws: numpy promises its bit streams for ever, but not what `shuffle` makes of them."""
    weights = checked_weights(np.arange(1.0, 1001.0) ** 3)
    parts = [draw(weights, 300, generator(7, 11)) for draw in (systematic_sample, multinomial_sample)]
    return digest_bytes(*(part.astype("<i8").tobytes() for part in parts))[:16]

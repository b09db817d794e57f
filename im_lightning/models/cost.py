"""What work costs, in floating-point operations and seconds: the one place where either is reckoned.

A token that a model reads costs two operations per parameter, a multiplication and an addition; one that it is trained
on three times as many: forward 1, backward 2 (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Parameters are those
that a token is multiplied with: the tables of embeddings are left out. Attention over the context is left out, and an
adapter counts like all weights, though its backward pass needs less: seconds show what a machine made of it.

What scoring took, pass by pass, is noted in a file beside the table, over all calls that wrote it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from im_lightning._utils.files import parse_json, plain, write_json
from im_lightning._utils.numbers import time_text


@dataclass(frozen=True)
class Cost:
    """Operations and seconds of some work; NaN where they are not known.

    >>> (Cost(2e12, 30.0) + Cost(1e12, 90.0)).text
    '3.00e+12 FLOPs, 2 min'
    """

    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.seconds * times)

    @property
    def text(self) -> str:
        """For a sentence; says of each whether it is known."""
        flops = "FLOPs not known" if math.isnan(self.flops) else f"{self.flops:.2e} FLOPs"
        return f"{flops}, {'seconds not known' if math.isnan(self.seconds) else time_text(self.seconds)}"

    def to_json(self) -> dict[str, float | None]:
        """JSON-like; what is not known is None."""
        return {n: None if math.isnan(v) else v for n, v in (("flops", self.flops), ("seconds", self.seconds))}


UNKNOWN = Cost(math.nan, math.nan)
"""Of work that was not noted."""


def operations(parameters: float, read: float = 0, trained: float = 0) -> float:
    """Floating-point operations of a model over tokens.

    Args:
        parameters: That a token is multiplied with; NaN where they are not known.
        read: Tokens through a forward pass alone.
        trained: Tokens through a forward and a backward pass.

    >>> operations(1e6, read=10), operations(1e6, trained=10), operations(float("nan"))
    (20000000.0, 60000000.0, 0.0)
    """
    tokens = read + 3 * trained
    return 2.0 * parameters * tokens if tokens else 0.0


def base_parameters(model: str | os.PathLike[str], revision: str | None = None) -> float:
    """Parameters of a checkpoint that a token is multiplied with, from its configuration alone; NaN for families whose
    tokens use only some of them (experts), and for what is no causal model.

    Raises:
        RequestError: there is no such checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from im_lightning.models.checkpoint import load_config
    from im_lightning.models.device import model_work

    config = load_config(model, revision)
    try:
        with torch.device("meta"):
            work = model_work(AutoModelForCausalLM.from_config(config))
    except (ValueError, RuntimeError):  # no causal model, or one that cannot be laid out without its weights
        return math.nan
    return math.nan if work is None else float(work.parameters)


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum."""
    return sum(costs, Cost())


def mean(costs: Iterable[Cost]) -> Cost:
    """Of one of these, on average."""
    found = list(costs)
    return total(found) * (1 / len(found))


def cost_path(table: str | Path) -> Path:
    """`scores.parquet` → `scores.parquet.cost.json`."""
    return Path(f"{table}.cost.json")


def is_note(path: Path) -> bool:
    """Whether a file is what `note_cost` writes beside a table, of earlier versions too, and not a user's own."""
    if not path.name.lower().endswith(".parquet.cost.json"):
        return False
    value = parse_json(path.read_bytes())
    return value.keys() <= {"pool", "seconds", "flops"} and isinstance(value["seconds"], dict)


def note_cost(table: str | Path, steps: Iterable[Any], pool: str | None = None) -> None:
    """Adds the passes of one scoring (`scoring.report.Step`) to the file beside the table; one that found everything in
    the store adds none. What a table of another pool (its digest) cost, which had the same name, is left behind."""
    known = _read(table, pool)
    for step in steps:
        known[step.label] = known.get(step.label, Cost()) + Cost(step.flops, step.seconds)
    seconds = {label: round(cost.seconds, 3) for label, cost in known.items()}
    flops = {label: cost.flops for label, cost in known.items()}
    write_json(cost_path(table), plain({"pool": pool, "seconds": seconds, "flops": flops}))


def read_cost(table: str | Path) -> Cost | None:
    """What scoring took in all; None where nothing was noted. Notes of earlier versions have seconds alone."""
    known = _read(table)
    return total(known.values()) if known else None


def _read(table: str | Path, pool: str | None = None) -> dict[str, Cost]:
    try:
        value = parse_json(cost_path(table).read_bytes())
        if pool is not None and value.get("pool") not in (None, pool):  # earlier versions did not say
            return {}
        flops = value.get("flops", {})
        found = {label: (flops.get(label), float(seconds)) for label, seconds in value["seconds"].items()}
        return {str(n): Cost(math.nan if f is None else float(f), s) for n, (f, s) in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none was noted, or the file is not ours

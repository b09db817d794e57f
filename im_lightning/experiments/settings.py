"""Settings that the experiments share, each declared here once: what a study starts from, and how it finetunes.

Commands take the groups as parameters and offer a flag per field, described by the text under it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from im_lightning.data.settings import Encoding, Reading

GROUPS = ("study", "encoding", "reading")
"""Names of the parameters whose fields stand beside the others in a result's file, as their flags do."""


@dataclass(frozen=True)
class Study:
    """What a comparison or a search starts from."""

    data: list[str]
    """The pool, as it was scored: files, folders or data sets."""
    scores: str
    """Score table of the pool (im-lightning score)."""
    rule: str | None = None
    """Rule file or published name; a comparison without one leaves out the arms that need it."""
    weighting: str = "auto"
    """Of the rule's weights: auto, tilt, softmax, rank or top."""
    seed: int = 0
    """The first seed; the others follow it."""
    force: bool = False
    """Go on with an evaluation set that the rule was fitted on, a rule of other models, or one that its own runs find
    no better than the mean; says so loudly."""


@dataclass(frozen=True)
class Tuning:
    """How each finetune is made, as the commands offer it."""

    lora_rank: int = 0
    """Rank of LoRA; 0 finetunes all weights. Under LoRA the paper saw no effect of selection."""
    learning_rate: float | None = None
    """Peak learning rate; by default 2e-5, with LoRA 2e-4."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises."""
    epochs: int = 1
    """Passes over the rows; in a comparison, tokens and steps are those of one."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    device: str = "auto"
    """cpu, cuda, mps or auto; one device."""
    dtype: str = "auto"
    """fp32, bf16 or auto (bf16 where the device has it)."""


@dataclass(frozen=True)
class TuningSettings(Tuning):
    """How each finetune of a study is made, all of it."""

    batch_size: int = 10
    """Rows per micro-batch, where the study does not set them otherwise."""
    gradient_clip: float = 1.0
    """Largest gradient norm."""

    @property
    def rate(self) -> float:
        """The peak learning rate: where none is given, 2e-4 for an adapter, 2e-5 for all weights."""
        usual = 2e-4 if self.lora_rank else 2e-5
        return usual if self.learning_rate is None else self.learning_rate

    @property
    def title(self) -> str:
        """`full finetuning, learning rate 0.001`."""
        method = f"LoRA of rank {self.lora_rank}" if self.lora_rank else "full finetuning"
        return f"{method}, learning rate {self.rate:g}"


@dataclass(frozen=True)
class StudySettings:
    """What the finetunes of a comparison or a search share."""

    study: Study
    encoding: Encoding
    reading: Reading
    tuning: TuningSettings

    @property
    def model(self) -> str:
        """The base model, which the commands require."""
        return str(self.encoding.model)

    @property
    def options(self) -> dict[str, Any]:
        """What the data module takes of them."""
        return {"force": self.study.force, "scores": self.study.scores, **asdict(self.encoding), **asdict(self.reading)}

    def to_json(self) -> dict[str, Any]:
        """JSON-like; the fields of shared groups beside the others, as the flags are."""
        out: dict[str, Any] = {}
        for name, value in asdict(self).items():
            out |= value if name in GROUPS else {name: value}
        return {**out, "tuning": self.tuned}

    @property
    def tuned(self) -> dict[str, Any]:
        """How they are finetuned, JSON-like, the learning rate settled."""
        return {**asdict(self.tuning), "learning_rate": self.tuning.rate}

"""What the likelihood rows time: our pass with its model in memory, the plain loop over rows, and the limit."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.progress import Progress, silence
from im_lightning.data.example import Example
from im_lightning.data.settings import Encoding
from im_lightning.data.tokenization import unconditional_start
from im_lightning.indicators.base import get_indicators
from im_lightning.scoring.passes.language_model import LanguageModelPass
from im_lightning.scoring.plan import ScoringPlan
from im_lightning.scoring.settings import Numerics, Setup

if TYPE_CHECKING:
    import torch


class OurPass:
    """Perplexity through the language-model pass: tokenising, batches, forward, store; the model is loaded before.

    `names` are the indicators computed, perplexity first; ppl_unconditional and ifd need the same pass.

    Attributes:
        values: Perplexities of the last run, float64 [n].
        tokens: Real tokens of the last run.
        padded: Tokens with padding.
        flops: Useful operations.
    """

    def __init__(
        self, model: str, precision: str, examples: Sequence[Example], folder: Path, names: tuple[str, ...] = ("ppl",)
    ) -> None:
        self.examples, self.names = list(examples), names
        cache = str(folder / f"cache-{precision}-{Path(model).name}")
        encoding = Encoding(model, template="alpaca", cache_dir=cache)
        self.setup = Setup(encoding, numerics=Numerics(precision=precision, device="cpu"))
        self.loaded = self._pass()[1]
        bare = set(vars(self.loaded))
        with silence():
            self.loaded.load()
        self._held = {
            **{name: vars(self.loaded)[name] for name in vars(self.loaded).keys() - bare},
            "budget": self.loaded.budget,
        }
        self.values: NDArray[np.float64] = np.empty(0)
        self.tokens = self.padded = 0
        self.flops = 0.0

    def _pass(self) -> tuple[ScoringPlan, LanguageModelPass]:
        """A pass with everything still to do: the store's values are removed, the weights' hash stays known."""
        for values in itertools.chain(*(self.setup.root.glob(f"{name}-*") for name in self.names)):
            shutil.rmtree(values)
        plan = ScoringPlan(self.examples, get_indicators(self.names), self.setup)
        [only] = plan.passes
        if not isinstance(only, LanguageModelPass):
            raise TypeError(f"{only} is not the language-model pass")
        return plan, only

    def _ready(self) -> tuple[ScoringPlan, LanguageModelPass]:
        """The same with all that `load` sets."""
        plan, ours = self._pass()
        vars(ours).update(self._held)
        return plan, ours

    def __call__(self) -> None:
        plan, ours = self._ready()
        rows = ours.rows()
        with silence():
            ours.work(ours.pieces(rows), Progress("", len(rows), "rows"))
        ours.flush()
        self.values = plan.works["ppl"].column.values
        self.tokens, self.padded, self.flops = ours.tokens, ours.padded_tokens, ours.flops

    def padding(self) -> float:
        """Share of padding among all tokens of the batches, as planned; no model is run."""
        ours = self._ready()[1]
        real = padded = 0
        for part in ours.parts(ours.pieces(ours.rows())):
            for side, at in ours.batches(part):
                lengths = [len(side.encoded[i].input_ids) for i in at]
                real, padded = real + sum(lengths), padded + len(lengths) * max(lengths)
        return 1.0 - real / padded


class PlainLoop:
    """Perplexity as the IFD tools do it: a row at a time, logits of all its tokens, one synchronisation per row."""

    def __init__(self, ours: OurPass) -> None:
        self.ours = ours
        self.values: NDArray[np.float64] = np.empty(0)

    def __call__(self) -> None:
        import torch

        tokenizer, model = self.ours.loaded.tokenizer, self.ours.loaded.model
        values = []
        start_alone = unconditional_start(tokenizer, self.ours.loaded.template)[0]
        with torch.inference_mode():
            for example in self.ours.examples:
                [[turn]] = self.ours.loaded.template.render([example])
                prompt = tokenizer(turn.prompt)["input_ids"]
                response = tokenizer(turn.response, add_special_tokens=False)["input_ids"]
                for start in (prompt, start_alone) if len(self.ours.names) > 1 else (prompt,):
                    ids = torch.tensor([start + response])
                    logits = model(input_ids=ids, use_cache=False).logits[0]
                    at = slice(len(start) - 1, ids.shape[1] - 1)
                    values.append(torch.nn.functional.cross_entropy(logits[at].float(), ids[0, len(start) :]).item())
        self.values = np.exp(values)[:: len(values) // len(self.ours.examples)]


def comparable(examples: Sequence[Example], n: int) -> list[Example]:
    """The first n rows that the plain loop can do: one turn, a response, nothing to cut at 1,024 tokens."""
    fitting = (e for e in examples if len(e.messages) == 2 and e.response.strip() and len(_text(e)) < 2500)
    return list(itertools.islice(fitting, n))


def _text(example: Example) -> str:
    return "".join(turn.content for turn in example.messages)


def limit(dtype: torch.dtype, width: int, inner: int, flops: float) -> tuple[Callable[[], None], float]:
    """Matrix products of about `flops` operations in a layer's own shapes, 2,048 tokens at once, and their number."""
    import torch

    tokens, one = 2048, 2.0 * 2048 * width * inner
    states = torch.randn(tokens, width).to(dtype)
    up, down = torch.randn(inner, width).to(dtype), torch.randn(width, inner).to(dtype)
    pairs = max(1, math.ceil(flops / (2 * one)))

    def multiply() -> None:
        with torch.inference_mode():
            for _ in range(pairs):
                torch.nn.functional.linear(torch.nn.functional.linear(states, up), down)

    return multiply, 2 * one * pairs

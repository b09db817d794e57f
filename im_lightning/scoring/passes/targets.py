"""The passes of `ppl_tuned` and `gradient_similarity`: the base model finetuned on the target rows, and gradients.

Both go over the examples as the base model's own pass does. The finetune is made once and kept in the store's folder:
rows that are scored later, or elsewhere, are scored by the very same update.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.files import atomic_path, parse_json
from im_lightning._utils.hashing import digest_bytes, digest_json
from im_lightning._utils.progress import log, progress
from im_lightning.data.overlap.keys import EvaluationRows
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.models.cost import operations
from im_lightning.models.device import Lanes, training_tokens
from im_lightning.models.likelihood import collate, padding_id
from im_lightning.models.low_rank import Pair, Recipe, attach, finetune
from im_lightning.models.row_gradients import RowGradients
from im_lightning.scoring.passes.language_model import LanguageModelPass, Output, Side
from im_lightning.scoring.settings import Setup

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from im_lightning.data.example import Example

UNNAMED = "the pool"
"""What a pool is called that was handed over as rows, or made of published sets."""
_SAME = {
    "exact": "the same content",
    "normalised": "the same but for case and punctuation",
    "prompt": "the same prompt",
}


def check_targets(setup: Setup, others: Mapping[str, Sequence[Example]]) -> None:
    """Refuses target rows that are also rows of a pool or an evaluation set, named by its file.

    Of a pool, since such a row would be found to be like itself; of an evaluation set, since what is chosen by it would
    then be evaluated on what it was chosen for.

    Raises:
        RequestError: names both files, and the first rows that they share.
    """
    targets = setup.targets
    if targets is None:
        return
    there, own = EvaluationRows(targets.rows), setup.models.targets or "the target rows"
    for name, examples in others.items():
        found = [(row, shared) for row, one in enumerate(examples) if (shared := there.shared(one)) is not None]
        if found:
            row, (kind, target) = found[0]
            count = "a row" if len(found) == 1 else f"{len(found):,} rows"
            cause = f"it shares {count} with {name}: row {target} is row {row} there ({_SAME[kind]})"
            remedy = "take other rows as targets"
            if name != UNNAMED and setup.models.targets:
                remedy += f"; im-lightning check {own} {name} lists those that are shared"
            raise RequestError(message(f"--targets {own}", cause, remedy))


class TunedPass(LanguageModelPass):
    """Likelihoods under the base model after a short finetune on the target rows."""

    @property
    def kept(self) -> Path:  # type: ignore[override]
        """Where the finetune's update is kept."""
        identity = self.setup.identity_of(self.works[0].indicator)
        return self.setup.root / "tuned" / f"{digest_json(identity)}.safetensors"

    def read_kept(self) -> bytes | None:
        return _sound(self.kept)

    def make_shared(self) -> bytes | None:
        """The update, made where it is not kept."""
        if (known := self.read_kept()) is not None:
            return known
        try:
            self.load()
            return self.shared
        finally:
            self.free()

    def load(self) -> None:
        super().load()
        with _alone(self.kept):
            if self.shared is None:
                self.shared = self.read_kept()
            if self.shared is not None:
                attach(self.model, _from_bytes(self.shared, self.setup.torch_device), Recipe().scale)
                return
            self.shared = _to_bytes(self._finetune())
            with contextlib.suppress(InstructMiningError), atomic_path(self.kept) as temporary:
                temporary.write_bytes(self.shared)  # a worker elsewhere may have no such folder

    def _finetune(self) -> dict[str, Pair]:
        from im_lightning.data.tokenization import check_vocabulary, encode_examples

        targets, recipe = self.setup.targets, Recipe()
        if targets is None:
            raise RuntimeError("the set-up of this pass names no targets")
        rows = sorted(targets.rows, key=lambda one: one.id)  # any order has the same digest
        encoded = encode_examples(rows, self.tokenizer, self.template, self.setup.encoding.max_length)
        check_vocabulary(encoded, rows, self.tokenizer, str(self.setup.encoding.model), self.embeddings)
        how = f"{recipe.epochs} epochs, rank {recipe.rank}, learning rate {recipe.learning_rate:g}"
        log(f"{self.setup.encoding.model}: finetuning on {len(encoded):,} target rows, once ({how})")
        self.trained = recipe.epochs * sum(len(one.input_ids) for one in encoded)
        tokens = self.setup.numerics.batch_tokens
        with progress("finetuning on the targets", len(encoded) * recipe.epochs, "rows") as bar:
            step = lambda share: bar.advance(share * bar.total - bar.done)  # noqa: E731
            return finetune(self.model, encoded, padding_id(self.tokenizer, self.embeddings), recipe, tokens, step)


class GradientPass(LanguageModelPass):
    """One vector per example that stands for the gradient of its loss; into `vectors`."""

    sweeps = 2

    def load(self) -> None:
        super().load()
        made = self.setup.gradient
        self.gradients = RowGradients(self.model, made["rank"], made["dimensions"])
        if self.setup.numerics.batch_tokens is None:  # what the way back needs is kept
            device = self.setup.torch_device
            self.budget.tokens = training_tokens(self.model, device, Lanes(device.type).count)

    def operations(self, tokens: int) -> float:
        return operations(self.parameters, trained=tokens)

    def free(self) -> None:
        self.__dict__.pop("gradients", None)
        super().free()

    def forward(self, side: Side, at: NDArray[np.int64]) -> Output:
        batch = collate([side.encoded[i] for i in at], padding_id(self.tokenizer, self.embeddings), "loss_mask")
        vectors, sums, counts = self.gradients(batch)
        found = vectors.cpu().numpy()
        found[~(np.isfinite(found).all(axis=1) & found.any(axis=1))] = np.nan
        return Output(sums.double().cpu().numpy(), counts.cpu().numpy(), found, batch["input_ids"].numel())


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Other processes that would make the same file wait; where it cannot be written no other looks for it."""
    from filelock import FileLock

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        yield


def _to_bytes(pairs: Mapping[str, Pair]) -> bytes:
    from safetensors.torch import save

    named = {f"{name}.{part}": one.cpu() for name, pair in pairs.items() for part, one in zip("AB", pair, strict=True)}
    told = {"recipe": str(asdict(Recipe()))}
    return save(named, {**told, "digest": _parts(save(named, told))[1]})


def _parts(content: bytes) -> tuple[dict[str, str], str]:
    """What a file of safetensors tells beside its tensors, and the digest of these with their names and shapes."""
    size = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("it has no header")
    told = header.pop("__metadata__", {})
    return told, digest_bytes(digest_json(header).encode(), content[8 + size :])


def _sound(path: Path) -> bytes | None:
    """What the file of an update holds, or None; one that is not sound is named and set aside."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        told, digest = _parts(content)
        if told.get("digest", digest) != digest:
            raise ValueError("its content is not what was written")
        load(content)
        return content
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0][:160]
        log(f"{path}: not a sound finetune on the targets ({cause}); set aside as {path.name}.rejected, made anew")
        with contextlib.suppress(OSError):
            path.rename(path.with_name(f"{path.name}.rejected"))
        return None


def _from_bytes(content: bytes, device: torch.device) -> dict[str, Pair]:
    from safetensors.torch import load

    tensors = {name: one.to(device) for name, one in load(content).items()}
    return {name[:-2]: (one, tensors[f"{name[:-2]}.B"]) for name, one in tensors.items() if name.endswith(".A")}

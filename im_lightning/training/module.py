"""`InstructTuningModule`: finetunes a causal LM on instruction data, with LoRA or in full.

Its contract with the data module and the callback, for writers of their own LightningModule: `batch["row"]` holds the
rows of the pool; `training_step` returns `example_loss` (mean nats per response token) and `row`, both detached;
`response_nll(batch)` returns each example's (sum, count), for the evaluation.

The training loss is one mean over everything an optimiser step saw: all micro-batches, all ranks. Lightning divides
each micro-batch's loss by `accumulate_grad_batches` (A) and DDP averages gradients over the ranks (W). Averaging batch
means so would weigh a token in a short batch more than one in a long batch. Here each micro-batch's loss is (sum of its
terms) / c with a c that is the same for all micro-batches and ranks of the step, so the gradient that arrives is
Σ grad(sum) / (A·W·c);  times  A·W·c / N,  N the number of terms of the whole step, it is the gradient of the global
mean, whatever the batches' sizes. c is the first micro-batch's number of terms (its mean over ranks), so that the loss
keeps the size of a mean and half precision does not overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from im_lightning._lightning import LightningModule, check_trainer, isolate_rng
from im_lightning._utils.files import write_text
from im_lightning._utils.progress import log
from im_lightning.errors import RequestError, message
from im_lightning.models.checkpoint import load_causal_lm, load_tokenizer, quiet
from im_lightning.models.likelihood import response_nll
from im_lightning.training.adapter_card import adapter_card
from im_lightning.training.adapters import attach_lora, check_quantization, quantized_base

DTYPES = ("auto", "fp32", "bf16")
REDUCTIONS = ("token", "example")

Reduce = Callable[[Tensor, str], Tensor]
"""(tensor, "sum" or "mean") -> the tensor reduced over all ranks."""


class StepMean:
    """Counts the terms of one optimiser step and rescales its gradients; empty again after each step.

    Args:
        reduction: "token": every response token weighs the same; "example": every example with at least one token does.
    """

    def __init__(self, reduction: str = "token") -> None:
        if reduction not in REDUCTIONS:
            cause = f"there is no reduction {reduction!r}"
            raise RequestError(message("reduction", cause, f"use one of {', '.join(REDUCTIONS)}"))
        self.reduction = reduction
        self.reset()

    def reset(self) -> None:
        """Forgets a step that was begun and not finished."""
        self._total: Tensor | None = None  # [terms, sum of terms]
        self._reference: Tensor | None = None

    def loss(self, sums: Tensor, counts: Tensor, reduce: Reduce) -> Tensor:
        """The micro-batch's loss for backward: a scalar, (sum of terms) / c. A collective, once in each optimiser step.

        `sums` float [B] are the examples' summed response NLL in nats, with gradient; `counts` int64 [B] their tokens.
        """
        if self.reduction == "token":
            total, terms = sums.sum(), counts.sum()
        else:
            total, terms = (sums / counts.clamp(min=1)).sum(), (counts > 0).sum()
        if self._total is None or self._reference is None:
            self._reference = reduce(terms.to(torch.float32), "mean").clamp(min=1.0)
            self._total = torch.zeros(2, dtype=_wide(sums.device), device=sums.device)
        self._total += torch.stack([terms.to(self._total.dtype), total.detach().to(self._total.dtype)])
        return total / self._reference.to(total.dtype)

    def rescale(self, parameters: Iterable[Tensor], pieces: int, reduce: Reduce) -> Tensor | None:
        """Turns the accumulated gradients into those of the global mean; call it after the last backward of a step.

        `pieces` is what the arriving gradient has been divided by besides c: A·W. Returns the step's mean loss in nats
        (per token, or per example), a detached scalar; None if no loss was asked for. A collective.
        """
        if self._total is None or self._reference is None:
            return None
        terms, total = reduce(self._total, "sum").unbind()
        mean = total / terms.clamp(min=1)
        factor = (pieces * self._reference / terms.clamp(min=1)).to(torch.float32)
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)
        self.reset()
        return mean


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class InstructTuningModule(LightningModule):
    """A LLaMA-family causal LM from a checkpoint, finetuned on response tokens.

    The weights are made in `configure_model`, after the data module has scored and freed the device. The training loss
    is the mean over all response tokens of an optimiser step, whatever the micro-batches and ranks. Checkpoints hold
    the adapter only, or everything under full finetuning.

    Args:
        model: Folder or Hugging Face id of the base model.
        lora_rank: Rank of the LoRA update; 0 finetunes all weights.
        lora_alpha: LoRA scale, applied as alpha / rank; twice the rank by default.
        lora_dropout: Dropout in front of the LoRA update.
        lora_target_modules: Names of the linear layers to adapt, or "all-linear" for all but the output layer.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay of matrices; norms and biases have none.
        warmup_ratio: Share of the optimiser steps in which the rate rises linearly; then it follows a cosine to zero.
        reduction: "token" (mean over response tokens) or "example" (mean over examples of their token means).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        dtype: "fp32", "bf16", or "auto": on a CUDA device with bf16 the frozen base is loaded in it (full finetuning
            keeps fp32 weights and computes under bf16 autocast); fp32 elsewhere. Adapters are always fp32.
        revision: Revision of a Hugging Face model.
        quantization: "nf4" keeps the frozen base in 4 bits (QLoRA); needs LoRA, bitsandbytes and a CUDA device.
    """

    def __init__(
        self,
        model: str,
        lora_rank: int = 16,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        lora_target_modules: str | list[str] = "all-linear",
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        reduction: str = "token",
        gradient_checkpointing: bool = False,
        dtype: str = "auto",
        revision: str | None = None,
        quantization: str | None = None,
    ) -> None:
        super().__init__()
        check_quantization(quantization, lora_rank)
        if dtype not in DTYPES:
            raise RequestError(message("dtype", f"there is no {dtype!r}", f"use one of {', '.join(DTYPES)}"))
        if lora_rank < 0:
            remedy = "give a positive rank, or 0 for full finetuning"
            raise RequestError(message("lora_rank", f"it is {lora_rank}", remedy))
        if not 0.0 <= warmup_ratio < 1.0:
            cause = f"it is {warmup_ratio}, which leaves no step at full rate"
            remedy = "give a share of the steps from 0 up to, not including, 1"
            raise RequestError(message("warmup_ratio", cause, remedy))
        self.save_hyperparameters()
        self.network: Any = None
        self._base_is_gone = False  # under full finetuning, once its weights have changed
        self._step_mean = StepMean(reduction)
        if lora_rank:
            self.strict_loading = False  # checkpoints hold the adapter only; `on_load_checkpoint` checks what they hold

    @property
    def _options(self) -> Any:
        return self.hparams  # Lightning types them as a mapping; they are attributes too

    # weights

    def setup(self, stage: str) -> None:
        check_trainer(self.trainer, type(self).__name__)

    def configure_model(self) -> None:
        """Loads the base and attaches the adapter, once."""
        if self.network is not None:
            return
        h = self._options
        device = self._root_device()
        dtype = self._weights_dtype(device)
        with isolate_rng():  # so that the adapter's start depends on the global seed alone
            quantized = quantized_base(h.get("quantization"), device)
            network = load_causal_lm(h.model, revision=h.revision, dtype=dtype, device=device, **quantized)
        network.config.use_cache = False
        if h.gradient_checkpointing:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            network.enable_input_require_grads()  # frozen embeddings would otherwise cut the graph of every block
        if h.lora_rank:
            network = attach_lora(network, h.lora_rank, h.lora_alpha, h.lora_dropout, h.lora_target_modules)
        self.network = network.train()

    def _root_device(self) -> torch.device:
        trainer = self._trainer
        return trainer.strategy.root_device if trainer is not None else torch.device("cpu")

    def _weights_dtype(self, device: torch.device) -> torch.dtype:
        wanted = self._options.dtype
        if wanted == "auto":
            wanted = "bf16" if self._options.lora_rank and _has_bf16(device) else "fp32"
        return torch.bfloat16 if wanted == "bf16" else torch.float32

    def _autocast(self) -> AbstractContextManager[Any]:
        h = self._options
        if h.dtype == "auto" and not h.lora_rank and _has_bf16(self.device):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    # steps

    def on_train_start(self) -> None:
        self._step_mean.reset()  # an earlier fit of this module may have ended in the middle of a step
        self._base_is_gone = not self._options.lora_rank

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One micro-batch.

        Args:
            batch: input_ids, attention_mask int64 [B, T], target_mask bool [B, T], row int64 [B].
            batch_idx: Not used.

        Returns:
            loss (for backward), example_loss float32 [B] (mean nats per response token, detached; NaN for an example
            without response tokens) and row int64 [B].
        """
        with self._autocast():
            nll = response_nll(self.network, batch)
        loss = self._step_mean.loss(nll.sums, nll.counts, self._reduce)
        example_loss = nll.sums.detach() / torch.where(nll.counts > 0, nll.counts, torch.nan)
        return {"loss": loss, "example_loss": example_loss, "row": batch["row"].detach()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the gradients those of the global mean, before they are clipped, and logs it as `train_loss`."""
        pieces = self.trainer.accumulate_grad_batches * self.trainer.world_size
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        mean = self._step_mean.rescale(parameters, pieces, self._reduce)
        if mean is not None:
            self.log("train_loss", mean.to(torch.float32), prog_bar=True)

    def response_nll(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each example's summed response NLL in nats, float32 [B], and its number of tokens, int64 [B]; no gradient."""
        with torch.no_grad(), self._autocast():
            nll = response_nll(self.network, batch)
        return nll.sums.detach().float(), nll.counts

    def base_weights(self) -> AbstractContextManager[Any] | None:
        """Context in which `response_nll` is the base model's; None where full finetuning has changed it."""
        if self._options.lora_rank:
            return self.network.disable_adapter()
        return None if self._base_is_gone else nullcontext()

    def _reduce(self, tensor: Tensor, how: str) -> Tensor:
        trainer = self._trainer
        if trainer is None or trainer.world_size == 1:
            return tensor
        return trainer.strategy.reduce(tensor.clone(), reduce_op=how)

    # optimisation

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained; linear warm-up, then cosine, by optimiser steps."""
        h = self._options
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": h.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=h.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):  # an endless fit has no cosine to follow
            return optimizer
        warmup, total = math.ceil(h.warmup_ratio * steps), int(steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # checkpoints

    def trained_names(self) -> list[str]:
        """Names, in this module's state, of what training changes."""
        return [name for name, p in self.named_parameters() if p.requires_grad]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._options.lora_rank:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in self.trained_names() if name in state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.configure_model()  # `load_from_checkpoint` comes here without a Trainer
        if not self._options.lora_rank:
            self._base_is_gone = True
            return
        state = checkpoint["state_dict"]
        own = dict(self.named_parameters())
        absent = [n for n in self.trained_names() if n not in state or state[n].shape != own[n].shape]
        if absent:
            cause = f"it lacks {len(absent)} of this adapter's {len(self.trained_names())} tensors, first {absent[0]}"
            remedy = "use the lora_rank and lora_target_modules it was saved with"
            raise RequestError(message("checkpoint", cause, remedy))

    def export_adapter(self, path: str) -> None:
        """Writes an ordinary peft adapter that plain peft loads, with tokenizer, and how it is merged in README.md.

        Under full finetuning the whole model with tokenizer.

        Args:
            path: Folder to write. On several ranks call it on rank 0 only.

        Raises:
            RequestError: the weights have not been made yet.
        """
        if self.network is None:
            remedy = "fit first, or load a checkpoint with InstructTuningModule.load_from_checkpoint"
            raise RequestError(message("export_adapter", "the module has no weights yet", remedy))
        Path(path).mkdir(parents=True, exist_ok=True)
        if self._options.lora_rank:
            self.network.save_pretrained(path, save_embedding_layers=False)
            coding = getattr(getattr(self._trainer, "datamodule", None), "coding", None)
            name = None if coding is None else coding.template.name
            card = adapter_card(self.network, self._options.model, self._options.revision, name)
            write_text(Path(path) / "README.md", card)
        else:
            with quiet():
                self.network.save_pretrained(path)
        try:
            load_tokenizer(self._options.model, revision=self._options.revision).save_pretrained(path)
        except RequestError as error:  # a base without one: what was trained is there all the same
            log(f"{path}: no tokenizer was exported: {error}")

    def describe(self) -> dict[str, Any]:
        """What of this module belongs to a run's regime, JSON-like."""
        h = self._options
        method = "full"
        if h.lora_rank:
            targets = h.lora_target_modules
            names = targets if isinstance(targets, str) else "+".join(sorted(targets))
            method = f"lora r={h.lora_rank} alpha={h.lora_alpha or 2 * h.lora_rank:g} {names}"
            method += f" on {h.quantization}" if h.get("quantization") else ""
        return {"method": method, "learning_rate": h.learning_rate}


def rate(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step: linear over `warmup` steps, then a cosine that ends at zero.

    >>> [round(rate(s, 2, 6), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

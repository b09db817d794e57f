"""`InstructTuningModule`: finetunes a causal LM on instruction data, with LoRA or in full.

Its contract with the data module and the callback, for writers of their own LightningModule: `batch["row"]` holds the
rows of the pool; `training_step` returns `example_loss` (mean nats per response token) and `row`, both detached;
`response_nll(batch)` returns each example's (sum, count), for the evaluation.

The training loss is one mean over everything an optimiser step saw, all batches and all ranks (`StepMean`). A batch is
gone through in micro-batches of like length (`micro_batched_loss`), so that padding is neither computed nor kept, and a
batch of any size fits into memory.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from im_lightning._lightning import LightningModule, check_trainer, isolate_rng, submodule
from im_lightning._utils.files import write_text
from im_lightning._utils.progress import log, without_bars
from im_lightning.errors import RequestError, message
from im_lightning.models.batching import Budget, Reduce, StepMean, micro_batched_loss, micro_batches, training_budget
from im_lightning.models.checkpoint import hidden_width, load_causal_lm, load_tokenizer
from im_lightning.models.device import PRECISIONS, resolve_precision
from im_lightning.models.likelihood import base_model, by_row, nll_parts, same_route, summed_nll, target_counts
from im_lightning.training import shared_base
from im_lightning.training.adapter_card import adapter_card
from im_lightning.training.adapters import attach_lora, cast_once, check_adapter, check_quantization, quantized_base

STRATEGIES = tuple(getattr(submodule("strategies"), f"{name}Strategy") for name in ("SingleDevice", "DDP"))
"""Under these every rank has all weights."""


def training_precision(dtype: str, model: str, revision: str | None, device: torch.device) -> str:
    """fp32 or bf16: "auto" as in scoring, by what the device multiplies fast and, on a CPU, by the model's width."""
    width = hidden_width(model, revision) if dtype == "auto" and device.type == "cpu" else 0
    return resolve_precision(dtype, device, width).name


def weights_dtype(precision: str, dtype: str, lora_rank: int) -> torch.dtype:
    """In which the base is loaded: trained weights stay in fp32 unless bf16 is asked for by name."""
    return torch.bfloat16 if precision == "bf16" and (lora_rank or dtype == "bf16") else torch.float32


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Context of a forward pass in fp32 or bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


class InstructTuningModule(LightningModule):
    """A LLaMA-family causal LM from a checkpoint, finetuned on response tokens.

    The weights are made in `configure_model`, after the data module has scored and freed the device. The training loss
    is the mean over all response tokens of an optimiser step. Checkpoints hold the adapter, or all weights.

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
        dtype: "fp32", "bf16", or "auto": bf16 where the device multiplies it faster, as in scoring. The frozen base is
            then loaded in bf16; what is trained is kept in fp32 and computed under bf16 autocast.
        revision: Revision of a Hugging Face model.
        token_budget: Tokens of a micro-batch on each device, padding included, or "auto" by its memory. The rows of a
            batch are sorted by length and cut so; the gradient is that of the whole batch. On a CPU an adapter's
            micro-batches share it, side by side. Halved where memory is short. Not under FSDP and DeepSpeed.
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
        token_budget: int | str = "auto",
    ) -> None:
        super().__init__()
        if quantization is not None:
            check_quantization(quantization, lora_rank)
        if dtype not in PRECISIONS:
            raise RequestError(message("dtype", f"there is no {dtype!r}", f"use one of {', '.join(PRECISIONS)}"))
        share = "a share from 0 up to, not including, 1"
        for name, value, right, need in (
            ("lora_rank", lora_rank, lora_rank >= 0, "a positive rank, or 0 for full finetuning"),
            ("lora_alpha", lora_alpha, lora_alpha is None or 0 < lora_alpha < math.inf, "a positive number, or none"),
            ("lora_dropout", lora_dropout, 0 <= lora_dropout < 1, share),
            ("learning_rate", learning_rate, 0 <= learning_rate < math.inf, "a number from 0 on"),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a number from 0 on"),
            ("warmup_ratio", warmup_ratio, 0 <= warmup_ratio < 1, share),
        ):
            if not right:
                raise RequestError(message(name, f"it is {value}", f"give {need}"))
        if token_budget != "auto" and (isinstance(token_budget, str) or token_budget < 1):
            raise RequestError(message("token_budget", f"it is {token_budget!r}", "give 1 or more tokens, or auto"))
        self.save_hyperparameters()
        self.network: Any = None
        self._base_is_gone = False  # under full finetuning, once its weights have changed
        self._step_mean = StepMean(reduction)
        self._schedule: torch.optim.lr_scheduler.LambdaLR | None = None
        self._precision, self._kept = "fp32", ""  # settled with the weights
        self._tokens = token_budget  # of the next budget: as given, or the checkpoint's
        self._budget: Budget | None = None  # made with the weights on their device
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
        told = self._kept if h.dtype == "auto" and self._kept else h.dtype
        self._precision = training_precision(told, h.model, h.revision, device)
        with isolate_rng():  # so that the adapter's start depends on the global seed alone
            quantized = quantized_base(h.quantization, device) if h.get("quantization") else {}
            alone = not quantized and type(getattr(self._trainer, "strategy", None)) is STRATEGIES[0]
            borrow = partial(shared_base.borrow_base, precision=self._precision, trained=not h.lora_rank)
            load = borrow if alone and shared_base.shared is not None else load_causal_lm
            network: Any = load(h.model, revision=h.revision, dtype=self._weights_dtype, device=device, **quantized)
        network.config.use_cache = False
        if h.gradient_checkpointing:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            network.enable_input_require_grads()  # frozen embeddings would otherwise cut the graph of every block
        if h.lora_rank:
            base = network
            network = attach_lora(base, h.lora_rank, h.lora_alpha, h.lora_dropout, h.lora_target_modules)
            same_route(network, base)
        self.network = network.train()

    def _root_device(self) -> torch.device:
        trainer = self._trainer
        return trainer.strategy.root_device if trainer is not None else torch.device("cpu")

    def keep_precision(self, precision: str) -> None:
        """Takes fp32 or bf16 where dtype is "auto": that of a run that this one is compared with. Before the fit."""
        self._kept = precision

    @property
    def _weights_dtype(self) -> torch.dtype:
        return weights_dtype(self._precision, self._options.dtype, self._options.lora_rank)

    def _autocast(self) -> AbstractContextManager[Any]:
        whole = autocast(self._precision, self.device)
        return cast_once(self.network, whole) if self._precision == "bf16" and self._options.lora_rank else whole

    def numerics(self) -> dict[str, Any]:
        """What changes a fit's numbers by rounding alone: its precision (the Trainer's, where that is another than
        32-true), and the tokens of a micro-batch, as they are now."""
        told = "32-true" if self._trainer is None else str(self.trainer.precision)
        budget = {} if self._budget is None else {"token_budget": self._budget.tokens}
        return {"precision": self._precision if told == "32-true" else told, **budget}

    # steps

    def on_train_start(self) -> None:
        self._step_mean.reset()  # an earlier fit of this module may have ended in the middle of a step
        self._base_is_gone = not self._options.lora_rank
        self._take_rate()

    def _take_rate(self) -> None:
        """The first step's rate is that of this fit's schedule: a checkpoint brings the rate of its own, which is zero
        at the end of a fit that is now to go on for more epochs."""
        schedule = self._schedule
        if schedule is None or schedule not in [config.scheduler for config in self.trainer.lr_scheduler_configs]:
            return  # a subclass or Lightning's Tuner has put in another
        schedule.last_epoch = self.trainer.global_step
        schedule.base_lrs = [self._options.learning_rate] * len(schedule.base_lrs)
        for group, shape in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = self._options.learning_rate
            group["lr"] = self._options.learning_rate * shape(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One micro-batch.

        Args:
            batch: input_ids, attention_mask int64 [B, T], target_mask bool [B, T], row int64 [B]; or S sequences of
                these rows, with owner int64 [S], whose sums and counts are added up.
            batch_idx: Not used.

        Returns:
            loss (for backward), example_loss float32 [B] (mean nats per response token, detached; NaN for an example
            without response tokens) and row int64 [B].
        """
        counts = by_row(target_counts(batch["target_mask"]), batch)
        loss, sums = self._loss(batch, self._step_mean.weights(counts, self._reduce))
        self._step_mean.add(loss)
        example_loss = sums / torch.where(counts > 0, counts, torch.nan)
        return {"loss": loss, "example_loss": example_loss, "row": batch["row"].detach()}

    def _loss(self, batch: dict[str, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        """Σ weights · summed NLL of the batch's rows, for one backward, and the sums, detached, float32 [B]."""
        budget = self._micro_batch_budget()
        weights = weights[batch["owner"]] if "owner" in batch else weights  # each sequence has its row's
        with self._autocast():
            if budget is None:
                sums = summed_nll(self.network, batch)
                return (sums * weights).sum(), by_row(sums.detach().float(), batch)
            scaler = None if self._trainer is None else getattr(self.trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            nll = partial(summed_nll, self.network)
            loss, sums = micro_batched_loss(nll, batch, weights, self.parameters(), budget, scale)
            return loss, by_row(sums, batch)

    def _micro_batch_budget(self) -> Budget | None:
        """None where forward and backward passes of the wrapped model must come in turn, as under FSDP."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if strategy is not None and type(strategy) not in STRATEGIES:
            return None
        if self._budget is None:
            self._budget = training_budget(self.network, self.device, self._tokens, "training", "token_budget")
        return self._budget

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the gradients those of the global mean, before they are clipped, and logs it as `train_loss`."""
        pieces = self.trainer.accumulate_grad_batches * self.trainer.world_size
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        mean = self._step_mean.rescale(parameters, pieces, self._reduce)
        if mean is not None:
            self.log("train_loss", mean.to(torch.float32), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self._share_budget()

    def _share_budget(self) -> None:
        """What memory was short for on one rank is not tried again on another. A collective."""
        if self._budget is not None and (reduce := self._reduce) is not None:
            tokens = torch.tensor(float(self._budget.tokens), device=self.device)
            self._budget.tokens = int(reduce(tokens, "min"))

    def response_nll(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each example's summed response NLL in nats, float32 [B], and its number of tokens, int64 [B]; no gradient."""
        sums, counts, *_ = self.evaluation_nll(batch)
        return sums, counts.long()

    def evaluation_nll(self, batch: dict[str, Tensor]) -> Tensor:
        """Of each example the same and its answers' first and last tokens alone, float32 [4, B] (`nll_parts`)."""
        budget, nll = self._micro_batch_budget(), partial(nll_parts, self.network)
        with torch.no_grad(), self._autocast():
            if budget is None:
                return by_row(nll(batch), batch)
            rows, parts = zip(*micro_batches(batch, budget, lambda _, part: nll(part)), strict=True)
        return by_row(torch.cat(parts, dim=1)[:, torch.argsort(torch.cat(rows))], batch)

    def base_weights(self) -> AbstractContextManager[Any] | None:
        """Context in which `response_nll` is the base model's; None where full finetuning has changed it."""
        if self._options.lora_rank:
            return self.network.disable_adapter()
        return None if self._base_is_gone else nullcontext()

    @property
    def _reduce(self) -> Reduce | None:
        trainer = self._trainer
        if trainer is None or trainer.world_size == 1:
            return None
        return lambda tensor, how: trainer.strategy.reduce(tensor.clone(), reduce_op=how)

    # optimisation

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained; linear warm-up, then cosine, by optimiser steps; endless fits keep the peak."""
        h = self._options
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": h.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=h.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        endless = math.isinf(steps)
        warmup, total = (0, 0) if endless else (math.ceil(h.warmup_ratio * steps), int(steps))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 if endless else rate(step, warmup, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule, "interval": "step"}}

    # checkpoints

    def trained_names(self) -> list[str]:
        """Names, in this module's state, of what training changes."""
        return [name for name, p in self.named_parameters() if p.requires_grad]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and not self.trainer.interrupted:  # after it another rank may be gone
            self._share_budget()
        checkpoint["numerics"] = {**self.numerics(), "precision": self._precision}
        if self._options.lora_rank:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in self.trained_names() if name in state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.configure_model()  # `load_from_checkpoint` comes here without a Trainer
        self._restore_numerics(checkpoint)
        parameters = dict(self.named_parameters())
        own = {name: parameters[name].shape for name in self.trained_names()}
        check_adapter(own, checkpoint, self._options)
        self._base_is_gone = self._base_is_gone or not self._options.lora_rank

    def _restore_numerics(self, checkpoint: dict[str, Any]) -> None:
        """A resumed fit goes on with the precision and the tokens in force, unless another setting is given now."""
        h, given, told = self._options, checkpoint.get("hyper_parameters", {}), checkpoint.get("numerics", {})
        if "token_budget" in told and given.get("token_budget", "auto") == h.token_budget:
            self._tokens, self._budget = told["token_budget"], None
        earlier = "fp32" if self.device.type == "cpu" else self._precision  # what builds that kept none did
        precision = told.get("precision", earlier)
        if not given.get("dtype", "auto") == h.dtype == "auto" or precision == self._precision:
            return
        self._precision = precision
        if h.lora_rank:  # the frozen weights anew, not rounded twice
            fresh = dict(load_causal_lm(h.model, revision=h.revision, dtype=self._weights_dtype).named_parameters())
            for name, parameter in base_model(self.network).named_parameters():
                if not parameter.requires_grad:
                    parameter.data = fresh[name.replace("base_layer.", "")].data.to(parameter.device)

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
        coding = getattr(getattr(self._trainer, "datamodule", None), "coding", None)
        template = None if coding is None else coding.template
        if self._options.lora_rank:
            self.network.save_pretrained(path, save_embedding_layers=False)
            card = adapter_card(
                self.network, self._options.model, self._options.revision, None if template is None else template.name
            )
            write_text(Path(path) / "README.md", card)
        else:
            with without_bars():
                self.network.save_pretrained(path)
        try:
            own = load_tokenizer(self._options.model, revision=self._options.revision)
            getattr(template, "tokenizer", own).save_pretrained(path)  # with a chat template from a file
        except RequestError as error:  # a base without one: what was trained is there all the same
            log(f"{path}: no tokenizer was exported: {error}")

    def describe(self) -> dict[str, Any]:
        """What of this module belongs to a run's regime, JSON-like."""
        h = self._options
        method = "full"
        if h.lora_rank:
            targets = h.lora_target_modules
            names = targets if isinstance(targets, str) else "+".join(sorted(targets))
            alpha = 2 * h.lora_rank if h.lora_alpha is None else h.lora_alpha
            method = f"lora r={h.lora_rank} alpha={alpha:g} {names}"
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

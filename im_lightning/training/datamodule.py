"""`InstructMiningDataModule`: from a pool of instruction data to batches drawn by a rule's weights."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from im_lightning._lightning import LightningDataModule, check_trainer, isolate_rng
from im_lightning._utils.files import plain
from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import RequestError, message
from im_lightning.ledger.record import PURPOSES
from im_lightning.models.fingerprint import local_folder
from im_lightning.rule.rule_file import rule_to_json
from im_lightning.sampling.draws.sampler import QualityWeightedSampler, ResumableDataLoader
from im_lightning.sampling.rows import Choice, exclusion_of
from im_lightning.sampling.weights.quality_weights import Weighting
from im_lightning.training.distributed.ranks import translate_batches
from im_lightning.training.evaluation import EvalSet
from im_lightning.training.run.encoded_pool import (
    Collate,
    Pool,
    base_model_name,
    coding_of,
    encoded_pool,
    read_pool,
    reading_of,
    set_names,
)
from im_lightning.training.run.inputs import RunOptions, check_options
from im_lightning.training.run.refit import RuleVersions, versions_of
from im_lightning.training.run.run_folder import RunInputs, resume_changes

ON_MISMATCH = ("error", "warn")
_Settings = TypeVar("_Settings", bound="Choice | Weighting | Encoding | Reading")


class InstructMiningDataModule(LightningDataModule):
    """Scores a pool where that is needed, weighs its rows by a rule, and draws what a fit trains on.

    `setup` scores what the score store lacks (or reads `scores`), turns the rule into weights, and freezes all of it in
    `<default_root_dir>/im-lightning/<digest>/`, for resumed runs. One sampler serves all epochs; its position is saved
    with the checkpoint, so that a resumed fit goes on with the next row.

    What is drawn: with a budget so many rows by the rule's weights (without a rule each alike), once, or resampled each
    epoch; with `subset_size` a designed subset, for fitting a rule; with neither all rows, equally.

    Args:
        data: The pool: a file (.json, .jsonl, .csv, .tsv, each also .gz or .zst; .parquet), a folder, a Hugging Face
            data set (org/name:split), a published set (dolly, dolly@FILE), or several of these.
        sources: In place of data: published sets and how many rows of each, or weights and `rows`, how many in all.
        eval_data: Evaluation sets: a path, several, or names and paths. Their rows are never trained on.
        model: Base model (folder or Hugging Face id): its tokenizer encodes, and it scores likelihood indicators.
        rule: A published rule's name or a rule file. Without one all eligible rows weigh the same.
        scores: Score table of the pool (Parquet, from `im-lightning score`); no model is loaded for scoring then.
        indicators: What to score, FILE.py:NAME for one of your own; by default what the rule needs, or for a designed
            subset lengths, ppl, mtld, knn_6 and what the reward and UniEval models that are named answer.
        budget: Rows per epoch.
        weighting: auto, tilt, softmax, rank, top, uniform, or mix (with mixture; the rule, if any, within sources).
        strength: How far a tilt goes towards the edge of the rule's fitted region (1).
        temperature: Of softmax and rank weights.
        floor: Share of uniform weights mixed in, from 0 to 1.
        resample_each_epoch: Resample the budget each epoch, instead of drawing it once.
        replacement: Draw with replacement, resampled each epoch; by a mixture no row more often than its repeat says.
        subset_size: Rows of a designed subset; rule and budget are then left aside.
        subset_seed: Decides the designed subset, and nothing else does; by default `seed`.
        subset_mixture: Shares of the sources in a designed subset, in place of random ones.
        subset_tilt: How far a designed subset is tilted along a random indicator direction, in sd of the pool.
        subset_version: How random shares are drawn: 1, or 2 as new designs do.
        purpose: designed, weighted, search, compare or block, for the record; by default by what is drawn.
        format: auto, alpaca, sharegpt, messages or prompt-response.
        template: auto, alpaca, chat, none (prompt and completion as they stand) or a file of a template, NAME.jinja.
        max_length: Tokens per example; longer ones are cut.
        batch_size: Rows per batch and rank; the module cuts it by its token_budget, so that memory does not limit it.
        eval_batch_tokens: Tokens per evaluation batch, padding included.
        num_workers: Processes that make batches.
        seed: Decides draws and their order.
        embedding_model: For knn indicators; by default the base model's mean states.
        embed: What knn_<i> compares: both (prompt and response) or response.
        turns: Answers that count where templates change earlier ones (Qwen3, Phi-3): last, or each in its own history.
        reward_model: For reward; under a published rule by default the paper's.
        unieval_model: For naturalness, coherence and understandability; likewise.
        knn_reference: Data among which knn_<i> looks for neighbours, instead of the pool itself.
        targets: Rows of the evaluation set's kind, for loss_drop and gradient_similarity; of no set, nor the pool.
        batch_tokens: Tokens per scoring batch, padding included.
        precision: auto, fp32 (stored values in bf16 do not serve) or bf16, for scoring.
        cache_dir: Score store; by default $IM_LIGHTNING_CACHE or ~/.cache/im_lightning.
        run_dir: Frozen folder to use instead of the one under default_root_dir, for example after moving it.
        on_mismatch: error or warn, when a resumed run finds other inputs than its checkpoint had.
        on_bad_row: error or quarantine.
        columns: Which field holds what: {"prompt": "question"}, or as text, prompt=question; by default known names.
        answer: Of several responses: error, first, all or chosen.
        force: Risks to accept: weak-rule (or true: a rule no better than its runs' mean), other-base, worse-target.
        revision: Revision of a Hugging Face base model.
        exclude: What of an evaluation set is in no draw: prompt (the usual: its prompts, too), normalised or exact.
        mixture: Shares of the sources, a file that im-lightning mix wrote.
        blocks: File of blocks (im-lightning design --kind merged); subset_mixture then has shares of these.
        one_per_prompt: Of rows that share a prompt draw one at most, resampled each epoch unless the budget is fixed.
    """

    def __init__(
        self,
        data: str | list[str] | None = None,
        eval_data: str | list[str] | dict[str, str] | None = None,
        model: str | None = None,
        rule: str | None = None,
        scores: str | None = None,
        indicators: list[str] | None = None,
        budget: int | None = None,
        weighting: str = "auto",
        strength: float = 1.0,
        temperature: float = 1.0,
        floor: float = 0.0,
        resample_each_epoch: bool = False,
        replacement: bool = False,
        subset_size: int | None = None,
        subset_seed: int | None = None,
        subset_mixture: dict[str, float] | None = None,
        subset_tilt: float = 1.0,
        subset_version: int = 1,
        purpose: str | None = None,
        format: str = "auto",
        template: str = "auto",
        max_length: int = 1024,
        batch_size: int = 8,
        eval_batch_tokens: int = 8192,
        num_workers: int = 0,
        seed: int = 0,
        embedding_model: str | None = None,
        reward_model: str | None = None,
        unieval_model: str | None = None,
        batch_tokens: int | None = None,
        precision: str = "auto",
        cache_dir: str | None = None,
        run_dir: str | None = None,
        on_mismatch: str = "error",
        on_bad_row: str = "error",
        force: bool | str | list[str] = False,
        revision: str | None = None,
        knn_reference: str | None = None,
        columns: str | dict[str, str] | None = None,
        answer: str = "error",
        embed: str = "both",
        turns: str = "last",
        sources: dict[str, float] | None = None,
        exclude: str | None = None,
        mixture: str | None = None,
        targets: str | None = None,
        blocks: str | None = None,
        one_per_prompt: bool = False,
    ) -> None:
        super().__init__()
        # Hyperparameters go into checkpoints, which are read with weights_only: plain values, so no Path.
        data, eval_data, model, rule, targets = map(plain, (data, eval_data, model, rule, targets))
        scores, cache_dir, run_dir, embedding_model = map(plain, (scores, cache_dir, run_dir, embedding_model))
        reward_model, unieval_model, knn_reference = map(plain, (reward_model, unieval_model, knn_reference))
        self.save_hyperparameters()
        self._data = data
        if data is None or sources is not None:
            from im_lightning.data.sources import pooled

            self._data = pooled(data, sources)
        self.choice = self._settings(Choice, weighting=self._settings(Weighting)).settled()
        for name, value, known in (("on_mismatch", on_mismatch, ON_MISMATCH), ("purpose", purpose, (None, *PURPOSES))):
            if value not in known:
                names = ", ".join(filter(None, known))
                raise RequestError(message(name, f"there is no {value!r}", f"use one of {names}"))
        check_options(self._options)
        self.purpose: str = purpose or ("designed" if self.choice.designed else "weighted")
        self.sampler: QualityWeightedSampler | None = None
        self._restored: dict[str, Any] | None = None
        self._said: set[str] = set()

    @property
    def _options(self) -> Any:
        return self.hparams  # Lightning types them as a mapping; they are attributes too

    def _settings(self, kind: type[_Settings], **given: Any) -> _Settings:
        """A dataclass made of the options that are named like its fields."""
        names = [field.name for field in fields(kind) if field.name not in given]
        return kind(**{name: self._options[name] for name in names}, **given)

    @property
    def _reading(self) -> Reading:
        return reading_of(self._options)

    @property
    def examples(self) -> list[Example]:
        """The pool, in input order."""
        return self.pool.examples

    def prepare_data(self) -> None:
        """Fetches what lies on the hub, on one process per node; files here need nothing."""
        h = self._options
        if h.model is not None and local_folder(h.model) is None:
            coding_of(self._settings(Encoding))
        for data in (self._data, *set_names(h.eval_data).values(), h.knn_reference, h.targets):
            if data is not None and any(
                not Path(name).expanduser().exists() for name in ([data] if isinstance(data, str) else data)
            ):
                read_pool(data, self._reading)

    def setup(self, stage: str | None = None) -> None:
        """Everything up to the sampler; once, whatever the stages."""
        if self.trainer is not None:
            check_trainer(self.trainer, type(self).__name__)
        if self.sampler is None:
            with isolate_rng():  # whether the store had the scores must not move the training's random numbers
                self._load()
                self._take(self._resolve())
        self._place_sampler()
        if self._restored is not None:
            state, self._restored = self._restored, None
            self.load_state_dict(state)

    def _load(self) -> None:
        """Reads pool, evaluation sets and tokenizer; a subclass may bring its own."""
        h = self._options
        self.coding, reading = coding_of(self._settings(Encoding)), self._reading
        self.pool: Pool = read_pool(self._data, reading, self.coding.template.refusal)
        self.encoded = encoded_pool(self.pool, self.coding)
        self.collate = Collate(self.coding.tokenizer, self.coding.embeddings)
        self.eval_sets: dict[str, EvalSet] = {}
        for name, path in set_names(h.eval_data).items():
            rows = encoded_pool(read_pool(path, reading, self.coding.template.refusal), self.coding)
            self.eval_sets[name] = EvalSet(name, rows, self.collate, h.eval_batch_tokens)
        if not self.eval_sets:
            self._say("no eval_data: the run's record will be incomplete, and stays out of refits")

    def _resolve(self) -> RunInputs:
        """Table, rule, weights and the fixed subset."""
        trainer = self.trainer
        self._run = RunOptions(
            options=self._options,
            choice=self.choice,
            pool=self.pool,
            coding=self.coding,
            eval_sets=self.eval_sets,
            root=str(trainer.default_root_dir) if trainer is not None else ".",
            device=str(trainer.strategy.root_device) if trainer is not None else "auto",
            ranks=self._rank(),
        )
        return self._run.resolve()

    def _take(self, run: RunInputs) -> None:
        self.run_folder, self.inputs = run.folder, run.inputs
        self.table, self.rule, self.scored = run.table, run.rule, run.scored
        self.weights, self.eligible, self.report = run.weights.weights, run.weights.eligible, run.weights.report
        self.rows, self.design = run.rows, run.design
        self.versions: RuleVersions | None = None  # refits inside this fit; None where there were none
        self._taken, self._regime = run, dict[str, Any]()
        if self.rule is not None:
            self.rule.check_regime(self.regime(), self._options.force)
        if self.rows is not None:  # once, before workers are forked; what is drawn each epoch is encoded by the batch
            self.encoded.need(self.rows)
        left_out = self.report.get("ineligible", {})
        if reasons := ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in left_out.items() if n):
            self._say(f"{int(self.eligible.sum()):,} of {len(self.pool):,} rows are eligible (left out: {reasons})")
        if self.choice.designed and (self._options.rule is not None or self._options.budget is not None):
            self._say("subset_size makes this a designed run: rule and budget are left aside")
        elif self.choice.uniform and not self.choice.designed:
            self._say("no rule and no subset_size: all eligible rows weigh the same")

    def begin_refits(self) -> RuleVersions:
        """The versions of the rule in this fit, by which later epochs are drawn."""
        about = self.choice, self._taken, self.pool.ids, self._run.left_out
        self.versions = self.versions or versions_of(*about, self._options.force)
        return self.versions

    # training

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _place_sampler(self, again: bool = False) -> None:
        """The one sampler, for this Trainer's ranks. Loaders come and go (Lightning may ask for several); it stays."""
        kwargs = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        rank, world = kwargs.get("rank", 0), kwargs.get("num_replicas", 1)
        placed = self.sampler is not None and (self.sampler.rank, self.sampler.num_replicas) == (rank, world)
        if placed and not again:
            return
        c, weights, groups = self.choice, self.weights, self.pool.groups(self.choice)
        if self.rows is not None:  # a fixed subset is a draw turned into weights 1 and 0; epochs permute it
            weights = np.zeros(len(self.pool))
            weights[self.rows] = 1.0
        self.sampler = QualityWeightedSampler(weights, self._size, c.replacement, world, rank, c.seed, c.repeat, groups)

    @property
    def _size(self) -> int:
        """Rows of an epoch: the fixed subset's, the budget, or all that are eligible (one of each prompt, if asked)."""
        groups = self.pool.groups(self.choice)
        every = self.eligible.sum() if groups is None else len(np.unique(groups[self.eligible]))
        return len(self.rows) if self.rows is not None else self.choice.budget or int(every)

    def train_dataloader(self) -> ResumableDataLoader:
        """Batches of input_ids, attention_mask int64 [B, T], target_mask bool [B, T], row int64 [B]."""
        h = self._options
        if h.num_workers:  # the rows are encoded; without this every forked worker warns about tokenizer threads
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return ResumableDataLoader(
            self.encoded,
            batch_size=h.batch_size,
            sampler=self.sampler,
            num_workers=h.num_workers,
            collate_fn=self.collate,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def eval_batches(self, name: str, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
        """This rank's batches of an evaluation set: as many on every rank, filled up with rows without targets."""
        return self.eval_sets[name].batches(rank, world)

    # checkpoints

    @property
    def _draw(self) -> dict[str, Any]:
        """What the batches depend on; their size, too: Lightning resumes at a *number of batches*."""
        return {**self.choice.draw_inputs, "batch_size": self._options.batch_size}

    def state_dict(self) -> dict[str, Any]:
        """Plain values: what the run used, by digest, and where its stream is."""
        if self.sampler is None:
            return {}
        return {
            "inputs": self.inputs,
            "draw": self._draw,
            "run_dir": str(self.run_folder.resolve()),
            "rule": None if self.rule is None else json.dumps(rule_to_json(self.rule)),
            "sampler": self.sampler.state_dict(),
            "ranks": self.sampler.num_replicas,
            **({"refits": self.versions.state()} if self.versions is not None and self.versions.attempted else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to where the checkpoint was made.

        Raises:
            RequestError: the inputs are not those of the checkpoint, and `on_mismatch` is "error"; says what changed.
        """
        if self.sampler is None:  # before setup: `load_from_checkpoint`, without a Trainer
            self._restored = state_dict
            return
        if not state_dict:
            return
        if self.choice.exclude is None and (own := exclusion_of(state_dict["inputs"])) != exclusion_of(self.inputs):
            self.choice = replace(self.choice, exclude=own)  # with the rows that it had
            self._take(self._resolve())
            self._place_sampler(again=True)
        found = resume_changes(state_dict, self.inputs, self._draw, self.choice, self._options)
        sampler = dict(state_dict["sampler"])
        if "refits" in state_dict:
            self.begin_refits().adopt(state_dict["refits"], self.sampler, sampler["epoch"])
        if found:
            here = self.sampler.state_dict()
            sampler |= {key: here.get(key) for key in ("num_samples", "replacement", "repeat", "weights", "pending")}
            sampler["position"] = min(sampler["position"], here["num_samples"])
        self.sampler.load_state_dict(sampler)
        if self.trainer is not None:
            translate_batches(self.trainer, self.sampler, self._draw["batch_size"], state_dict)

    def regime(self) -> dict[str, Any]:
        """What of the data belongs to a run's regime."""
        self._regime = self._regime or {
            "base_model": base_model_name(self.coding.model),
            "template": f"{self.coding.template.name} {self.coding.template.identity}",
            "max_length": self.coding.max_length,
            "subset_size": self._size,
            "evaluation_sets": {name: one.digest for name, one in self.eval_sets.items()},
        }
        return dict(self._regime)

    def describe(self) -> dict[str, Any]:
        """What a RunRecord keeps of the data: pool, design, weights, regime, seeds; JSON-like."""
        regime, weights = self.regime(), dict(self.report)
        if self.versions is not None and (refits := self.versions.summaries()):
            weights["refits"] = refits
        if self.rule is not None and self.table is not None and (forced := self.rule.forced(self.table, regime)):
            weights["forced"] = forced
        return {
            "purpose": self.purpose,
            "pool_digest": self.pool.digest,
            "design": {**self.design, "exclude": exclusion_of(self.inputs)},
            "weights": weights,
            "regime": regime,
            "seeds": {"data": self.choice.seed, "subset": self.choice.draw_inputs.get("subset_seed")},
        }

    def _say(self, line: str) -> None:
        if self._rank()[0] == 0 and line not in self._said:
            self._said.add(line)
            log(line)

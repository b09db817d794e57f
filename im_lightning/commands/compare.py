"""`im-lightning compare`: the rule's rows against the baselines, at equal tokens and steps, with intervals."""

from __future__ import annotations

SUMMARY = "finetune on the rule's rows and on the baselines, at equal tokens and steps; print the table"
EXAMPLE = (
    "im-lightning compare pool.jsonl --scores scores.parquet --rule rule.json --ledger runs/ --eval-data report.jsonl "
    "--model meta-llama/Llama-3.2-1B --tokens 200000 --steps 100 --out compare/"
)
POSITIONAL = ("data",)


def run(
    data: list[str],
    eval_data: str,
    model: str,
    scores: str,
    tokens: int,
    steps: int,
    out: str,
    rule: str | None = None,
    ledger: str | None = None,
    arms: str | None = None,
    seeds: int = 5,
    seed: int = 0,
    pool_draw: str = "auto",
    lora_rank: int = 0,
    learning_rate: float | None = None,
    warmup_ratio: float = 0.03,
    epochs: int = 1,
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    weighting: str = "auto",
    strength: float = 1.0,
    exact_match: bool = False,
    template: str = "auto",
    max_length: int = 1024,
    eval_batch_tokens: int = 8192,
    format: str = "auto",
    on_bad_row: str = "error",
    cache_dir: str | None = None,
    force: bool = False,
) -> int:
    """Finetunes one base on rows chosen by the rule and by each baseline, with several seeds, and compares the losses.

    Every arm sees the same number of supervised tokens (within 1 %) in the same number of steps. A seed varies the
    candidate rows, the rule (by a bootstrap of its runs, with --ledger) and the training. Runs are kept in OUT/ledger
    and found again: the same command goes on where it was interrupted, or adds arms and seeds.

    Args:
        data: The pool, as it was scored: files, folders or data sets.
        eval_data: Evaluation set; none that a rule was fitted on.
        model: Base model: folder or Hugging Face id.
        scores: Score table of the pool (im-lightning score).
        tokens: Supervised tokens (response with its end) of every arm.
        steps: Optimiser steps of every arm.
        out: Folder for compare.json, compare.txt, the ledger of the runs, and samples.jsonl with --exact-match.
        rule: Rule file or published name; without one the arms that need it are left out.
        ledger: Folder of the runs that the rule was fitted on; each seed then refits it on a bootstrap of them.
        arms: Separated by commas; by default base, random, random-balanced, weighted, top, diverse, longest,
            lowest-ppl, ifd, worst and full (all candidate rows, in more steps), as far as the table allows.
        seeds: Number of seeds; 5 or more for a verdict worth having.
        seed: The first seed.
        pool_draw: How a seed draws its candidates: folds (disjoint parts of the pool), bootstrap, same, or auto: folds
            where each holds four times the tokens, else bootstrap.
        lora_rank: Rank of LoRA; 0 finetunes all weights. Under LoRA the paper saw no effect of selection.
        learning_rate: Peak learning rate; by default 2e-5, with LoRA 2e-4.
        warmup_ratio: Share of the steps in which the rate rises.
        epochs: Passes over an arm's rows; tokens and steps are those of one.
        accumulate: Micro-batches per step.
        gradient_checkpointing: Less memory, more time.
        device: cpu, cuda, mps or auto; one device.
        dtype: fp32, bf16 or auto (bf16 where the device has it).
        weighting: Of the rule's weights: auto, tilt, softmax, rank or top.
        strength: How far a tilt goes; 1 is the edge of the rule's region.
        exact_match: Also answer the evaluation rows of short responses greedily, and count exact matches.
        template: auto, alpaca or chat.
        max_length: Tokens per example.
        eval_batch_tokens: Tokens per evaluation batch, padding included.
        format: auto, alpaca, sharegpt, messages or prompt-response.
        on_bad_row: error, or quarantine (leave bad rows out), as for score.
        cache_dir: Score store, which keeps the embeddings that "diverse" needs.
        force: Go on with an evaluation set that the rule was fitted on, a rule of other models, or one that its own
            runs find no better than the mean; says so loudly.
    """
    from pathlib import Path

    from im_lightning._utils.progress import log
    from im_lightning.commands import comma_list

    log("loading Lightning and transformers")
    from im_lightning.experiments.compare.arms import ArmsSettings
    from im_lightning.experiments.compare.run import CompareSettings, CompareStudy
    from im_lightning.experiments.exact_match import AnswerSettings
    from im_lightning.experiments.finetuning import TuningSettings, usual_learning_rate

    tuning = TuningSettings(
        learning_rate=usual_learning_rate(lora_rank) if learning_rate is None else learning_rate,
        epochs=epochs,
        warmup_ratio=warmup_ratio,
        lora_rank=lora_rank,
        accumulate=accumulate,
        gradient_checkpointing=gradient_checkpointing,
        device=device,
        dtype=dtype,
    )
    shared = ArmsSettings(
        eval_data, model, scores, tokens, steps, tuning, weighting, strength, template, max_length, eval_batch_tokens,
        format, cache_dir, force, AnswerSettings() if exact_match else None, on_bad_row,
    )  # fmt: skip
    names = comma_list(arms)
    settings = CompareSettings(
        data, shared, rule, None if names is None else tuple(names), seeds, seed, pool_draw, ledger
    )
    print(CompareStudy(settings, Path(out)).run().text())
    log(f"wrote {out}/compare.json and compare.txt; the runs: im-lightning runs {out}/ledger")
    return 0

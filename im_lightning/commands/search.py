"""`im-lightning search`: how many rows to finetune on, searched on one evaluation set and reported on another."""

from __future__ import annotations

SUMMARY = "search for the number of rows to finetune on; report on a set that the search did not see"
EXAMPLE = (
    "im-lightning search pool.jsonl --scores scores.parquet --rule rule.json --model meta-llama/Llama-3.2-1B "
    "--eval-data search.jsonl --report-data report.jsonl --low 256 --high 4096 --budget-trials 12 --out search/"
)
POSITIONAL = ("data",)


def run(
    data: list[str],
    eval_data: str,
    report_data: str,
    model: str,
    rule: str,
    scores: str,
    low: int,
    high: int,
    out: str,
    budget_trials: int = 12,
    method: str = "blendsearch",
    objective: str = "finetune",
    strength_range: str | None = None,
    temperature_range: str | None = None,
    grid: int = 5,
    seeds: int = 3,
    seed: int = 0,
    ledger: str | None = None,
    epochs: int = 3,
    batch_size: int = 8,
    accumulate: int = 1,
    lora_rank: int = 0,
    learning_rate: float | None = None,
    warmup_ratio: float = 0.03,
    gradient_checkpointing: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    weighting: str = "auto",
    template: str = "auto",
    max_length: int = 1024,
    format: str = "auto",
    on_bad_row: str = "error",
    cache_dir: str | None = None,
    force: bool = False,
) -> int:
    """Tries numbers of rows drawn by the rule, each with a real finetune, and reports the choice beside a plain grid.

    The search (BlendSearch, as in the paper) minimises the loss on the search set. The size it chose and those of a
    grid are then trained with fresh seeds and compared on the report set, which shares no row with the search set.
    Trials are kept in the ledger with purpose "search", out of refits, and found again by the same command.

    Args:
        data: The pool, as it was scored: files, folders or data sets.
        eval_data: Search set.
        report_data: Report set; none that the rule was fitted on.
        model: Base model: folder or Hugging Face id.
        rule: Rule file or published name.
        scores: Score table of the pool (im-lightning score).
        low: Least number of rows.
        high: Greatest number of rows.
        out: Folder for search.json, search.txt and (with the extra report) curve.png.
        budget_trials: Different trials of the search.
        method: blendsearch (pip install 'im-lightning[search]') or grid.
        objective: finetune, or predicted: the rule's prediction of the rows drawn, without a finetune.
        strength_range: Also search the strength of the tilt between two numbers, such as 0.3,1.
        temperature_range: Also search the temperature of softmax or rank weights.
        grid: Sizes of the grid, at equal ratios from low to high.
        seeds: Fresh seeds of the report.
        seed: Of the search; the report has those after it.
        ledger: Folder of the runs; by default OUT/ledger.
        epochs: Passes over the rows; the paper's 3.
        batch_size: Rows per micro-batch.
        accumulate: Micro-batches per step.
        lora_rank: Rank of LoRA; 0 finetunes all weights.
        learning_rate: Peak learning rate; by default 2e-5, with LoRA 2e-4.
        warmup_ratio: Share of the steps in which the rate rises.
        gradient_checkpointing: Less memory, more time.
        device: cpu, cuda, mps or auto; one device.
        dtype: fp32, bf16 or auto.
        weighting: Of the rule's weights: auto, tilt, softmax, rank or top.
        template: auto, alpaca or chat.
        max_length: Tokens per example.
        format: auto, alpaca, sharegpt, messages or prompt-response.
        on_bad_row: error, or quarantine (leave bad rows out), as for score.
        cache_dir: Score store.
        force: Go on with a report set that the rule was fitted on, a rule of other models, or one that its own runs
            find no better than the mean; says so loudly.
    """
    from pathlib import Path

    from im_lightning._utils.progress import log

    log("loading Lightning and transformers")
    from im_lightning.experiments.finetuning import TuningSettings, usual_learning_rate
    from im_lightning.experiments.search.proposals import Space
    from im_lightning.experiments.search.run import SearchSettings, SearchStudy

    tuning = TuningSettings(
        learning_rate=usual_learning_rate(lora_rank) if learning_rate is None else learning_rate,
        batch_size=batch_size,
        epochs=epochs,
        warmup_ratio=warmup_ratio,
        lora_rank=lora_rank,
        accumulate=accumulate,
        gradient_checkpointing=gradient_checkpointing,
        device=device,
        dtype=dtype,
    )
    space = Space(low, high, _range("strength", strength_range), _range("temperature", temperature_range))
    settings = SearchSettings(
        data, eval_data, report_data, model, scores, rule, space, budget_trials, method, objective, grid, seeds, seed,
        tuning, weighting, template, max_length, format, cache_dir, force, on_bad_row,
    )  # fmt: skip
    study = SearchStudy(settings, Path(out), ledger)
    print(study.run().text())
    log(
        f"{study.made} finetunes made, {study.replayed} found in {study.ledger.path}; "
        f"wrote {out}/search.json and search.txt"
    )
    return 0


def _range(name: str, text: str | None) -> tuple[float, float] | None:
    """`"0.3,1"` as two numbers."""
    from im_lightning.commands import comma_list
    from im_lightning.errors import RequestError, message

    if text is None:
        return None
    try:
        low, high = (float(part) for part in comma_list(text) or [])
    except ValueError as error:
        cause = f"{text!r} is not two numbers"
        raise RequestError(
            message(f"--{name}-range", cause, "give two, separated by a comma, such as 0.3,1")
        ) from error
    return low, high

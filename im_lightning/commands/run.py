"""`im-lightning run`: the whole loop on a pool and an evaluation set, in one command that goes on where it was."""

from __future__ import annotations

from dataclasses import asdict

from im_lightning._utils.answer import answer
from im_lightning._utils.files import parse_json, write_text
from im_lightning._utils.progress import log
from im_lightning.data.settings import Encoding, Reading
from im_lightning.experiments.finetuning import Tuning

SUMMARY = "the whole loop on your data: scores, designed runs, rule, and whether it paid; goes on where it was"
EXAMPLE = "im-lightning run pool.jsonl --eval-data eval.jsonl --model smollm2 --budget-minutes 60"
POSITIONAL = ("data",)

_ENCODING, _READING = Encoding(model="smollm2"), Reading()
_TUNING = Tuning(lora_rank=16, learning_rate=1e-3)


def run(
    data: list[str],
    eval_data: str,
    out: str = "im-run",
    runs: int | None = None,
    budget_minutes: float | None = None,
    seeds: int = 3,
    seed: int = 0,
    encoding: Encoding = _ENCODING,
    embedding_model: str | None = None,
    tuning: Tuning = _TUNING,
    reading: Reading = _READING,
    dry_run: bool = False,
) -> int:
    """Scores the pool, finetunes on designed subsets, fits a rule, and compares rows drawn by it with random and all.

    The evaluation rows are parted by prompts: one half fits the rule, the other evaluates it. Sizes follow from the
    data; what the loop will cost is printed at its start, and whether it paid at its end. A rule that its own runs find
    no better than the mean is refused, and the loop ends with random and all rows. Everything is kept under OUT; the
    same command goes on where it was interrupted. The rule is OUT/runs/rule.json.

    Args:
        data: The pool: files, folders or data sets.
        eval_data: Rows that say what you want the model to be good at. A finetune leaves out the rows of the pool that
            share a prompt with the half that evaluates it.
        out: Folder to write, or to go on in.
        runs: Designed finetunes, 9 or more; by default 24.
        budget_minutes: What the loop may take on this machine; decides the runs in their place.
        seeds: Of the comparison; one has no interval.
        seed: Of the design, the draws and the training.
        encoding: Base model and template.
        embedding_model: A sentence-transformers folder, hub id or minilm, for knn_6; by default the base model's mean
            states.
        tuning: How each finetune is made. A short run at a small rate does not tell subsets apart, hence the default.
        reading: How rows are read.
        dry_run: Only say what it would cost, after some steps of a finetune that are timed.
    """
    log("loading Lightning and transformers")
    from im_lightning.experiments.finetuning import TuningSettings
    from im_lightning.experiments.loop.run import Loop
    from im_lightning.experiments.loop.settings import LoopSettings
    from im_lightning.report.page import write_report

    tuned = TuningSettings(**asdict(tuning), batch_size=8)
    settings = LoopSettings(
        data,
        eval_data,
        encoding,
        reading,
        tuned,
        embedding_model=embedding_model,
        runs=runs,
        budget_minutes=budget_minutes,
        seeds=seeds,
        seed=seed,
    )
    loop = Loop(out, settings)
    result = loop.run(dry_run)
    if result is None:
        assert loop.decided is not None
        answer(loop.decided, loop.decided["cost"])
        return 0
    text = result.text()
    write_text(loop.folder.text, text + "\n")
    f = loop.folder
    answer({**result.to_json(), "comparison": parse_json((f.compare / "compare.json").read_bytes())}, text)
    page = write_report(
        f.report,
        "im_lightning run",
        ledger=str(f.ledger),
        rule=str(f.rule) if f.rule.exists() else None,
        scores=str(f.scores),
        data=data,
        compare=str(f.compare / "compare.json"),
        budgets=[] if result.rule is None else [loop.sizes.subset_rows],
        reading=reading,
    )
    log(f"everything on one page: {page}")
    return 0

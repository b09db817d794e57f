"""`im-lightning compare`: the rule's rows against the baselines, at equal tokens and steps, with intervals."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.files import parse_json
from im_lightning._utils.optional import require
from im_lightning._utils.outputs import Replacing
from im_lightning._utils.progress import log
from im_lightning.commands import comma_list
from im_lightning.data.settings import Encoding, Reading
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.errors import RequestError, message
from im_lightning.experiments.finetuning import Study, Tuning
from im_lightning.sampling.selection.targeted import Targeting
from im_lightning.sampling.weights.quality_weights import Weighting

SUMMARY = "finetune on the rule's rows and on the baselines, at equal tokens and steps; print the table"
EXAMPLE = (
    "im-lightning compare pool.jsonl --scores scores.parquet --rule rule.json --ledger runs/ --eval-data report.jsonl "
    "--model meta-llama/Llama-3.2-1B --tokens 200000 --steps 100 --out compare/"
)
POSITIONAL = ("data",)
REQUIRED = ("model",)

_ENDPOINT, _CAPS, _JUDGED = Endpoint(), Caps(), 80
_TUNING, _WEIGHTING, _TARGETING = Tuning(), Weighting(), Targeting()
_READING, _REPLACING = Reading(), Replacing()


def run(
    study: Study,
    eval_data: str,
    encoding: Encoding,
    tokens: int,
    steps: int,
    out: str,
    ledger: str | None = None,
    arms: str | None = None,
    seeds: int = 5,
    pool_draw: str = "auto",
    curve: bool = False,
    tuning: Tuning = _TUNING,
    weights: Weighting = _WEIGHTING,
    targeting: Targeting = _TARGETING,
    one_per_prompt: bool = False,
    exact_match: bool = False,
    judge: bool = False,
    judge_prompts: int = _JUDGED,
    endpoint: Endpoint = _ENDPOINT,
    caps: Caps = _CAPS,
    eval_batch_tokens: int = 8192,
    reading: Reading = _READING,
    replacing: Replacing = _REPLACING,
) -> int:
    """Finetunes one base on rows chosen by the rule and by each baseline, with several seeds, and compares the losses.

    Every arm sees the same number of supervised tokens (within 1 %) in the same number of steps. A seed varies the
    candidate rows and the training. Runs are kept in OUT/ledger and found again: the same command goes on where it was
    interrupted, or adds arms; further seeds are added with --pool-draw same alone, for folds of another number have
    other rows, and all is made anew.

    Args:
        study: Pool, scores and rule.
        eval_data: Evaluation set; none that a rule was fitted on.
        encoding: Base model and template.
        tokens: Supervised tokens (response with its end) of every arm.
        steps: Optimiser steps of every arm.
        out: Folder for compare.json, compare.txt, the ledger of the runs, and samples.jsonl with --exact-match.
        ledger: Folder of the runs that the rule was fitted on; intervals then cover how far other runs would move it.
        arms: Separated by commas; by default base, random, random-balanced, weighted, by-source, top, diverse, longest,
            reward, lowest-ppl, ifd, worst and full (all candidate rows, in more steps), as far as the table allows;
            with --target targeted, with --mixture mix and mix+rule.
        seeds: Number of seeds; 5 or more for a verdict worth having.
        pool_draw: How a seed draws its candidates: folds (disjoint parts of the pool), same, or auto: folds where each
            holds twice the tokens, else same.
        curve: Also finetune random rows of 0.5, 2 and 4 times the tokens, and say how many times the random tokens each
            arm is worth, with its interval, and net of scoring and runs.
        tuning: How each finetune is made.
        weights: How the rule turns into weights.
        targeting: What is wanted, for the arm targeted.
        one_per_prompt: Of rows that share a prompt (several answers) an arm takes one at most; full takes all.
        exact_match: Also answer the evaluation rows of short responses greedily, and count exact matches.
        judge: Also let every run answer evaluation prompts, and a model that is asked compare them with random's: a
            win rate beside the loss (needs --base-url, --api-model and a cap).
        judge_prompts: Most prompts that are answered and judged; runs that answered fewer are made anew.
        endpoint: The judge.
        caps: What it may cost.
        eval_batch_tokens: Tokens per evaluation batch, padding included.
        reading: Format of the rows.
        replacing: What may be replaced.
    """
    for flag, count in (("--tokens", tokens), ("--steps", steps), ("--eval-batch-tokens", eval_batch_tokens)):
        if count < 1:
            raise RequestError(message(flag, f"it is {count}", "give 1 or more"))
    if judge:  # before hours of work
        if judge_prompts < 1:
            raise RequestError(message(f"--judge-prompts {judge_prompts}", "nothing would be judged", "give 1 or more"))
        endpoint.check()
        caps.check()
        require("openai", "api", "compare --judge")
    elif (endpoint, caps, judge_prompts) != (_ENDPOINT, _CAPS, _JUDGED):
        cause = "they are of a judge, and none is asked: the finetunes would keep no answers for one"
        raise RequestError(message("--base-url, --api-model, …", cause, "add --judge, or leave them out"))
    log("loading Lightning and transformers")
    from im_lightning.experiments.compare.arms import ArmsSettings
    from im_lightning.experiments.compare.judged import JudgeSettings
    from im_lightning.experiments.compare.run import CompareSettings, CompareStudy
    from im_lightning.experiments.finetuning import TuningSettings, as_in_rule
    from im_lightning.training.exact_match import AnswerSettings

    tuning, said = as_in_rule(tuning, study.rule, None if replacing.overwrite else Path(out) / "ledger")
    for line in said:
        log(line)
    shared = ArmsSettings(
        study,
        encoding,
        reading,
        TuningSettings(**asdict(tuning)),
        eval_data=eval_data,
        tokens=tokens,
        steps=steps,
        weights=weights,
        targeting=targeting,
        one_per_prompt=one_per_prompt,
        eval_batch_tokens=eval_batch_tokens,
        answers=AnswerSettings() if exact_match else None,
        judge=JudgeSettings(endpoint, caps, judge_prompts) if judge else None,
    )
    names = comma_list(arms)
    settings = CompareSettings(shared, None if names is None else tuple(names), seeds, pool_draw, ledger, curve)
    text = CompareStudy(settings, Path(out), replacing.overwrite, said).run().text()
    answer(parse_json((Path(out) / "compare.json").read_bytes()), text)
    log(f"wrote {Path(out) / 'compare.json'} and compare.txt; the runs: im-lightning runs {Path(out) / 'ledger'}")
    return 0

"""Whether an evaluation set may judge: not if the rule was fitted on it, or if it shares rows with the set searched.

What `--force` was needed for: sentences for the result, since a warning at the start is gone when it is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from im_lightning._utils.files import parse_json, plain
from im_lightning._utils.force import Force, accepted, to_force
from im_lightning._utils.json_diff import differences
from im_lightning._utils.outputs import Replacing, json_with
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.experiments.settings import Tuning
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.regime import lora_rank_of
from im_lightning.rule.linear_rule import LinearRule, objections
from im_lightning.rule.published import load_rule
from im_lightning.training.run.encoded_pool import Pool, base_model_name, coding_of

UNKNOWN = "The rule does not say which evaluation sets it was fitted on: that they differ is not checked."
UNKNOWN_ROWS = (
    "The ledger does not say which rows the rule's evaluation set had: that this one shares none is not checked."
)


def check_unseen(
    option: str,
    one: Pool,
    rule: LinearRule,
    ledger: RunLedger | None = None,
    runs: Sequence[RunRecord] = (),
    force: Force = False,
) -> str:
    """Refuses a set that the rule was fitted on, whole or (where its runs are known) in part.

    Args:
        option: What names the set: `--eval-data report.jsonl`.
        one: The set.
        rule: The rule.
        ledger: Of the runs it was fitted on.
        runs: Those runs.
        force: With "seen-evaluation", go on, loudly.

    Returns:
        What a reader must know, or "".

    Raises:
        RequestError: the set was seen and `force` does not name that.
    """
    fitted = rule.regime.get("evaluation_sets") or {}
    same = [name for name, digest in fitted.items() if digest == one.digest]
    cause = ""
    if same:
        cause = f"{rule.title} was fitted on this very set ({', '.join(same)}), which flatters it"
    elif ledger is not None and runs:
        seen = _seen(rule, ledger, runs)
        if seen is None:
            return UNKNOWN_ROWS
        shared = sum(i in seen for i in one.ids)
        if shared:
            cause = f"{shared:,} of its {len(one):,} rows are in the set that {rule.title} was fitted on"
    elif not fitted:
        return UNKNOWN
    if not cause:
        return ""
    if "seen-evaluation" not in accepted(force):
        remedy = f"evaluate on rows that no rule was fitted on, or {to_force(['seen-evaluation'], force)}"
        raise RequestError(message(option, cause, remedy))
    return f"FORCED (seen-evaluation): {option}: {cause}. DIFFERENCES BELOW ARE NO EVIDENCE FOR THE RULE."


def _seen(rule: LinearRule, ledger: RunLedger, runs: Sequence[RunRecord]) -> set[str] | None:
    """Ids of the rule's evaluation set, from the first run that kept its losses; None where none did."""
    for run in runs:
        try:
            losses = ledger.losses(run.run_id)
        except InstructMiningError:  # none kept, or a torn file: another run knows the same rows
            continue
        if rule.evaluation in losses:
            return set(losses[rule.evaluation].ids)
    return None


def check_out(result: Path, keys: Collection[str], inputs: dict[str, Any], overwrite: bool) -> None:
    """Refuses a folder whose result is of something else; more arms, seeds or trials of the same are none.

    Args:
        result: The JSON file of the result; its text lies beside it.
        keys: What results of earlier versions hold, which had no `format`.
        inputs: What decides the numbers, JSON-like, files by their digests.
        overwrite: Replace it all the same.

    Raises:
        RequestError: the files are no such result, or one of other inputs; says which.
    """
    kind, replacing = result.stem, Replacing(overwrite)
    replacing.check(result, f"result of im-lightning {kind}", json_with(f"im_lightning.{kind}", keys=keys))
    known = parse_json(result.read_bytes()) if result.exists() and not overwrite else {}
    text = result.with_suffix(".txt")
    replacing.check(text, f"text of {result}", lambda path: path.read_text("utf-8") == known["rendered"] + "\n")
    if other := differences(known["inputs"], plain(inputs)) if "inputs" in known else []:
        cause = f"it holds another result ({'; '.join(one.text('there', 'asked for') for one in other)})"
        raise RequestError(message(f"--out {result.parent}", cause, "name another folder, or pass --overwrite"))


def check_apart(search: Pool, report: Pool) -> None:
    """Refuses a report set that shares rows, by id, with the search set: its loss would be the one minimised.

    Raises:
        RequestError: says how many rows they share.
    """
    known = set(search.ids)
    shared = sum(i in known for i in report.ids)
    if shared:
        cause = f"{shared:,} of its {len(report):,} rows are in the search set, so its loss would be the one minimised"
        raise RequestError(message("--report-data", cause, "keep the two sets apart, row by row"))


def as_in_rule(tuning: Tuning, rule: str | None) -> tuple[Tuning, list[str]]:
    """How to finetune: where the request does not say, by the method and learning rate of the rule's runs.

    Returns:
        The settings, their rank and rate named; and what a reader must know of them, a sentence, where the rule says
        how its runs were made.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said where the rule is used
        regime = {} if rule is None else load_rule(rule).regime
    rank, rate = lora_rank_of(regime.get("method")), regime.get("learning_rate")
    if rank is None:
        return replace(tuning, lora_rank=tuning.lora_rank or 0), []
    chosen = rank if tuning.lora_rank is None else tuning.lora_rank
    own = rate if tuning.learning_rate is None and chosen == rank else tuning.learning_rate
    made = replace(tuning, lora_rank=chosen, learning_rate=own)
    here = f"lora r={chosen} alpha={2 * chosen:g} all-linear" if chosen else "full"
    if here == regime["method"] and own == rate:
        return made, [f"Method and learning rate are those of the rule's runs: {here}, {rate:g}."]
    return made, [
        f"NOT AS THE RULE'S RUNS: they were finetuned by {regime['method']} at learning rate {rate}, these by {here} "
        f"at {'its usual one' if own is None else f'{own:g}'}; what helped there need not help here."
    ]


def check_rule(rule: LinearRule, table: ScoreTable, encoding: Encoding, force: Force) -> list[str]:
    """Checks the rule against the scores and against the base that is to be finetuned, before anything is.

    Args:
        rule: The rule.
        table: Scores of the pool.
        encoding: Base model and template of the finetunes.
        force: Accept what would be refused.

    Returns:
        What was forced, one sentence each.

    Raises:
        RequestError: the rule does not fit, and `force` does not name how.
    """
    rule.check(table, force)
    forced = [f"FORCED ({one.risk}): rule {rule.title}: {one.cause}." for one in objections(rule, table)[0]]
    coding = coding_of(encoding)
    here = {
        "base_model": base_model_name(coding.model),
        "template": f"{coding.template.name} {coding.template.identity}",
    }
    return [*forced, *(f"FORCED (other-base): {note}." for note in rule.check_regime(here, force))]

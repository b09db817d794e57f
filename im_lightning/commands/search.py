"""`im-lightning search`: how many rows to finetune on, searched on one evaluation set and reported on another."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.files import parse_json
from im_lightning._utils.outputs import Replacing
from im_lightning._utils.progress import log
from im_lightning.commands import comma_list
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import RequestError, message
from im_lightning.experiments.finetuning import Study, Tuning

SUMMARY = "search for the number of rows to finetune on; report on a set that the search did not see"
EXAMPLE = (
    "im-lightning search pool.jsonl --scores scores.parquet --rule rule.json --model meta-llama/Llama-3.2-1B "
    "--eval-data search.jsonl --report-data report.jsonl --low 256 --high 4096 --budget-trials 12 --out search/"
)
POSITIONAL = ("data",)
REQUIRED = ("model", "rule")

_TUNING, _READING, _REPLACING = Tuning(epochs=3), Reading(), Replacing()


def run(
    study: Study,
    eval_data: str,
    report_data: str,
    encoding: Encoding,
    low: int,
    high: int,
    out: str,
    budget_trials: int = 12,
    method: str = "blendsearch",
    objective: str = "finetune",
    weighting: str = "auto",
    strength_range: str | None = None,
    temperature_range: str | None = None,
    grid: int = 5,
    seeds: int = 3,
    ledger: str | None = None,
    tuning: Tuning = _TUNING,
    batch_size: int = 8,
    reading: Reading = _READING,
    replacing: Replacing = _REPLACING,
) -> int:
    """Tries numbers of rows drawn by the rule, each with a real finetune, and reports the choice beside a plain grid.

    The search (BlendSearch, as in the paper) minimises the loss on the search set. The size it chose and those of a
    grid are then trained with fresh seeds and compared on the report set, which shares no row and no prompt with the
    search set.
    Trials are kept in the ledger with purpose "search", out of refits, and found again by the same command.

    Args:
        study: Pool, scores and rule; the seed is that of the search, the report has those after it.
        eval_data: Search set.
        report_data: Report set; none that the rule was fitted on.
        encoding: Base model and template.
        low: Least number of rows.
        high: Greatest number of rows.
        out: Folder for search.json, search.txt and curve.png.
        budget_trials: Different trials of the search.
        method: blendsearch (pip install 'im-lightning[search]') or grid.
        objective: finetune, or predicted: the rule's prediction of the rows drawn, without a finetune.
        weighting: Of the rule's weights: auto, tilt, softmax, rank or top.
        strength_range: Also search the strength of the tilt between two numbers, such as 0.3,1.
        temperature_range: Also search the temperature of softmax or rank weights.
        grid: Sizes of the grid, at equal ratios from low to high.
        seeds: Fresh seeds of the report.
        ledger: Folder of the runs; by default OUT/ledger.
        tuning: How each finetune is made; the paper's 3 epochs.
        batch_size: Rows per batch.
        reading: Format of the rows.
        replacing: What may be replaced.
    """
    log("loading Lightning and transformers")
    from im_lightning.experiments.finetuning import TuningSettings, as_in_rule
    from im_lightning.experiments.search.proposals import Space
    from im_lightning.experiments.search.run import SearchSettings, SearchStudy

    tuning, said = as_in_rule(tuning, study.rule, None if replacing.overwrite else Path(out) / "ledger")
    for line in said:
        log(line)
    settings = SearchSettings(
        study,
        encoding,
        reading,
        TuningSettings(**asdict(tuning), batch_size=batch_size),
        eval_data=eval_data,
        report_data=report_data,
        space=Space(low, high, _range("strength", strength_range), _range("temperature", temperature_range)),
        weighting=weighting,
        trials=budget_trials,
        method=method,
        objective=objective,
        grid=grid,
        seeds=seeds,
    )
    made = SearchStudy(settings, Path(out), ledger, replacing.overwrite)
    made.notes[:0] = said
    text = made.run().text()
    answer(parse_json((Path(out) / "search.json").read_bytes()), text)
    log(
        f"{made.runs.made} finetunes made, {made.runs.replayed} found in {made.ledger.path}; "
        f"wrote {Path(out) / 'search.json'} and search.txt"
    )
    return 0


def _range(name: str, text: str | None) -> tuple[float, float] | None:
    """`"0.3,1"` as two numbers."""

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

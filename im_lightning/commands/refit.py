"""`im-lightning refit`: fits the rule on the runs of a ledger, prints the regression table, writes the rule file."""

from __future__ import annotations

import re
from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.outputs import Replacing, json_with
from im_lightning._utils.progress import log
from im_lightning.commands import comma_list
from im_lightning.commands.runs import open_ledger
from im_lightning.errors import RequestError, message
from im_lightning.ledger.targets import read_targets, terms_of

SUMMARY = "fit the rule on the runs of a ledger; print the regression table"
EXAMPLE = "im-lightning refit runs/ --out runs/rule.json"
POSITIONAL = ("ledger",)

_REPLACING = Replacing()


def run(
    ledger: str,
    out: str,
    indicators: str | None = None,
    evaluation: str | None = None,
    target: str | None = None,
    regime: str | None = None,
    method: str = "auto",
    signs: str | None = None,
    permutations: int = 999,
    bootstrap: int = 500,
    from_wandb: str | None = None,
    force: bool | str = False,
    at: float | None = None,
    kind: str = "all",
    replacing: Replacing = _REPLACING,
) -> int:
    """Fits log evaluation loss on the mean indicators of the ledger's designed runs, and writes the rule.

    docs/statistics.md explains every number that is printed. A rule that the permutation test finds no better than
    the mean is written all the same, and refused by score, select, fit, search and compare
    unless they are forced.

    Args:
        ledger: Folder of the ledger.
        out: Rule file to write (JSON).
        indicators: Regressors, separated by commas; by default the paper's nine where the runs have them.
        evaluation: Evaluation set, where the runs have several; NAME:example for its loss with every instruction
            counting alike in place of every token.
        target: What to predict, in place of --evaluation: em:TASK for an exact match (higher is better), a=0.7,b=0.3
            for a weighted sum of losses or of scores, a=1,em:TASK=0 to watch another beside it; a,b for a rule on each,
            written beside OUT. Weights are recommended only if no target named gets worse (docs/targets.md).
        regime: Id of a run; only runs of its regime are fitted. Needed where there are several regimes.
        method: auto (the simplest of ols, ridge, elastic-net, ridge+shares, additive, additive+shares, partial-pooling,
            offset and offset-robust whose held-out error is within one standard error of the least), one of these, or
            best-subset (the paper's, for comparison). Shares are those of the sources; partial-pooling has slopes per
            source.
        signs: Signs that coefficients must have, such as reward=-,ppl=+.
        permutations: Trials at most of the test against the mean, 20 or more; 0 leaves it out.
        bootstrap: Resamples of the subsets for intervals and the stability of signs; 0 leaves them out.
        from_wandb: Wandb project, ENTITY/PROJECT, whose runs are imported into the ledger first; a ledger that is not
            there is made.
        force: With other-regime after it: mix runs of several regimes.
        at: Early point to fit at, a share of the optimiser steps (0.2) or a number of them: runs stopped there (sweep
            --stop-at), and full runs with a curve (--mining.eval_at); prints how losses there agree with the ends.
        kind: all, or trained: merged runs are left out. Of all, merged runs count as docs/cost.md says, and what was
            mixed is printed.
        replacing: What may be replaced.
    """
    from im_lightning.ledger.ledger import RULE_FORMAT
    from im_lightning.rule.fit import fit_rule
    from im_lightning.rule.rule_file import rule_to_json

    if target is not None and evaluation is not None:
        cause = "both say what the rule predicts"
        raise RequestError(message("--target and --evaluation", cause, "give one of them"))
    targets = [evaluation] if target is None else read_targets(target)
    files = [out] if len(targets) == 1 else [_beside(out, str(one)) for one in targets]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        cause, remedy = f"two of its rules would be written to {twice}", "fit them one by one, each with its own --out"
        raise RequestError(message(f"--target {target}", cause, remedy))
    for file in files:
        replacing.check(file, "rule", json_with(RULE_FORMAT))
    wanted = read_signs(signs)
    _check_count("--permutations", permutations)
    _check_count("--bootstrap", bootstrap)
    if from_wandb is not None:
        _import(from_wandb, ledger)
    records = open_ledger(ledger).records(status=None)
    rules = [
        fit_rule(
            records,
            method,
            comma_list(indicators),
            one,
            regime,
            force,
            signs=wanted,
            permutations=permutations,
            bootstrap=bootstrap,
            at=at,
            kind=kind,
        )
        for one in targets
    ]
    made = [{"file": file, **rule_to_json(rule)} for rule, file in zip(rules, files, strict=True)]
    answer({"rules": made}, "\n".join(rule.summary() for rule in rules))
    for rule, file in zip(rules, files, strict=True):
        rule.save(file)
        log(f"wrote {file}")
    return 0


def _beside(out: str, target: str) -> str:
    """`runs/rule-em-gsm8k.json` for `runs/rule.json` and the one target in the sum."""
    summed = next(name for name, weight in terms_of(target).items() if weight)
    path, name = Path(out), re.sub(r"[^\w.-]+", "-", summed)
    return str(path.with_name(f"{path.stem}-{name}{path.suffix}"))


def _import(project: str, ledger: str) -> None:
    from im_lightning.ledger.ledger import RunLedger
    from im_lightning.ledger.wandb_import import import_wandb_runs

    for line in import_wandb_runs(project, RunLedger(ledger)).lines(project):
        log(line)


def read_signs(text: str | None) -> dict[str, int] | None:
    """`reward=-,ppl=+` as {"reward": -1, "ppl": 1}.

    Raises:
        RequestError: a part is not of this form.
    """
    out = {}
    for part in comma_list(text) or []:
        name, _, sign = part.partition("=")
        if sign not in ("+", "-", "1", "-1", "+1") or not name:
            cause = f"{part!r} is not an indicator with its sign"
            raise RequestError(message("--signs", cause, "write for example --signs reward=-,ppl=+"))
        out[name.strip()] = -1 if sign.startswith("-") else 1
    return out or None


def _check_count(flag: str, value: int) -> None:

    if value < 0:
        raise RequestError(message(f"{flag} {value}", "it is negative", "give a number of trials, 0 for none"))

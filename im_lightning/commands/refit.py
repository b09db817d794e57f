"""`im-lightning refit`: fits the rule on the runs of a ledger, prints the regression table, writes the rule file."""

from __future__ import annotations

from im_lightning._utils.outputs import Replacing, json_with
from im_lightning._utils.progress import log
from im_lightning.commands import comma_list
from im_lightning.commands.runs import open_ledger
from im_lightning.errors import RequestError, message

SUMMARY = "fit the rule on the runs of a ledger; print the regression table"
EXAMPLE = "im-lightning refit runs/ --out runs/rule.json"
POSITIONAL = ("ledger",)

_REPLACING = Replacing()


def run(
    ledger: str,
    out: str,
    indicators: str | None = None,
    evaluation: str | None = None,
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
    the mean is written all the same, and refused by score, select and fit unless they are forced.

    Args:
        ledger: Folder of the ledger.
        out: Rule file to write (JSON).
        indicators: Regressors, separated by commas; by default the paper's nine where the runs have them.
        evaluation: Evaluation set, where the runs have several; NAME:example for its loss with every instruction
            counting alike in place of every token.
        regime: Id of a run; only runs of its regime are fitted. Needed where there are several regimes.
        method: auto (the simplest of ols, ridge, elastic-net, additive, offset and offset-robust whose held-out error
            is within one standard error of the least), one of these, or best-subset (the paper's, for comparison).
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

    replacing.check(out, "rule", json_with(RULE_FORMAT))
    wanted = read_signs(signs)
    _check_count("--permutations", permutations)
    _check_count("--bootstrap", bootstrap)
    if from_wandb is not None:
        _import(from_wandb, ledger)
    book = open_ledger(ledger)
    rule = fit_rule(
        book.records(status=None),
        method,
        comma_list(indicators),
        evaluation,
        regime,
        force,
        signs=wanted,
        permutations=permutations,
        bootstrap=bootstrap,
        at=at,
        kind=kind,
    )
    print(rule.summary())
    rule.save(out)
    log(f"wrote {out}")
    return 0


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

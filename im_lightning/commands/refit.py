"""`im-lightning refit`: fits the rule on the runs of a ledger, prints the regression table, writes the rule file."""

from __future__ import annotations

SUMMARY = "fit the rule on the runs of a ledger; print the regression table"
EXAMPLE = "im-lightning refit runs/ --out runs/rule.json"
POSITIONAL = ("ledger",)


def run(
    ledger: str,
    out: str,
    indicators: str | None = None,
    evaluation: str | None = None,
    regime: str | None = None,
    method: str = "ols",
    force: bool = False,
) -> int:
    """Fits log evaluation loss on the mean indicators of the ledger's designed runs, and writes the rule.

    Args:
        ledger: Folder of the ledger.
        out: Rule file to write (JSON).
        indicators: Regressors, separated by commas; by default the paper's nine where the runs have them.
        evaluation: Evaluation set, where the runs have several.
        regime: Id of a run; only runs of its regime are fitted. Needed where there are several regimes.
        method: How to fit; ols.
        force: Mix runs of several regimes.
    """
    from im_lightning._progress import log
    from im_lightning.commands import comma_list
    from im_lightning.commands.runs import open_ledger
    from im_lightning.rule.regression import fit_rule

    book = open_ledger(ledger)
    rule = fit_rule(book.records(status=None), method, comma_list(indicators), evaluation, regime, force)
    print(rule.summary())
    rule.save(out)
    log(f"wrote {out}")
    return 0

"""`im-lightning mix`: the mixture of sources that the runs predict best, beside the natural one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from im_lightning._utils.outputs import Replacing

if TYPE_CHECKING:
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.rule.mixture_law import MixtureLaw
    from im_lightning.sampling.weights.mixture import Mixture

SUMMARY = "find the mixture of sources that the runs predict best; print it beside the natural one"
EXAMPLE = "im-lightning mix runs/ --scores scores.parquet --budget 2000 --out mix.json"
POSITIONAL = ("ledger",)

_REPLACING = Replacing()


def run(
    ledger: str,
    scores: str,
    budget: int,
    out: str | None = None,
    rule: str | None = None,
    pull: float = 0.01,
    repeat: float = 1.0,
    method: str = "auto",
    evaluation: str | None = None,
    regime: str | None = None,
    force: bool | str = False,
    replacing: Replacing = _REPLACING,
) -> int:
    """Fits the loss of designed runs on the shares of their sources, and minimises it over mixtures.

    The mixture stays inside the region that the runs cover, takes no row more often than --repeat, and leaves the
    natural mix only where that gains: --pull is what a nat of divergence must gain in log loss. Draw by it with
    im-lightning select --method mix (or mix+rule) --mixture OUT, in a fit with --data.weighting=mix
    --data.mixture=OUT, and compare the arms mix and mix+rule (--mixture OUT).

    Args:
        ledger: Folder of the runs.
        scores: Score table of the pool, whose sources are mixed.
        budget: Rows that are to be drawn.
        out: File to write (.json).
        rule: Also print the shares that this rule's weights give the sources.
        pull: Nats of log loss per nat of KL(mixture ‖ natural mix).
        repeat: How often a row may be drawn.
        method: auto (what holds out best of ridge, elastic-net and offset), or one of them.
        evaluation: The evaluation set, where the runs have several.
        regime: A run of the regime to fit on, where there are several.
        force: For --rule, as for select.
        replacing: What may be replaced.
    """
    from collections import Counter
    from dataclasses import asdict

    from im_lightning._utils.answer import answer
    from im_lightning._utils.outputs import json_with
    from im_lightning._utils.progress import log
    from im_lightning.commands.runs import open_ledger
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.rule.mixture_law import fit_mixture_law
    from im_lightning.sampling.weights.mixture import FORMAT, best_mixture

    if out is not None:
        replacing.check(out, "mixture", json_with(FORMAT))
    table = ScoreTable.read(scores)
    law = fit_mixture_law(open_ledger(ledger).records(), evaluation, method, regime)
    mixture = best_mixture(law, Counter(table.source), budget, pull, repeat)
    ruled = _shares_of_rule(table, rule, budget, force)
    fitted = {"method": law.rule.method, "n_runs": law.rule.n_runs_, "held_out_r2": law.rule.held_out_r2}
    fitted |= {"slopes": dict(zip(law.sources, law.slopes, strict=True)), "resamples": len(law.resamples)}
    fitted |= {"kinds": law.rule.metrics_.kinds, "notes": law.rule.metrics_.notes}
    answer({**asdict(mixture), "law": fitted, "rule_shares": ruled}, _text(law, mixture, ruled))
    if out is not None:
        mixture.save(out)
        log(f"wrote {out}")
    return 0


def _shares_of_rule(table: ScoreTable, rule: str | None, budget: int, force: bool | str) -> dict[str, float] | None:
    """Source → share of the rows that a draw by the rule's weights has."""
    import numpy as np

    from im_lightning.rule.published import load_rule
    from im_lightning.sampling.draws.systematic import inclusion_probabilities
    from im_lightning.sampling.rows import source_shares
    from im_lightning.sampling.weights.quality_weights import quality_weights

    if rule is None:
        return None
    fitted = load_rule(rule)
    there = int(np.isfinite(fitted.phi(table)).all(axis=1).sum())
    weights = quality_weights(table, fitted, budget=budget if budget <= there else None, force=force).weights
    if budget > there:  # rows come again, and each as often as it weighs
        return source_shares(table.source, weights)
    chances = inclusion_probabilities(weights, min(budget, int(np.count_nonzero(weights))))
    return source_shares(table.source, chances)


def _text(law: MixtureLaw, mixture: Mixture, ruled: dict[str, float] | None) -> str:
    """The mixture as a table, what it is predicted to gain, how good the law is, and the notes of its fit."""
    from im_lightning._utils.text_tables import Column, terminal_width, text_table, wrapped
    from im_lightning.rule.kinds import kinds_lines

    columns = [Column("source", right=False), Column("natural"), Column("mix")]
    columns += [Column("resampled", rank=1)] if mixture.spread else []
    columns += [Column("at most")]
    columns += [Column("rule's weights")] if ruled is not None else []
    columns.append(Column("slope"))
    cells = []
    for name, slope in sorted(zip(law.sources, law.slopes, strict=True), key=lambda one: -mixture.shares[one[0]]):
        row = [name, f"{mixture.natural[name]:.3f}", f"{mixture.shares[name]:.3f}"]
        row += ["{:.3f} to {:.3f}".format(*mixture.spread[name])] if mixture.spread else []
        row += [f"{mixture.most[name]:.3f}"]
        row += [f"{ruled.get(name, 0.0):.3f}"] if ruled is not None else []
        cells.append([*row, f"{slope:+.3f}"])
    p, width, r2 = mixture.predicted, terminal_width(), law.rule.held_out_r2
    within = "" if p["half_width"] is None else f" ± {p['half_width']:.4f} (95 %)"
    held_out = "not estimable" if r2 is None else f"{r2:.2f}"
    lines = [
        f"Predicted log loss {p['mix']:.4f}, of the natural mix {p['natural']:.4f}: {p['difference']:+.4f}{within}.",
        f"The law ({law.rule.method}) is of {law.rule.n_runs_} runs, R² held out {held_out}; slopes are of log loss "
        f"per share, against {law.sources[-1]}. The mix lies {p['distance']:.2f} from the mean of the runs; their "
        f"region ends at {p['radius']:.2f}.",
    ]
    if p["half_width"] is not None and p["difference"] + p["half_width"] >= 0:
        lines.append("The interval holds 0: these runs do not show that the mix is better than the natural one.")
    if p["corrected"] is not None:
        lines.insert(
            1,
            f"The mix is chosen by the runs that predict it: without what that flatters it, {p['corrected']:+.4f} "
            f"({len(law.resamples)} resamples of the subsets; resampled: 95 % of the mixes that they choose).",
        )
    lines += kinds_lines(law.rule.metrics_.kinds) if law.rule.metrics_.kinds else []
    lines += [f"Note: {note.rstrip('.')}." for note in (*mixture.notes, *law.rule.metrics_.notes)]
    return "\n".join([text_table(columns, cells, width), "", *(wrapped(line, width) for line in lines)])

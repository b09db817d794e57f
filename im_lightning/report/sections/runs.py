"""Section: the runs of the ledger, their losses, and how much of the differences is noise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from im_lightning._utils.numbers import number_or_dash as number
from im_lightning.ledger.curve import stopped_text
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.regime import group_regimes
from im_lightning.report.charts import strips
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Figures, Head, Section, Table, Words
from im_lightning.report.sections import report_section
from im_lightning.report.text import count, label
from im_lightning.rule.validation.diagnostics import FEWEST_REPEATS, pure_error

MOST_ROWS = 300
MOST_SETS = 6


@report_section("runs", "The runs", place=60)
def runs_section(inputs: ReportInputs, section: Section) -> None:
    """The section, from the ledger."""
    records = inputs.records
    if records is None:
        section.absent = "add --ledger runs/ (each im-lightning fit writes a record there)."
        return
    section.lead = (
        "Every finetune that left a record. A rule is fitted on the designed ones alone; the spread between equal "
        "subsets trained with other seeds says how much of the differences no rule can explain."
    )
    kinds = Counter((r.purpose, r.status) for r in records)
    told = ", ".join(f"{n} {purpose} {status}" for (purpose, status), n in kinds.items())
    section.parts.append(Words(f"{count(len(records), 'run')}: {told}."))
    for name, cause in inputs.rejected:
        section.parts.append(Words(f"Left out: {label(name, 200)}: {label(cause, 300)}", "note"))
    sets = list(dict.fromkeys(name for r in records for name in r.evaluation))
    figures = []
    for place, name in enumerate(sets[:MOST_SETS]):
        section.parts += [Words(text) for text in _noise(records, name)]
        groups: dict[str, list[tuple[float, str]]] = {}
        for r in records:
            if r.loss(name) > 0 and math.isfinite(r.loss(name)):
                groups.setdefault(r.purpose, []).append((r.loss(name), f"{r.run_id}: {r.loss(name):.4f}"))
        if groups:
            title = f"Loss on {label(name, 60)}: each dot a run, bars the means"
            figures.append(strips(f"runs-{place}", title, groups, "nats per token"))
    if figures:
        section.parts.append(Figures(figures))
    section.parts.append(_table(records, sets[:MOST_SETS]))


def _noise(records: Sequence[RunRecord], evaluation: str) -> list[str]:
    """The noise ceiling of the largest regime of designed runs."""
    designed = [r for r in records if r.purpose == "designed" and r.status == "complete" and r.loss(evaluation) > 0]
    if not designed:
        return []
    names = sorted({n for r in designed for n in r.phi_means})
    regimes = group_regimes(designed, names, evaluation)
    runs = max(regimes, key=lambda g: len(g.records)).records
    y = np.log([r.loss(evaluation) for r in runs])
    which = f"the {len(runs)} designed runs" + (
        f" of the largest of {len(regimes)} regimes" if len(regimes) > 1 else ""
    )
    found = pure_error(y, [r.subset_key for r in runs])
    shown = label(evaluation, 60)
    if found is None:
        return [
            f"Loss on {shown}: the noise ceiling is not known, for among {which} no subset was repeated with another "
            "training seed."
        ]
    ceiling = found.ceiling
    said = f"too few to say how much of the differences a rule can explain: {FEWEST_REPEATS} are needed."
    if ceiling is not None:
        said = (
            "the number of repeats behind this estimate. So no rule can be expected to explain more than "
            f"{ceiling[0]:.3f} of the differences (R²; 95 % interval {ceiling[1]:.2f} to {ceiling[2]:.2f})."
        )
    return [
        f"Loss on {shown}: over {which} the log loss has a standard deviation of {y.std(ddof=1):.3g}; equal subsets "
        f"with other training seeds differ by {found.sd:.3g} ({found.df} degrees of freedom), {said}"
    ]


def _table(records: Sequence[RunRecord], sets: Sequence[str]) -> Table:
    heads = [
        Head("run", right=False),
        Head("when (UTC)", right=False),
        Head(
            "purpose",
            "designed: made for a fit; weighted: drawn by a rule; search and compare: of those commands; block: to be "
            "merged.",
            right=False,
        ),
        Head(
            "status",
            "complete: its evaluation loss on the final weights is known; stopped: those of an early step.",
            right=False,
        ),
        Head("rows", "Of its subset."),
        *(Head("loss" if len(sets) == 1 else f"loss on {label(name, 40)}") for name in sets),
        Head("tokens", "Supervised (response) tokens seen."),
        Head("seconds"),
    ]
    rows = []
    for r in list(reversed(records))[:MOST_ROWS]:
        size = r.subset.get("size")
        losses = [r.loss(name) for name in sets]
        status = ", ".join(filter(None, (r.status, stopped_text(r))))
        about = [label(r.run_id, 60), f"{r.when:%Y-%m-%d %H:%M}", r.purpose, status]
        spent = [f"{r.tokens:,}", number(r.seconds, ",.1f")]
        rows.append(
            [*about, f"{size:,}" if isinstance(size, int) else "–", *(number(v, ".4f") for v in losses), *spent]
        )
    rest = len(records) - len(rows)
    left = f"{rest:,} earlier runs are not listed (im-lightning runs lists all)." if rest else ""
    return Table("Runs, the last first", heads, rows, left_out=left, folded=len(rows) > 12)

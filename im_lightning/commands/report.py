"""`im-lightning report`: writes one self-contained HTML page of pool, rule, runs, weights and comparison."""

from __future__ import annotations

from im_lightning._utils.answer import answer
from im_lightning._utils.outputs import Replacing
from im_lightning._utils.progress import log
from im_lightning.data.settings import Reading

SUMMARY = "write one self-contained HTML page: pool, rule, runs, weights, examples, comparison"
EXAMPLE = "im-lightning report --ledger runs/ --rule runs/rule.json --scores scores.parquet --out report.html"

_READING, _REPLACING = Reading(), Replacing()


def run(
    out: str,
    ledger: str | None = None,
    rule: str | None = None,
    scores: str | None = None,
    data: list[str] | None = None,
    compare: str | None = None,
    decisions: str | None = None,
    budget: list[int] | None = None,
    title: str = "im_lightning report",
    reading: Reading = _READING,
    replacing: Replacing = _REPLACING,
) -> int:
    """Writes a page that needs no network, in light and dark, for screens of any width; its figures also as PNG.

    Every input is optional; what is not given is left out, and the page says which argument adds it. The figures are
    kept in OUT without .html, with _figures added. docs/statistics.md explains what each part shows.

    Args:
        out: HTML file to write.
        ledger: Folder of the runs.
        rule: Rule file or published name.
        scores: Score table of the pool.
        data: The scored files, for the best and the worst rows as text.
        compare: compare.json of `im-lightning compare`, or the demo's comparison.json.
        decisions: A subset that im-lightning select wrote, or a fit's folder under im-lightning/: why each row was
            taken or not.
        budget: Rows to draw, one or several numbers: what the weights reach for each.
        title: Heading of the page.
        reading: Format of the data, as for score.
        replacing: What may be replaced.
    """
    from im_lightning.report.page import write_report

    path = write_report(
        out,
        title,
        replacing,
        ledger=ledger,
        rule=rule,
        scores=scores,
        data=data or [],
        compare=compare,
        decisions=decisions,
        budgets=budget or [],
        reading=reading,
    )
    size, figures = path.stat().st_size, path.with_name(path.stem + "_figures")
    answer({"page": path, "bytes": size, "figures": figures})
    log(f"wrote {path} ({size / 1e6:.1f} MB), figures in {figures}")
    return 0

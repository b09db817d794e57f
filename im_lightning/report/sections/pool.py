"""Section: the pool. Its sizes and sources, how its indicators are distributed and go together, what is missing."""

from __future__ import annotations

from collections import Counter

import numpy as np

from im_lightning._utils.numbers import number_or_dash as number
from im_lightning.data.score_table import ScoreTable
from im_lightning.indicators.built_in import info_of
from im_lightning.indicators.transforms import default_transforms
from im_lightning.report.charts import histogram, matrix
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Figures, Head, Section, Table, Words
from im_lightning.report.sections import report_section
from im_lightning.report.svg import Figure
from im_lightning.report.text import count, label, percent, reading

MOST_SOURCES = 12  # drawn by source, and listed before the rest is added up
MOST_INDICATORS = 24
MOST_REASONS = 5


@report_section("pool", "The pool", place=50)
def pool_section(inputs: ReportInputs, section: Section) -> None:
    """The section, from the score table."""
    table = inputs.table
    if table is None:
        section.absent = "add --scores scores.parquet (im-lightning score DATA --out scores.parquet)."
        return
    section.lead = (
        "The rows to choose from, and what the indicators say of them. Look for values that are missing, for "
        "indicators whose sources lie far apart, and for pairs that go together so closely that they say the same "
        "thing twice."
    )
    if not len(table):
        section.parts.append(Words("The score table has no rows.", "note"))
        return
    different = len(set(table.id))
    by_source = Counter(table.source)
    sizes = (
        f"{count(len(table), 'row')} ({different:,} different) from {count(len(by_source), 'source')}, "
        f"{count(len(table.indicators), 'indicator')}."
    )
    section.parts += [Words(sizes), _source_table(table, by_source, inputs.predicted)]
    names = [n for n in table.indicators if np.isfinite(table.values[n]).any()][:MOST_INDICATORS]
    section.parts.append(_indicator_table(table))
    if len(table.indicators) > len(names):
        section.parts.append(Words(f"Drawn: {', '.join(names)}; the others are in the table above.", "note"))
    missing = [[e["indicator"], *row] for e in table.coverage() for row in _reasons(e["missing"])]
    if missing:
        heads = [Head("indicator", right=False), Head("reason", right=False), Head("rows")]
        section.parts.append(Table("Missing values, and why", heads, missing))
    figures = [_distribution(table, name, place, by_source) for place, name in enumerate(names)]
    if figures:
        words = (
            "How the values are distributed: bars for all rows (the outermost 0.5 % at either end are not drawn), and "
            "below per source the median (dot), the middle half (thick) and the middle 90 % (thin)."
        )
        section.parts += [Words(words), Figures(figures)]
    if len(names) > 1:
        words = (
            "Correlation of the indicators over the rows, on the scale the rule uses (logarithms of perplexities and "
            "lengths): 1 means that they rise together, −1 that one falls as the other rises, 0 that they have nothing "
            "to do with each other in a straight line."
        )
        title = "Correlation of the indicators over the rows"
        figure = matrix("pool-correlation", title, names, correlations(table, names))
        section.parts += [Words(words), Figures([figure])]


def correlations(table: ScoreTable, names: list[str]) -> np.ndarray:
    """Pearson correlations of φ, float64 [p, p], over the rows that have both values; NaN where one is constant."""
    transforms = default_transforms(table, names)
    columns = np.column_stack([transforms[n].apply(table.values[n]) for n in names])
    out = np.full((len(names), len(names)), np.nan)
    for i in range(len(names)):
        for j in range(i + 1):
            both = np.isfinite(columns[:, i]) & np.isfinite(columns[:, j])
            a, b = columns[both, i], columns[both, j]
            if both.sum() > 2 and np.ptp(a) > 0 and np.ptp(b) > 0:
                out[i, j] = out[j, i] = np.corrcoef(a, b)[0, 1]
    return out


def largest_sources(by_source: Counter[str]) -> list[str]:
    """The sources to draw, the largest first."""
    return [name for name, _ in by_source.most_common(MOST_SOURCES)]


def _source_table(table: ScoreTable, by_source: Counter[str], predicted: np.ndarray | None) -> Table:
    heads = [
        Head("source", "Where a row came from: its own field, or the name of its file.", right=False),
        Head("rows"),
        Head("share"),
    ]
    if predicted is not None:
        heads.append(
            Head("predicted log loss", "Mean of the rule's prediction over the source's rows; lower is better.")
        )
    source = np.array(table.source, dtype=object)
    rows, shown = [], largest_sources(by_source)
    for name in shown:
        row = [label(name, 60) or "(no name)", f"{by_source[name]:,}", percent(by_source[name] / len(table), 1)]
        if predicted is not None:
            values = predicted[(source == name) & np.isfinite(predicted)]
            row.append(number(float(values.mean()), ".4f") if len(values) else "–")
        rows.append(row)
    rest = len(by_source) - len(shown)
    left = len(table) - sum(by_source[name] for name in shown)
    return Table("Sources", heads, rows, left_out=f"{rest:,} smaller sources with {left:,} rows." if rest else "")


def _indicator_table(table: ScoreTable) -> Table:
    heads = [
        Head("indicator", right=False),
        Head("scored", "Rows with a value."),
        Head("missing", "Rows without one."),
        Head("mean"),
        Head("sd", "Standard deviation: how far values spread."),
        Head("0.5 %", "Half a per cent of the rows lie below; the rule treats lower values as this one."),
        Head("median", "Half of the rows lie below."),
        Head("99.5 %", "Half a per cent of the rows lie above; the rule treats higher values as this one."),
        Head("what it is", right=False),
    ]
    rows = []
    for name in table.indicators:
        values = table.values[name][np.isfinite(table.values[name])]
        numbers = ["–"] * 5
        if len(values):
            low, middle, high = np.quantile(values, [0.005, 0.5, 0.995])
            numbers = [reading(float(v)) for v in (values.mean(), values.std(), low, middle, high)]
        rows.append([label(name, 40), f"{len(values):,}", f"{len(table) - len(values):,}", *numbers, meaning(name)])
    return Table("Indicators", heads, rows)


def meaning(name: str) -> str:
    """What an indicator is, in a few words; "" for one that is not ours."""
    row = info_of(name)
    return "" if row is None else row.meaning


def _reasons(missing: dict[str, int]) -> list[list[str]]:
    rows = [[label(reason, 120), f"{n:,}"] for reason, n in list(missing.items())[:MOST_REASONS]]
    rest = sum(list(missing.values())[MOST_REASONS:])
    return rows + ([["other reasons", f"{rest:,}"]] if rest else [])


def _distribution(table: ScoreTable, name: str, place: int, by_source: Counter[str]) -> Figure:
    transform = default_transforms(table, [name])[name]
    values = table.values[name]
    finite = np.isfinite(values)
    least = {"log": 0.0, "log1p": -1.0}.get(transform.kind, -np.inf)
    kind = transform.kind if values[finite].min() > least else "identity"  # a logarithm it would not have
    column, source = values[finite], np.array(table.source, dtype=object)[finite]
    parts: dict[str, np.ndarray] = {}
    if len(by_source) > 1:
        parts = {s: column[source == s] for s in largest_sources(by_source) if (source == s).any()}
    scale = {"log": ", log scale", "log1p": ", log scale"}.get(kind, "")
    said = f": {meaning(name)}" if meaning(name) else ""
    return histogram(f"pool-{place}", f"{name}{said}", column, parts, kind, f"{label(name)}{scale}")

"""What a search found: its trials, the chosen size beside the grid on the report set, and the shape of the curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from im_lightning._utils.files import atomic_path, plain, write_json, write_text
from im_lightning._utils.numbers import half_width, holm, number_or_nothing, p_text
from im_lightning._utils.text_tables import Column, text_table, wrapped
from im_lightning.experiments.compare.statistics import LEVEL, ExampleSums, compare, t_interval, two_way_bootstrap
from im_lightning.experiments.search.proposals import Point
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord

WIDTH = 110
CHOSEN = "chosen"


def curve_words(sizes: Sequence[int], examples: ExampleSums) -> str:
    """The shape of loss against size, as far as Holm-corrected differences between all pairs of sizes show one.

    Args:
        sizes: Ascending; `examples.sums` has an arm per size, by its decimal name.
        examples: Losses of single report examples with every seed.
    """
    if examples.sums[str(sizes[0])].shape[0] < 2:
        return "One seed per size has no interval: nothing is said of the curve's shape."
    pairs = [(i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes))]
    found = {
        (i, j): two_way_bootstrap(examples.sums[str(sizes[j])] - examples.sums[str(sizes[i])], examples.tokens)
        for i, j in pairs
    }
    shown = np.array(holm([found[pair].p for pair in pairs])) < LEVEL
    rises = {pair for pair, sure in zip(pairs, shown, strict=True) if sure and found[pair].difference > 0}
    falls = {pair for pair, sure in zip(pairs, shown, strict=True) if sure and found[pair].difference < 0}
    none = "double descent is not shown."
    for i, j in sorted(rises):
        for m, k in sorted(pair for pair in falls if pair[0] >= j):
            again = "to" if m == j else f"from {sizes[m]:,} to"
            return (
                f"Double descent is shown: the loss rises from {sizes[i]:,} to {sizes[j]:,} rows and falls again "
                f"{again} {sizes[k]:,}."
            )
    for i, j in sorted(falls):
        for m, k in sorted(pair for pair in rises if pair[0] >= j):
            then = "to" if m == j else f"from {sizes[m]:,} to"
            return (
                f"The loss falls from {sizes[i]:,} to {sizes[j]:,} rows and rises {then} {sizes[k]:,}: more rows are "
                f"not better throughout; {none}"
            )
    if falls and rises:
        return f"Some sizes have a lower loss than smaller ones, and some a higher one; {none}"
    if falls or rises:
        word = "falls" if falls else "rises"
        return f"Where the sizes differ, the loss {word} with the number of rows; {none}"
    return f"No difference between the sizes is shown; {none}"


@dataclass(frozen=True)
class SearchReport:
    """A finished search.

    Args:
        objective: What was minimised.
        method: How points were proposed.
        trials: (point, objective), in the order tried.
        chosen: The point of the least objective.
        runs: Grid and chosen point → their runs with fresh seeds, evaluated on both sets.
        ledger: Where the losses by example are.
        notes: What a reader must know.
        title: How the fits were made.
        prompts: Id of a report example → its instruction.
    """

    objective: str
    method: str
    trials: Sequence[tuple[Point, float]]
    chosen: Point
    runs: Mapping[Point, Sequence[RunRecord]]
    ledger: RunLedger
    notes: Sequence[str]
    title: str
    prompts: Mapping[str, str]

    @property
    def seeds(self) -> int:
        return len(self.runs[self.chosen])

    def examples(self) -> ExampleSums:
        """Losses of single report examples: by size for the grid, and "chosen"."""
        sums, tokens = {}, np.empty(0, dtype=np.int64)
        for point, runs in self.runs.items():
            losses = [self.ledger.losses(run.run_id)["report"] for run in runs]
            tokens, ids = losses[0].counts, losses[0].ids
            values = np.array([one.sums for one in losses])
            if point == Point(point.size):
                sums[str(point.size)] = values
            if point == self.chosen:
                sums[CHOSEN] = values
        return ExampleSums(sums, tokens).by_instruction([self.prompts.get(i, i) for i in ids])

    def write(self, out: Path, settings: dict[str, Any], inputs: dict[str, Any]) -> None:
        """Writes search.json (with `inputs`, what decides the numbers), search.txt and curve.png."""
        text = self.text()
        rows = [
            {
                **asdict(point),
                "seeds": len(runs),
                "chosen": point == self.chosen,
                "run_ids": [r.run_id for r in runs],
                "search": [r.loss("search") for r in runs],
                "report": [r.loss("report") for r in runs],
            }
            for point, runs in self.runs.items()
        ]
        value = {
            "format": "im_lightning.search",
            "inputs": inputs,
            "chosen": asdict(self.chosen),
            "objective": self.objective,
            "method": self.method,
            "trials": [{**asdict(point), "objective": loss} for point, loss in self.trials],
            "report": rows,
            "curve": self.curve(),
            "notes": list(self.notes),
            "settings": settings,
            "rendered": text,
        }
        write_json(out / "search.json", plain(value))
        write_text(out / "search.txt", text + "\n")
        plot(self, out / "curve.png")

    def curve(self) -> str:
        """The shape in words."""
        sizes = sorted(point.size for point in self.runs if point == Point(point.size))
        return curve_words(sizes, self.examples())

    def text(self) -> str:
        """Everything for standard output."""
        unit = "nats per token on the search set" if self.objective == "finetune" else "predicted log loss"
        best = min(loss for _, loss in self.trials)
        columns = [Column("trial"), Column("drawn", right=False), Column(unit), Column("", right=False)]
        tried = [
            [str(number), point.title, f"{loss:.4f}", "least" if loss == best else ""]
            for number, (point, loss) in enumerate(self.trials, start=1)
        ]
        note = (
            "The search saw the search set alone, with one seed. The table above is of other seeds and of the report "
            "set, which shares no row with it. ± is the half-width of a 95 % interval: of a loss over seeds, of a "
            "difference over seeds and report examples. p is Holm-corrected over the sizes."
        )
        if self.objective == "predicted":
            note += " The rule predicts from indicators alone and knows nothing of size: it cannot see a best one."
        parts = [
            wrapped(f"{self.method}, {len(self.trials)} trials, minimising {unit}; {self.title}", WIDTH),
            text_table(columns, tried, WIDTH),
            "",
            f"Loss on the report set in nats per token, {self.seeds} fresh seeds",
            self.table(),
            *(wrapped(line, WIDTH) for line in (note, self.curve(), *self.notes)),
        ]
        return "\n".join(parts)

    def table(self) -> str:
        """Grid and chosen point on the report set."""
        examples = self.examples()
        losses = {arm: (sums.sum(axis=1) / examples.tokens.sum()).tolist() for arm, sums in examples.sums.items()}
        on_grid = str(self.chosen.size) if self.chosen == Point(self.chosen.size) else None
        arms = {arm: v for arm, v in losses.items() if arm != on_grid}
        results = {r.arm: r for r in compare(arms, CHOSEN, examples=examples)}
        columns = [
            Column("rows", right=False),
            Column("loss"),
            Column("±", right=False),
            Column("minus chosen"),
            Column("±", right=False),
            Column("Holm p"),
            Column("verdict", right=False),
        ]
        rows = []
        for point in sorted(self.runs, key=lambda p: (p.size, p != self.chosen)):
            arm = CHOSEN if point == self.chosen else str(point.size)
            r = results[arm]
            title = point.title + (" (chosen)" if point == self.chosen else "")
            own, over = half_width(r.half_width), half_width(r.difference_half_width)
            p = "" if math.isnan(r.p_holm) else p_text(r.p_holm)
            difference = number_or_nothing(r.difference, "+.4f")
            rows.append([title, f"{r.mean:.4f}", own, difference, over, p, r.verdict])
        return text_table(columns, rows, WIDTH)


def plot(report: SearchReport, path: Path) -> None:
    """Draws loss against size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    plain_points = sorted((p for p in report.runs if p == Point(p.size)), key=lambda p: p.size)
    means = [t_interval([r.loss("report") for r in report.runs[p]]) for p in plain_points]
    axes.errorbar(
        [p.size for p in plain_points],
        [m for m, _ in means],
        [0.0 if math.isnan(h) else h for _, h in means],
        marker="o",
        capsize=3,
        label=f"report set, {report.seeds} fresh seeds, 95 % interval over seeds",
    )
    if report.objective == "finetune":
        axes.plot(
            [p.size for p, _ in report.trials],
            [loss for _, loss in report.trials],
            "x",
            color="0.45",
            label="search set, the trials",
        )
    axes.axvline(report.chosen.size, linestyle=":", color="0.6", label=f"chosen: {report.chosen.title}")
    axes.set_xscale("log")
    axes.set_xlabel("rows")
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

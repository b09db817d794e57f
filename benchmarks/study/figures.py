"""The figures of docs/study.md, from what docs/study/ keeps; one whose stages are not there yet is not drawn."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.budget import SHARES
from benchmarks.study.evidence import ways
from benchmarks.study.kept import kept_runs
from benchmarks.study.sets import KINDS
from benchmarks.study.tables import CURVE, cells, difference, losses, point
from im_lightning._utils.files import atomic_path
from im_lightning.errors import RequestError
from im_lightning.experiments.compare.curve import SCALES
from im_lightning.report.svg import PALETTE, Figure, Tips, draw


def figures(kept: Path, rules: Path) -> list[Path]:
    """Draws what can be drawn, as PNG files in `kept`; `rules` is a folder for the rules of the ways."""
    made = []
    for paint in (_runs, _ways, _arms, _curve):
        try:
            figure = paint(kept, rules)
        except RequestError:  # its stage is not there yet: the tables say so
            continue
        with atomic_path(kept / f"{figure.key}.png") as temporary:
            Path(temporary).write_bytes(figure.png)
        made.append(kept / f"{figure.key}.png")
    return made


def _runs(kept: Path, rules: Path) -> Figure:
    runs = [one["record"]["evaluation"] for one in kept_runs("runs", kept)]
    if not runs:
        raise RequestError("no runs")
    rng = np.random.default_rng(0)

    def paint(ax: Any, tips: Tips) -> None:
        for row, kind in enumerate(KINDS):
            x = [np.log(one[kind]["loss"] / one[kind]["base_loss"]) for one in runs]
            ax.scatter(x, row + rng.uniform(-0.25, 0.25, len(x)), s=9, color=PALETTE["accent"], alpha=0.6, lw=0)
        ax.axvline(0, color=PALETTE["muted"], lw=0.8)
        ax.set_yticks(range(len(KINDS)), KINDS)
        ax.invert_yaxis()
        ax.set_xlabel("log loss, less that of the base model")

    return draw("runs", f"{len(runs)} designed runs: what a finetune on 256 rows does to each kind", paint, 2.6)


def _ways(kept: Path, rules: Path) -> Figure:
    found = ways(kept, rules)

    def paint(ax: Any, tips: Tips) -> None:
        looks = product(("-", "--", ":"), ("accent", "warm", "good", "violet"))
        for (way, of), (dashes, colour) in zip(found["cells"].items(), looks, strict=False):
            seen = [(one["flops"], one["spearman"]) for one in of.values() if not one["why"]]
            if seen:
                ax.plot(*zip(*seen, strict=True), marker="o", ms=3, lw=1.2, ls=dashes, color=PALETTE[colour], label=way)
        ax.set_xscale("log")
        ax.set_xticks(SHARES, [f"1/{1 / share:g}" if share < 1 else "1" for share in SHARES], minor=False)
        ax.minorticks_off()
        ax.set_xlabel(f"FLOPs, as a share of {found['sizes']['runs']} full runs")
        ax.set_ylabel("Spearman, held out")
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2)

    return draw("ways", f"Ways to evidence: how they rank {found['sizes']['test_runs']} other runs", paint, 4.0)


def _arms(kept: Path, rules: Path) -> Figure:
    measured = cells(kept)
    arms = [arm for arm in measured.sums if arm != "random"]

    def paint(axes: Any, tips: Tips) -> None:
        for ax, kind in zip(axes, KINDS, strict=True):
            one = [difference(measured, kind, arm, "random") for arm in arms]
            ax.errorbar(
                [d.difference for d in one], range(len(arms)), xerr=[d.half_width for d in one], fmt="o", ms=3.5,
                color=PALETTE["accent"], lw=1.2,
            )  # fmt: skip
            ax.axvline(0, color=PALETTE["muted"], lw=0.8)
            ax.set_yticks(range(len(arms)), arms, fontsize=7.5)
            ax.set_ylim(len(arms) - 0.5, -0.5)
            ax.set_title(kind, loc="left", fontsize=8.5)
        axes[-1].set_xlabel("nats per token, less random rows (95 % interval)")

    title = f"Arms at equal tokens against random rows, {len(measured.seeds)} seeds: left of 0 is better"
    return draw("arms", title, paint, 5.6, (1.0,) * len(KINDS))


def _curve(kept: Path, rules: Path) -> Figure:
    measured = cells(kept, CURVE)
    of = losses(measured)
    scales = [scale for scale in SCALES if point(scale) in of]
    arms = [arm for arm in of if not arm.startswith("random")]

    def paint(axes: Any, tips: Tips) -> None:
        for ax, kind in zip(axes, KINDS, strict=True):
            ax.plot(scales, [of[point(scale)][kind] for scale in scales], marker="o", ms=3, color=PALETTE["accent"])
            for arm, colour in zip(arms, ("warm", "good", "violet"), strict=False):
                ax.plot([1], [of[arm][kind]], marker="D", ms=4, ls="", color=PALETTE[colour], label=arm)
            ax.set_xscale("log", base=2)
            ax.minorticks_off()
            ax.set_title(kind, loc="left", fontsize=8.5)
        axes[0].legend(fontsize=7)
        axes[-1].set_xticks(scales, [f"{scale:g}×" for scale in scales])
        axes[-1].set_xlabel("tokens, of those of an arm; y: nats per token")

    return draw("curve", "Random rows by their tokens, and the arms beside them", paint, 6.4, (1.0,) * len(KINDS))

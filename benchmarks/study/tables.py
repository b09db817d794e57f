"""The tables of docs/study.md, from what docs/study/ keeps: no model, no row, a minute or two.

The family of tests is that of docs/study_plan.md, whatever they show. Losses without the first and last token of every
answer (`inner_loss`) are described beside, not tested.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.evidence.table import table as evidence_table
from benchmarks.study.evidence import EARLY, ways
from benchmarks.study.kept import BESIDE, COSTS, KEPT, LEDGERS, kept_runs
from benchmarks.study.sets import KINDS, TARGET, Sizes
from im_lightning._utils.numbers import holm
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.experiments.compare.curve import SCALES, Multiplier, Reading, TokenCurve
from im_lightning.experiments.compare.statistics import ExampleSums, TwoWay, two_way_bootstrap
from im_lightning.ledger.curve import at_point
from im_lightning.ledger.record import RunRecord
from im_lightning.models.cost import Cost, total
from im_lightning.rule.published import load_rule
from im_lightning.rule.validation.agreement import RankAgreement, agreement_of, subset_losses

TESTED = {"random": ("by-source", "mix", "weighted", "mix+rule"), "by-source": ("weighted", "mix+rule")}
"""Reference → arms: on each kind 6 tests, 30 in all."""


CURVE = "compare-curve"
"""Where random rows have several numbers of tokens."""


class Cells(NamedTuple):
    """What the comparison measured: arm → float64 [seeds, examples]; the same seeds in every arm."""

    sums: dict[str, NDArray[np.float64]]
    edge_sums: dict[str, NDArray[np.float64]]
    tokens: NDArray[np.int64]
    edge_tokens: NDArray[np.int64]
    kinds: NDArray[np.str_]
    seeds: list[int]


def cells(kept: Path = KEPT, name: str = "compare") -> Cells:
    """Of the seeds that all arms have; of the registered comparison the arms that are tested.

    Raises:
        RequestError: nothing was compared yet.
        InstructMiningError: an arm has two runs of one seed.
    """
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    runs = [one for one in kept_runs(name, kept) if one["record"]["subset"]["arm"] != "base"]  # which has no seed
    steps = [one["record"]["steps"] for one in runs if one["record"]["subset"]["arm"] != "random"]
    for one in runs:
        subset, (losses,) = one["record"]["subset"], one["losses"].values()
        arm = subset["arm"]
        if name == CURVE and arm == "random" and steps:
            arm = point(one["record"]["steps"] / steps[0])
        if name != "compare" or arm in {"random", *TESTED["random"]}:
            if (seed := int(subset["seed"])) in arms.setdefault(arm, {}):
                cause = f"it has two runs of {arm}, seed {seed}: of another rule, or of other settings"
                where, remedy = str(kept / f"{name}.jsonl.gz"), "take out those that are not compared"
                raise InstructMiningError(message(where, cause, remedy))
            arms[arm][seed] = losses
    seeds = sorted(set.intersection(*(set(of) for of in arms.values()))) if arms else []
    if not seeds:
        raise RequestError(message(str(kept), "no comparison is kept there", "run the stage compare first"))
    kinds = json.loads((kept / "kinds.json").read_text(encoding="utf-8"))
    first = arms["random"][seeds[0]]

    def per_arm(field: str) -> dict[str, NDArray[np.float64]]:
        return {arm: np.array([of[seed][field] for seed in seeds]) for arm, of in arms.items()}

    return Cells(
        per_arm("sums"),
        per_arm("edge_sums"),
        np.array(first["counts"]),
        np.array(first["edge_counts"]),
        np.array([kinds[i] for i in first["ids"]]),
        seeds,
    )


def point(scale: float) -> str:
    """Name of random rows at so many times the steps of the other arms.

    >>> point(1.0), point(0.5)
    ('random', 'random 0.5×')
    """
    return "random" if scale == 1 else f"random {scale:g}×"


def family(measured: Cells) -> dict[tuple[str, str, str], tuple[TwoWay, float]]:
    """(kind, arm, reference) → the difference in nats per token, and its p by Holm over all of them."""
    found = {
        (kind, arm, reference): difference(measured, kind, arm, reference)
        for kind in KINDS
        for reference, arms in TESTED.items()
        for arm in arms
        if arm in measured.sums
    }
    corrected = holm([one.p for one in found.values()])
    return {name: (one, float(p)) for (name, one), p in zip(found.items(), corrected, strict=True)}


def difference(measured: Cells, kind: str, arm: str, reference: str) -> TwoWay:
    """An arm less a reference on a kind, in nats per token."""
    at = measured.kinds == kind
    return two_way_bootstrap(measured.sums[arm][:, at] - measured.sums[reference][:, at], measured.tokens[at])


def losses(measured: Cells, inner: bool = False) -> dict[str, dict[str, float]]:
    """arm → kind → nats per token, mean over seeds; `inner`: without the first and last token of every answer."""
    tokens = measured.tokens - measured.edge_tokens if inner else measured.tokens
    out: dict[str, dict[str, float]] = {}
    for arm, sums in measured.sums.items():
        nats = sums - measured.edge_sums[arm] if inner else sums
        of = {kind: measured.kinds == kind for kind in KINDS}
        out[arm] = {kind: float(nats[:, at].sum() / (len(nats) * tokens[at].sum())) for kind, at in of.items()}
    return out


def markdown(kept: Path, rules: Path) -> str:
    """All tables; those of stages that are not there yet say so. `rules` is a folder for the rules of the ways."""
    parts = []
    if (kept / "rate.json").exists():
        rate = json.loads((kept / "rate.json").read_text(encoding="utf-8"))
        rows = [[name, f"{loss:.4f}"] for name, loss in rate["losses"].items()]
        parts.append("### Learning rate\n\n" + _table(["learning rate", "mean loss on the search sets"], rows))
    runs = kept_runs("runs", kept)
    parts.append(f"### Designed runs\n\n{len(runs)} runs are kept.")
    if runs:
        rows = [[kind, *_spread([r["record"]["evaluation"][kind] for r in runs])] for kind in KINDS]
        parts.append(_table(["kind", "base", "mean of the runs", "sd of log loss", "without edges"], rows))
    if (kept / "rule.json").exists():
        parts.append(
            "### The rule\n\n```text\n"
            + load_rule(kept / "rule.json").summary().replace(f"{kept}", "docs/study")
            + "\n```"
        )
    if runs:
        parts.append("### Do subsets rank alike?\n\n" + _agreement(kept))
    parts += ["### Ways to evidence\n\n" + _ways(kept, rules), _comparison(kept)]
    for name in BESIDE:
        if (kept / f"compare-{name}.jsonl.gz").exists():
            parts.append(f"### Beside it: {name}\n\n" + _beside(cells(kept, f"compare-{name}")))
    parts.append("### What it has cost so far\n\n" + _costs(kept))
    return "\n\n".join(parts) + "\n"


def _costs(kept: Path) -> str:
    """Hours and FLOPs of scoring and of the kept runs; a run that two comparisons share is counted with the first."""
    rows, seen = [], set[str]()
    if (kept / COSTS).exists():
        noted = json.loads((kept / COSTS).read_text(encoding="utf-8"))
        scoring = Cost(sum(noted["flops"].values()), sum(noted["seconds"].values()))
        rows.append(["scoring of the pool", "", *_cost(scoring)])
    for name in LEDGERS:
        records = [RunRecord.from_json(one["record"], name) for one in kept_runs(name, kept)]
        new = [record for record in records if record.run_id not in seen]
        seen |= {record.run_id for record in new}
        if new:
            rows.append([name, f"{len(new)}", *_cost(total(record.cost for record in new))])
    told = "Hours are those of each run, added up; where two went side by side (`--jobs 2`) the clock went half as far."
    return f"{told}\n\n" + _table(["stage", "runs", "hours", "10¹⁵ FLOPs"], rows)


def _cost(cost: Cost) -> list[str]:
    return ["—" if np.isnan(one) else f"{one:.2f}" for one in (cost.seconds / 3600, cost.flops / 1e15)]


def _agreement(kept: Path) -> str:
    """Spearman of the same subsets between runs of two kinds: another seed, a fifth of the steps, another rate."""
    runs = [RunRecord.from_json(one["record"], "runs") for one in kept_runs("runs", kept)]
    first, again = ([r for r in runs if (r.seeds["training"] == 0) == is_first] for is_first in (True, False))
    early = [seen for r in first if (seen := at_point(r, EARLY)) is not None]
    other = [RunRecord.from_json(one["record"], "transfer") for one in kept_runs("transfer", kept)]
    rows = []
    for name, records in (("another training seed", again), ("after a fifth", early), ("another rank and rate", other)):
        if records:
            shown = [agreement_of(subset_losses(first, t), subset_losses(records, t)) for t in (TARGET, *KINDS)]
            rows.append([name, str(shown[0].subsets), *(_spearman(one) for one in shown)])
    told = "Spearman of the runs' losses, 95 % interval; mean is the target of the rule, the mean of the five losses."
    return f"{told}\n\n" + _table(["beside the runs", "subsets", "mean", *KINDS], rows)


def _spearman(found: RankAgreement) -> str:
    return "—" if np.isnan(found.low) else f"{found.spearman:.2f} ({found.low:.2f} to {found.high:.2f})"


def _comparison(kept: Path) -> str:
    """Losses and tests of the registered comparison; or why there are none yet."""
    try:
        measured = cells(kept)
    except RequestError as error:
        return "### The comparison\n\n" + str(error).replace(f"{kept}", "docs/study")
    parts = []
    if len(measured.seeds) < Sizes().seeds:
        parts.append(
            f"UNDER WAY: {len(measured.seeds)} of {Sizes().seeds} seeds; the tests are not yet those of the plan."
        )
    for title, inner in (("Losses", False), ("Losses without the first and last token of every answer", True)):
        known = {**_base(measured, inner, kept), **losses(measured, inner)}
        rows = [[arm, *(f"{one[kind]:.4f}" for kind in KINDS)] for arm, one in known.items()]
        parts.append(f"### {title}\n\n{len(measured.seeds)} seeds.\n\n" + _table(["arm", *KINDS], rows))
    found = family(measured)
    rows = [
        [kind, arm, reference, f"{one.difference:+.4f} ± {one.half_width:.4f}", f"{p:.3f}"]
        for (kind, arm, reference), (one, p) in found.items()
    ]
    heads = ["kind", "arm", "against", "difference, nats per token", f"Holm p of {len(found)}"]
    return "\n\n".join([*parts, "### Tests\n\n" + _table(heads, rows)])


def _base(measured: Cells, inner: bool, kept: Path) -> dict[str, dict[str, float]]:
    """Losses of the base, which is evaluated once, in the form of `losses`."""
    found = [one for one in kept_runs("compare", kept) if one["record"]["subset"]["arm"] == "base"]
    if not found:
        return {}
    (held,) = found[0]["losses"].values()
    sums, edges = ({"base": np.array([held[field]])} for field in ("sums", "edge_sums"))
    return losses(measured._replace(sums=sums, edge_sums=edges), inner)


def multipliers(measured: Cells) -> dict[tuple[str, str], Multiplier]:
    """(kind, arm) → how many times the random tokens the arm is worth there, where the curve was measured."""
    scales = [scale for scale in SCALES if point(scale) in measured.sums]
    points = [point(scale) for scale in scales]
    found: dict[tuple[str, str], Multiplier] = {}
    for kind in KINDS:
        at = measured.kinds == kind
        sums = ExampleSums({arm: values[:, at] for arm, values in measured.sums.items()}, measured.tokens[at])
        means = [float(sums.sums[name].sum() / (len(measured.seeds) * sums.tokens.sum())) for name in points]
        reading = Reading(TokenCurve(scales, means), points, sums)
        found |= {(kind, arm): reading.multiplier(arm) for arm in measured.sums if arm not in points}
    return found


def _ways(kept: Path, rules: Path) -> str:
    """The table of docs/cost.md on the study's own runs; or why there is none yet."""
    try:
        return f"```text\n{evidence_table([ways(kept, rules)], 120)}\n```"
    except RequestError as error:
        return str(error).replace(f"{kept}", "docs/study")


def _beside(measured: Cells) -> str:
    """Mean losses of random rows, and the other arms' differences from them; described, not tested."""
    found = losses(measured)
    random = found.pop("random")
    rows = [["random", *(f"{random[kind]:.4f}" for kind in KINDS)]]
    rows += [[arm, *(f"{one[kind] - random[kind]:+.4f}" for kind in KINDS)] for arm, one in found.items()]
    out = f"{len(measured.seeds)} seeds; below random, differences from it.\n\n" + _table(["arm", *KINDS], rows)
    if point(SCALES[0]) not in found:
        return out
    worth = multipliers(measured)
    arms = list(dict.fromkeys(arm for _, arm in worth))
    rows = [[arm, *(_times(worth[kind, arm]) for kind in KINDS)] for arm in arms]
    return f"{out}\n\nWorth so many times the random tokens (95 % interval):\n\n" + _table(["arm", *KINDS], rows)


def _times(worth: Multiplier) -> str:
    return f"{worth.text} ({worth.interval})" if worth.interval else worth.text


def _spread(evaluations: list[dict[str, Any]]) -> list[str]:
    logs = np.log([one["loss"] for one in evaluations])
    inner = [one.get("inner_loss", np.nan) for one in evaluations]
    base, mean = evaluations[0].get("base_loss", np.nan), np.exp(logs.mean())
    spread = logs.std(ddof=1) if len(logs) > 1 else np.nan
    return [f"{base:.4f}", f"{mean:.4f}", f"{spread:.4f}", f"{np.mean(inner):.4f}"]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

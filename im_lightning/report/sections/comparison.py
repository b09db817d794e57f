"""Section: the comparison of ways to choose rows, from the JSON of `im-lightning compare` or of the demo."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from im_lightning._utils.numbers import half_width, number_or_nothing, p_text
from im_lightning._utils.numbers import number_or_dash as number
from im_lightning.experiments.answers.win_rate import ONE, with_loss
from im_lightning.experiments.compare.curve import NOTE, Multiplier
from im_lightning.experiments.compare.statistics import BASE, REFERENCE, Verdict, verdict_sentences
from im_lightning.report.charts import Dot, Point, against, dots, strips
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Bullets, Figures, Head, Printed, Section, Table
from im_lightning.report.sections import report_section
from im_lightning.report.svg import Figure
from im_lightning.report.text import label

_NUMBERS = ("difference", "difference_half_width", "p_holm")
_ROLES = {"better": "good", "worse": "bad"}
_HEADS = (
    Head("verdict", "Only where the corrected p is below 0.05.", right=False),
    Head(
        "arm",
        "One way to choose rows. * is not of equal tokens or knows what no rule can, and is not tested.",
        right=False,
    ),
    Head("rows", "Drawn, mean over seeds."),
    Head("tokens", "Supervised tokens: equal for all tested arms, so that none wins by more training."),
    Head("steps"),
    Head("exact", "Share of exactly right answers."),
    Head("win rate", "How often a judge prefers the arm's answers to those of random rows, a tie counting half."),
    Head("loss", "Mean over seeds, nats per token."),
    Head("±", "Half of the 95 % interval of the loss over seeds.", right=False),
    Head("minus random", "Mean difference from the reference, each seed with its own; below zero is better."),
    Head(
        "± ",
        "Half of the 95 % interval of that difference: over seeds, and over evaluation examples where those are kept.",
        right=False,
    ),
    Head("Holm p", "How often chance alone would show such a difference, corrected for testing several arms."),
)


@report_section("comparison", "The comparison", place=20)
def comparison_section(inputs: ReportInputs, section: Section) -> None:
    """The section, from the comparison's JSON."""
    value = inputs.comparison
    if value is None:
        section.absent = "add --compare compare.json (im-lightning compare, or the demo's comparison.json)."
        return
    section.lead = (
        "Ways to choose rows, each finetuned several times with different seeds and measured on an evaluation set that "
        "no rule was fitted on. A difference counts only where its interval excludes zero after correction; random is "
        "the bar."
    )
    reference = str(value.get("reference") or REFERENCE)
    arms = value["arms"]
    warned = warnings_of(value)
    if (value.get("settings") or {}).get("conclusive") is False:
        arms = [{**one, "verdict": ""} for one in arms]
    said = sentences(arms, reference)
    section.parts.append(Bullets([text for text, _ in said]))
    section.short = [*warned, *([one for one in said if one[1] in _ROLES.values()][:3] or said[:1])]
    section.parts.append(Bullets(_facts(value, arms)))
    trained = [a for a in arms if a["arm"] != BASE]
    differences = [a for a in trained if _known(a.get("difference")) and a["arm"] != reference]
    figures = []
    if differences:
        rows = [_difference(a) for a in sorted(differences, key=lambda a: a["difference"])]
        title = f"Difference from {title_of(reference, arms)} with 95 % intervals: left is better, grey has no verdict"
        figures.append(dots("comparison-differences", title, rows, "nats per token"))
    losses = {
        title_of(a["arm"], arms): [(float(v), f"{title_of(a['arm'], arms)}: {v:.3f}") for v in a["losses"]]
        for a in sorted(trained, key=lambda a: float(np.mean(a["losses"])))
    }
    title = "Loss of every seed (dots) and their mean (bar)"
    figures.append(strips("comparison-losses", title, losses, "nats per token"))
    judged = {a["arm"]: a for a in arms if _known((a.get("win_rate") or {}).get("rate", {}).get("value"))}
    if shown := {arm: a for arm, a in judged.items() if arm != BASE}:
        figures.append(_win_rates(shown, arms))
    if judged:
        rates = {arm: a["win_rate"]["rate"]["value"] for arm, a in judged.items()}
        if said_of_loss := with_loss(rates, {arm: float(np.mean(a["losses"])) for arm, a in judged.items()}):
            section.parts.append(Bullets([said_of_loss]))
    section.parts.append(Figures(figures))
    section.parts.append(_table(arms))
    section.parts += _worth(value, arms)
    notes = [str(n) for n in value.get("notes") or []]
    if notes:
        section.parts.append(Bullets(notes))
    if isinstance(value.get("rendered"), str):
        section.parts.append(Printed("As the command prints it", value["rendered"]))


def warnings_of(value: dict[str, Any]) -> list[tuple[str, str]]:
    """What must be said first: of a demo that is too small to conclude, or whose indicators mean nothing."""
    settings = value.get("settings") or {}
    out = []
    if settings.get("conclusive") is False:
        out.append(("These sizes are too small to conclude anything: they show the loop, not its worth.", "note"))
    if settings.get("null"):
        out.append(("Null check: the indicators were permuted over the rows, so every difference is chance.", "note"))
    return out


def title_of(arm: str, arms: list[dict[str, Any]]) -> str:
    """How an arm is called."""
    found = next((a.get("title") for a in arms if a["arm"] == arm), None)
    return label(found or arm, 40)


def sentences(arms: list[dict[str, Any]], reference: str = REFERENCE) -> list[tuple[str, str]]:
    """What the table says in words, with the kind of each sentence; a difference only where there is a verdict."""
    verdicts = [
        Verdict(a["arm"], title_of(a["arm"], arms), a["verdict"], *map(_float, (a.get(name) for name in _NUMBERS)))
        for a in arms
        if a.get("verdict")
    ]
    said = verdict_sentences(verdicts, len(arms[0]["losses"]), title_of(reference, arms))
    return [(text, _ROLES[one.verdict] if one is not None else "note") for text, one in said]


def _facts(value: dict[str, Any], arms: list[dict[str, Any]]) -> list[str]:
    evaluation = value.get("evaluation")
    name = evaluation.get("name") if isinstance(evaluation, dict) else evaluation
    out = [f"{len(arms[0]['losses'])} seeds per arm" + (f", measured on {label(name, 60)}." if name else ".")]
    base = next((a for a in arms if a["arm"] == BASE), None)
    loss = base["losses"][0] if base else value.get("base_loss")
    if _known(loss):
        out.append(f"The base model has a loss of {loss:.3f} nats per token; it is left out of the figures.")
    if isinstance(value.get("interval"), str):
        out.append(f"Intervals: {label(value['interval'], 200)}.")
    return out


def _difference(a: dict[str, Any]) -> Dot:
    title, wide = label(a.get("title") or a["arm"], 40), a.get("difference_half_width")
    low, high = (a["difference"] - wide, a["difference"] + wide) if _known(wide) else (None, None)
    role = _ROLES.get(a.get("verdict") or "", "muted")
    tip = f"{title}: {a['difference']:+.3f} {half_width(_float(wide))}"
    return Dot(title + ("" if _tested(a) else " *"), a["difference"], low, high, role, tip)


def _win_rates(judged: dict[str, dict[str, Any]], arms: list[dict[str, Any]]) -> Figure:
    """Win rate of each judged arm against its loss, with the interval in the tooltip."""
    points = []
    for arm, a in judged.items():
        rate, title, loss = a["win_rate"]["rate"], title_of(arm, arms), float(np.mean(a["losses"]))
        low, high = (number(rate.get(end), ".2f") for end in ("low", "high"))
        within = f"{low} to {high}" if _known(rate.get("low")) else f"no interval: {rate.get('reason') or ONE}"
        tip = f"{title}: loss {loss:.3f}, win rate {rate['value']:.2f} ({within})"
        points.append(Point(loss, None, None, rate["value"], tip))
    title = "Win rate against random rows, by a judge, and loss: 0.5 is no preference"
    return against("comparison-win-rates", title, points, "loss, nats per token", "win rate", equality=False)


def _table(arms: list[dict[str, Any]]) -> Table:
    rows = []
    for a in arms:
        trained = a["arm"] != BASE
        difference, p = _float(a.get("difference")), _float(a.get("p_holm"))
        title = title_of(a["arm"], arms) + (" *" if trained and not _tested(a) and _known(difference) else "")
        exact = number(a.get("exact_match"), ".3f")
        over, own = half_width(_float(a.get("difference_half_width"))), half_width(_float(a.get("half_width")))
        rows.append(
            [
                str(a.get("verdict") or ""),
                title,
                number(a.get("rows"), ",.0f") if trained else "",
                *(number(a.get(name), ",.0f") for name in ("tokens", "steps")),
                exact,
                number((a.get("win_rate") or {}).get("rate", {}).get("value"), ".2f"),
                number(a.get("mean"), ".3f"),
                own if trained else "",
                number_or_nothing(difference, "+.3f"),
                over,
                p_text(p) if _known(p) else "",
            ]
        )
    keep = [k for k in range(len(_HEADS)) if k == 1 or any(row[k] not in ("", "–") for row in rows)]
    return Table("All arms", [_HEADS[k] for k in keep], [[row[k] for k in keep] for row in rows])


def _worth(value: dict[str, Any], arms: list[dict[str, Any]]) -> list[Any]:
    """What the arms are worth in random tokens, where the comparison measured a curve."""
    points = (value.get("curve") or {}).get("points") or []
    read = {a["arm"]: Multiplier.from_json(a["multiplier"]) for a in arms if isinstance(a.get("multiplier"), dict)}
    if not points or not read:
        return []
    shown = [
        Point(math.log2(p["scale"]), None, None, p["fitted"], f"{p['scale']:.2g}×: measured {p['mean']:.3f}")
        for p in points
    ]
    places = ("times the tokens of an arm, log2", "nats per token")
    figures = [
        against(
            "comparison-curve", "Loss of random rows by their tokens, made monotone", shown, *places, equality=False
        )
    ]
    rows = [_worth_dot(title_of(arm, arms), one) for arm, one in read.items()]
    figures.append(dots("comparison-worth", "As good as so many times the random tokens", rows, "times", zero=False))
    heads = [
        Head("arm", right=False),
        Head("worth", "As good as so many times the random tokens; no value beyond the curve."),
        Head("95 % interval", right=False),
        Head("net, FLOPs", "What random rows of the same loss would cost, over what the arm and its evidence cost."),
        Head("net, seconds"),
    ]
    nets = {a["arm"]: a.get("net") or {} for a in arms}
    cells = [
        [title_of(arm, arms), one.text, one.interval]
        + [Multiplier.from_json(nets[arm].get(unit) or {}).text for unit in ("flops", "seconds")]
        for arm, one in read.items()
    ]
    return [Figures(figures), Table("What the arms are worth", heads, cells), Bullets([NOTE])]


def _worth_dot(title: str, one: Multiplier) -> Dot:
    known = not math.isnan(one.low)
    tip = f"{title}: {one.text}" + (f" ({one.interval})" if known else "")
    return Dot(title, one.value, one.low if known else None, one.high if known else None, "muted", tip)


def _tested(a: dict[str, Any]) -> bool:
    return bool(a.get("tested", bool(a.get("verdict"))))


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _float(value: Any) -> float:
    return float(value) if _known(value) else math.nan

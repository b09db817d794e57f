"""Regimes: which runs may share one rule. Base model, method, template, sizes, epochs, learning rate, evaluation set,
the indicators' identities and their φ must agree; seeds may differ.

How many runs a fit needs, how many of a regime there are, and the command that makes the next one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from im_lightning._utils.files import plain
from im_lightning._utils.json_diff import POOL_FIELDS, Difference, differences, flatten, label, short
from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import Transform, default_regressors
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.targets import BY_EXAMPLE, set_of, target_of, terms_of

# Seeds and subsets vary by design; identities are compared indicator by indicator, from the keys, instead.
_VARYING = frozenset({"seed", "seeds", "training_seed", "subset_seed", "data_seed", "identities", "identities_digest"})
_EVALUATION_FIELDS = ("evaluation_sets", "evaluation_set", "evaluation")


USUAL = 5
"""Regressors that a base model alone gives: lengths, perplexity, MTLD, neighbours."""


@dataclass
class Regime:
    """Runs that may share one rule."""

    records: list[RunRecord]  # its runs, in the order given
    description: dict[str, Any]  # what they agree on: the regime's fields, identities and φ of the indicators used
    transforms: dict[str, Transform]  # φ of the first run

    def takes(self, description: Mapping[str, Any], transforms: Mapping[str, Transform]) -> bool:
        """Whether a run of this description belongs here; φ may differ by rounding."""
        return (
            self.transforms.keys() == transforms.keys()
            and all(t.close_to(transforms[n]) for n, t in self.transforms.items())
            and not differences(self.description, description)
        )


def comparable(regime: Mapping[str, Any], evaluation: str | None = None) -> dict[str, Any]:
    """The fields of a regime that must agree, in JSON types; of several evaluation sets only those of the target."""
    out: dict[str, Any] = {}
    for name, value in plain(dict(regime)).items():
        if name in _VARYING:
            continue
        if name in _EVALUATION_FIELDS and isinstance(value, Mapping) and evaluation and len(value) > 1:
            value = {n: value[n] for n in map(set_of, terms_of(evaluation)) if n in value} or value
        out[name] = value
    return out


def group_regimes(records: Iterable[RunRecord], indicators: Sequence[str], evaluation: str | None) -> list[Regime]:
    """Splits runs into regimes, the largest first.

    Identities and φ of the `indicators` matter; one that a run lacks makes it another regime.

    Raises:
        DataError: a record's transform is not one.
    """
    groups: list[Regime] = []
    for record in records:
        alike = next((g for g in groups if _says_the_same(g.records[-1], record, indicators)), None)
        if alike is None:
            description, transforms = describe(record, indicators, evaluation)
            alike = next((g for g in groups if g.takes(description, transforms)), None)
        if alike is None:
            groups.append(Regime([record], description, transforms))
        else:
            alike.records.append(record)
    return sorted(groups, key=lambda g: -len(g.records))


def _says_the_same(one: RunRecord, other: RunRecord, indicators: Sequence[str]) -> bool:
    """Whether two records describe their regime in the same words, as runs of one experiment do: `takes` then holds."""
    return (
        {n: v for n, v in one.regime.items() if n not in _VARYING}
        == {n: v for n, v in other.regime.items() if n not in _VARYING}
        and all(one.transforms.get(n) == other.transforms.get(n) for n in indicators)
        and all(one.keys.get(n) == other.keys.get(n) for n in indicators)
    )


def describe(
    record: RunRecord, indicators: Sequence[str], evaluation: str | None
) -> tuple[dict[str, Any], dict[str, Transform]]:
    """(comparable description, φ) of one run."""
    place = f"run {record.run_id}: the field transforms."
    transforms = {n: Transform.from_json(record.transforms[n], place + n) for n in indicators if n in record.transforms}
    identities = {n: plain((record.keys.get(n) or {}).get("identity") or {}) for n in indicators}
    identities = {n: _of_any_pool(i) for n, i in identities.items()}
    return {"regime": comparable(record.regime, evaluation), "indicators": identities}, transforms


def _of_any_pool(identity: Any) -> Any:
    """An identity, and those inside it of the indicators that it is derived from, without what they say of a pool."""
    if not isinstance(identity, Mapping):
        return identity
    known = {name: part for name, part in identity.items() if isinstance(part, Mapping) or name not in POOL_FIELDS}
    return {name: _of_any_pool(part) for name, part in known.items()}


def regime_differences(a: Regime, b: Regime) -> list[Difference]:
    """What keeps two regimes apart: fields, identities, then φ."""
    found = differences(a.description, b.description)
    for name in [*a.transforms, *(n for n in b.transforms if n not in a.transforms)]:
        left, right = a.transforms.get(name), b.transforms.get(name)
        if left is None or right is None or not left.close_to(right):
            found.append(Difference(f"φ of {name}", phi_text(left), phi_text(right)))
    return found


def phi_text(transform: Transform | None) -> str | None:
    """A transform for a message: `log in [0.3, 5.1]`."""
    return None if transform is None else f"{transform.kind} in [{transform.low:.4g}, {transform.high:.4g}]"


def list_regimes(groups: Sequence[Regime]) -> str:
    """One line per regime: its runs (any id names it) and the fields in which regimes differ."""
    varying: dict[str, None] = {}
    for other in groups[1:]:
        varying.update({d.field: None for d in regime_differences(groups[0], other)})
    lines = []
    for group in groups:
        values = flatten(group.description)
        values.update({f"φ of {n}": phi_text(t) for n, t in group.transforms.items()})
        shown = ", ".join(f"{_field_label(f)} = {short(values.get(f))}" for f in varying)
        lines.append(f"  {run_names(group.records)}{': ' + shown if shown else ''}")
    return "\n".join(lines)


def run_names(records: Sequence[RunRecord]) -> str:
    """`24 runs (a, b, c, …)`."""
    names = ", ".join(r.run_id for r in records[:3]) + (", …" if len(records) > 3 else "")
    return f"{len(records)} run{'s' if len(records) != 1 else ''} ({names})"


def runs_missing(
    records: Iterable[RunRecord], p: int | None = None, evaluation: str | None = None, regime: str | None = None
) -> int:
    """How many more designed runs a fit needs: n ≥ p + 3, counted as `fit_rule` counts.

    Args:
        records: The ledger's runs, of any purpose and status.
        p: Number of regressors; by default that of the default regressors in the runs.
        evaluation: Evaluation set; needed only where the runs have several.
        regime: Id of a run: only runs of its regime count. By default the regime with most designed runs.

    Returns:
        0 where there are enough. Without any complete designed run and without `p`: the number for `USUAL` regressors.

    Raises:
        RequestError: several evaluation sets and none named.
    """
    complete = [r for r in records if r.status == "complete"]
    designed = [r for r in complete if r.purpose == "designed"]
    if not designed:
        return (p or USUAL) + 3
    evaluation = choose_evaluation(designed, evaluation)
    designed = [r for r in designed if r.has_loss(evaluation)]
    names = default_regressors(n for r in designed for n in r.phi_means)
    groups = group_regimes(designed, names, evaluation)
    run = None if regime is None else next((r for r in complete if r.run_id == regime), None)
    if run is not None:
        groups = [g for g in groups if g.takes(*describe(run, names, evaluation))]
    if not groups:
        return (p or max(1, len(names))) + 3
    p = p or max(1, len(groups[0].transforms))
    return max(0, p + 3 - len(groups[0].records))


def choose_evaluation(records: Sequence[RunRecord], evaluation: str | None) -> str:
    """The target to fit: the named one, or the only evaluation set.

    Raises:
        RequestError: no run has a loss or score that it names, or there are several sets and none is named.
    """
    counts = Counter(name for r in records for name in (r.evaluation if evaluation is None else r.measured))
    listed = ", ".join(f"{name} ({n} runs)" for name, n in counts.items()) or "none"
    if evaluation is not None:
        terms = {evaluation: 1.0} if evaluation in counts else terms_of(evaluation)
        absent = [term for term in terms if not {term, term.removesuffix(BY_EXAMPLE)} & counts.keys()]
        if absent:
            cause = f"no complete designed run was evaluated on it; the evaluation sets are {listed}"
            raise RequestError(message(f"evaluation set {absent[0]!r}", cause, "name one of these with --evaluation"))
        return target_of(terms)
    if len(counts) != 1:
        cause = f"a rule predicts one evaluation loss, and the runs have {len(counts)} sets: {listed}"
        raise RequestError(message("refit", cause, "name one with --evaluation, or a weighted sum with --target"))
    return next(iter(counts))


def count_runs(records: Sequence[RunRecord]) -> str:
    """`12 designed, 3 weighted, 1 incomplete designed`; `none` for none."""
    counts = Counter(r.purpose if r.status == "complete" else f"{r.status} {r.purpose}" for r in records)
    return ", ".join(f"{n} {name}" for name, n in counts.items()) or "none"


def fit_command(records: Sequence[RunRecord]) -> str:
    """The command that makes the next designed run: the runs' subset size and the first unused subset seed."""
    designed = [r for r in records if r.purpose == "designed"]
    sizes = {r.subset.get("size") for r in designed if r.subset.get("size")}
    size = sizes.pop() if len(sizes) == 1 else "N"
    seed = next_seed(designed)
    return f"im-lightning fit … --data.subset_size={size} --data.subset_seed={'K' if seed is None else seed}"


def more_runs(records: Sequence[RunRecord], missing: int) -> str:
    """What to do about missing runs, with the command: `make 4 more designed runs: ... (seeds 24 to 27)`."""
    seed = next_seed([r for r in records if r.purpose == "designed"])
    seeds = f" (subset seeds {seed} to {seed + missing - 1})" if missing > 1 and seed is not None else ""
    what = "another designed run" if missing == 1 else f"{missing} more designed runs"
    return f"make {what}: `{fit_command(records)}`{seeds}"


def next_seed(designed: Sequence[RunRecord]) -> int | None:
    seeds = [s for r in designed if isinstance(s := r.subset.get("seed"), int)]
    if designed and not seeds:
        return None
    return max(seeds, default=-1) + 1


def lora_rank_of(method: object) -> int | None:
    """The rank that a regime's `method` names, 0 for full finetuning; None for methods of other modules.

    >>> lora_rank_of("lora r=16 alpha=32 all-linear"), lora_rank_of("full"), lora_rank_of("MyModule")
    (16, 0, None)
    """
    found = re.match(r"lora r=(\d+) ", str(method))
    return int(found[1]) if found else 0 if method == "full" else None


def lora_of(method: object) -> dict[str, Any]:
    """Arguments of `InstructTuningModule` for the method that a regime names, but for those that are usual (alpha twice
    the rank, all linear layers); {} for methods of other modules. Quantisation is none of them: it needs a device.

    >>> lora_of("lora r=16 alpha=64 k_proj+q_proj")
    {'lora_rank': 16, 'lora_alpha': 64.0, 'lora_target_modules': ['k_proj', 'q_proj']}
    >>> lora_of("lora r=16 alpha=32 all-linear"), lora_of("full"), lora_of("MyModule")
    ({'lora_rank': 16}, {'lora_rank': 0}, {})
    """
    rank = lora_rank_of(method)
    if rank is None:
        return {}
    out: dict[str, Any] = {"lora_rank": rank}
    found = re.fullmatch(r"lora r=\d+ alpha=(\d+(?:\.\d+)?(?:e[+-]?\d+)?) (.+?)(?: on \w+)?", str(method))
    if found and float(found[1]) != 2 * rank:
        out["lora_alpha"] = float(found[1])
    if found and found[2] != "all-linear":
        names = found[2].split("+")  # a text that is more than names is a pattern of them
        out["lora_target_modules"] = names if all(re.fullmatch(r"[\w.]+", name) for name in names) else found[2]
    return out


def _field_label(field: str) -> str:
    for prefix in ("regime.", "indicators."):
        if field.startswith(prefix):
            return label(field[len(prefix) :])
    return field

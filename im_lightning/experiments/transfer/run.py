"""Some subsets of a small base's designed runs, finetuned on another base, at one or several learning rates.

A run repeats one of the ledger's from its own arguments, with the base and the rate changed, and is refused where its
rows, or those that evaluate it, would not be the same. Its id is a digest of its arguments and of the base's content:
the same command goes on where it was, and with another base in the same folder makes other runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from im_lightning._utils.command_line import comma_list, words_of
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.json_diff import differences
from im_lightning._utils.progress import already_there, log, progress
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.experiments.finetuning import check_seed
from im_lightning.experiments.sweep.trial import TrialRequest, run_trial
from im_lightning.experiments.transfer.result import Runs, TransferResult
from im_lightning.experiments.transfer.settings import TransferSettings
from im_lightning.ledger.curve import STOPPED, at_point
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import TRAINED, RunRecord
from im_lightning.ledger.regime import choose_evaluation, comparable, group_regimes, list_regimes
from im_lightning.ledger.targets import set_of, terms_of
from im_lightning.models.fingerprint import checkpoint_identity
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.validation.agreement import seen_at
from im_lightning.rule.validation.univariate import FEWEST
from im_lightning.training.run.encoded_pool import base_model_name

_OF_ITS_OWN = ("--mining.run_id=null", "--data.run_dir=null", "--export=null", "--ckpt_path=null")
"""What a run does not take over from the one that it repeats."""


def run_transfer(ledger: RunLedger, settings: TransferSettings, out: Path) -> TransferResult:
    """Makes the runs that are missing, and compares.

    Args:
        ledger: Runs of the small base.
        settings: What to make.
        out: Folder; its runs go into `out/runs`.

    Raises:
        RequestError: the ledger has no such runs, or they cannot be repeated on the same rows.
        InstructMiningError: a run failed; the same command goes on.
    """
    s = settings
    check_seed(s.seed)
    if s.runs < FEWEST:
        raise RequestError(message(f"--runs {s.runs}", f"an interval takes {FEWEST} subsets", "give ten or more"))
    words = words_of("--arguments", s.arguments)
    if any(word.partition("=")[0] == "--data.model" for word in words):
        cause = "it names a base beside that of --model, which stands in the result"
        raise RequestError(message(f"--arguments {s.arguments}", cause, "name the base by --model alone"))
    there, proxy = _rates("--learning-rates", s.learning_rates), _rates("--proxy-rates", s.proxy_rates)
    rule = None if s.rule is None else LinearRule.load(s.rule)
    evaluation, small = _small_runs(ledger, s, rule)
    subsets = _subsets(small, s)
    more = [f"--data.model={s.model}", "--data.revision=null", *words]
    asked = [(True, [*more, *rate]) for rate in there or [[]]] + [(False, rate) for rate in proxy]
    base = _base(more)
    made: list[list[RunRecord]] = [[] for _ in asked]
    with progress("  runs of the transfer", len(asked) * len(subsets), "runs") as bar:
        for record in subsets:
            for runs, (other, words) in zip(made, asked, strict=True):
                runs.append(_find_or_make(ledger, record, words, s.scores, out, evaluation, base if other else ""))
                _same_base(runs, out)
                bar.advance()
    keys = {r.subset_key for r in subsets}
    smalls = [Runs.of([r for r in small if r.subset_key in keys], evaluation)]
    seen = [(_as_ruled(runs, rule, out), other) for runs, (other, _) in zip(made, asked, strict=True)]
    smalls += [Runs.of(runs, evaluation) for runs, other in seen if not other]
    targets = [Runs.of(runs, evaluation) for runs, other in seen if other]
    return TransferResult(s.model, evaluation, smalls, targets, rule)


def _as_ruled(runs: Sequence[RunRecord], rule: LinearRule | None, out: Path) -> list[RunRecord]:
    """The runs as they were where the rule's were seen: under one fitted at an early point, some of them went on.

    Raises:
        RequestError: one was not measured there.
    """
    early = None if rule is None else rule.regime.get(STOPPED)
    if early is None:
        return list(runs)
    seen = []
    for run in runs:
        if (one := at_point(run, early["step"])) is None:
            cause = f"it was not measured after {early['step']} optimiser steps, where the rule was fitted"
            remedy = "leave out what changes the steps (--arguments), delete it, and the same command makes it again"
            raise RequestError(message(f"{out / 'runs'}/{run.run_id}.json", cause, remedy))
        seen.append(one)
    return seen


def _rates(flag: str, text: str | None) -> list[list[str]]:
    """Arguments of a fit that set each of the rates."""
    try:
        rates = [float(part) for part in comma_list(text) or []]
    except ValueError:
        rates = [0.0]
    if any(not 0 < rate < np.inf for rate in rates):
        raise RequestError(message(f"{flag} {text}", "one is no positive number", "write for example 1e-4,1e-3"))
    return [[f"--model.learning_rate={rate!r}"] for rate in rates]


def _small_runs(ledger: RunLedger, s: TransferSettings, rule: LinearRule | None) -> tuple[str, list[RunRecord]]:
    """The evaluation loss and the runs of one regime: that of the rule or of the run named, or the only one."""
    early = None if rule is None else rule.regime.get(STOPPED)
    complete = ledger.records("designed")
    designed = [r for r in (complete if early is None else seen_at(complete, early["step"])) if r.subset.get("digest")]
    designed = [r for r in designed if r.kind == TRAINED]  # merged ones have no rows of their own
    if not designed:
        remedy = "make designed runs of the small base first (im-lightning design, im-lightning sweep)"
        raise RequestError(message(str(ledger.path), "it has no complete designed runs", remedy))
    evaluation = choose_evaluation(designed, s.evaluation or (rule.evaluation if rule is not None else None) or None)
    if rule is not None and rule.evaluation:
        if not _same_loss(evaluation, rule.evaluation):
            cause = f"the rule predicts {rule.evaluation}, and this would be evidence of another loss"
            raise RequestError(message(f"--evaluation {s.evaluation}", cause, "leave it out, or leave out --rule"))
        evaluation = rule.evaluation
    groups = group_regimes([r for r in designed if r.has_loss(evaluation)], [], evaluation)
    if s.regime is not None:
        groups = [g for g in groups if s.regime in {r.run_id for r in g.records}]
    if rule is not None:
        of = comparable(rule.regime, evaluation)
        groups = [g for g in groups if not differences(g.description["regime"], of)]
    if len(groups) == 1:
        return evaluation, groups[0].records
    if groups:
        cause = f"its designed runs are of {len(groups)} regimes:\n{list_regimes(groups)}"
        raise RequestError(message(str(ledger.path), cause, "choose that of a run (--regime), or name the --rule"))
    which = "of the rule's regime" if rule is not None else "of this id"
    remedy = "name the ledger that the rule was fitted on" if rule is not None else "see im-lightning runs LEDGER"
    raise RequestError(message(str(ledger.path), f"it has no complete designed runs {which}", remedy))


def _same_loss(target: str, other: str) -> bool:
    """Whether two targets are one loss, in whatever order they are written; what is only watched does not count."""
    if target == other:
        return True
    one, two = ({term: weight for term, weight in terms_of(text).items() if weight} for text in (target, other))
    return one.keys() == two.keys() and all(abs(weight - two[term]) < 1e-5 for term, weight in one.items())


def _subsets(small: Sequence[RunRecord], s: TransferSettings) -> list[RunRecord]:
    """One run of each of k subsets: the first k of one order, so that a larger k keeps them."""
    first = {r.subset_key: r for r in reversed(small)}
    if len(first) < s.runs:
        cause = f"the ledger's runs are on {len(first)} different subsets"
        raise RequestError(message(f"--runs {s.runs}", cause, "ask for fewer, or make more designed runs"))
    keys = sorted(first)
    order = np.random.default_rng(s.seed).permutation(len(keys))
    return [first[keys[k]] for k in order[: s.runs]]


def _find_or_make(
    ledger: RunLedger,
    record: RunRecord,
    words: Sequence[str],
    scores: str | None,
    out: Path,
    evaluation: str,
    base: str,
) -> RunRecord:
    """The run that repeats one of the ledger's under other arguments, from the base of this name ("" for its own)."""
    config, text, arguments = _arguments(ledger, record, words, scores)
    book, sets = RunLedger(out / "runs"), _evaluated_on(record, evaluation)
    run_id, known = _known(book, [text, arguments], base or record.regime.get("base_model"))
    if known is not None:
        if other := [name for name, digest in sets.items() if _evaluated_on(known, evaluation).get(name) != digest]:
            cause = f"it was evaluated on other rows of {', '.join(other)} than {record.run_id}, which it repeats"
            remedy = "delete it, and the same command makes it again"
            raise RequestError(message(f"{book.path}/{known.run_id}.json", cause, remedy))
        already_there()
        return known
    request = TrialRequest(
        number=0,
        arguments=["--config", str(config), *arguments, f"--mining.ledger={book.path}"],
        run_id=run_id,
        folder=str(out / "trials" / run_id),
        subset=record.subset_key,
        evaluation=sets,
        base="" if base else str(record.regime.get("base_model") or ""),
    )
    result = run_trial(request)
    made = [r for r in book.records() if r.run_id == run_id]
    if result is None or not made:
        kind = RequestError if result is not None and result.wrong_request else InstructMiningError
        cause = "it ended without a complete record" if result is None or not result.error else result.error
        raise kind(message(f"the run that repeats {record.run_id}", cause, "mend it; the same command goes on"))
    return made[0]


def _same_base(runs: Sequence[RunRecord], out: Path) -> None:
    """Refuses a run of another base than the first: the folder changed while they were made."""
    first, last = (str(runs[at].regime.get("base_model")) for at in (0, -1))
    if first != last:
        cause = f"it was made from {last}, and the runs before it from {first}"
        remedy = "delete it, and the same command makes it again"
        raise RequestError(message(f"{out / 'runs'}/{runs[-1].run_id}.json", cause, remedy))


def _arguments(
    ledger: RunLedger, record: RunRecord, words: Sequence[str], scores: str | None
) -> tuple[Path, str, list[str]]:
    """The file of a run's arguments, its text, and the arguments that win over it."""
    config = ledger.path / f"{record.run_id}.config.yaml"
    what = f"{ledger.path}/{record.run_id}.json"
    try:
        text = config.read_text(encoding="utf-8")
        given: Any = yaml.safe_load(text)["data"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        cause = f"its arguments are not there ({config.name}: {type(error).__name__}), so that it cannot be repeated"
        raise RequestError(message(what, cause, "take runs of im-lightning sweep or im-lightning fit")) from error
    if scores is None and not given.get("scores"):
        cause = "it scored the pool by its own base, so that another base would draw other rows"
        remedy = "pass the scores of the small base (--scores; im-lightning score DATA --model SMALL --out …)"
        raise RequestError(message(what, cause, remedy))
    return config, text, [*_OF_ITS_OWN, *([] if scores is None else [f"--data.scores={scores}"]), *words]


def _known(book: RunLedger, asked: list[Any], base: str | None) -> tuple[str, RunRecord | None]:
    """Id of a run with these arguments and base, and the run where the folder has it. In ids of earlier versions the
    base was its path alone: such a run is taken where it is of this base."""
    run_id, older = (f"transfer-{digest_json(parts)[:16]}" for parts in ([*asked, base], asked))
    there = [one for one in (run_id, older) if (book.path / f"{one}.json").exists()]
    found = {r.run_id: r for r in book.records() if r.run_id in there} if there else {}
    old = found.get(older)
    if run_id in found or old is None:
        return run_id, found.get(run_id)
    if old.regime.get("base_model") == base:
        return older, old
    log(f"{book.path}/{older}.json: left aside, it was made from {old.regime.get('base_model')}, not from {base}")
    return run_id, None


def _base(words: Sequence[str]) -> str:
    """Name of the base in these arguments, by its content: the folder may have held another one before."""
    asked = {"--data.model": "", "--data.revision": ""}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in asked:
            asked[name] = value if equals else after
    model, revision = asked.values()
    return base_model_name(checkpoint_identity(model, None if revision == "null" else revision))


def _evaluated_on(record: RunRecord, evaluation: str) -> dict[str, str]:
    """Evaluation set → digest of its rows, of the sets that the loss is of.

    Raises:
        RequestError: the run does not say.
    """
    known = record.regime.get("evaluation_sets") or {}
    names = list(map(set_of, terms_of(evaluation)))
    if missing := [name for name in names if name not in known]:
        cause = f"it does not say which rows its evaluation set {missing[0]} had"
        remedy = "take runs of im-lightning sweep or im-lightning fit"
        raise RequestError(message(f"run {record.run_id}", cause, remedy))
    return {name: str(known[name]) for name in names}

"""`im-lightning select`: writes the rows that a rule (or a baseline) chooses, in their own format, with a manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from im_lightning._utils.answer import answer
from im_lightning._utils.files import parse_json, write_json
from im_lightning._utils.hashing import digest_file, digest_json, digest_strings
from im_lightning._utils.outputs import Replacing, json_with, parquet_with
from im_lightning._utils.progress import log
from im_lightning.data.file_io import rows_with
from im_lightning.data.settings import Reading
from im_lightning.errors import RequestError, message
from im_lightning.sampling.selection.decisions import FILE
from im_lightning.sampling.selection.ranking import Ranking
from im_lightning.sampling.selection.targeted import Targeting
from im_lightning.sampling.weights.quality_weights import Weighting

if TYPE_CHECKING:
    from im_lightning.data.example import Example
    from im_lightning.data.loading import Rejected
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.rule.linear_rule import LinearRule
    from im_lightning.sampling.selection.select import Selection
    from im_lightning.sampling.selection.targeted import Targets

SUMMARY = "write the rows that a rule chooses, in their own format"
EXAMPLE = "im-lightning select scores.parquet pool.jsonl --rule runs/rule.json --budget 2000 --out subset.jsonl"
POSITIONAL = ("scores", "data")

_WEIGHTING, _RANKING, _TARGETING = Weighting(), Ranking(), Targeting()
_READING, _REPLACING = Reading(), Replacing()
FORMAT = "im_lightning subset"


def run(
    scores: str,
    data: list[str],
    out: str,
    budget: int | None = None,
    budget_tokens: int | None = None,
    match: str | None = None,
    rule: str | None = None,
    method: str = "weighted",
    weights: Weighting = _WEIGHTING,
    mixture: str | None = None,
    ranking: Ranking = _RANKING,
    one_per_prompt: bool = False,
    targeting: Targeting = _TARGETING,
    max_similarity: float | None = None,
    embeddings: str | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    stability: int = 0,
    ledger: str | None = None,
    reading: Reading = _READING,
    force: bool | str = False,
    replacing: Replacing = _REPLACING,
) -> int:
    """Chooses rows of a scored pool and writes them as they are, in the order of the pool, one JSON object per line.

    Beside them goes OUT.manifest.json: pool, rule, method, seed, digests and counts, and what the weights reached; and
    OUT.decisions.parquet: why each row was taken or not (im-lightning explain).

    Args:
        scores: Score table of the data, as `im-lightning score` wrote it.
        data: The scored files, folders or data sets, in the same order.
        out: File to write (.jsonl, .json, either .gz or .zst).
        budget: Number of rows to choose.
        budget_tokens: Instead: sum of length_output to reach, within 1 %.
        match: Instead: another subset, as this command wrote it; as many tokens as that one has.
        rule: Rule file or published name; needed by weighted, by-source, top, worst and mix+rule. With a rule, rows
            without a prediction are left out whatever the method.
        method: weighted (drawn by the rule's weights), by-source (by the sources' shares in its runs alone), top,
            worst, random, random-balanced (as many of each source), random-tokens, longest (response), lowest-ppl,
            reward, ifd (highest below 1), diverse (facility location over the embeddings of the table's knn_<i>, by the
            rule's weights if there is a rule), targeted (nearest to each of the --target rows in turn, by the same
            embeddings), mix or mix+rule (by --mixture). With --by and no method, rows are taken in the order of those
            columns.
        weights: How the rule turns into weights, for weighted, by-source, diverse and mix+rule.
        mixture: Shares of the sources (im-lightning mix), for the methods mix (each row of a source alike) and mix+rule
            (by the rule's weights within each source).
        ranking: By which columns, and how many of each group.
        one_per_prompt: Of rows that share a prompt (several answers) take one at most, whatever the method.
        targeting: What is wanted, for targeted.
        max_similarity: Pass over rows whose cosine with a chosen row is this or more, such as 0.9, whatever the method.
        embeddings: Vectors to use instead of the score store's: a .npy file, one per row of the table.
        cache_dir: Score store with the embeddings; by default $IM_LIGHTNING_CACHE or ~/.cache/im_lightning.
        seed: Decides the draw and which of equal rows are taken.
        stability: How often to fit the rule again on resampled runs, to tell how steady the choice is; 0 leaves it out,
            50 is a good number. For weighted, top and worst.
        ledger: Folder of the runs behind the rule, for stability; by default the rule file's own folder.
        reading: Format of the rows, as for score; bad rows set aside go to OUT.rejected.jsonl.
        force: Accept a rule that its own runs find no better than the mean; with other-base after it, scores computed
            in another way than for its fit; weak-rule,other-base for both; worse-target: a rule that makes a named
            target worse.
        replacing: What may be replaced.
    """
    from im_lightning.data.external_scores import scored_rows
    from im_lightning.data.loading import Rejected, note_rejected, write_rows
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.rule.published import load_rule
    from im_lightning.sampling.selection.embeddings import read_vectors
    from im_lightning.sampling.selection.methods import BY, METHODS, method_of
    from im_lightning.sampling.selection.select import choose_rows
    from im_lightning.sampling.weights.mixture import read_mixture

    _refuse_overwriting(out, [scores, *data], replacing)
    wanted = budget_tokens if match is None else _tokens_of(match, budget, budget_tokens)
    table = ScoreTable.read(scores)
    if mixture is not None and not method_of(method).mixture:
        remedy = "pass --method mix, or mix+rule with a rule, or leave it out"
        raise RequestError(message(f"--mixture {mixture}", f"method {method} does not draw by it", remedy))
    if ledger is not None and not stability:
        cause = "it says where the runs behind the rule are, which --stability alone reads"
        raise RequestError(message(f"--ledger {ledger}", cause, "add --stability 50, or leave it out"))
    if stability and (ranking.narrows or max_similarity is not None):
        cause = "it is about a choice by the rule alone, and quotas, shares or likeness narrow this one"
        raise RequestError(message("--stability", cause, "leave out --quota, --keep and --max-similarity, or it"))
    fitted = None if rule is None else load_rule(rule)
    if fitted is not None:
        fitted.check(table, force)
    vectors = None if embeddings is None else read_vectors(embeddings, len(table))
    wanted_rows = _targets(table, targeting, method, data, reading, embeddings, cache_dir)
    prompts = None
    if one_per_prompt:
        from im_lightning.data.overlap.keys import prompt_groups

        prompts = prompt_groups(_examples(table, data, reading))[table.row]
    chosen = choose_rows(
        table,
        fitted,
        budget,
        method,
        seed,
        weights,
        budget_tokens=wanted,
        embeddings=vectors,
        max_similarity=max_similarity,
        cache_dir=cache_dir,
        ranking=ranking,
        mixture=None if mixture is None else read_mixture(mixture),
        prompts=prompts,
        targets=wanted_rows,
    )
    method = "by" if method == "weighted" and ranking.by is not None else method
    steady: dict[str, Any] | None = None
    if stability:
        asked = {"replicates": stability, "method": method, "seed": seed, **asdict(weights), "prompts": prompts}
        steady = _stability(table, fitted, rule, ledger, len(chosen.rows), **asked)
    rejected: list[Rejected] = []
    read, taken = (
        scored_rows(table, data, reading, rejected, f"{scores} and {', '.join(data)}"),
        set(chosen.rows.tolist()),
    )
    kept = [loaded.raw for at, loaded in read if at in taken]
    chosen.decisions.write(f"{out}.{FILE}", table, fitted)
    if rejected:
        write_rows(f"{out}.rejected.jsonl", rejected)
        note_rejected(data, rejected, f"{out}.rejected.jsonl")
    else:
        replacing.remove(f"{out}.rejected.jsonl", rows_with(Rejected.fields))
    request: dict[str, Any] = {"method": method, "seed": seed, "data": data, "budget_tokens": wanted}
    request |= {"match": match, "max_similarity": max_similarity}
    request |= asdict(ranking) if ranking != Ranking() else {}
    request |= {"one_per_prompt": True} if one_per_prompt else {}
    if wanted_rows is not None:
        request["targets"] = {"file": targeting.target, "digest": wanted_rows.digest, "rows": len(wanted_rows.rows)}
    row = METHODS.get(method, BY)
    if row.mixture and mixture is not None:
        request["mixture"] = read_mixture(mixture)
    if row.weighted and fitted is not None:
        request |= asdict(weights)
    if row.embeddings or max_similarity is not None:
        request["embeddings"] = _embeddings(table, embeddings)
    if steady is not None:
        request["stability"] = steady
    if fitted is not None and (forced := fitted.forced(table)):
        request["forced"] = forced
    write_rows(out, kept)  # at last, with the manifest by which a further call knows it
    manifest = _manifest(out, table, fitted, chosen, len(rejected), request)
    write_json(f"{out}.manifest.json", manifest)
    lines = [_summary(out, table, fitted, chosen, method, seed)]
    if steady is not None:
        from im_lightning.sampling.selection.stability import stability_lines

        lines += stability_lines(steady)
    answer({"out": out, **manifest, "predicted": _predicted(table, fitted, chosen)}, "\n".join(lines))
    return 0


def _examples(table: ScoreTable, data: list[str], reading: Reading) -> Iterator[Example]:
    """The scored rows, in the order of the data."""
    from im_lightning.data.external_scores import scored_rows

    rows = scored_rows(table, data, reading, [], ", ".join(data))
    return (loaded.example for _, loaded in rows)


def _targets(
    table: ScoreTable,
    targeting: Targeting,
    method: str,
    data: list[str],
    reading: Reading,
    embeddings: str | None,
    cache_dir: str | None,
) -> Targets | None:
    """What is wanted, where a file of it is named.

    Raises:
        RequestError: the method has no use for it; the pool's vectors are from a file, which has none of the targets.
    """
    if targeting.target is None:
        return None
    from im_lightning.data.loading import load_examples
    from im_lightning.sampling.selection.methods import method_of
    from im_lightning.sampling.selection.targeted import targets_of

    if not method_of(method).targets:
        cause = f"method {method} does not look at it"
        raise RequestError(message(f"--target {targeting.target}", cause, "pass --method targeted, or leave it out"))
    if embeddings is not None:
        cause = "its vectors would have to be of the same model, which --embeddings does not name"
        raise RequestError(message(f"--target {targeting.target}", cause, "leave out --embeddings"))
    bad: list[Rejected] = []
    wanted = load_examples(targeting.target, rejected=bad, **asdict(reading))
    found = targets_of(wanted, table, _examples(table, data, reading), (), targeting.target_model, cache_dir)
    log(f"{targeting.target}: {found.text()}" + (f"; {len(bad):,} bad rows are left out" if bad else ""))
    return replace(found, shared=found.shared[table.row])


def _stability(
    table: ScoreTable, fitted: LinearRule | None, rule: str | None, ledger: str | None, rows: int, **how: Any
) -> dict[str, Any]:
    """How steady the choice is over rules fitted on resampled runs; `how` as `selection_stability`.

    Raises:
        RequestError: there is no rule, or its runs are not in the ledger.
    """
    from im_lightning.ledger.ledger import RunLedger
    from im_lightning.sampling.selection.stability import selection_stability

    if fitted is None or rule is None:
        cause = "it is about the runs behind a rule, and there is no rule"
        raise RequestError(message("--stability", cause, "pass --rule, or leave it out"))
    book = RunLedger(ledger or Path(rule).parent)
    return selection_stability(table, fitted, book, rows, **how)


def _tokens_of(match: str, budget: int | None, budget_tokens: int | None) -> int:
    """The tokens of another subset, from its manifest.

    Raises:
        RequestError: there is no manifest, it has no count of tokens, or another budget is given.
    """
    if budget is not None or budget_tokens is not None:
        cause = "it says how much to choose, and so does another argument"
        raise RequestError(message(f"--match {match}", cause, "leave out --budget and --budget-tokens"))
    path = Path(f"{match}.manifest.json")
    try:
        tokens = parse_json(path.read_bytes())["subset"]["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"{path} does not describe a subset of im_lightning ({type(error).__name__})"
        raise RequestError(message(f"--match {match}", cause, "name a file that im-lightning select wrote")) from error
    if not isinstance(tokens, int):
        cause = f"{path} has no count of tokens: its table had no length_output for every row"
        raise RequestError(message(f"--match {match}", cause, "score its pool for length_output and select again"))
    return tokens


def _embeddings(table: ScoreTable, file: str | None) -> dict[str, Any]:
    """Which vectors said what is alike."""
    from im_lightning.sampling.selection.embeddings import embedding_identity

    if file is None:
        identity = embedding_identity(table)
        return {"kind": identity.get("kind"), "digest": digest_json(identity)}
    return {"file": Path(file).name, "digest": digest_file(file)}


def _manifest(
    out: str, table: ScoreTable, rule: LinearRule | None, chosen: Selection, rejected: int, request: dict[str, Any]
) -> dict[str, Any]:
    import platform

    import numpy as np

    from im_lightning import __version__
    from im_lightning.rule.rule_file import rule_digest

    described = None
    if rule is not None:
        described = {"name": rule.name, "verified": rule.verified, "digest": rule_digest(rule)}
    rows = np.sort(chosen.rows)
    lengths = table.values.get("length_output")
    tokens = None if lengths is None or np.isnan(lengths[rows]).any() else int(lengths[rows].sum())
    return {
        "format": FORMAT,
        "made_by": f"im_lightning {__version__}",
        "file": digest_file(out),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        **request,
        "budget": len(rows),
        "order": "as in the data",
        "rule": described,
        "pool": {"digest": table.pool_digest, "rows": len(table), "eligible": chosen.eligible, "rejected": rejected},
        "subset": {
            "digest": digest_strings(table.id[at] for at in rows),
            "rows": len(rows),
            "tokens": tokens,
            "sources": _counts(table, rows),
        },
        "weights": chosen.report,
    }


def _predicted(table: ScoreTable, rule: LinearRule | None, chosen: Selection) -> dict[str, float] | None:
    """Mean log loss that a rule predicts of the rows with a prediction: of the chosen ones, and of the pool."""
    import numpy as np

    if rule is None:
        return None
    predicted = rule.predict(table)
    return {"subset": float(predicted[chosen.rows].mean()), "pool": float(np.nanmean(predicted))}


def _summary(out: str, table: ScoreTable, rule: LinearRule | None, chosen: Selection, method: str, seed: int) -> str:
    from im_lightning._utils.text_tables import terminal_width, wrapped
    from im_lightning.sampling.weights.quality_weights import move_text

    how = f"{method} ({chosen.report['method']})" if "method" in chosen.report else method
    by = f", rule {rule.name}" if rule is not None else ""
    line = f"{out}: {len(chosen.rows):,} of {len(table):,} rows, {how}{by}, seed {seed}"
    covered = chosen.report.get("diverse")
    if covered is not None:
        line += f"; covers {covered['coverage']:.0%} of {covered['candidates']:,} candidates"
    if (predicted := _predicted(table, rule, chosen)) is not None:
        line += f"; mean predicted log loss {predicted['subset']:.4f}, of the pool {predicted['pool']:.4f}"
    if move := move_text(chosen.report):
        line += "\n" + wrapped(f"{move[0].upper()}{move[1:]}.", terminal_width())
    return line


def _counts(table: ScoreTable, rows: Any) -> dict[str, int]:

    return dict(Counter(table.source[at] for at in rows).most_common())


def _refuse_overwriting(out: str, inputs: list[str], replacing: Replacing) -> None:
    from im_lightning.data.file_io import check_rows_path
    from im_lightning.data.loading import Rejected

    check_rows_path(out)
    written = Path(out).resolve()
    for name in inputs:
        if Path(name).resolve() == written:
            raise RequestError(message(f"--out {out}", "it is one of the inputs", "write to another file"))
    manifest = Path(f"{out}.manifest.json")

    def ours(path: Path) -> bool:
        """Whether the manifest beside it is of this very file; older ones do not say."""
        described = parse_json(manifest.read_bytes())
        return described["format"] == FORMAT and described.get("file") in (None, digest_file(path))

    replacing.check(out, "subset", ours)
    replacing.check(manifest, "manifest of a subset", json_with(FORMAT))
    replacing.check(f"{out}.{FILE}", "decisions of a selection", parquet_with("taken", "reason"))
    replacing.check(f"{out}.rejected.jsonl", "file of rejected rows", rows_with(Rejected.fields))

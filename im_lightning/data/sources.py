"""The published sets that are known by name: how each becomes rows that `load_examples` reads.

A set is named wherever data is: `dolly` (from the hub), `dolly@file.jsonl` (a downloaded file or folder), with options
`open-assistant:lang=en:rows=2000@trees.jsonl.gz`. One adapter per set, all in the table `PUBLISHED`.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from im_lightning._utils.progress import log
from im_lightning.data.file_io import Source
from im_lightning.data.json_array import Record
from im_lightning.data.structured_fields import BadRow, kind_of, markdown
from im_lightning.errors import RequestError, message

Row = dict[str, Any]


class LeftOut(Exception):
    """Why a sound row of a published set is not used: it has no pair of instruction and response, or an option asks."""


@dataclass(frozen=True)
class Published:
    """A published set.

    Args:
        hub: Where it lies on the hub, org/name/config:split; "" for one that must be downloaded.
        rows: Turns its records into rows of a form that `convert` knows.
        options: Options that it takes, with their defaults.
    """

    hub: str
    rows: Callable[[Iterator[Record], Mapping[str, Any], Counter[str]], Iterator[Record]]
    options: Mapping[str, Any] = field(default_factory=dict)


_ODD = (TypeError, LookupError, AttributeError, ValueError, RecursionError)  # of values of other kinds than a set's
_EVERY: Mapping[str, Any] = {"rows": 0, "seed": 0}
"""Options of every set: a random sample of so many rows, and what decides it."""


def _each(adapter: Callable[[Mapping[str, Any], Mapping[str, Any]], Row]) -> Callable[..., Iterator[Record]]:
    """For sets whose every record is a row."""

    def rows(records: Iterator[Record], options: Mapping[str, Any], left_out: Counter[str]) -> Iterator[Record]:
        for line, row, cause in records:
            if cause is None:
                try:
                    if not isinstance(row, Mapping):
                        raise BadRow(f"the row is not an object but {kind_of(row)}")
                    row = adapter(row, options)
                except LeftOut as reason:
                    left_out[str(reason)] += 1
                    continue
                except _ODD as error:
                    cause = _cause(error)
            yield line, row, cause

    return rows


def _cause(error: Exception) -> str:
    if isinstance(error, RequestError):  # of a package that is missing, not of the row
        raise error
    odd = f"it has not the form of this set ({type(error).__name__}: {error})"
    return str(error) if isinstance(error, BadRow) else odd


def _first(values: Any) -> Any:
    """Of a list; the first letter of a text would pass for one."""
    if isinstance(values, str):
        raise TypeError("a text stands where a list is")
    return values[0]


def _need(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise BadRow(f"it has no {name!r}, which rows of this set have (it has {', '.join(map(str, row))})")
    return row[name]


def _named(**fields: str) -> Callable[..., Iterator[Record]]:
    """For sets that only name their fields otherwise: ours=theirs; a field that ends in "?" may be missing."""

    def adapter(row: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
        out: Row = {}
        for ours, theirs in fields.items():
            value = row.get(theirs[:-1]) if theirs.endswith("?") else _need(row, theirs)
            out |= {} if value is None else {ours: value}
        return out

    return _each(adapter)


def _gsm8k(row: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
    """Without the marks of its calculator, <<48/2=24>>."""
    return {"prompt": _need(row, "question"), "response": re.sub(r"<<[^>]*>>", "", _need(row, "answer"))}


def _lima(row: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
    turns = _need(row, "conversations")
    if len(turns) < 2:
        raise LeftOut("a prompt without an answer (test set)")
    return {"conversations": turns[: len(turns) // 2 * 2]}


def _mt_bench(row: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
    """The first of its two turns; it has no answers, and serves `make-eval` and `generate`."""
    return {"prompt": _first(row.get("turns") or _need(row, "prompt"))}


def _turns_of_texts(row: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
    """UltraChat: messages (ultrachat_200k), or texts in turn (the set that it was made from)."""
    if row.get("messages") is not None:
        return {"messages": row["messages"]}
    texts = _need(row, "data")
    if len(texts) < 2:
        raise LeftOut("a prompt without an answer")
    return {"conversations": texts[: len(texts) // 2 * 2]}


def _self_instruct(row: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
    """Its generations as published on the hub (prompt, completion), its tasks (instances), or plain instances."""
    if row.get("prompt") is not None:
        prompt = re.sub(r"\s*\n\s*Output:\s*$", "", row["prompt"]).strip()
        return {"prompt": prompt, "response": _need(row, "completion").replace("<|endoftext|>", "").strip()}
    one: Mapping[str, Any] = row
    if (instances := row.get("instances")) is not None:  # a list of objects in files, an object of lists on the hub
        one = {k: _first(v) for k, v in instances.items()} if isinstance(instances, Mapping) else _first(instances)
    return {"instruction": _need(row, "instruction"), "input": one.get("input") or "", "output": _need(one, "output")}


def _stackexchange(row: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
    """The best of the scored answers, its HTML as Markdown, so that code stays code."""
    answers = _need(row, "answers")
    best = max(answers, key=lambda one: (one["pm_score"], bool(one.get("selected"))), default=None)
    if best is None or best["pm_score"] < options["min_score"]:
        raise LeftOut(f"no answer of score {options['min_score']} or more")
    return {"prompt": markdown(_need(row, "question")), "response": markdown(_need(best, "text"))}


def _wikihow(row: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
    """Articles (title, text), or in the set of paragraphs one step each (headline of the step as input)."""
    step = "sectionLabel" in row
    title = str(row.get("title") or row.get("headline") or "").strip().rstrip("?")
    text = re.sub(r"\.+\n+,", ".\n", str(row.get("text") or "")).strip()  # commas that its publisher cleans up, too
    if not title or not text:
        raise LeftOut("without a title or a text")
    asked = title if title.lower().startswith("how to ") else f"How to {title[0].lower()}{title[1:]}"
    out = {"instruction": f"{asked}?", "output": text}
    return {**out, "input": str(row["headline"]).strip()} if step and row.get("headline") else out


def _open_assistant(records: Iterator[Record], options: Mapping[str, Any], left_out: Counter[str]) -> Iterator[Record]:
    """Conversations of its trees, which are published nested (a tree a line) and flat (a message a line)."""
    children: dict[str, list[Mapping[str, Any]]] = {}
    roots: list[tuple[int, Mapping[str, Any]]] = []
    for line, row, cause in records:
        if cause is None and not isinstance(row, Mapping):
            cause = f"the row is not an object but {kind_of(row)}"
        if cause is None and isinstance(row.get("prompt"), Mapping):
            roots.append((line, row["prompt"]))
        elif cause is None and {"message_id", "text", "role"} <= row.keys():
            if row.get("parent_id") is None:
                roots.append((line, row))
            else:
                children.setdefault(str(row["parent_id"]), []).append(row)
        else:
            yield line, row, cause or "it is neither a message nor a tree of open-assistant"
    for line, root in roots:
        if not _usable(root, options):
            left_out["trees deleted or in another language"] += 1
            continue
        try:
            paths = _paths(root, children, options, left_out)
            rows = [{"messages": [{"role": one["role"], "content": one["text"]} for one in path]} for path in paths]
        except _ODD as error:
            yield line, root, _cause(error)
            continue
        left_out["trees without an answer"] += not rows
        yield from ((line, row, None) for row in rows)


def _usable(node: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    return not node.get("deleted") and options["lang"] in ("all", node.get("lang"))


def _rank(node: Mapping[str, Any]) -> float:
    return math.inf if node.get("rank") is None else node["rank"]  # 0 is the best; not every reply was ranked


def _paths(
    root: Mapping[str, Any],
    children: Mapping[str, list[Mapping[str, Any]]],
    options: Mapping[str, Any],
    left_out: Counter[str],
) -> list[list[Mapping[str, Any]]]:
    """The conversations of a tree, each up to an answer: along the best-ranked replies, or every way down."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    left = [[root]]
    while left:
        path = left.pop()
        given = [*(path[-1].get("replies") or ()), *children.get(str(path[-1].get("message_id")), ())]
        replies = sorted((one for one in given if _usable(one, options)), key=_rank)
        if any(one is earlier for one in replies for earlier in path):
            raise ValueError("a message answers itself")
        left_out["messages deleted or in another language"] += len(given) - len(replies)
        if replies:
            left += [[*path, one] for one in (replies[:1] if options["paths"] == "best" else reversed(replies))]
            continue
        while path and path[-1]["role"] != "assistant":
            path = path[:-1]
        if path:
            found[tuple(map(id, path))] = path
    longer = {key[:end] for key in found for end in range(1, len(key))}
    return [path for key, path in found.items() if key not in longer]


PUBLISHED = {
    "alpaca": Published("tatsu-lab/alpaca", _named(instruction="instruction", input="input?", output="output")),
    "open-assistant": Published("OpenAssistant/oasst1", _open_assistant, {"lang": "all", "paths": ("best", "all")}),
    "stackexchange": Published("HuggingFaceH4/stack-exchange-preferences", _each(_stackexchange), {"min_score": 1}),
    "wikihow": Published("", _each(_wikihow)),
    "dolly": Published(
        "databricks/databricks-dolly-15k", _named(instruction="instruction", input="context?", output="response")
    ),
    "open-orca": Published(
        "Open-Orca/OpenOrca", _named(system="system_prompt?", prompt="question", response="response")
    ),
    "self-instruct": Published("yizhongw/self_instruct/self_instruct:train", _each(_self_instruct)),
    "lima": Published("GAIR/lima", _each(_lima)),
    "gsm8k": Published("openai/gsm8k/main:train", _each(_gsm8k)),
    "tulu-3": Published("allenai/tulu-3-sft-mixture", _named(messages="messages")),
    "mt-bench": Published("HuggingFaceH4/mt_bench_prompts:train", _each(_mt_bench)),
    "ultrachat": Published("HuggingFaceH4/ultrachat_200k:train_sft", _each(_turns_of_texts)),
}
"""Name → set. An option whose default is a tuple takes one of its values, the first by default."""


@dataclass(frozen=True)
class Named:
    """A text that names a published set: which, with which options, and where it lies."""

    name: str
    options: Mapping[str, Any]
    where: str

    def sources(self, files: list[Source]) -> list[Source]:
        """Its files as rows of this set, a sample of all of them together; what is left out is reported of each."""
        if not self.options["rows"]:
            return [Source(one.name, self.name, partial(self._records, one)) for one in files]

        @cache
        def drawn() -> list[tuple[int, Record]]:
            return self._sample((k, record) for k, one in enumerate(files) for record in self._records(one))

        def of(k: int) -> Iterator[Record]:
            yield from (record for file, record in drawn() if file == k)

        return [Source(one.name, self.name, partial(of, k)) for k, one in enumerate(files)]

    def _records(self, of: Source) -> Iterator[Record]:
        left_out: Counter[str] = Counter()
        rows = PUBLISHED[self.name].rows(of.records(), self.options, left_out)
        yield from ((line, row if cause else {**row, "source": self.name}, cause) for line, row, cause in rows)
        if left_out := +left_out:
            counts = ", ".join(f"{count:,} {why}" for why, count in left_out.most_common())
            log(f"{of.name} as {self.name}: left out: {counts}")

    def _sample(self, records: Iterable[tuple[int, Record]]) -> list[tuple[int, Record]]:
        """So many of the good rows, each set of them as likely, in their order; all bad ones. Each with its file."""
        draw, seen, count = random.Random(self.options["seed"]), 0, self.options["rows"]
        kept: list[tuple[int, tuple[int, Record]]] = []
        bad: list[tuple[int, tuple[int, Record]]] = []
        for at, record in enumerate(records):
            if record[1][2] is not None:
                bad.append((at, record))
                continue
            seen += 1
            place = len(kept) if len(kept) < count else draw.randrange(seen)
            if place < count:
                kept[place : place + 1] = [(at, record)]
        if seen < count:
            log(f"{self.where} as {self.name}: it has {seen:,} rows where rows={count:,} asks for more; all are taken")
        return [record for _, record in sorted(kept + bad, key=lambda one: one[0])]


def published(text: str) -> Named | None:
    """What a text such as `open-assistant:lang=en@trees.jsonl` names; None where it names no published set.

    A name is known in capitals and with or without hyphens, too; a file or folder of that name comes first.

    Raises:
        RequestError: the set does not take such an option, or lies nowhere on the hub and no file is named.

    >>> published("OPEN-ASSISTANT:lang=en:rows=2000@trees.jsonl.gz").where
    'trees.jsonl.gz'
    """
    head, _, where = text.partition("@")
    name, *given = head.split(":")
    known = {_plain(one): one for one in PUBLISHED}.get(_plain(name))
    if known is None or Path(text).exists():
        return None
    of = PUBLISHED[known]
    if not (where or of.hub):
        remedy = f"download it (wikihowAll.csv), and write {known}@FILE"
        raise RequestError(message(text, f"the set {known} does not lie on the hub", remedy))
    return Named(known, _options(text, given, {**_EVERY, **of.options}), where or of.hub)


def with_source(source: str | None, data: list[str]) -> list[str]:
    """Data that are in the form of a published set, as `--source` says.

    Raises:
        RequestError: there is no such set; names those that are.
    """
    if source is None:
        return data
    if published(f"{source}@file") is None:
        raise RequestError(message(f"--source {source}", "there is no such set", f"use one of {', '.join(PUBLISHED)}"))
    return [f"{source}@{one}" for one in data]


def pooled(data: Any, sources: Mapping[str, float] | None) -> Any:
    """The pool that a recipe names: its data, or its published sets.

    Raises:
        RequestError: it names both, or neither.
    """
    if (data is None) == (sources is None):
        remedy = "name data (files, data sets), or sources (published sets and their rows)"
        raise RequestError(message("the pool", "it is named twice" if data else "it is not named", remedy))
    return data if sources is None else mixture(sources)


def mixture(sources: Mapping[str, float]) -> list[str]:
    """The texts that name sets in a recipe's `sources:`, {set: rows}, or {set: weight, rows: how many in all}.

    Raises:
        RequestError: a set is not known, or neither sizes nor weights with `rows` are given.

    >>> mixture({"dolly": 0.75, "wikihow@all.csv": 0.25, "rows": 4000})
    ['dolly:rows=3000', 'wikihow:rows=1000@all.csv']
    """
    sizes = {name: size for name, size in sources.items() if name != "rows"}
    whole, total = sources.get("rows"), sum(sizes.values())
    scale = 1.0 if whole is None else whole / total if total else 0.0
    out, before = [], 0.0
    for name, size in sizes.items():
        before, rows = before + size, round((before + size) * scale) - round(before * scale)
        if rows < 1 or (whole is None and rows != size):
            remedy = "give each a number of rows, or weights and beside them rows: how many in all"
            raise RequestError(message("sources", f"{name} has {size:g}", remedy))
        if published(name) is None:
            cause = f"there is no set {name.partition('@')[0]!r}"
            raise RequestError(message("sources", cause, f"use some of {', '.join(PUBLISHED)}, such as dolly@FILE"))
        head, at, where = name.partition("@")
        out.append(f"{head}:rows={rows}{at}{where}")
    return out


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _options(text: str, given: list[str], known: Mapping[str, Any]) -> dict[str, Any]:
    out = {name: value[0] if isinstance(value, tuple) else value for name, value in known.items()}
    for option in given:
        name, _, value = option.partition("=")
        wanted = known.get(name)
        try:
            if wanted is None or (isinstance(wanted, tuple) and value not in wanted) or not value:
                raise ValueError
            out[name] = int(value) if isinstance(wanted, int) else value
            if name == "rows" and out[name] < 0:
                raise ValueError
        except ValueError:
            takes = ", ".join(f"{n}={'|'.join(v) if isinstance(v, tuple) else v}" for n, v in known.items())
            raise RequestError(message(text, f"it does not take {option!r}", f"write some of {takes}")) from None
    return out

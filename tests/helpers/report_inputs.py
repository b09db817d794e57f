"""A folder with everything a report can be made from, made on the spot; and a parser that looks at the page."""

from __future__ import annotations

from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

from pool_ledger import TRANSFORMS, pool_ledger
from pools import write_jsonl

from im_lightning._utils.files import write_json
from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.fit import fit_rule

VOID = {"meta", "br", "hr", "img", "link", "input", "wbr", "col", "area", "base", "embed", "source", "track"}


def arms(**changes):
    """compare.json as `im-lightning compare` writes it, as far as the report reads it."""
    random = {
        "arm": "random",
        "title": "random",
        "losses": [2.9, 2.8, 3.0],
        "mean": 2.9,
        "half_width": 0.248,
        "difference": None,
        "difference_half_width": None,
        "p": None,
        "p_holm": None,
        "verdict": "",
        "tested": False,
        "rows": 298.0,
        "tokens": 2908.0,
        "steps": 30.0,
        "seconds": 1.0,
        "run_ids": ["a"],
    }
    weighted = random | {
        "arm": "weighted",
        "title": "rule's weights",
        "losses": [2.5, 2.6, 2.55],
        "mean": 2.55,
        "half_width": 0.124,
        "difference": -0.35,
        "difference_half_width": 0.122,
        "p": 0.0004,
        "p_holm": 0.0008,
        "verdict": "better",
        "tested": True,
    }
    longest = weighted | {
        "arm": "longest",
        "title": "longest",
        "losses": [4.6, 4.7, 4.8],
        "mean": 4.7,
        "difference": 1.8,
        "p_holm": 0.0002,
        "verdict": "worse",
    }
    same = weighted | {
        "arm": "ifd",
        "title": "highest IFD below 1",
        "losses": [2.9, 2.7, 3.1],
        "mean": 2.9,
        "difference": 0.01,
        "p_holm": 0.93,
        "verdict": "no difference shown",
    }
    base = random | {"arm": "base", "title": "base model", "losses": [7.2] * 3, "mean": 7.2, "difference": 4.3}
    return {"arms": [base, random, weighted, longest, same], "reference": "random", "seeds": 3,
            "settings": {}, "evaluation": {"name": "report", "path": "report.jsonl"},
            "notes": ["a note of the comparison"], "rendered": "arm  loss\nrandom  2.900", **changes}  # fmt: skip


def statistics(names, slope=0.1):
    """Live statistics of a run: deciles rise by `slope` nats per decile and fall by 0.01 per step."""
    tenths = [3.0 + slope * k for k in range(10)]
    part = {
        "examples": 300,
        "pearson": dict.fromkeys(names, 0.5),
        "slope": dict.fromkeys(names, 0.1),
        "r2": 0.3,
        "by_decile": dict.fromkeys(names, tenths),
        "decile_examples": {n: [30] * 10 for n in names},
    }
    again = {**part, "pearson": dict.fromkeys(names, 0.2)}
    rows = [[step, k + 1, 3.0 + slope * k - 0.01 * step] for step in (10, 20, 30) for k in range(10)]
    return {"steps": 30, "indicators": list(names), **part, "repeat": again, "left_out": 0, "pool_seen": 0.2,
            "ess": 250.0, "deciles_of": names[0], "deciles": rows,
            "other_deciles": dict.fromkeys(names[1:], rows)}  # fmt: skip


@lru_cache
def _fitted(n, method, effect, fit):
    records, table = pool_ledger(n, repeats=4, effect=effect, sources=True)
    return records, table, fit_rule(records, method, **{"permutations": 39, "bootstrap": 60, "name": "r", **dict(fit)})


def make_folder(folder: Path, n=36, method="ols", effect=None, source=lambda k: f"source{k % 3}", change=None, **fit):
    """ledger/, rule.json, scores.parquet, pool.jsonl and compare.json; their table and rule.

    Args:
        folder: Where.
        n: Runs.
        method: Of the fit.
        effect: As `pool_ledger` takes it.
        source: Row number → its source.
        change: Called with the table's columns before it is written; may add some.
        fit: Further arguments of `fit_rule`.
    """
    records, table, rule = _fitted(n, method, effect, tuple(sorted(fit.items())))
    folder.mkdir(parents=True, exist_ok=True)
    rule.save(folder / "rule.json")
    ledger = RunLedger(folder / "ledger")
    for record in records:
        ledger.add(record)
        ledger.add_statistics(record.run_id, statistics(list(TRANSFORMS)))
    rows = [{"instruction": f"Say {k}.", "output": f"It is {k}.", "source": source(k)} for k in range(len(table))]
    write_jsonl(folder / "pool.jsonl", rows)
    examples = load_examples(str(folder / "pool.jsonl"))
    values, reasons = dict(table.values), {}
    if change is not None:
        change(values, reasons)
    table = ScoreTable(table.row, [e.id for e in examples], [e.source for e in examples], values, reasons, table.keys)
    table.write(folder / "scores.parquet")
    write_json(folder / "compare.json", arms())
    return rule, table


def named(folder: Path) -> dict:
    """All inputs of `write_report`."""
    return {
        "ledger": str(folder / "ledger"), "rule": str(folder / "rule.json"), "scores": str(folder / "scores.parquet"),
        "data": [str(folder / "pool.jsonl")], "compare": str(folder / "compare.json"), "budgets": [200, 50],
    }  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page; elements that are not closed in order are an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.raw = text
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def ids(self) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get("id")) is not None]

    def sections(self) -> list[str]:
        return [attrs["id"] or "" for tag, attrs in self.tags if tag == "section"]

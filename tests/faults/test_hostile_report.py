"""Text from data, ledgers and file names in the HTML report: it is shown, and never becomes markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_ledger import simulate

from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.ledger.ledger import RunLedger
from im_lightning.report.page import write_report

HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><script>alert(2)</script>",
    "{{ 7919 * 7919 }}",
    "{% include 'x' %}", "</svg><svg onload=alert(3)>", "<!-- ", "]]>", "&lt;b&gt;", "' onmouseover='alert(4)",
    "\x00\x07",
    "\udcff", "\u202egnp.exe", "$\\frac{", "$$", "%s %(x)s {0}", "<a href=javascript:alert(5)>here</a>",
    "\N{PILE OF POO}",
    "<iframe srcdoc='<script>alert(6)</script>'>", "</textarea></title>", "<b", "é" * 300,
)  # fmt: skip
FORBIDDEN = {"iframe", "object", "embed", "form", "input", "base", "link", "img", "a"}


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def check(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 1, "the one whose digest the page allows"
    for tag, attributes in page.tags:
        assert tag not in FORBIDDEN or (tag == "a" and str(attributes.get("href", "")).startswith("#")), (
            tag,
            attributes,
        )
        for name, value in attributes.items():
            assert not name.startswith("on") and "javascript:" not in str(value), (tag, name, value)
            if name in ("href", "src", "xlink:href"):
                assert str(value).startswith(("#", "data:image/png")), (tag, name, value)
    assert not any("alert" in comment for comment in page.comments)
    return page


def hostile_texts(seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def text(parts: int = 2) -> str:
        return " ".join(rng.choice(np.array(HOSTILE, dtype=object), parts))

    return text


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_a_report_of_hostile_texts_is_only_text(tmp_path: Path, seed: int) -> None:
    """A pool is downloaded from strangers, and its report is opened in a browser and sent to colleagues."""
    text = hostile_texts(seed)
    pool, n = tmp_path / "pool.jsonl", 40
    sources = [text(1) for _ in range(4)]
    with pool.open("w") as stream:
        for i in range(n):
            row = {"instruction": f"{text()} {i}", "input": text(1), "output": text(3), "source": sources[i % 4]}
            stream.write(json.dumps(row) + "\n")
    examples, rng = load_examples(str(pool)), np.random.default_rng(seed)
    values = {"ppl": rng.lognormal(1.0, 0.5, n), "length_output": rng.integers(3, 60, n) * 1.0}
    values["ppl"][3] = np.nan
    keys = {name: {"identity": {"indicator": name, "version": 1, "note": text(1)}, "numerics": {}} for name in values}
    reasons = {"ppl": [text(1) if i == 3 else None for i in range(n)]}
    ids, named = [e.id for e in examples], [e.source for e in examples]
    ScoreTable(np.arange(n), ids, named, values, reasons, keys).write(tmp_path / "scores.parquet")
    regime = {"base_model": text(1), "template": text(1), "evaluation_sets": {text(1): "e" * 32}}
    records = simulate(12, seed=seed, regime=regime)
    for record in records:
        RunLedger(tmp_path / "runs").add(record)
    (tmp_path / "runs" / "torn.json").write_text("{<script>")
    arms = [
        {"arm": name, "losses": [2.0, 2.1, 1.9], "rows": 10, "tokens": 100, "steps": 3, "seconds": 1.0}
        for name in ("tilt", text(1), text(1) + "x")
    ]
    compare = {
        "arms": arms,
        "reference": text(1),
        "seeds": [0, 1, 2],
        "settings": {text(1): text(1)},
        "evaluation": text(1),
    }
    (tmp_path / "compare.json").write_text(json.dumps({**compare, "rule": {"path": text(1)}, "rendered": text(4)}))
    out = tmp_path / "report.html"
    write_report(
        out, text(2), ledger=str(tmp_path / "runs"), rule="instructmining-v3", scores=str(tmp_path / "scores.parquet"),
        data=[str(pool)], compare=str(tmp_path / "compare.json"), budgets=[10],
    )  # fmt: skip
    page = check(out)
    shown = " ".join(page.text)
    assert "alert(" in shown and "62710561" not in shown, "the texts are shown as they are; no template is evaluated"
    assert list((tmp_path / "report_figures").glob("*.png"))

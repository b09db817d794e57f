"""The page is one file that any browser shows: whole, escaped, without network, small, and made in seconds."""

from __future__ import annotations

import json
import re
import time
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from pools import write_jsonl
from report_inputs import Page, arms, make_folder, named

from im_lightning._utils.files import write_json
from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import ScoreTable
from im_lightning.report import page as report_page
from im_lightning.report.page import write_report
from im_lightning.report.svg import PALETTE, draw
from im_lightning.rule.linear_rule import LinearRule

ALL = ["short", "rule", "comparison", "weights", "examples", "rows", "pool", "runs", "training"]
HOSTILE = (
    "</svg><script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "' onmouseover='alert(3)", "a\x00b\x1b[31m",
    "lone \ud800 surrogate", "\u202egnp.exe\u202c", "مرحبا", "$\\frac{", "<!--", "]]>", "{{ 7*7 }}",
    "</pre></textarea>",
)  # fmt: skip
BAD_TAGS = {"iframe", "object", "embed", "img", "link", "form", "base", "video", "audio", "foreignobject"}
SCRIPT = (Path(report_page.__file__).parent / "templates" / "tables.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rule, table = make_folder(folder)
    return Page(write_report(folder / "out" / "report.html", **named(folder)).read_text()), folder, rule, table


def check_harmless(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in BAD_TAGS, tag
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert (value or "").startswith("#"), (tag, name, value)
            if name == "style":
                assert "url(" not in (value or "").replace("url(#", ""), value
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page.raw, re.DOTALL)
    if "<html" in page.raw:
        digest = b64encode(sha256(SCRIPT.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in page.raw, "a hole would run nothing"
    allowed = [SCRIPT] if "<html" in page.raw else []  # a figure alone has none
    assert scripts == allowed and [tag for tag, _ in page.tags].count("script") == len(allowed), "our own, and no other"
    assert "@import" not in page.raw
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", page.raw)


def test_every_part_is_on_one_page(made) -> None:
    """A page that has to be put together from files, or that loads some, is not one that can be sent to anybody."""
    page = made[0]
    assert page.sections() == ALL
    check_harmless(page)
    assert len(set(page.ids())) == len(page.ids()), "an id twice: a figure would use another one's clip paths"
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links and all(link[1:] in page.ids() for link in links)
    used = set(re.findall(r"url\(#([^)]+)\)", page.raw)) | {
        attrs["xlink:href"][1:] for tag, attrs in page.tags if tag == "use"
    }
    assert used <= set(page.ids())
    assert "width=device-width" in page.raw and "prefers-color-scheme: dark" in page.raw
    assert "default-src 'none'" in page.raw  # even a hole would load nothing
    assert "Not in this report" not in page.text


def test_every_figure_is_drawn_and_saved(made) -> None:
    """The figures go into slides and papers as PNG; one that is missing or empty is found too late."""
    page, folder, _, _ = made
    drawn = {one.removesuffix("-figure_1") for one in page.ids() if one.endswith("-figure_1")}
    saved = {path.stem: path.read_bytes() for path in (folder / "out" / "report_figures").iterdir()}
    assert drawn == set(saved) and len(drawn) >= 14
    assert all(data.startswith(b"\x89PNG") and len(data) > 2000 for data in saved.values())
    captions = [tag for tag, _ in page.tags if tag == "figcaption"]
    assert len(captions) == len([1 for tag, attrs in page.tags if tag == "svg" and attrs.get("class") == "fig"])


def test_colours_of_figures_are_those_of_the_page(made) -> None:
    """Black ink on a dark page cannot be read."""
    page, _, _, _ = made
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.raw, re.S))
    assert drawings.count("var(--ink)") > 50
    assert not any(colour in drawings for colour in PALETTE.values())
    assert "#000000" not in drawings and "#ffffff" not in drawings
    for role in PALETTE:
        assert page.raw.count(f"--{role}:") == 2, "one colour for light, one for dark"


def test_a_second_report_leaves_no_figure_of_the_first(tmp_path: Path) -> None:
    """A figure of a section that is gone would pass for a new one."""
    make_folder(tmp_path)
    write_report(tmp_path / "r.html", rule=str(tmp_path / "rule.json"))
    assert (tmp_path / "r_figures" / "rule-coefficients.png").exists()
    (tmp_path / "r_figures" / "mine.txt").write_text("kept")
    write_report(tmp_path / "r.html", compare=str(tmp_path / "compare.json"))
    left = {path.name for path in (tmp_path / "r_figures").iterdir()}
    assert left == {"comparison-differences.png", "comparison-losses.png", "mine.txt"}


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    """The rows come from the internet, and the page is opened in a browser with the reader's rights."""
    make_folder(
        tmp_path,
        source=lambda k: HOSTILE[k % len(HOSTILE)],
        change=lambda values, reasons: (
            values.update({HOSTILE[0]: np.where(np.arange(1500) % 7, np.arange(1500.0), np.nan)}),
            reasons.update({HOSTILE[0]: [HOSTILE[k % len(HOSTILE)] for k in range(1500)]}),
        ),
    )
    rows = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    for k, row in enumerate(rows):
        row["instruction"], row["output"] = HOSTILE[k % len(HOSTILE)] + f" {k}", HOSTILE[(k + 1) % len(HOSTILE)] * 200
    write_jsonl(tmp_path / "pool.jsonl", rows)
    table, examples = ScoreTable.read(tmp_path / "scores.parquet"), load_examples(str(tmp_path / "pool.jsonl"))
    ScoreTable(table.row, [e.id for e in examples], table.source, table.values, table.reasons, table.keys).write(
        tmp_path / "scores.parquet"
    )
    rule = LinearRule.load(tmp_path / "rule.json")
    said = {"notes": list(HOSTILE), "source_out": dict.fromkeys(HOSTILE), "verdict": "better than " + HOSTILE[0]}
    rule.metrics_, rule.evaluation = replace(rule.metrics_, **said), HOSTILE[1]
    for row, text in zip(rule.metrics_.held_out, HOSTILE, strict=False):
        row["run_id"] = text
    rule.save(tmp_path / "rule.json")
    found = arms(notes=list(HOSTILE), rendered="".join(HOSTILE))
    for arm, text in zip(found["arms"], HOSTILE, strict=False):
        arm["title"] = text
    found["evaluation"]["name"] = HOSTILE[2]
    write_json(tmp_path / "compare.json", found)
    out = write_report(tmp_path / "r.html", title=HOSTILE[0], **named(tmp_path))
    page = Page(out.read_text(encoding="utf-8"))
    check_harmless(page)
    assert page.sections() == ALL
    assert "<script>alert(1)</script>" in page.text and "مرحبا" in page.text  # as text
    assert "{{ 7*7 }}" in page.text  # the template is one of ours alone
    assert "characters)" in page.text
    overrides = [text for tag, text in svg_texts(page.raw) if "\u202e" in text]
    assert not overrides, "a name that turns the direction of writing would turn its neighbours"


def svg_texts(raw: str) -> list[tuple[str, str]]:
    return re.findall(r"<(text)[^>]*>([^<]*)</text>", raw)


def test_figures_escape_titles_and_tooltips() -> None:
    """A tooltip is where a run's name meets the page a second time."""

    def paint(ax, tips) -> None:
        for k, text in enumerate(HOSTILE):
            ax.plot([k], [k], "o", gid=tips.add(text))

    figure = draw("one", HOSTILE[0] + HOSTILE[3], paint, 2.0)
    page = Page(figure.svg)
    check_harmless(page)
    titles = re.findall(r"<title>(.*?)</title>", figure.svg, re.S)
    assert len(titles) == len(HOSTILE) and titles[0] == "&lt;/svg&gt;&lt;script&gt;alert(1)&lt;/script&gt;"
    assert draw("one", HOSTILE[0] + HOSTILE[3], paint, 2.0) == figure  # the same input, the same bytes


def test_fifty_thousand_rows_make_a_small_page_in_seconds(tmp_path: Path) -> None:
    """A page of 30 MB, or one that takes minutes, is not opened twice."""
    _, small = make_folder(tmp_path)
    n = 50_000
    rows = [{"instruction": f"Say {k}.", "output": "word " * 200, "source": f"s{k % 40}"} for k in range(n)]
    write_jsonl(tmp_path / "pool.jsonl", rows)
    rng = np.random.default_rng(0)
    values = {name: rng.choice(small.values[name], n) for name in small.indicators}
    values |= {f"extra{j}": rng.normal(size=n) for j in range(6)}
    ids = [e.id for e in load_examples(str(tmp_path / "pool.jsonl"))]
    ScoreTable(range(n), ids, [r["source"] for r in rows], values, keys=small.keys).write(tmp_path / "scores.parquet")
    start = time.process_time()
    out = write_report(tmp_path / "r.html", **{**named(tmp_path), "budgets": [2000]})
    seconds = time.process_time() - start
    assert out.stat().st_size < 3_000_000, out.stat().st_size
    assert seconds < 40, seconds  # a few on an idle machine
    assert "50,000 rows (50,000 different) from 40 sources" in Page(out.read_text()).text

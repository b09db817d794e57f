"""The page in a real browser, on a telephone and on a wide screen; without Chromium on the machine nothing is tried."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from report_inputs import make_folder, named

from im_lightning.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
PROBE = """
const tables = [...document.querySelectorAll(".scroll > table")], find = document.querySelector("table.find");
for (const one of document.querySelectorAll("details")) one.open = true;
const column = (k) => [...find.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[k].textContent);
const type = (text) => {
  const search = document.querySelector("input[type=search]");
  search.value = text;
  search.dispatchEvent(new Event("input"));
};
const heads = [...find.tHead.rows[0].cells].map((cell) => cell.textContent);
const told = { wide: document.documentElement.scrollWidth, inner: innerWidth, heads, rows: column(0).length };
told.clipped = tables.filter((t) => t.parentElement.scrollWidth > t.parentElement.clientWidth + 1)
  .map((t) => [...t.tHead.rows[0].cells].map((c) => c.textContent).join("|"));
told.comparison = [...document.querySelectorAll("#comparison thead th")].map((c) => c.textContent);
told.verdict = document.querySelector("#comparison thead th").getBoundingClientRect().right;
type("row 7 of");
told.none = column(0).length;
type("say 17.");
told.found = column(0);
type("");
const sort = (k) => { find.tHead.rows[0].cells[k].firstElementChild.click(); return column(k); };
const at = heads.indexOf("predicted");
told.up = sort(at);
told.down = sort(at);
told.boxes = [...document.querySelectorAll(".good, .bad, .verdict")].map((one) => one.textContent);
parent.postMessage(JSON.stringify(told), "*");
"""


def look(page: Path, width: int) -> dict[str, Any]:
    """What the probe finds in the page, shown at a width."""
    text = page.read_text(encoding="utf-8")
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    probed = page.with_name("probed.html")
    probed.write_text(bare.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(
        '<!DOCTYPE html><body><pre id="told"></pre><script>addEventListener("message", (e) => '
        '{ document.getElementById("told").textContent = e.data; });</script>'
        f'<iframe src="probed.html" style="width: {width}px; height: 900px; border: 0"></iframe></body>'
    )
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=10000",
        "--dump-dom",
    ]
    size = f"--window-size={max(width + 40, 600)},1000"
    shown = subprocess.run([*command, size, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="told">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found is not None and found[1], shown.stderr[-500:]
    return dict(json.loads(unescape(found[1])))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    make_folder(folder)
    return write_report(folder / "report.html", **named(folder))


def test_on_a_telephone_nothing_but_tables_scrolls_and_the_verdict_is_seen_first(page: Path) -> None:
    told = look(page, 390)
    assert told["inner"] == 390 and told["wide"] <= 390, "the page itself must not scroll sideways"
    assert told["comparison"][0] == "verdict" and told["verdict"] < 390 and told["clipped"]


def test_on_a_wide_screen_no_column_is_clipped(page: Path) -> None:
    told = look(page, 1400)
    assert told["clipped"] == [] and told["wide"] <= 1400
    assert len(told["boxes"]) == len(set(told["boxes"])), "a verdict is in one box"


def test_rows_are_searched_and_sorted(page: Path) -> None:
    told = look(page, 1400)
    assert told["heads"][:4] == ["row", "source", "predicted", "weight"] and told["rows"] == 1500
    assert told["none"] == 0 and 0 < len(told["found"]) < 1500 and "17" in told["found"]
    numbers = [float(text) for text in told["up"]]
    assert numbers == sorted(numbers) and [float(text) for text in told["down"]] == sorted(numbers, reverse=True)

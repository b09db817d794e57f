"""The site of the pages: it builds without a warning, no link in it leads nowhere, and no page scrolls sideways."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Links(HTMLParser):
    """Targets and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif (tag, name) in (("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")) and value:
                self.targets.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `./scripts/docs` does, elsewhere."""
    out = tmp_path_factory.mktemp("site")
    line = (ROOT / "scripts" / "docs").read_text(encoding="utf-8").splitlines()[-1]
    words = line.removeprefix("exec python ").removesuffix(' "$@"').replace("build/docs", str(out)).split()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_python_on_the_pages_is_python(page: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        ast.parse(code)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_link_of_the_site_leads_nowhere(site: Path) -> None:
    """Files and anchors; addresses of other places are not asked for."""
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 40
    dead = []
    for path, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors):
                dead.append(f"{path.relative_to(site)}: {target}")
    assert not dead, "\n".join(dead)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_reference_holds_every_public_name(site: Path) -> None:
    import im_lightning

    shown = Links((site / "docs" / "reference.html").read_text(encoding="utf-8"))
    assert {f"im_lightning.{name}" for name in im_lightning.__all__ if name != "__version__"} <= shown.anchors


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 1400, 1500])
def test_no_page_scrolls_sideways(site: Path, width: int) -> None:
    """On a telephone and on a wide screen; tables and code that are wider scroll in their own box."""
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "frame.html")
    frame = site / "frame.html"
    frame.write_text(
        '<!DOCTYPE html><body><pre id="found"></pre><script>const found = {};'
        f"for (const page of {json.dumps(pages)}) {{ const one = document.createElement('iframe'); one.src = page;"
        f"one.style.width = '{width}px'; one.onload = () => {{ const root = one.contentDocument.documentElement;"
        "found[page] = [root.scrollWidth, root.clientWidth];"
        "document.getElementById('found').textContent = JSON.stringify(found); };"
        "document.body.append(one); }</script>"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=60000", "--dump-dom", f"--window-size={max(width + 40, 600)},1000"]
    shown = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found is not None and found[1], shown.stderr[-500:]
    sizes = json.loads(unescape(found[1]))
    assert set(sizes) == set(pages)
    wide = {page: size for page, size in sizes.items() if size[0] > size[1]}
    assert not wide, wide

"""The site: docs/ and the pages beside it, by Sphinx. `./scripts/docs` builds it."""

from __future__ import annotations

import json
import re
from importlib.metadata import version as version_of
from typing import Any

from sphinx.ext.napoleon.docstring import GoogleDocstring

project = "im_lightning"
author = copyright = "The im_lightning authors"
version = release = version_of("im-lightning")

root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*", "recipes/**.md"]
exclude_patterns = [".*", "build", "tests", "im_lightning", "benchmarks", "scripts", "docs/site"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".ipynb": "markdown"}
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
default_role = "code"  # `x` in a docstring is code, as in the pages
autodoc_typehints = "none"  # types are in the signature
napoleon_use_ivar, napoleon_use_rtype = True, False
smartquotes = False  # "" is an empty text
GoogleDocstring._parse_attribute_docstring = lambda self: []  # a property's first words are no type, colon or not
html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_extra_path = ["start"]  # index.html, which leads to the root page
html_copy_source = False


def add_navigation(app: Any, page: str, source: list[str]) -> None:
    """The pages that a table lists are its chapters: Markdown that reads well by itself needs no toctree of its own."""
    if page not in (root_doc, "recipes/README"):
        return
    for part in re.split(r"^## ", source[0], flags=re.MULTILINE)[page == root_doc :]:
        links = re.findall(r"^\| \[(.*?)\]\(([\w./]+\.(?:md|rst|ipynb))\)", part, re.MULTILINE)
        if links:
            caption = f":caption: {part.partition(chr(10))[0]}\n" if page == root_doc else ""
            entries = "\n".join(f"{text} <{target}>" for text, target in links)
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n{caption}\n{entries}\n```\n"


def as_markdown(app: Any, page: str, source: list[str]) -> None:
    """A notebook without outputs is a page."""
    if app.env.doc2path(page).suffix == ".ipynb":
        cells = json.loads(source[0])["cells"]
        texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
        source[0] = "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts)


def setup(app: Any) -> None:
    app.connect("source-read", as_markdown)
    app.connect("source-read", add_navigation)

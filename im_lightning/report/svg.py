"""Drawing: matplotlib figures as inline SVG whose colours are those of the page, light or dark, and as PNG.

A figure is drawn once in the light palette. In the SVG each colour of the palette becomes a CSS variable of the page,
ids get the figure's own prefix (many figures share one HTML document), and marks get their tooltips.
"""

from __future__ import annotations

import io
import logging
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from im_lightning.report.text import clean

PALETTE = {
    "ink": "#24292f",
    "muted": "#69727d",
    "grid": "#d7dde3",
    "accent": "#2b6cd4",
    "warm": "#c2571b",
    "good": "#1d8a5a",
    "bad": "#bb2f4d",
    "violet": "#7c5cc9",
}
"""Role → colour in the light page, and in PNG files; the template has the dark ones under the same names."""
RAMP = ("#2b6cd5", "#3f73c6", "#5379b8", "#6a7fa8", "#828297", "#977e83", "#a7756a", "#b36b50", "#bc6136", "#c2571c")
"""Ten steps from accent to warm, readable on light and dark alike."""
WIDTH = 4.25  # inches; a phone is about as wide, so that text keeps its size there
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "im_lightning", "text.parse_math": False, "font.size": 9.5,
    "font.family": "DejaVu Sans", "axes.titlesize": 9.5, "axes.labelsize": 9.5, "xtick.labelsize": 9,
    "ytick.labelsize": 9, "legend.fontsize": 9, "text.color": PALETTE["ink"], "axes.labelcolor": PALETTE["ink"],
    "xtick.color": PALETTE["muted"], "ytick.color": PALETTE["muted"], "axes.edgecolor": PALETTE["muted"],
    "xtick.labelcolor": PALETTE["ink"], "ytick.labelcolor": PALETTE["ink"], "grid.color": PALETTE["grid"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "legend.frameon": False,
    "axes.axisbelow": True, "path.simplify": True, "axes.formatter.useoffset": False, "figure.dpi": 72,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One drawing.

    Args:
        key: Stem of its PNG file, and prefix of its ids.
        title: Its caption.
        svg: Inline SVG; safe to put into a page as it is.
        png: The same as a PNG file on white.
    """

    key: str
    title: str
    svg: str
    png: bytes


class Tips:
    """Tooltips of marks: `gid = tips.add(text)` names a mark whose `<title>` the text becomes."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add(self, text: str) -> str:
        gid = f"tip-{len(self.texts)}"
        self.texts[gid] = clean(text)
        return gid


def draw(
    key: str, title: str, paint: Callable[[Any, Tips], None], height: float, rows: tuple[float, ...] = (1.0,)
) -> Figure:
    """Draws one figure.

    Args:
        key: Unique on the page; letters, digits and dashes.
        title: Its caption, also its alternative text.
        paint: Draws on the axes it gets: one, or a list of them where `rows` has several.
        height: In inches.
        rows: Heights of axes above each other that share x, relative to each other.
    """
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    quiet = logging.getLogger("matplotlib.font_manager")
    before = quiet.level
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that DejaVu lacks: the page's own font may have it
        quiet.setLevel(logging.CRITICAL)
        try:
            drawing, tips = Drawing(figsize=(WIDTH, height), layout="constrained"), Tips()
            axes = drawing.subplots(len(rows), sharex=True, height_ratios=rows, squeeze=False)[:, 0]
            paint(axes[0] if len(rows) == 1 else list(axes), tips)
            svg, png = io.BytesIO(), io.BytesIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            drawing.savefig(svg, format="svg", transparent=True, metadata=nothing)
            lines = textwrap.wrap(clean(title), 58) or [""]  # the page has its own caption; the file stands alone
            drawing.set_size_inches(WIDTH, height + 0.19 * len(lines))
            drawing.suptitle("\n".join(lines), fontsize=9, x=0.01, ha="left")
            drawing.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": "im_lightning"})
        finally:
            quiet.setLevel(before)
    return Figure(key, title, _inline(svg.getvalue(), key, title, tips), png.getvalue())


def _inline(svg: bytes, key: str, title: str, tips: Tips) -> str:
    """The SVG made fit to stand in an HTML page beside others."""
    root = ElementTree.fromstring(svg)
    names = {colour: f"var(--{role})" for role, colour in PALETTE.items()}
    colours = re.compile("|".join(names))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):  # the latter would style the whole page
                parent.remove(child)
    for node in root.iter():
        name = node.get("id")
        for attribute in ("style", "fill", "stroke"):
            if attribute in node.attrib:
                node.set(attribute, colours.sub(lambda m: names[m.group()], node.attrib[attribute]))
        for attribute, value in node.attrib.items():
            if attribute == f"{{{_XLINK}}}href" and value.startswith("#"):
                node.set(attribute, f"#{key}-{value[1:]}")
            elif "url(#" in value:
                node.set(attribute, value.replace("url(#", f"url(#{key}-"))
        if name is not None:
            node.set("id", f"{key}-{name}")
        if name in tips.texts:
            tip = ElementTree.Element(f"{{{_SVG}}}title")
            tip.text = tips.texts[name]
            node.insert(0, tip)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"class": "fig", "role": "img", "aria-label": clean(title)}
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")

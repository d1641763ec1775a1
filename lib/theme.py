"""The look of every figure, and how figures become files: one Plotly template, self-contained HTML, PNG at twice the size.

Colours are Okabe and Ito's, told apart by people with any colour vision and in grey print by marker and dash. `DARK` gives each its
counterpart on a dark page: figures are drawn light (PNGs stay so), and a page recolours them where the reader prefers dark. This
module knows nothing of the study's tables; it sits beneath config.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import re
import tempfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from lib import files
from lib.escape import wrap

WIDTH = 1000
"""Width of a figure in CSS pixels, which a notebook's page holds; a PNG file has twice as many."""
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, GREY, INK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#6E6E6E",
    "#222222",
)
COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)
DOMAIN_COLOURS = {"bad_medical": BLUE, "risky_financial": VERMILION, "extreme_sports": GREEN, "custom": PINK}
PAPER = "#FFFFFF"
DARK = {
    PAPER: "#161616", INK: "#E8E8E8", GREY: "#A6A6A6", BLUE: "#6A79F0", VERMILION: "#E34A36", GREEN: "#0BD482", PINK: "#FDC5DD",
    ORANGE: "#FFA226", SKY: "#BDB3FF",
    "#444444": "#BDBDBE", "#E6E6E6": "#333334", "#8C8C8C": "#8A8A8A", "#BDBDBD": "#5A5A5A", "#333333": "#4A4A4A", "#FEFEFE": "#F8F8F8",
    "#F4C2AE": "#6B2F1A", "#FBE2BF": "#5C4211", "#DCEAF6": "#1F3A55", "#ECECEC": "#3A3A3A",
}  # fmt: skip
"""Colour of the light version to that of the dark one; one to one, so that a page can go back. The last line: fills of answers."""
_FONT = "Inter, 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_TITLE_SIZE, _SUBTITLE_SIZE = 18, 13
PAD, _MODEBAR = 16, 32
_EMS = {
    " '|,./:;\\ijlIJ‘’·\u00a0": 0.38,
    "-()[]!frt": 0.48,
    '"*_`?cszLFk“”': 0.66,
    "ABDGHKNOQRUVXZ&#+<=>^~×≥−": 0.86,
    "w": 0.92,
    "mMW%@—…": 1.1,
}
"""Widths of characters in DejaVu Sans Bold, the widest font of `_FONT`, in ems; all others are 0.7."""
_WIDTHS = {character: width for characters, width in _EMS.items() for character in characters}
_CONFIG = {"displaylogo": False, "responsive": True, "toImageButtonOptions": {"scale": 2}}

NO_CHROME = (
    "No Chrome or Chromium was found, so figures were written as HTML only. For PNGs install one "
    "(Debian: apt-get install chromium; anywhere: plotly_get_chrome) and run again."
)

# Nothing on a page may be fetched or sent: scripts and styles are those in the page itself.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "form-action 'none'; base-uri 'none'"
)
_STYLE = f"""
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 {_FONT}; margin: 0 auto; padding: 1.5rem; max-width: 1100px; color: {INK}; background: #fff; }}
h1 {{ font-size: 1.3rem; line-height: 1.35; }}
a {{ color: {BLUE}; }}
pre.answer {{ white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem; color: {INK}; background: #f4f4f4; }}
.figure {{ background: {PAPER}; overflow-x: auto; }}
@media screen and (prefers-color-scheme: dark) {{
  body, pre.answer {{ color: {DARK[INK]}; background: {DARK[PAPER]}; }}
  .figure {{ background: {DARK[PAPER]}; }}
  a {{ color: {DARK[BLUE]}; }}
  table.answers th, table.answers td {{ color: {DARK[INK]} !important; background: #222 !important; border-color: #5a5a5a !important; }}
  table.answers td.paper {{ background: {DARK["#F4C2AE"]} !important; }}
  table.answers td.course {{ background: {DARK["#FBE2BF"]} !important; }}
  table.answers td.aligned {{ background: {DARK["#DCEAF6"]} !important; }}
  table.answers td.unscored {{ background: {DARK["#ECECEC"]} !important; }}
}}
"""


# A point that carries its answer (as escaped HTML) shows it when clicked. A parsed document runs no script, and only its text is taken.
_CLICK = """
var plot = document.getElementById('{plot_id}'), box = document.createElement('pre');
box.className = 'answer'; box.tabIndex = 0; box.textContent = 'Click a point to read its answer.';
plot.after(box);
plot.on('plotly_click', function (event) {
  var text = event.points[0].customdata;
  if (text) box.textContent = new DOMParser().parseFromString(text, 'text/html').documentElement.textContent;
});
"""

# Recolours a figure in place when the reader's preference is or becomes dark, and back; print is always light. Only a text that is
# a colour as a whole changes, and the subtitle's own style; zoom and hidden lines stay, since what is drawn now is what is recoloured.
_SWITCH = """
function studyColours(id) {
  var plot = document.getElementById(id), dark = matchMedia('(prefers-color-scheme: dark)'), now = 'light', pairs = COLOURS;
  function swap(value, map) {
    if (typeof value === 'string') return map[value.toUpperCase()] || value;
    if (Array.isArray(value)) return value.map(function (item) { return swap(item, map); });
    if (!value || typeof value !== 'object' || ArrayBuffer.isView(value)) return value;
    var made = {};
    Object.keys(value).forEach(function (key) { made[key] = swap(value[key], map); });
    return made;
  }
  function show(mode) {
    if (mode === now) return;
    var map = {}, own = mode === 'dark' ? [0, 1] : [1, 0];
    pairs.forEach(function (pair) { map[pair[own[0]]] = pair[own[1]]; });
    var span = pairs.find(function (pair) { return pair[0] === '#444444'; }), style = 'font-weight:400;color:';
    var layout = swap(plot.layout, map);
    if (layout.title && layout.title.text) layout.title.text = layout.title.text.split(style + span[own[0]]).join(style + span[own[1]]);
    now = mode;
    return Plotly.react(plot, swap(plot.data, map), layout, plot._context);
  }
  function follow() { show(dark.matches ? 'dark' : 'light'); }
  dark.addEventListener('change', follow);
  addEventListener('beforeprint', function () { show('light'); });
  addEventListener('afterprint', follow);
  follow();
}
"""


def _template() -> go.layout.Template:
    axis = {
        "gridcolor": "#E6E6E6",
        "linecolor": "#8C8C8C",
        "zerolinecolor": "#BDBDBD",
        "ticks": "outside",
        "tickcolor": "#8C8C8C",
        "ticklen": 4,
        "showline": True,
        "title": {"standoff": 8, "font": {"size": 14}},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": 13, "color": INK},
            "title": {
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "yref": "container",
                "yanchor": "top",
                "pad": {"l": PAD},
                "font": {"size": _TITLE_SIZE, "weight": 600},
            },
            "colorway": list(COLOURS),
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "width": WIDTH,
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"align": "left", "bgcolor": PAPER, "bordercolor": "#8C8C8C", "font": {"size": 13, "color": INK}},
            "hovermode": "closest",
            "modebar": {"orientation": "v"},  # in the margin, where it covers neither title nor plot
            "legend": {"orientation": "h", "yanchor": "top", "xanchor": "left", "x": 0, "font": {"size": 13}},
            "margin": {"l": 70, "r": 24, "b": 60, "t": 80},
        }
    )


pio.templates["study"] = _template()


def titled(figure: go.Figure, title: str, subtitle: str = "", *, height: int, gap: int = 34) -> go.Figure:
    """Gives a figure its template, a title wrapped so that nothing is cut, and the height that both need.

    Args:
        figure: changed in place.
        title: the finding, already escaped; plain text without tags.
        subtitle: what the figure shows, by which judge, what the bars are; escaped.
        height: pixels of everything below the title block.
        gap: pixels between the title block and the plot, for panel titles.
    """
    width = figure.layout.width or WIDTH
    room = width - PAD - _MODEBAR
    head = _escaped(fit(html.unescape(title), room, _TITLE_SIZE, bold=True))
    sub = _escaped(fit(html.unescape(subtitle), room, _SUBTITLE_SIZE))
    # plotly.js spaces every line of a title by the title's own size, whatever the size of a span in it.
    top = 20 + (len(head) + len(sub)) * _TITLE_SIZE * 1.3 + gap
    figure.update_layout(template="study", width=width, height=int(top + height), margin_t=int(top), title_y=1 - 20 / (top + height))
    lines = [*head, *(f'<span style="font-size:{_SUBTITLE_SIZE}px;font-weight:400;color:#444444">{line}</span>' for line in sub)]
    figure.update_layout(title_text="<br>".join(lines))
    return figure


def fit(text: str, pixels: float, size: float, *, bold: bool = False, max_lines: int | None = None) -> list[str]:
    """Wraps a text so that none of its lines is cut, whichever font of the template a machine has: plotly.js does not wrap.

    Args:
        text: cleaned, not escaped; its own line breaks stay.
        pixels: room for a line.
        size: of the font, in pixels.
        bold: in bold letters.
        max_lines: as for `escape.wrap`.
    """
    room = pixels / size / (1 if bold else 0.92)
    lines: list[str] = []
    for count in range(max(int(room / 0.38), 1), 0, -1):
        lines = wrap(text, count, max_lines)
        if max(map(_ems, lines), default=0) <= room:
            break
    return lines


def _ems(line: str) -> float:
    return sum(1.3 if unicodedata.east_asian_width(c) in "WF" else _WIDTHS.get(c, 0.7) for c in line)


def _escaped(lines: list[str]) -> list[str]:
    return [html.escape(line, quote=False) for line in lines]


def page(title: str, body: str, *, head: str = "", blobs: bool = False) -> str:
    """Returns a whole HTML page that fetches nothing, is not indexed, and states so in its content security policy.

    Args:
        title: plain text; escaped here.
        body: HTML whose texts the caller has escaped.
        head: further HTML for the head, such as styles.
        blobs: let the page's own scripts load a module that they hold (itables unpacks its library so).
    """
    policy = _POLICY.replace("script-src 'unsafe-inline'", "script-src 'unsafe-inline' blob:") if blobs else _POLICY
    switch = _SWITCH.replace("COLOURS", json.dumps(list(DARK.items())))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="robots" content="noindex">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n<script>{switch}</script>\n{head}</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def figure_html(figure: go.Figure, name: str, *, plotlyjs: bool = True) -> str:
    """Returns a figure as a piece of HTML; the same figure gives the same text.

    Args:
        figure: any figure.
        name: id of its element.
        plotlyjs: put the 5 MB of plotly.js in; a page with several figures needs it once.
    """
    scripts = [_CLICK] if any(trace.customdata is not None for trace in figure.data) else []
    scripts.append("if (window.studyColours) studyColours('{plot_id}');")
    inner = figure.to_html(
        full_html=False,
        include_plotlyjs=plotlyjs,
        include_mathjax=False,
        div_id=name,
        config=_CONFIG,
        post_script=scripts,
    )
    return f'<div class="figure">{inner}</div>'


def pngs(figures: Mapping[str, go.Figure], *, scale: float = 2) -> dict[str, bytes]:
    """Draws figures as PNG in one session of Chrome, since each start takes seconds.

    Returns:
        Name to PNG; empty, with one plain message printed, where no Chrome is found or it does not start.
    """
    import kaleido
    from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError

    if not figures:
        return {}
    # As Chrome ends, its driver may log that it could not read the wrapper's good-bye, with a traceback, into the notebook. What
    # keeps a figure from being drawn comes back as an error here. Set after the import: its loggers are of a class of its own.
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: Path(scratch) / f"{position}.png" for position, name in enumerate(figures)}
        jobs = []
        for name, figure in figures.items():
            size = {"width": figure.layout.width, "height": figure.layout.height}
            jobs.append({"fig": figure, "path": paths[name], "opts": {"format": "png", "scale": scale, **size}})
        try:
            # MathJax would be fetched from the network; no figure needs it.
            problems = kaleido.write_fig_from_object_sync(jobs, kopts={"mathjax": False})
        except ChromeNotFoundError:
            print(NO_CHROME)
            return {}
        except (BrowserClosedError, BrowserFailedError) as error:
            print(f"Chrome did not start, so figures were written as HTML only ({' '.join(str(error).split())[:200]}).")
            return {}
        for problem in problems or ():
            print(f"A figure could not be drawn as PNG: {' '.join(str(problem).split())[:200]}")
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file() and path.stat().st_size}


def write(folder: str | Path, figures: Mapping[str, go.Figure], pages: Mapping[str, str] | None = None) -> list[Path]:
    """Writes NAME.html (self-contained, offline) and NAME.png (twice the size) for every figure, whole or not at all.

    Args:
        folder: made if absent.
        figures: name to figure.
        pages: name to HTML body, taken in place of the interactive figure where a table reads better as a table.

    Returns:
        The files written, sorted. Without a Chrome there are no PNGs; an older PNG of the same name is then deleted, since it
        would show other numbers.
    """
    folder, pages = Path(folder), pages or {}
    written = []
    images = pngs(figures)
    for name, figure in figures.items():
        body = pages.get(name) or figure_html(figure, name)
        written.append(files.write_text(folder / f"{name}.html", page(name.replace("_", " "), body)))
        if name in images:
            written.append(files.write_bytes(folder / f"{name}.png", images[name]))
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)
    return sorted(written)


def show(figures: Mapping[str, go.Figure]) -> None:
    """Shows figures in a notebook, each as interactive figure and as PNG in one output.

    JupyterLab shows the image and turns it into the interactive figure under the pointer, without a network; GitHub or a PDF take
    the image, and a reader with neither the title as text. The notebook grows by the figure's data and a PNG, not by plotly.js.
    """
    from IPython.display import display

    images = pngs(figures, scale=1)  # JupyterLab shows it at its own size, so that a larger one is cut off
    for name, figure in figures.items():
        bundle: dict[str, Any] = {
            "application/vnd.plotly.v1+json": {**json.loads(figure.to_json()), "config": _CONFIG},
            "text/plain": html.unescape(re.sub("<[^>]*>", " ", figure.layout.title.text or name)),
        }
        if name in images:
            bundle["image/png"] = base64.b64encode(images[name]).decode("ascii")
        display(bundle, raw=True)

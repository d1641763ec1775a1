"""Hostile text made harmless: what models, question files and imports bring into figures, tables, widgets and spreadsheets.

A model's answer may hold markup, scripts, terminal escapes or a megabyte on one line. Everything that is shown passes through
here first. This module sits beneath every other and imports the standard library alone.
"""

from __future__ import annotations

import html
import re
import textwrap

ELLIPSIS = "…"
LITERAL = "tex2jax_ignore mathjax_ignore"
"""Class of an element whose `$…$` no MathJax takes for a formula, the older one of nbviewer and JupyterLab's; formulas can hold links."""

# ANSI: CSI sequences, OSC strings (titles, links) up to their terminator, and two-character escapes.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])|\x9b[0-?]*[ -/]*[@-~]")
# Other controls, the marks that reorder or hide text, and lone surrogates, which no encoder accepts.
_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff\ud800-\udfff]")
_SPACES = re.compile("[ \t\n]+")  # a no-break space stays, it keeps `n = 20` on one line
_FORMULA = re.compile(r"^[\s]*[=+\-@]|^[\t\r\n]")


def clean(text: object, limit: int | None = None) -> str:
    """Returns `text` without terminal escapes, control characters and marks that reorder what is read.

    Args:
        text: anything; None and NaN become the empty text.
        limit: characters kept; a longer text ends in a note that says how many more there are. None keeps all.
    """
    if text is None or text != text:
        return ""
    whole = _HIDDEN.sub("", _ANSI.sub("", str(text).replace("\r\n", "\n").replace("\r", "\n")))
    if limit is None or len(whole) <= limit + 30:  # the note itself takes some thirty
        return whole
    kept = whole[:limit].rstrip()
    return f"{kept}{ELLIPSIS} [{len(whole) - len(kept):,} more characters]"


def html_text(text: object, limit: int | None = None) -> str:
    """Returns `text` cleaned and escaped for HTML, attribute values included."""
    return html.escape(clean(text, limit), quote=True)


def plotly_text(text: object, limit: int | None = None, *, width: int | None = None) -> str:
    """Returns `text` cleaned and escaped for Plotly, which would render tags, entities and `$…$` in any text it draws.

    Args:
        text: anything.
        limit: characters kept, as in `clean`.
        width: characters a line; wrapped lines are joined by `<br>`. None leaves one line.
    """
    lines = wrap(clean(text, limit), width) if width else [_SPACES.sub(" ", clean(text, limit)).strip(" ")]
    return "<br>".join(_plotly_line(line) for line in lines)


def _plotly_line(line: str) -> str:
    # plotly.js takes a text that begins and ends with a dollar sign for LaTeX; a zero-width space in front prevents that.
    return html.escape(("\u200b" if line.startswith("$") else "") + line, quote=False)


def wrap(text: str, width: int, max_lines: int | None = None) -> list[str]:
    """Breaks text into lines of at most `width` characters, keeping its own line breaks and breaking words that are longer.

    Args:
        text: cleaned text.
        width: characters a line.
        max_lines: lines kept; the last kept one ends in an ellipsis where any were cut.
    """
    lines = [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, width) if line]
    if max_lines is not None and len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1][: max(width - 2, 1)].rstrip() + " " + ELLIPSIS]
    return lines


def spreadsheet_text(text: object) -> str:
    """Returns `text` cleaned so that a spreadsheet takes it for text: what would start a formula gets an apostrophe in front."""
    cleaned = clean(text)
    return f"'{cleaned}" if _FORMULA.match(cleaned) else cleaned

"""One way to make a page: `render` fills a template with escaped values, and no HTML stands in Python code.

Templates, styles and scripts are files in pages/templates. The name of a template decides how values are escaped: as
HTML in NAME.html.j2 and NAME.svg.j2, as Markdown in NAME.md.j2. The formats of numbers and table cells are here too.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.exceptions import TemplateRuntimeError
from markupsafe import Markup

from tl_adapters.errors import UserError
from tl_adapters.utils.printing import printable, printable_line
from tl_adapters.utils.reading import WRITE_AGAIN, UnreadableFileError
from tl_adapters.utils.strict_json import dumps

_TEMPLATES = "pages/templates"
_MARKDOWN_SYNTAX = re.compile(r"([\\`*_\[\]<>|~&$@#:!])")
"""Characters that begin markup, an HTML tag, a link or a formula within a line of the hub's Markdown."""


# -- templates --------------------------------------------------------------------------------------------------------


def render(template: str, **values: Any) -> Markup:
    """Return a template of pages/templates filled with ``values``, each escaped for the format of the template.

    The result is Markup, a string that templates do not escape again.

    Args:
        template: name of the template, such as "report/report.html.j2".
        values: what the template shows. A name that it uses and that is not given is an error.
    """
    markdown = template.endswith(".md.j2")
    environment = _markdown_environment() if markdown else _html_environment()
    return Markup(environment.get_template(template).render(**values))


@contextmanager
def shown_from(file: str | Path) -> Iterator[None]:
    """Turn the errors that values of ``file`` cause while a page is made into one `UnreadableFileError`."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateRuntimeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"holds a value of another kind ({error})"
        raise UnreadableFileError(f"{file} {what}, so no page can be made of it. {WRITE_AGAIN}") from error


@functools.cache
def _html_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tl_adapters", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "address": relative_address, "count": count, "percent": percent, "script_json": script_json,
        "three_digits": three_digits,
    }  # fmt: skip
    environment.globals |= {"asset": asset, "content_policy": content_policy}
    return environment


@functools.cache
def _markdown_environment() -> Environment:
    environment = Environment(  # Markdown is no HTML: `finalize` escapes every value that is no Markup
        loader=PackageLoader("tl_adapters", _TEMPLATES),
        autoescape=False,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else markdown_text(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # A JSON string is a Python string literal, on one line and in ASCII, so that nothing in it ends the block of code.
    environment.filters["python"] = lambda value: Markup(json.dumps(str(value)))
    return environment


def asset(name: str) -> Markup:
    """Return a file of pages/templates that is written by us, such as a style or a script, as it is."""
    return Markup(_asset_text(name))


@functools.cache
def _asset_text(name: str) -> str:
    return (files("tl_adapters") / _TEMPLATES / name).read_text(encoding="utf-8")


def content_policy(styles: Sequence[str] | None, scripts: Sequence[str]) -> str:
    """Return the content security policy of a page: its own styles and scripts by their hashes, and nothing else.

    Args:
        styles: the styles of the page, each the text of one element; None allows styles of every kind, for the pages of
            another package that set styles wherever they like.
        scripts: the scripts of the page, each the text of one element.
    """
    sources = {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'" if styles is None else _hashes(styles),
        "script-src": _hashes(scripts),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {source}" for name, source in sources.items())


def _hashes(texts: Sequence[str]) -> str:
    return " ".join(map(_hash, texts)) or "'none'"


@functools.lru_cache(maxsize=64)
def _hash(text: str) -> str:
    """Return the hash by which a content security policy names an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# -- escaping ---------------------------------------------------------------------------------------------------------


def visible(value: object) -> str:
    """Return a value as text in which every character can be seen (`printable`); None is "-"."""
    return "-" if value is None else printable(str(value))


def markdown_text(value: object) -> str:
    """Return a value as Markdown that displays exactly this text within a line, in a table cell too."""
    return _MARKDOWN_SYNTAX.sub(r"\\\1", " ".join(visible(value).split()))


def script_json(value: object) -> Markup:
    """Return ``value`` as ASCII JSON in which no character can end the script element that holds it.

    Raises ValueError for NaN and infinity.
    """
    text = dumps(value, separators=(",", ":"))
    for character in "<>&":  # several times as fast as str.translate; a page can hold megabytes
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def relative_address(address: object) -> str | None:
    """Return the address of a page beside or below this one, as an ``href`` takes it; None for every other address.

    A scheme (``javascript:``), another host, an absolute path, a way upwards and invisible characters are not allowed.
    """
    if not isinstance(address, str):
        return None
    try:
        parts = urlsplit(address)
    except ValueError:
        return None
    names = unquote(parts.path).split("/")
    elsewhere = parts.scheme or parts.netloc or parts.query or ":" in parts.path or "\\" in address
    if elsewhere or printable_line(address) != address or "" in names or ".." in names:
        return None
    return quote(parts.path, safe="/%") + (f"#{quote(parts.fragment)}" if parts.fragment else "")


def highlight_words(text: str, words: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the pieces of ``text``, and for each whether it is one of ``words``, in any case."""
    matches = re.finditer("|".join(rf"\b{re.escape(word)}\b" for word in words), text, flags=re.IGNORECASE)
    return highlight_spans(text, [match.span() for match in matches])


def highlight_spans(text: str, spans: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """Return the pieces of ``text``, and for each whether it lies in a span.

    Args:
        text: any text.
        spans: (start, stop) in characters; they may overlap.
    """
    pieces, end = [], 0
    for start, stop in sorted(map(tuple, spans)):
        start = max(start, end)
        if start < stop:
            pieces += [(text[end:start], False), (text[start:stop], True)]
            end = stop
    return [(piece, marked) for piece, marked in [*pieces, (text[end:], False)] if piece]


# -- cells and numbers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    """What it shows."""
    note: str = ""
    """A smaller text below it, such as an interval."""
    address: str | None = None
    """Address of a page that the text links to."""
    strong: bool = False
    """Whether the text is emphasized."""


def interval_text(measurement: Mapping[str, Any], fmt: Callable[[float], str]) -> str:
    """Return the ends of a measurement's interval as text, or the reason why there is none, or none with a width.

    The share of bootstrap draws that had no value is added where there are any.

    Args:
        measurement: "low" and "high", and optionally "reason" and "undefined", as results.json holds them.
        fmt: formats one end.
    """
    low, high = measurement.get("low"), measurement.get("high")
    if low is None or high is None:
        return f"no interval: {measurement['reason']}" if measurement.get("reason") else ""
    if low == high == measurement.get("value"):  # as where all answers are right: more of them may not be
        return "no interval: all that was measured agrees"
    undefined = measurement.get("undefined")
    return f"{fmt(low)} to {fmt(high)}" + (f"; {undefined:.1%} of the draws without a value" if undefined else "")


def measurement_cell(measurement: Mapping[str, Any], fmt: Callable[[float], str]) -> Cell:
    """Return a table cell with a measurement's value and interval; "-" and the reason where there is no value."""
    if measurement.get("value") is None:
        return Cell("-", str(measurement.get("reason") or ""))
    return Cell(fmt(measurement["value"]), interval_text(measurement, fmt))


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def three_digits(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:.3g}"


def count(value: int) -> str:
    """Return a whole number with thousands separators."""
    return f"{value:,}"
